"""Docstrings of the code as Markdown, for the pages of the API."""

import re

import griffe


class Markdown(griffe.Extension):
    """Formulas, which the code writes as Sphinx does, and doctests."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = _markdown(obj.docstring.value)


def _markdown(text: str) -> str:
    text = re.sub(r":math:`([^`]*)`", r"$\1$", text)
    formula = re.compile(r"^( *)\.\. math::(.*(?:\n\1 +\S.*)*)", re.MULTILINE)
    text = formula.sub(lambda m: f"{m[1]}$$ {' '.join(m[2].split())} $$", text)
    doctest = re.compile(r"^( *)(>>> .*(?:\n\1\S.*)*)", re.MULTILINE)
    return doctest.sub(r"\1```pycon\n\1\2\n\1```", text)

"""Makes the tables of settings, metrics and objectives from the code, and formulas that
need no script, while mkdocs builds the site."""

import ast
import html
import re
from typing import Any

import latex2mathml.converter

from pfjax import objectives
from pfjax.trainer import metrics, recipes, settings


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts a table where a page says `<!-- table: NAME -->`."""
    return re.sub(r"<!-- table: (\w+) -->", lambda m: _TABLES[m[1]](), markdown)


def on_page_content(content: str, **_: Any) -> str:
    """LaTeX becomes MathML, which browsers draw by themselves."""
    return re.sub(
        r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>',
        lambda m: _mathml(html.unescape(m[2]), "block" if m[1] == "div" else "inline"),
        content,
        flags=re.DOTALL,
    )


def _mathml(latex: str, display: str) -> str:
    out = latex2mathml.converter.convert(latex, display=display)
    return out.replace("<mi>log</mi>", '<mi>log</mi><mspace width="0.17em"/>')


def _settings() -> str:
    groups: dict[str, list[str]] = {}
    for name, setting in settings.SETTINGS.items():
        group = name.rpartition(".")[0]
        groups.setdefault(group, []).append(_setting(name, setting))
    head = "| setting | default | meaning | may be | may change on resume |\n"
    head += "|---|---|---|---|---|\n"
    titles = {"": "The run"} | {g: f"`{g}.*`" for g in groups if g}
    parts = (f"## {titles[g]}\n\n{head}" + "\n".join(r) for g, r in groups.items())
    return "\n\n".join(parts)


def _setting(name: str, setting: settings.Setting) -> str:
    choices = setting.choices() if callable(setting.choices) else setting.choices
    may_be = ", ".join(f"`{x}`" for x in choices or ()) or setting.bounds()
    default = '""' if setting.default == "" else setting.default
    changes = "yes" if setting.may_change else ""
    anchor = f'<a id="{name}"></a>`{name}`'
    return _row(anchor, f"`{default}`", _text(setting.about), may_be, changes)


_GROUPS = {
    "tb": "The balance, and the match with the target",
    "policy": "Policy and base",
    "completions": "The responses of a step",
    "rollout": "The sampler against the scorer",
    "lr": "The optimiser",
    "pack": "Cost",
    "eval": "Evaluation",
}


def _metrics() -> str:
    lines = []
    for name, metric in metrics.METRICS.items():
        title = _GROUPS.get(name.partition("/")[0])
        if title and f"## {title}" not in lines:
            lines += ["", f"## {title}", ""]
            lines += ["| metric | meaning | a good value |", "|---|---|---|"]
        about = metric.about + (f" *(with {metric.when})*" if metric.when else "")
        formula = f"<br>${metric.formula}$" if metric.formula else ""
        lines.append(_row(f"`{name}`", _text(about) + formula, _text(metric.good)))
    return "\n".join(lines)


def _objectives() -> str:
    lines = ["| objective | loss | log Z | reward |", "|---|---|---|---|"]
    log_z = {"any": "head or group", "group": "group", "none": "none"}
    for name, kind in objectives.OBJECTIVES.items():
        loss = f"[`{kind.loss.__name__}`][pfjax.objectives.{kind.loss.__name__}]"
        lines.append(_row(f"`{name}`", loss, log_z[kind.log_z], kind.reward))
    return "\n".join(lines)


def _recipes() -> str:
    lines = ["| recipe | what it does |", "|---|---|"]
    for name, path in recipes.recipe_paths().items():
        about = ast.get_docstring(ast.parse(path.read_text())).partition("\n")[0]
        lines.append(_row(f"`{name}`", about))
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _text(text: str) -> str:
    """Text as it is, in a cell of a table."""
    return text.replace("|", r"\|").replace("\\boxed{}", "`\\boxed{}`")


_TABLES = {
    "settings": _settings,
    "recipes": _recipes,
    "metrics": _metrics,
    "objectives": _objectives,
}

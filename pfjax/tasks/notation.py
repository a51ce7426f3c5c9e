r"""How people write answers: to one LaTeX, and words, choices, bases and times apart.

What of it is graded how, and why, says `pfjax.tasks.equality`.
"""

import contextlib
import itertools
import re
import unicodedata

_WRAPPED = re.compile(
    r"(?P<text>\\(?:text\w*|math(?:rm|bf|it|sf)|[mh]box|emph|operatorname)\s*)?\{(.*)\}"
    r"|\((.*)\)",
    re.DOTALL,
)
_THOUSANDS = re.compile(
    r"\s*([-+]?\d{1,3})((?:(?:,\\!|\{,\}|,|~|\\[,;: ]|[ \xa0\u202f])\d{3})+)(\.\d+)?\s*"
)
# What people write for LaTeX.
_SYMBOLS = str.maketrans(
    {
        "°": r"^\circ ", "∞": r"\infty ", "π": r"\pi ", "≤": r"\le ", "≥": r"\ge ",
        "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "−": "-", "∪": r"\cup ",
        "∩": r"\cap ", "∈": r"\in ", "±": r"\pm ", "º": r"^\circ ", "–": "-", "⁄": "/",
        "。": ".", "、": ",", "٫": ".", "٬": ",", "٪": "%", "’": "'", "\u2009": " ",
        **dict.fromkeys("\u200b\u2060\ufeff"),
    }
)  # fmt: skip
_REWRITTEN = (
    (re.compile(r"√\s*(\{[^{}]*\}|\([^()]*\)|\d+(?:\.\d+)?|[a-zA-Z])"), r"\\sqrt{\1}"),
    (re.compile(r"\\big(cup|cap)"), r"\\\1"),
    # Bold numbers; words have rules of their own.
    (
        re.compile(r"\\(?:mathbf|textbf|boldsymbol|bm|mathrm)\s*\{([^{}]*\d[^{}]*)\}"),
        r"\1",
    ),
    (re.compile(r"\\text\s*\{\s*(\d[\d:.,]*)\s*\}"), r"\1"),
    (re.compile(r"\\!"), ""),
    (re.compile(r"^i\s*=\s*"), ""),  # an index, which math-verify finds not real
    (re.compile(r"\\(?:mathrm|text)\s*\{([ie])\}"), r"\1"),
    (re.compile(r"(?<![\\a-zA-Z])pi(?![a-zA-Z])"), r"\\pi "),
    (re.compile(r"\\text\s*\{\s*infinity\s*\}"), r"\\infty"),
    (re.compile(r"^(?:[€£¥₹]|USD)\s*(?=\d)"), ""),
    (re.compile(r"(?:\\[,;: ]|\s)+(?=\\?%)"), ""),
    (re.compile(r"(?:\\\s*)+$"), ""),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"^([-+]?\d+)\s+(\d+)\s*/\s*(\d+)$"), r"\1\\frac{\2}{\3}"),
    (re.compile(r"\\varnothing"), r"\\emptyset"),
    (re.compile(r"(?<=\d)\s*percent$"), r"\\%"),
    (re.compile(r"(?<=\d)\s*(?:dollars?|cents?|USD|EUR|[€£¥₹])$"), ""),
    # A name of its own, as math-verify drops it; of a function it is left.
    (re.compile(r"\^\{?\s*\\prime\s*\}?"), "'"),
    (re.compile(r"\b([a-zA-Z])''(?![a-z'(])"), r"\1_{pp}"),
    (re.compile(r"\b([a-zA-Z])'(?![a-z'(])"), r"\1_{p}"),
    (re.compile(r"\\langle"), "("),
    (re.compile(r"\\rangle"), ")"),
    (
        re.compile(r"(?<![\w.\\])(\d+\.?\d*)[eE]([-+]?\d+)(?![\w.])"),
        r"\1 \\times 10^{\2}",
    ),
)
# A unit or what is counted.
_BEHIND_NUMBER = re.compile(r"(?<=\d)\s*\\text\s*\{[^{}\d]*\}$")
_NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")
_PERCENT = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+))(\\?%)?")
_DECIMAL_COMMA = re.compile(r"([-+]?\d+)(?:,|\{,\})(\d+)")
_CHOICE = re.compile(r"(?:\\text\w*\s*\{)?\(?([A-J])\)?\}?\s*[.:)}]\s*\S.*", re.DOTALL)
_HALF = re.compile(r"([ap])\.?\s*m\b", re.IGNORECASE)  # of the day
# Two numbers are a range or a score, three a date: no differences or quotients.
_RANGE = re.compile(r"\d+\s*-{1,2}\s*\d+|\d{1,4}([-/.])\d{1,2}\1\d{1,4}")
_RATIO = re.compile(
    r"(?!\(?[A-J][.:)]+\s|.*(?<![\\a-zA-Z])[a-zA-Z]{2})(?:.*=)?([^:=,]+(?::[^:=,]+){2,})"
)
# "2 hours 30 minutes", \text{} aside.
_QUANTITIES = re.compile(r"(?:\d+(?:\.\d+)?\s*[a-zA-Z]{2,}\.?\s*(?:and\s+)?){2,}")
_TIME = re.compile(r"\d{1,2}:\d\d")
_BESIDE_TIME = re.compile(r"\\text\w*\s*\{[^{}]*\}|[{}\s]|\\[,;: ]|[aApP]\.?[mM]\.?")
_NAMED = re.compile(r"\s*([a-zA-Z]\w*)\s*=\s*([^=]+)")
# Squares, cubes and quotients of units; math-verify drops the plain ones.
_UNIT = re.compile(
    r"(?<=\d)(?:\s*(?:mm|cm|dm|km|in|ft|yd|mi)\^\{?[23]\}?"
    r"|(?:\s*(?:cm|km|ft|mi)|\s+m)\s*/\s*(?:s|sec|min|h|hr|hour))$"
)
_BASED = re.compile(r"\(?([0-9A-Z]+)\)?\s*(?:_\s*\{?\s*(\d+)\s*\}?)?")


def plain_pair(gold: str, answer: str) -> tuple[str, str]:
    """Both in LaTeX that math-verify reads."""
    gold, answer = _plain(gold), _plain(answer)
    units = [x and re.sub(r"\s", "", x[0]) for x in map(_UNIT.search, (gold, answer))]
    if None in units or units[0] == units[1]:
        gold, answer = (_UNIT.sub("", x) for x in (gold, answer))
    if _NUMBER.fullmatch(gold):
        answer = _DECIMAL_COMMA.sub(r"\1.\2", answer)
    return gold, answer


def equal_by_rule(gold: str, answer: str) -> bool | None:
    """The verdict on what is not mathematics; None where only mathematics decides."""
    percent, other_percent = (_PERCENT.fullmatch(x) for x in (gold, answer))
    if percent and other_percent and (percent[2] or other_percent[2]):
        whole = float(percent[1]) == float(other_percent[1])
        if whole or bool(percent[2]) == bool(other_percent[2]):
            return whole
    (word, is_text), (other, is_other_text) = _word(gold), _word(answer)
    if word and len(word) == 1 and (choice := _CHOICE.fullmatch(answer)):
        return choice[1] == word
    if _TIME.fullmatch(time := _BESIDE_TIME.sub("", gold)):
        halves = {x[1].lower() for x in map(_HALF.search, (gold, answer)) if x}
        is_same = _BESIDE_TIME.sub("", answer).lstrip("0") == time.lstrip("0")
        return is_same and len(halves) < 2
    for read in (_parts, _quantities):
        if (parts := read(gold)) or (read is _quantities and read(answer)):
            return parts == read(answer)
    if (is_text or is_other_text) and _inside(gold) == _inside(answer):
        return True
    is_product = word and len(word) == 2 and word.isascii()
    if word and other and (is_text or is_other_text or not is_product):
        return word == other or (len(word) > 1 and word.casefold() == other.casefold())
    based, other_based = _BASED.fullmatch(gold), _BASED.fullmatch(answer)
    if based and other_based and (base := based[2] or other_based[2]):
        if other_based[2] not in (None, base):
            return False
        with contextlib.suppress(ValueError):  # a symbol such as `A_1`
            return int(based[1], int(base)) == int(other_based[1], int(base))
    is_mixed = {_is_ordered(gold), _is_ordered(answer)} == {True, False}
    return False if is_mixed else None


def in_order(gold: str, answer: str) -> tuple[str, str]:
    """Both as tuples, if one names its values and the order of the other stands for names:
    `x = 1, y = 2` is `(1,2)`, and not `2,1`. Of a gold that is a list the order says nothing."""
    if (named := _named(gold)) and "=" not in answer and "\\{" not in answer:
        ordered = answer if _is_ordered(answer) else f"({answer})"
        return f"({','.join(named.values())})", ordered
    if (named := _named(answer)) and _is_ordered(gold):
        return gold, f"({','.join(named[x] for x in sorted(named))})"
    return gold, answer


def _named(text: str) -> dict[str, str]:
    """Values by their names, none where these are of one letter: roots of one unknown."""
    parts = [_NAMED.fullmatch(x) for x in text.split(",")]
    out = {x[1]: x[2] for x in parts if x}
    is_named = len({x[0] for x in out}) == len(parts) > 1
    return out if is_named else {}


def _plain(text: str) -> str:
    """Without dollars, a final full stop and separators of thousands; in LaTeX."""
    text = _ascii(unicodedata.normalize("NFC", text).translate(_SYMBOLS))
    text = text.replace("\\$", "").replace("$", "").strip().removesuffix(".").strip()
    for pattern, replacement in _REWRITTEN:
        text = pattern.sub(replacement, text)
    if number := _THOUSANDS.fullmatch(_BEHIND_NUMBER.sub("", text)):
        return number[1] + re.sub(r"\D", "", number[2]) + (number[3] or "")
    # By its first number; math-verify would divide on.
    if ratio := _RATIO.fullmatch(text):
        first, *others = ratio[1].split(":")
        return f"(1,{','.join(f'({x})/({first})' for x in others)})"
    if text.count("\\pm") == 1:
        return ",".join(text.replace("\\pm", sign) for sign in "+-")
    return text


def _ascii(text: str) -> str:
    """Digits of other scripts, raised, lowered, wide and fractions of one character in LaTeX."""
    if text.isascii():
        return text
    out = [_ascii_of(char) for char in text]
    return "".join(out).replace("}^{", "").replace("}_{", "")


def _ascii_of(char: str) -> str:
    kind, _, codes = unicodedata.decomposition(char).partition(" ")
    plain = "".join(chr(int(x, 16)) for x in codes.split()).replace("−", "-")
    if kind in ("<super>", "<sub>") and re.fullmatch(r"[\d+n-]", plain):
        return f"{'^' if kind == '<super>' else '_'}{{{plain}}}"
    if kind == "<fraction>":
        return rf"\frac{{{plain.replace(chr(0x2044), '}{')}}} "
    if kind == "<wide>":
        return plain
    return str(unicodedata.digit(char, char))


def _parts(text: str) -> list[int] | None:
    """The numbers of a range, a score or a date."""
    return [*map(int, re.findall(r"\d+", text))] if _RANGE.fullmatch(text) else None


def _quantities(text: str) -> list[str] | None:
    """Numbers and units of a quantity in several units, of which math-verify reads the first."""
    plain = re.sub(r"\\text\w*\s*\{|[{}~]|\\[,;: ]", " ", text).strip()
    if not _QUANTITIES.fullmatch(plain):
        return None
    return [
        x.rstrip("s") for x in re.findall(r"[\d.]*\d|[a-zA-Z]+", plain) if x != "and"
    ]


def _inside(text: str) -> str:
    r"""What stands in one `\text{}`, or the text itself, without spaces."""
    wrapped = _WRAPPED.fullmatch(text)
    inside = wrapped[2] if wrapped and wrapped["text"] else text
    return re.sub(r"\s", "", inside)


def _word(text: str) -> tuple[str | None, bool]:
    r"""Its letters if it has no other characters; whether it stood in `\text{}`."""
    is_text = False
    while wrapped := _WRAPPED.fullmatch(text := text.strip(" \n\t.~")):
        is_text |= wrapped["text"] is not None
        text = wrapped[2] if wrapped[3] is None else wrapped[3]
    # Bare, a hyphen is a minus.
    letters = re.sub(r"[\s'-]" if is_text else r"\s", "", text)
    return (letters if letters.isalpha() else None), is_text


def _is_ordered(text: str) -> bool | None:
    r"""True for `(a, b)` or `[a, b]`, False for `a, b` or `\{a, b\}`, else None."""
    text = re.sub(r"\\left|\\right|\\(?=[{}])|\s", "", text)
    depths = [*itertools.accumulate((c in "([{") - (c in ")]}") for c in text)]
    commas = {d for d, c in zip(depths, text, strict=True) if c == ","}
    if "=" in text or not commas:
        return None
    if 0 in commas:
        return False
    is_enclosed = text[0] in "([{" and 0 not in depths[:-1]
    return text[0] != "{" if is_enclosed and 1 in commas else None

r"""Answers to right or wrong, by math-verify in a process that can be killed.

The worker, `python -m pfjax.tasks.grading`, answers each line of JSON with one. Some
answers send sympy into arithmetic that no alarm can interrupt (`\boxed{9^{9^{9^9}}}`): the
kernel ends it after some seconds of its own processor time, so that no verdict depends on
how busy a machine is, the answer counts as wrong, and a new one starts.

math-verify compares mathematics. Rules before it decide what is not mathematics:

- *Words*, of letters alone, are compared as strings: math-verify reads `even` as a
  product of symbols, equal to `neve`. Case is ignored, except of a single letter (a
  side a, a vertex A). `\text{}`, `\mathbf{}`, braces, parentheses and a final full
  stop do not matter, so `A`, `(A)` and `\textbf{(A)}` are one choice. Two bare
  letters stay a product: `ab` = `ba`.
- *Numbers with a base* have the same digits and the same base. A base left out is the
  one that was asked for: `2516_8` = `2516`, but not `2516_9`.
- *Tuples are ordered, lists are not*: `(1,2)` is neither `1,2` nor `(2,1)`, while
  `1,2` = `2,1` = `\{1,2\}`. `1,000` is a number and `1, 000` a list.
- *Scientific notation*: `4.5e33` is 4.5 times 10 to the 33rd, not a product with Euler's
  number.
- *Exact values exactly*: two fractions are equal only if they are, and so are equations
  but for a factor. math-verify would find `1/2004!` = `1/2006!` and `x^2+1=0` = `x^2+2=0`.
- *Choices and times*: `C. 45` is the choice `C`, `7:30 \text{ p.m.}` the time `7:30`.
- *A decimal comma* is one where the gold is one number: `0,5` = `0.5`.
- *All or nothing*: an answer that does not parse as a whole is compared as a string.
  math-verify would grade its last number, and find `3` in `\frac{1}{2} & 3`.

What math-verify decides and we keep: `10\%` = `10` = `0.1` if one side has the sign,
as harnesses for MATH do; `x = 5` = `5`; an interval equals its inequality; a decimal
equals a fraction or a root when six decimals agree (`0.333` is not a third). Of numbers
below a thousandth three digits have to, and `i` is the imaginary unit (math-verify has two
symbols of that name).

Known limits, each pinned by a test: units are dropped (`5 cm` = `5 m`); degrees in
functions are radians; `xyz` is a word, not a product; three-digit numbers without spaces
(`100,200`) are one number; a base in words and `x < 1 \text{ or } x > 2` for an interval
are not understood; of an equation in the answer the right side counts, `2x + z = 1` is 1.
"""

import contextlib
import functools
import itertools
import json
import logging
import os
import re
import resource
import select
import signal
import subprocess
import sys
from importlib import metadata
from typing import Literal

# Golds that a check at the start looks at: a few seconds.
_CHECKED = 1000
DEADLINE_SECONDS = 2.0  # of the worker's processor time, for one comparison
# Of wall time, where something hangs: nothing is said of how long it takes.
_PATIENCE = 600.0
_MEMORY_BYTES = 4 * 2**30
_MANY_WORDS = 20  # golds of the sets have up to 12
_LONGEST = 2000  # characters of an answer; golds of the sets have up to 210
# Counts changes of the rules above: scores of different numbers do not compare.
RULES_VERSION = 2

# A command is skipped with the character after its backslash: `\{` is no brace.
_BRACES = re.compile(r"(?P<box>\\+boxed\s*\{)|\\.|[{}]", re.DOTALL)
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
        "∩": r"\cap ", "∈": r"\in ", "±": r"\pm ", "²": "^2", "³": "^3",
        "½": r"\frac12 ", "¼": r"\frac14 ", "¾": r"\frac34 ",
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
    (re.compile(r"^(?:€|£|USD)\s*(?=\d)"), ""),
    (re.compile(r"(?:\\[,;: ]|\s)+(?=\\?%)"), ""),
    (re.compile(r"\\\s*$"), ""),
    (re.compile(r"\\varnothing"), r"\\emptyset"),
    (re.compile(r"(?<=\d)\s*percent$"), r"\\%"),
    (re.compile(r"(?<=\d)\s*(?:dollars?|cents?)$"), ""),
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
_TIME = re.compile(r"\d{1,2}:\d\d")
_BESIDE_TIME = re.compile(r"\\text\w*\s*\{[^{}]*\}|[{}\s]|\\[,;: ]|[aApP]\.?[mM]\.?")
_BASED = re.compile(r"\(?([0-9A-Z]+)\)?\s*(?:_\s*\{?\s*(\d+)\s*\}?)?")


def boxed(text: str, policy: Literal["last", "first"] = "last") -> str | None:
    r"""What stands in the last or first closed `\boxed{...}`; None where nothing does.

    Braces are balanced. Of adjacent boxes (`\boxed{5} or \boxed{4}`) one is taken too:
    given both, math-verify would grade the set of them. `\fbox`, `\boxed 5` and a box
    that the text ends in are no answers.
    """
    open_braces: list[re.Match] = []
    found: dict[int, str] = {}
    for brace in _BRACES.finditer(text):
        if brace["box"] or brace[0] == "{":
            open_braces.append(brace)
        elif brace[0] == "}" and open_braces and (opened := open_braces.pop())["box"]:
            found[opened.start()] = text[opened.end() : brace.start()]
    pick = max if policy == "last" else min
    text = found[pick(found)] if found else ""
    return text if text.strip() else None


def last_boxed(text: str) -> str | None:
    r"""What stands in the last closed `\boxed{...}`, or None."""
    return boxed(text)


def _is_text(gold: str) -> bool:
    """Whether it is of several lines or many words: a solution, not an answer."""
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", gold)
    return "\n" in gold or len(words) >= _MANY_WORDS


class Grader(contextlib.AbstractContextManager):
    """Compares answers; a context manager that holds one worker process. `timeouts` is the
    number of comparisons that were cut off."""

    def __init__(self, deadline_seconds: float = DEADLINE_SECONDS):
        self.timeouts = 0
        self._deadline = deadline_seconds
        self._worker: subprocess.Popen | None = None
        # Started once one was killed, as others will be.
        self._spare: subprocess.Popen | None = None
        self._endless: set[str] = set()  # cannot even be compared with 0
        self._fine: set[str] = set()  # has been compared, so is never one of these
        self._judge_once = functools.cache(self._judge)

    def __exit__(self, *unused) -> None:
        self._stop()
        self._worker, self._spare = self._spare, None
        self._stop()

    def describe(self) -> dict[str, str | float]:
        """What to store with a score: two that differ here do not compare."""
        return {
            "grader": "math-verify",
            "version": metadata.version("math-verify"),
            "sympy": metadata.version("sympy"),
            "rules": RULES_VERSION,
            "deadline_seconds": self._deadline,
        }

    def check_golds(self, golds: list[str | None]) -> None:
        """Grades each known gold against itself, as if the strings differed: the first
        1,000 of those that differ.

        Raises:
          ValueError: naming the golds that no answer would equal.
        """
        known = [*dict.fromkeys(g for g in golds if g is not None)][:_CHECKED]
        wrong = [g for g in known if _is_text(g) or not self._ask(g, g)]
        if wrong:
            raise ValueError(
                f"{len(wrong)} of {len(known)} gold answers are not equal to themselves: "
                f"{wrong[:20]}; correct them (LaTeX, as inside a box, without a solution) "
                "or leave their prompts out"
            )

    def is_equal(self, gold: str, answer: str, tolerance: float | None = None) -> bool:
        """Whether `answer` is the same as `gold`. Not symmetric: gold comes first.

        Args:
          gold: several values stand in one list (`1,2`); their order is free.
          tolerance: how far a number, or each of a list, may be off (the field `error`
            of OlympiadBench); absolute.
        """
        same = gold.strip() == answer.strip()
        if not same and max(len(gold), len(answer)) > _LONGEST:
            return False
        return same or self._judge_once(gold, answer, tolerance)

    def classes(self, answers: list[str | None]) -> list[int]:
        """Equivalence classes, numbered as they appear; -1 for no or an empty answer.

        Two answers are one class if each equals the other as gold.
        """
        known: list[str] = []
        out: list[int] = []
        for answer in answers:
            if answer is None or not answer.strip():
                out.append(-1)
                continue
            same = (
                self.is_equal(x, answer) and self.is_equal(answer, x) for x in known
            )
            out.append(next((i for i, x in enumerate(same) if x), len(known)))
            if out[-1] == len(known):
                known.append(answer)
        return out

    def _judge(self, gold: str, answer: str, tolerance: float | None) -> bool:
        if {gold, answer} & self._endless:
            return False
        verdict = self._ask(gold, answer, tolerance)
        if verdict is None:
            self.timeouts += 1
            # Whose fault? It would else cost a deadline and a worker against every
            # other answer of its prompt.
            for text in {answer, gold} - self._fine:
                if self._ask(text, "0") is None:
                    self._endless.add(text)
        return bool(verdict)

    def _ask(
        self, gold: str, answer: str, tolerance: float | None = None
    ) -> bool | None:
        """The worker's verdict; None if it ran out of time or memory, or died."""
        if self._worker is None:
            self._worker, self._spare = self._spare or self._start(), None
            if not self._read_line():
                self._stop()
                raise RuntimeError("the grading process did not start; see above")
        request = json.dumps([gold, answer, tolerance])
        try:
            print(request, file=self._worker.stdin, flush=True)
        except BrokenPipeError:  # it has died meanwhile
            self._stop()
            return self._ask(gold, answer, tolerance)
        if line := self._read_line():
            self._fine |= {gold, answer}
            return json.loads(line)
        self._stop()
        self._spare = self._spare or self._start()
        return None

    def _start(self) -> subprocess.Popen:
        command = [sys.executable, "-m", __spec__.name, str(self._deadline)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def _read_line(self) -> str:
        """A line, which the worker writes whole; "" when it died."""
        out = self._worker.stdout
        return out.readline() if select.select([out], [], [], _PATIENCE)[0] else ""

    def _stop(self) -> None:
        if self._worker is not None:
            with contextlib.suppress(BrokenPipeError), self._worker:
                self._worker.kill()
            self._worker = None


def _equal_by_rule(gold: str, answer: str) -> bool | None:
    """The verdict of the rules in the module's docstring, None where none applies."""
    (word, is_text), (other, is_other_text) = _word(gold), _word(answer)
    if word and len(word) == 1 and (choice := _CHOICE.fullmatch(answer)):
        return choice[1] == word
    if _TIME.fullmatch(gold):
        return _BESIDE_TIME.sub("", answer).lstrip("0") == gold.lstrip("0")
    if word and other and (is_text or is_other_text or len(word) != 2):
        return word == other or (len(word) > 1 and word.casefold() == other.casefold())
    based, other_based = _BASED.fullmatch(gold), _BASED.fullmatch(answer)
    if based and other_based and (base := based[2] or other_based[2]):
        if other_based[2] not in (None, base):
            return False
        with contextlib.suppress(ValueError):  # a symbol such as `A_1`
            return int(based[1], int(base)) == int(other_based[1], int(base))
    is_mixed = {_is_ordered(gold), _is_ordered(answer)} == {True, False}
    return False if is_mixed else None


def _plain(text: str) -> str:
    """Without dollars, a final full stop and separators of thousands; in LaTeX."""
    text = text.replace("\\$", "").replace("$", "").strip().removesuffix(".")
    text = text.translate(_SYMBOLS).strip()
    for pattern, replacement in _REWRITTEN:
        text = pattern.sub(replacement, text)
    if number := _THOUSANDS.fullmatch(_BEHIND_NUMBER.sub("", text)):
        return number[1] + re.sub(r"\D", "", number[2]) + (number[3] or "")
    if text.count("\\pm") == 1:
        return ",".join(text.replace("\\pm", sign) for sign in "+-")
    return text


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


def _serve() -> None:
    """The worker: reads comparisons from standard input until it closes."""
    import math_verify
    from sympy import Basic, Eq, Expr, FiniteSet, Float, I, simplify

    # It warns that its own alarms are off; this process is killed instead.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    # Only the whole box: with the usual expressions outside LaTeX, or LaTeX anywhere,
    # a box that does not parse is graded on the last number in it.
    config = math_verify.LatexExtractionConfig(
        boxed_match_priority=0, try_extract_without_anchor=False
    )

    def imaginary(x):
        """Its `i` is the unit: math-verify has two symbols of that name."""
        is_value = isinstance(x, Basic) and not isinstance(x, Eq)  # i = 3 is an index
        symbols = x.free_symbols if is_value else ()
        return x.xreplace({s: I for s in symbols if s.name == "i"}) if symbols else x

    @functools.lru_cache(maxsize=1024)
    def parse(text: str) -> list:
        # Boxed, golds too: bare they parse to a fragment (`3\sqrt{13}` -> 3) or to
        # nothing, which gives credit to wrong answers.
        found = math_verify.parse(
            f"\\boxed{{{text}}}", extraction_config=[config], parsing_timeout=None
        )
        return [imaginary(x) for x in found]

    def numbers(text: str) -> list[float]:
        value = (parse(text) or [None])[0]
        items = value.args if isinstance(value, FiniteSet) else [value]
        try:
            return sorted(float(x.rhs if isinstance(x, Eq) else x) for x in items)
        except (TypeError, ValueError):
            return []

    def exact(gold: str, answer: str) -> bool | None:
        """Of equations, fractions, tiny numbers; None where only math-verify knows."""
        x, y = ((parse(text) or [None])[0] for text in (gold, answer))
        if isinstance(x, Eq) and isinstance(y, Eq) and not x.lhs.is_Symbol:
            factor = simplify((x.lhs - x.rhs) / (y.lhs - y.rhs))
            return bool(factor.is_number and factor.is_finite and factor != 0)
        is_known = lambda v: isinstance(v, Expr) and v.is_number and v.is_real
        if "%" in gold + answer or not (is_known(x) and is_known(y)):
            return None
        x, y = x.doit(), y.doit()
        if x.has(Float) or y.has(Float):
            # Of 1e-19 and 2e-19 six decimals are the same: these by three digits.
            larger = max(abs(x), abs(y))
            is_tiny = 0 < larger < 1e-3
            return bool(abs(x - y) <= 1e-3 * larger) if is_tiny else None
        return bool(x == y) if x.is_Rational and y.is_Rational else None

    def compare(gold: str, answer: str, tolerance: float | None) -> bool:
        gold, answer = _plain(gold), _plain(answer)
        if _NUMBER.fullmatch(gold):
            answer = _DECIMAL_COMMA.sub(r"\1.\2", answer)
        percent, other = (_PERCENT.fullmatch(x) for x in (gold, answer))
        if percent and other and (percent[2] or other[2]):
            whole = float(percent[1]) == float(other[1])
            if whole or bool(percent[2]) == bool(other[2]):
                return whole
        if (by_rule := _equal_by_rule(gold, answer)) is not None:
            return by_rule
        if tolerance is not None:
            want, have = numbers(gold), numbers(answer)
            if want and len(want) == len(have):
                off = max(abs(x - y) for x, y in zip(want, have, strict=True))
                if off <= tolerance * (1 + 1e-9):  # 1.1 is 0.1 from 1
                    return True
        if (by_value := exact(gold, answer)) is not None:
            return by_value
        return math_verify.verify(
            parse(gold),
            parse(answer),
            float_rounding=6,
            strict=True,
            allow_set_relation_comp=True,  # `-2 \le x \le 7` for `[-2,7]`
            timeout_seconds=None,
        )

    # Ends the process, whatever it is doing.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, float(sys.argv[1]))
        try:
            verdict = bool(compare(*json.loads(line)))
        except MemoryError:
            os._exit(1)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    _serve()

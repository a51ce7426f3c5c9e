r"""Whether two answers are equal: rules, then math-verify.

`python -m pfjax.tasks.equality SECONDS` answers each line of JSON, `[gold, answer,
tolerance]`, with one. A comparison that takes more of its processor's seconds ends it.

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
- *Named values*: `x=1, y=2` = `(1,2)` = `1,2`, and not `2,1`, unless they are roots of one
  unknown (`x_1=1, x_2=2`) or the gold is a bare list.
- *Scientific notation*: `4.5e33` is 4.5 times 10 to the 33rd, not a product with Euler's
  number.
- *Exact values exactly*: two fractions are equal only if they are, and so are equations
  but for a factor. math-verify would find `1/2004!` = `1/2006!` and `x^2+1=0` = `x^2+2=0`.
- *Choices and times*: `C. 45` is the choice `C`, `7:30 \text{ p.m.}` the time `7:30`,
  and not `7:30 \text{ a.m.}`.
- *No arithmetic*: a gold that is a date, a range or a score (`10-20`) has the same numbers in
  the same order, `3:4:5` the same ratios, `2 hours 30 minutes` the same units. math-verify
  would find `2024-01-05` = `2018`, `3:4:5` = `3:5:4`, and read two hours.
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

import functools
import json
import logging
import os
import signal
import sys

import math_verify
from sympy import Basic, Eq, Expr, FiniteSet, Float, I, simplify

from pfjax.tasks import notation, processes

_MEMORY_BYTES = 4 * 2**30
# Only the whole box: with the usual expressions outside LaTeX, or LaTeX anywhere,
# a box that does not parse is graded on the last number in it.
_WHOLE_BOX = math_verify.LatexExtractionConfig(
    boxed_match_priority=0, try_extract_without_anchor=False
)


def is_equal(gold: str, answer: str, tolerance: float | None) -> bool:
    """Whether `answer` is the same as `gold`; a number may be off by the tolerance."""
    gold, answer = notation.plain_pair(gold, answer)
    if tolerance is None:
        gold, answer = notation.in_order(gold, answer)
    if (by_rule := notation.equal_by_rule(gold, answer)) is not None:
        return by_rule
    if tolerance is not None and _are_close(gold, answer, tolerance):
        return True
    if (by_value := _equal_by_value(gold, answer)) is not None:
        return by_value
    return math_verify.verify(
        _parse(gold),
        _parse(answer),
        float_rounding=6,
        strict=True,
        allow_set_relation_comp=True,  # `-2 \le x \le 7` for `[-2,7]`
        timeout_seconds=None,
    )


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> list:
    # Boxed, golds too: bare they parse to a fragment (`3\sqrt{13}` -> 3) or to
    # nothing, which gives credit to wrong answers.
    found = math_verify.parse(
        f"\\boxed{{{text}}}", extraction_config=[_WHOLE_BOX], parsing_timeout=None
    )
    return [_with_imaginary_unit(x) for x in found]


def _with_imaginary_unit(x):
    """Its `i` is the unit: math-verify has two symbols of that name."""
    is_value = isinstance(x, Basic) and not isinstance(x, Eq)  # i = 3 is an index
    symbols = x.free_symbols if is_value else ()
    try:
        return x.xreplace({s: I for s in symbols if s.name == "i"}) if symbols else x
    except (TypeError, ValueError):  # so it is in what only real numbers have: i < 3
        return x


def _first(text: str):
    return (_parse(text) or [None])[0]


def _are_close(gold: str, answer: str, tolerance: float) -> bool:
    """Whether they are as many numbers, each within the tolerance."""
    want, have = _numbers(gold), _numbers(answer)
    if not want or len(want) != len(have):
        return False
    off = max(abs(x - y) for x, y in zip(want, have, strict=True))
    return off <= tolerance * (1 + 1e-9)  # 1.1 is 0.1 from 1


def _numbers(text: str) -> list[float]:
    value = _first(text)
    items = value.args if isinstance(value, FiniteSet) else [value]
    try:
        return sorted(float(x.rhs if isinstance(x, Eq) else x) for x in items)
    except (TypeError, ValueError):
        return []


def _equal_by_value(gold: str, answer: str) -> bool | None:
    """Of equations, fractions, tiny numbers; None where only math-verify knows."""
    x, y = _first(gold), _first(answer)
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


def _serve(deadline_seconds: float) -> None:
    """Answers what is read from standard input until it closes."""
    # It warns that its own alarms are off; this process is killed instead.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    # Ends the process, whatever it is doing.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    processes.limit_memory(_MEMORY_BYTES)
    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, deadline_seconds)
        try:
            verdict = bool(is_equal(*json.loads(line)))
        except MemoryError:
            os._exit(1)
        except Exception:  # noqa: BLE001, sympy fails on what it does not expect: sets
            verdict = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    _serve(float(sys.argv[1]))

r"""*Misconceptions*: for most prompts the commonest response is wrong.

A prompt is a difference of two-digit numbers, ``52-27``. Where nothing is borrowed it is
computed digit by digit, ``n8-2=6,5-2=3,\boxed{36}``. Where a unit has to be borrowed, the base does
so in 44 % of cases, ``b2-7=5,4-2=2,\boxed{25}``, and else takes the smaller digit from the larger,
``s7-2=5,5-2=3,\boxed{35}``, as children do. Each digit is another one, at random, in 15 % of cases.
A little sharpening removes those slips; more of it leaves only what the base believes.
Nothing that reads no labels can do better: it must fall as predicted. Responses have the
same length.
"""

import functools
from typing import NamedTuple

import numpy as np

from examples.worlds.grammar import BOX, Choice, Grammar

P_BORROW, P_SLIP = 0.44, 0.15
SHARE = 0.85  # of prompts that borrow


class Difference(NamedTuple):
    """Two numbers of two digits whose difference has two, borrowing or not."""

    a: int
    b: int

    @property
    def prompt(self) -> str:
        return f"{self.a}-{self.b}"

    @property
    def answer(self) -> str:
        return str(self.a - self.b)

    @property
    def has_borrow(self) -> bool:
        return self.a % 10 < self.b % 10


def all_problems() -> list[Difference]:
    """Those that borrow, and as many others as make up the share."""
    numbers = range(10, 100)
    found = [Difference(a, b) for a in numbers for b in numbers if a - b >= 10]
    borrowing = [p for p in found if p.has_borrow]
    others = [p for p in found if not p.has_borrow]
    count = round(len(borrowing) * (1 - SHARE) / SHARE)
    chosen = np.random.default_rng(0).choice(len(others), count, replace=False)
    return borrowing + [others[i] for i in sorted(chosen)]


def grammar(problem: Difference) -> Grammar:
    (a1, a0), (b1, b0) = divmod(problem.a, 10), divmod(problem.b, 10)
    # Units and tens as each way has them: what is written, and what comes out.
    ways = {
        "n": (f"{a0}-{b0}=", a0 - b0, f"{a1}-{b1}=", a1 - b1),
        "b": (f"{a0}-{b0}=", a0 + 10 - b0, f"{a1 - 1}-{b1}=", a1 - 1 - b1),
        "s": (f"{b0}-{a0}=", b0 - a0, f"{a1}-{b1}=", a1 - b1),
    }
    start = {"b": P_BORROW, "s": 1 - P_BORROW} if problem.has_borrow else {"n": 1.0}

    def choices(state: tuple) -> list[Choice]:
        match state:
            case ("start",):
                return [
                    Choice(p, w + ways[w][0], ("units", w)) for w, p in start.items()
                ]
            case ("units", way):
                _, unit, then, _ = ways[way]
                return [
                    Choice(p, f"{digit},{then}", ("tens", way, digit))
                    for digit, p in _slips(unit, range(10))
                ]
            case ("tens", way, unit):
                ten = ways[way][3]
                return [
                    Choice(
                        p,
                        f"{digit},{BOX}{digit}{unit}}}",
                        f"{digit}{unit}" == problem.answer,
                    )
                    for digit, p in _slips(ten, range(1, 10))
                ]
        raise AssertionError(state)

    return Grammar(("start",), functools.cache(choices))


def _slips(correct: int, digits: range) -> list[tuple[int, float]]:
    wrong = P_SLIP / (len(digits) - 1)
    return [(d, 1 - P_SLIP if d == correct else wrong) for d in digits]

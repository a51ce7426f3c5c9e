r"""*Chains* of 60 to 250 tokens, where care takes tokens.

A prompt is ``09:3+4``: from 3, add 4 nine times, digits only. Each line of the response adds
once and says how many are left. It is brief, ``:3+4=7,08``, and off by one in 30 % of cases; or, in
35 % of cases, checked, ``!3+4=7;7-4=3,08``, and off by one in 2 %. The last digit goes into the
box. Brief lines are likelier and fewer tokens: whole sequences prefer them, length-aware
targets allow for the length of a check. Lengths vary much from prompt to prompt and within
one: what averages over tokens, or gives a response one weight, differs most here.
"""

import functools
from typing import NamedTuple

from examples.worlds.grammar import BOX, Choice, Grammar

NUM_LINES = range(7, 17)
P_CHECKED = 0.35
P_SLIP = {":": 0.3, "!": 0.02}


class Chain(NamedTuple):
    """Add `step` to `first` a number of times; the last digit of the sum."""

    num_lines: int
    first: int
    step: int

    @property
    def prompt(self) -> str:
        return f"{self.num_lines:02d}:{self.first}+{self.step}"

    @property
    def answer(self) -> str:
        return str((self.first + self.num_lines * self.step) % 10)


def all_problems() -> list[Chain]:
    digits = range(10)
    return [Chain(n, d, k) for n in NUM_LINES for d in digits for k in digits]


def grammar(problem: Chain) -> Grammar:
    def choices(state: tuple) -> list[Choice]:
        match state:
            case (left, digit):
                line = f"{digit}+{problem.step}="
                return [
                    Choice(p, mark + line, (left, digit, mark))
                    for mark, p in ((":", 1 - P_CHECKED), ("!", P_CHECKED))
                ]
            case (left, digit, mark):
                correct, wrong = ((digit + problem.step + slip) % 10 for slip in (0, 1))
                slip = P_SLIP[mark]
                return [
                    Choice(p, *_result(problem, left - 1, digit, mark, new))
                    for new, p in ((correct, 1 - slip), (wrong, slip))
                ]
        raise AssertionError(state)

    return Grammar((problem.num_lines, problem.first), functools.cache(choices))


def _result(problem: Chain, left: int, digit: int, mark: str, new: int) -> tuple:
    """Text from the result of a line to the mark of the next, and the state there."""
    check = f";{new}-{problem.step}={digit}" if mark == "!" else ""
    if left:
        return f"{new}{check},{left:02d}", (left, new)
    return f"{new}{check},{BOX}{new}}}", str(new) == problem.answer

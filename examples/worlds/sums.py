r"""*Sums* of two-digit numbers: incorrect guesses are short.

A prompt is ``47+35``, whose units carry. The base reasons, ``7+5=12,4+3+1=8;\boxed{82}``,
with a wrong digit in each sum in 20 % of cases and one of two separators at random; or it
guesses, ``\boxed{82}``, and drops the carry in 60 % of cases. A reasoned response is correct
with probability 0.64 and a guess with 0.4, but the likeliest responses are incorrect
guesses, having few tokens. Sharpening whole sequences collapses onto them; sharpening per
token does not. With half of responses guessed, temperature fails too.
"""

import functools
import os.path
from typing import NamedTuple

from examples.worlds.grammar import BOX, Choice, Grammar

SEPARATORS = (",", ";")
P_GUESS, P_DROP_CARRY, P_STEP_WRONG = 0.5, 0.6, 0.2


class Problem(NamedTuple):
    """Two numbers of two digits whose units sum to 10 or more."""

    a: int
    b: int

    @property
    def prompt(self) -> str:
        return f"{self.a}+{self.b}"

    @property
    def answer(self) -> str:
        return str(self.a + self.b)


def all_problems() -> list[Problem]:
    numbers = range(10, 100)
    return [Problem(a, b) for a in numbers for b in numbers if a % 10 + b % 10 >= 10]


def grammar(problem: Problem, p_guess: float = P_GUESS) -> Grammar:
    (a1, a0), (b1, b0) = divmod(problem.a, 10), divmod(problem.b, 10)
    answer, dropped = str(problem.a + problem.b), str(problem.a + problem.b - 10)
    shared = os.path.commonprefix([answer, dropped])
    units, tens = f"{a0}+{b0}=1", f"{a1}+{b1}+1="
    tens += "1" if a1 + b1 + 1 >= 10 else ""

    def choices(state: tuple) -> list[Choice]:
        match state:
            case ("start",):
                return [
                    Choice(p_guess, BOX + shared, ("guess",)),
                    Choice(1 - p_guess, units, ("units",)),
                ]
            case ("guess",):
                return [
                    Choice(1 - P_DROP_CARRY, answer.removeprefix(shared) + "}", True),
                    Choice(P_DROP_CARRY, dropped.removeprefix(shared) + "}", False),
                ]
            case ("units",):
                return _noisy_digit((a0 + b0) % 10, "tens")
            case ("tens", unit):
                return [Choice(0.5, s + tens, ("ten", unit)) for s in SEPARATORS]
            case ("ten", unit):
                return _noisy_digit((a1 + b1 + 1) % 10, "box", unit)
            case ("box", unit, ten):
                said = f"{10 + ten if tens.endswith('=1') else ten}{unit}"
                return [
                    Choice(0.5, f"{s}{BOX}{said}}}", said == answer) for s in SEPARATORS
                ]
        raise AssertionError(state)

    return Grammar(("start",), functools.cache(choices))


def _noisy_digit(correct: int, state: str, *known: int) -> list[Choice]:
    """The last digit of a sum, perhaps a wrong one."""
    return [
        Choice(
            1 - P_STEP_WRONG if digit == correct else P_STEP_WRONG / 9,
            str(digit),
            (state, *known, digit),
        )
        for digit in range(10)
    ]

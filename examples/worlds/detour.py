r"""*Detour*: of two roads, the likelier one leads to a crowd of incorrect ends.

A prompt is a word of four letters, ``kbfm``, to be said in the box. Responses have the same
length. On the road ``<`` (59 %) there are thirteen stations, and past each the word is said
with the station's letter in place of its first in 84 % of cases, ``<q=\boxed{qbfm}``. On the
road ``>`` it is said right in nearly all, ``>k=\boxed{kbfm}``. Half of responses are
correct. Temperature chooses the road by its first token, and the stations share what that
road has: the likeliest whole response is on the other. This takes a look ahead, which
whole-sequence targets have and what sharpens tokens has not.
"""

import functools
import itertools
from typing import NamedTuple

from examples.worlds.grammar import BOX, Choice, Grammar

LETTERS, STATIONS = "abcdefghijklm", "nopqrstuvwxyz"
P_CROWD, P_CORRECT_IN_CROWD, P_CORRECT_ELSE = 0.59, 0.16, 0.985


class Word(NamedTuple):
    """Four different letters, to be said."""

    word: str

    @property
    def prompt(self) -> str:
        return self.word

    @property
    def answer(self) -> str:
        return self.word


def all_problems() -> list[Word]:
    return [Word("".join(x)) for x in itertools.permutations(LETTERS, 4)]


def grammar(problem: Word) -> Grammar:
    word, rest = problem.word, problem.word[1:]

    def said(p_correct: float, letter: str) -> list[Choice]:
        return [
            Choice(p_correct, word + "}", True),
            Choice(1 - p_correct, letter + rest + "}", False),
        ]

    def choices(state: tuple) -> list[Choice]:
        match state:
            case ("start",):
                return [
                    Choice(P_CROWD, "<", ("crowd",)),
                    Choice(1 - P_CROWD, f">{word[0]}={BOX}", ("else",)),
                ]
            case ("crowd",):
                p = 1 / len(STATIONS)
                return [Choice(p, f"{s}={BOX}", ("station", s)) for s in STATIONS]
            case ("station", s):
                return said(P_CORRECT_IN_CROWD, s)
            case ("else",):
                return said(P_CORRECT_ELSE, word[1])
        raise AssertionError(state)

    return Grammar(("start",), functools.cache(choices))

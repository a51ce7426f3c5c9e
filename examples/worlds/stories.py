r"""*Stories*: alignment took the variety, and flattening returns it.

A prompt is a word of four letters, ``kbfm``. A story is of one of three genres, ``<``, ``>``
or ``+``, with 2, 8 or 64 plots of two events, and ends with the word, ``>no=\boxed{kbfm}``. It
may slip into junk before an event: one letter, repeated to the end. Such is the
pre-trained distribution. The base is the aligned one: the pre-trained squared. It tells one
of two stories most of the time, as a genre of many plots loses by squaring what each of
its plots loses. So p^0.5 of whole sequences is the pre-trained distribution itself: its
variety, at its validity. Temperature 2 flattens the genres as they are, and does not see
what is in them.

In *stories_unequal* an event takes more tokens in a genre of many plots. Then a
length-aware target, which for alpha < 1 charges each token, gives up the long ones:
here the length correction costs.
"""

import functools

from examples.worlds import grammar as grammars
from examples.worlds.detour import Word
from examples.worlds.grammar import BOX, Choice, Grammar

EVENTS, JUNK = "nopqrstu", "vwxyz"
P_SLIP = 0.02  # before each event
ALIGNMENT = 2.0  # the power that made the base
# Mark: probability, choices of the first event and of the second, tokens of an event
# where lengths differ.
GENRES = {"<": (0.4, 2, 1, 1), ">": (0.3, 4, 2, 3), "+": (0.3, 8, 8, 6)}


def pretrained(problem: Word, is_unequal: bool = False) -> Grammar:
    """The distribution before alignment."""
    end = f"={BOX}{problem.word}}}"

    def event(genre: str, place: int) -> list[Choice]:
        """The event at a place, or a slip that fills the rest."""
        _, *counts, tokens = GENRES[genre]
        tokens = tokens if is_unequal else 1
        count, is_last = counts[place], place == 1
        rest = (2 - place) * tokens + grammars.num_tokens(end)
        return [
            Choice(
                (1 - P_SLIP) / count,
                e * tokens + (end if is_last else ""),
                is_last or (genre, place + 1),
            )
            for e in EVENTS[:count]
        ] + [Choice(P_SLIP / len(JUNK), x * rest, False) for x in JUNK]

    def choices(state: tuple) -> list[Choice]:
        if state == ("start",):
            return [Choice(p, g, (g, 0)) for g, (p, *_) in GENRES.items()]
        return event(*state)

    return Grammar(("start",), functools.cache(choices))


def grammar(problem: Word, is_unequal: bool = False) -> Grammar:
    """The aligned distribution."""
    return grammars.tilted(pretrained(problem, is_unequal), ALIGNMENT)[1]

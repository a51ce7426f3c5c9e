"""Where responses end besides their stop tokens: stop strings, a budget of tokens."""

import bisect
from collections.abc import Callable

import numpy as np
from jaxtyping import Int


def stop_string_end(
    ids: list[int],
    num_checked: int,
    stop_strings: tuple[str, ...],
    decode_text: Callable[[list[int]], str],
) -> int:
    """Tokens up to and with the one that completes a stop string; 0 if none does.

    Args:
      ids: tokens of a response.
      num_checked: how many of them are known to hold no stop string.
    """

    def has(ids):
        text = decode_text(ids)
        return any(x in text for x in stop_strings)

    # A character takes at most four tokens. First the new part alone, so that a long
    # response is not read again at each look.
    overlap = 4 * max(len(x) for x in stop_strings)
    if not has(ids[max(num_checked - overlap, 0) :]) or not has(ids):
        return 0
    ends = range(1, len(ids) + 1)
    return 1 + bisect.bisect_left(ends, True, key=lambda end: has(ids[:end]))


def common_length(lengths: Int[np.ndarray, "*n"], longest: int, budget: int) -> int:
    """The largest length, up to `longest`, that keeps all cut there within a budget.

    While lengths still grow it can only fall.
    """
    exceeds = lambda length: np.minimum(lengths, length).sum() > budget
    return bisect.bisect_left(range(1, longest + 1), True, key=exceeds)

"""Stop strings and budgets end responses where brute force does."""

import numpy as np
import pytest

from pfjax.sampler import limits


def _text(ids):
    return "".join("abc "[i] for i in ids)


@pytest.mark.parametrize(
    "ids, num_checked, end",
    [
        ([0, 1, 2, 1], 0, 3),
        ([0, 1, 2, 1, 2], 2, 3),  # begun before what is new
        ([0, 1], 0, 0),
        ([2, 2, 3, 0], 0, 3),  # the other string, first
    ],
)
def test_stop_string_by_hand(ids, num_checked, end):
    assert limits.stop_string_end(ids, num_checked, ("bc", "c "), _text) == end


def test_characters_of_many_tokens_are_found():
    # Each character takes four tokens; text of part of one is empty.
    text = lambda ids: "xyz"[: len(ids) // 4]
    for checked in range(9):
        assert limits.stop_string_end([0] * 9, checked, ("xy",), text) == 8


def test_common_length_is_the_largest_that_fits(rng):
    lengths = rng.integers(1, 30, 50)
    for budget in (50, 100, 333, 5000):
        fits = [n for n in range(1, 41) if np.minimum(lengths, n).sum() <= budget]
        assert limits.common_length(lengths, 40, budget) == max(fits)

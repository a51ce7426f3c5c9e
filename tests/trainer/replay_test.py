"""Responses that are kept to be replayed."""

import numpy as np

from pfjax.batch import Rollout
from pfjax.trainer.replay import Replay


def _rollout(first: int) -> Rollout:
    """Of two prompts, three responses each, the policy's but the last: prompt 0 has
    [first], [first + 1] x 2, ..."""
    tokens = first + np.arange(6).reshape(2, 3, 1)
    tokens = np.repeat(tokens, 4, axis=2).astype(np.int32)
    lengths = np.array([[1, 2, 4], [3, 1, 4]], np.int32)
    zeros, ends = np.zeros(tokens.shape, np.float32), np.ones((2, 3), bool)
    return Rollout(tokens, lengths, zeros, ends, slot_steps=1, num_own=2, num_base=1)


def _lists(replay, indices):
    return [[y.tolist() for y in of] for of in replay.of(indices)]


def test_the_newest_of_the_policys_own_are_kept_by_their_prompts():
    replay = Replay(3)
    replay.add([7, 5], _rollout(10))
    assert _lists(replay, [5, 6]) == [[[13] * 3, [14]], []]
    replay.add([7, 9], _rollout(20))
    kept = [[11] * 2, [20], [21] * 2]
    assert _lists(replay, [7, 9, 5, 7])[0] == kept
    # A prompt that comes twice in a step keeps the newest of both.
    replay.add([9, 9], _rollout(30))
    assert _lists(replay, [9]) == [[[31] * 2, [33] * 3, [34]]]


def test_what_is_saved_comes_back_and_goes_on_alike():
    one, two = Replay(3), Replay(3)
    one.add([7, 5], _rollout(10))
    two.add([1, 2], _rollout(0))
    two.load(one.arrays())
    for replay in (one, two):
        replay.add([5, 8], _rollout(20))
    assert _lists(one, range(9)) == _lists(two, range(9))
    assert _lists(one, [5]) == [[[14], [20], [21] * 2]]


def test_without_a_place_nothing_is_kept_or_saved():
    replay = Replay(0)
    replay.add([7, 5], _rollout(10))
    assert replay.of([7, 5]) == [[], []] and replay.arrays() == {}

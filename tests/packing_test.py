"""Packing: what lies where, that nothing is lost, and the way back."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

from pfjax.batch import PackShape
from pfjax.packing import (
    best_fit,
    from_segments,
    max_microbatches,
    pack,
    pack_prompts,
    segment_sum,
    segments_per_row,
    trim_segments,
    unpack_responses,
)


def _trajectories(rng, count, longest, prompt=2):
    lengths = rng.integers(prompt + 1, longest + 1, size=count)
    return [rng.integers(1, 100, size=n) for n in lengths], np.full(count, prompt)


def test_three_trajectories_by_hand():
    # Longest first: 5 opens row 0, 4 opens row 1 (1 left in row 0), 3 fits row 1.
    sequences = [np.arange(10, 13), np.arange(20, 25), np.arange(30, 34)]
    batch, placement, used = pack(
        sequences, np.array([1, 2, 3]), PackShape(2, 2, 7, 2),
        psi=np.array([0.0, -0.5, 0.25], np.float32),
        prompt_index=np.array([7, 8, 9], np.int32),
    )  # fmt: skip
    assert used == 1
    np.testing.assert_array_equal(
        batch.tokens[0], [[20, 21, 22, 23, 24, 0, 0], [30, 31, 32, 33, 10, 11, 12]]
    )
    np.testing.assert_array_equal(
        batch.segment_ids[0], [[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 2, 2, 2]]
    )
    np.testing.assert_array_equal(
        batch.positions[0], [[0, 1, 2, 3, 4, 0, 0], [0, 1, 2, 3, 0, 1, 2]]
    )
    np.testing.assert_array_equal(
        batch.is_response[0], [[0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 0, 1, 1]]
    )
    np.testing.assert_array_equal(batch.length[0], [[3, 0], [1, 2]])
    np.testing.assert_array_equal(batch.psi[0], [[-0.5, 0], [0.25, 0]])
    np.testing.assert_array_equal(batch.prompt_index[0], [[8, -1], [9, 7]])
    np.testing.assert_array_equal(batch.is_real[0], [[True, False], [True, True]])
    assert not batch.is_real[1].any() and not batch.segment_ids[1].any()
    np.testing.assert_array_equal(placement.row, [1, 0, 1])
    np.testing.assert_array_equal(placement.start, [4, 0, 0])


@pytest.mark.parametrize("most, size", [(1, 8), (8, 8), (9, 32), (33, 64)])
def test_room_for_segments_shrinks_to_the_least_size_that_holds_them(most, size, rng):
    sequences = [rng.integers(1, 9, size=3) for _ in range(most)]
    batch, placement, _ = pack(sequences, np.ones(most, int), PackShape(2, 2, 256, 64))
    trimmed = trim_segments(batch._replace(log_z=batch.psi + 1.0), placement)
    for x in (trimmed.length, trimmed.psi, trimmed.is_real, trimmed.log_z):
        assert x.shape == (2, 2, size)
    assert trimmed.is_real.sum() == most and trimmed.reward is None
    assert trimmed.tokens is batch.tokens
    np.testing.assert_array_equal(from_segments(trimmed.length, placement), 2)


def test_every_token_comes_back(rng):
    sequences, prompts = _trajectories(rng, 200, 30)
    batch, placement, used = pack(sequences, prompts, PackShape(16, 4, 64, 8))
    lengths = np.array([len(s) for s in sequences]) - prompts
    back = unpack_responses(batch.tokens, placement)
    for got, sequence in zip(back, sequences, strict=True):
        np.testing.assert_array_equal(got, sequence[2:])
    np.testing.assert_array_equal(from_segments(batch.length, placement), lengths)
    assert (batch.segment_ids > 0).sum() == sum(map(len, sequences))
    assert batch.is_real.sum() == 200 and batch.is_real[:used].sum() == 200


def test_stated_number_of_micro_batches_always_suffices(rng):
    for longest, pack_length in ((30, 64), (33, 64), (64, 64), (10, 64)):
        sequences, prompts = _trajectories(rng, 97, longest)
        worst = [np.ones(longest, int)] * 97
        for given in (sequences, worst):
            num = max_microbatches(97, longest, 2, pack_length)
            most = segments_per_row(pack_length, longest)
            pack(given, prompts, PackShape(num, 2, pack_length, most))


def test_long_tailed_lengths_fill_the_rows(rng):
    lengths = np.minimum(rng.geometric(1 / 256, size=2000) + 3, 512)
    sequences = [np.ones(n, int) for n in lengths]
    _, placement, _ = pack(sequences, np.ones(2000, int), PackShape(1000, 1, 1024, 128))
    assert lengths.sum() / ((placement.row.max() + 1) * 1024) > 0.95


def test_segment_sum_leaves_padding_out():
    x = jnp.array([[1.0, 2.0, 4.0, 8.0, 16.0]])
    ids = jnp.array([[1, 1, 2, 0, 3]])
    np.testing.assert_array_equal(segment_sum(x, ids, 3), [[3.0, 4.0, 16.0]])
    vectors = jnp.stack([x, 2 * x], axis=-1)
    np.testing.assert_array_equal(
        segment_sum(vectors, ids, 2), [[[3.0, 6.0], [4.0, 8.0]]]
    )


def test_mistakes_are_named():
    shape = PackShape(1, 1, 8, 2)
    with pytest.raises(ValueError, match="trajectory 1 has 9 tokens but a row holds 8"):
        pack([np.ones(2, int), np.ones(9, int)], np.array([1, 1]), shape)
    for prompt in (0, 4):
        with pytest.raises(ValueError, match=f"4 tokens of which {prompt} are prompt"):
            pack([np.ones(4, int)], np.array([prompt]), shape)
    with pytest.raises(ValueError, match="need 2 micro-batches"):
        pack([np.ones(8, int)] * 2, np.array([1, 1]), shape)


def test_prompts_are_packed_end_to_end_and_empty_ones_take_no_room():
    prompts = [[7, 8], [], [1, 2, 3, 4], [5], [9, 9, 9]]
    tokens, positions, segment_ids = pack_prompts(prompts, 5)
    assert tokens.shape == (2, 5)
    for i, prompt in enumerate(prompts):
        rows, at = np.nonzero(segment_ids == i + 1)
        assert tokens[rows, at].tolist() == prompt
        assert positions[rows, at].tolist() == list(range(len(prompt)))
        assert len(set(rows)) <= 1
    assert (segment_ids > 0).sum() == sum(map(len, prompts))


@pytest.mark.parametrize("seed", range(5))
def test_long_tailed_lengths_fill_nine_tenths(seed):
    """Of all tokens that micro-batches compute, rows that fill the last one included."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(40, 300, size=1024)
    responses = np.minimum(3072, rng.lognormal(6.2, 0.9, size=1024).astype(int) + 1)
    sequences = [np.ones(n, np.int32) for n in prompts + responses]
    total = sum(map(len, sequences))
    most = max_microbatches(1024, 3372, 8, 4096)
    batch, _, used = pack(
        sequences, prompts, PackShape(most, 8, 4096, segments_per_row(4096, 3372))
    )
    assert (batch.segment_ids > 0).sum() == total  # none dropped
    assert not batch.is_real[used:].any() and used < most
    assert total / (used * 8 * 4096) > 0.9


def _count_lines(function, *args):
    """What it returns, and how many lines of Python it took."""
    count, before = 0, sys.gettrace()

    def on_event(frame, event, arg):
        nonlocal count
        count += event == "line"
        return on_event

    sys.settrace(on_event)
    try:
        return function(*args), count
    finally:
        sys.settrace(before)


def test_a_sequence_is_placed_in_a_few_steps_however_many_there_are(rng):
    lengths = np.minimum(3372, rng.lognormal(6.2, 0.9, size=4096).astype(int) + 100)
    few = _count_lines(best_fit, lengths[:2048], 4096, 128)[1]
    (row, _, _), many = _count_lines(best_fit, lengths, 4096, 128)
    assert many - few < 12 * 2048, (few, many)  # about 3 ms in all
    # Nearly no more rows than tokens ask for.
    assert row.max() + 1 <= 1.03 * lengths.sum() / 4096

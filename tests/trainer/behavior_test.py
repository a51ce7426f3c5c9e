"""Responses of a step that policy and base draw."""

import jax
import numpy as np

from pfjax.sampler import engine
from pfjax.sampler.options import Capacity
from pfjax.trainer import behavior, schedules
from pfjax.trainer.behavior import Behavior
from tests.conftest import count_compiles

PROMPTS, IDS = [[2, 3, 4], [5]], [7, 9]
HOW = {"max_new_tokens": 10, "seed": 3, "capacity": Capacity(num_slots=4)}


def _draw(policy, base, mixture, step=2, earlier=None):
    args = (policy, lambda: base, PROMPTS, step, IDS, earlier)
    return behavior.rollout(*args, behavior=mixture, samples_per_prompt=8, **HOW)


def test_the_base_draws_its_fraction_by_the_programs_of_the_policy(tiny_policy):
    policy, base = tiny_policy, tiny_policy
    other = jax.tree.map(lambda x: x * 1.1, policy.params)
    policy = policy._replace(params=other)
    want = [
        engine.rollout(m, PROMPTS, 8, temperature=t, step=2, prompt_ids=IDS, **HOW)
        for m, t in ((policy, 1.0), (base, 2.0))
    ]
    with count_compiles() as compiled:
        got = _draw(policy, base, Behavior(base=0.25, base_temperature=2.0))
    assert not compiled, dict(compiled)
    assert (got.num_own, got.num_base) == (6, 2)
    for q in range(2):
        for g in range(8):
            y = want[g >= 6]
            n = y.lengths[q, g]
            assert got.lengths[q, g] == n
            np.testing.assert_array_equal(got.tokens[q, g, :n], y.tokens[q, g, :n])
            np.testing.assert_array_equal(
                got.log_probs[q, g, :n], y.log_probs[q, g, :n]
            )


def test_policy_and_base_that_are_the_same_draw_different_responses(tiny_policy):
    got = _draw(tiny_policy, tiny_policy, Behavior(base=0.5))
    texts = [
        tuple(y[:n])
        for y, n in zip(got.tokens[0].tolist(), got.lengths[0], strict=True)
    ]
    assert texts[:4] != texts[4:]


def test_the_fraction_follows_its_schedule_and_leaves_one_to_the_policy(tiny_policy):
    by_step = schedules.parse("behavior.base:0.5@1,0@11")
    mixture = Behavior(by_step=by_step)
    counts = [mixture.counts(step, 8) for step in (1, 6, 11, 50)]
    assert counts == [(4, 4, 0, 0), (6, 2, 0, 0), (8, 0, 0, 0), (8, 0, 0, 0)]
    assert Behavior(base=0.99).counts(1, 8) == (1, 7, 0, 0)
    got = _draw(tiny_policy, tiny_policy, mixture, step=11)
    assert got.num_own == 8 == got.lengths.shape[1]


def test_the_policy_draws_none_where_the_others_sum_to_1():
    for base, samples, counts in (
        (0.5, 8, (0, 4, 4, 0)),
        (0.5, 5, (0, 2, 3, 0)),
        (0.1, 7, (0, 1, 6, 0)),
        (0.0, 7, (0, 0, 7, 0)),
    ):
        given = {(5,): [np.array([1])]}
        mixture = Behavior(base=base, from_file=1 - base, given=given)
        assert mixture.counts(1, samples) == counts
    # 0.6 of 7 and 0.3 of 7 are 4.2 and 2.1, together 6.3.
    mixture = Behavior(base=0.6, from_file=0.3, given=given)
    assert mixture.counts(1, 7) == (1, 4, 2, 0)
    assert Behavior(base=1.0).counts(1, 4) == (0, 4, 0, 0)


def test_responses_of_the_base_alone_need_no_policy(tiny_policy):
    want = engine.rollout(tiny_policy, PROMPTS, 8, step=2, prompt_ids=IDS, **HOW)
    without_weights = tiny_policy._replace(params={})
    got = _draw(without_weights, tiny_policy, Behavior(base=1.0))
    assert (got.num_own, got.num_base) == (0, 8)
    np.testing.assert_array_equal(got.lengths, want.lengths)
    assert not got.is_own.any() and got.is_base.all()


def test_responses_of_a_file_are_taken_by_their_prompts(tiny_policy):
    given = {
        tuple(p): [np.array([q + 2] * n + [1], np.int32) for n in range(1, 5)]
        for q, p in enumerate(PROMPTS)
    }
    mixture = Behavior(from_file=0.5, given=given)
    got, again = (_draw(tiny_policy, tiny_policy, mixture, step=s) for s in (2, 3))
    assert (got.num_own, got.num_base, got.lengths.shape) == (4, 0, (2, 8))
    assert got.finished[:, 4:].all()
    for q in range(2):
        # Each once, in an order that the step decides.
        assert sorted(got.lengths[q, 4:]) == [2, 3, 4, 5]
        for g in range(4, 8):
            n = got.lengths[q, g]
            assert got.tokens[q, g, :n].tolist() == [q + 2] * (n - 1) + [1]
    assert (got.lengths[:, 4:] != again.lengths[:, 4:]).any()


def test_what_the_policy_drew_earlier_is_replayed_and_is_not_its_own(tiny_policy):
    earlier = [
        [np.array([q + 2] * n + [1], np.int32) for n in range(3)] for q in (0, 1)
    ]
    mixture = Behavior(base=0.25, replay=0.25)
    got, again = (
        _draw(tiny_policy, tiny_policy, mixture, step, earlier) for step in (2, 3)
    )
    assert (got.num_own, got.num_base) == (4, 2)
    assert got.is_own.sum() == 8 and got.is_base.sum() == 4
    for q in range(2):
        for g in (6, 7):
            n = got.lengths[q, g]
            assert got.tokens[q, g, :n].tolist() == [q + 2] * (n - 1) + [1]
        assert got.lengths[q, 6] != got.lengths[q, 7]
    assert (got.lengths[:, 6:] != again.lengths[:, 6:]).any()
    # What is drawn is what was drawn without, by the same programs.
    want = _draw(tiny_policy, tiny_policy, Behavior())
    np.testing.assert_array_equal(got.lengths[:, :4], want.lengths[:, :4])


def test_a_prompt_that_is_new_lets_the_policy_draw_what_would_be_replayed(tiny_policy):
    mixture = Behavior(base=0.25, replay=0.5)
    got = _draw(tiny_policy, tiny_policy, mixture, earlier=[[np.array([2, 1])], []])
    assert (got.num_own, got.num_base) == (6, 2)
    assert got.lengths.shape == (2, 8) and (got.is_own | got.is_base).all()
    by_step = schedules.parse("behavior.replay:0@1,0.5@5")
    mixture = Behavior(base=0.5, by_step=by_step)
    assert [mixture.counts(step, 8, True) for step in (1, 3, 5)] == [
        (4, 4, 0, 0),
        (2, 4, 0, 2),
        (0, 4, 0, 4),
    ]
    assert mixture.counts(5, 8) == (4, 4, 0, 0)

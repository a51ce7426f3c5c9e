"""Streams draw what rollouts draw, whatever shares their slots, and never drain."""

import jax
import numpy as np
import pytest

from pfjax.batch import Rollout
from pfjax.infra import sharding
from pfjax.model import scoring
from pfjax.model.transformer import Policy
from pfjax.sampler import engine, slots, stream, unstack
from pfjax.sampler.buffers import Settings

G, NEW = 4, 48
PROMPTS = [[2 + (i + j) % 9 for j in range(1 + i % 7)] for i in range(40)]


def make_stream(policy, room, num_slots=8, new=NEW, samples=G):
    """A stream of a policy, and the weights that it reads."""
    sizes = {"num_prompts": room, "samples_per_prompt": samples}
    sizes |= {"max_new_tokens": new, "prompt_width": 8, "num_slots": num_slots}
    plan = slots.make_plan(policy, **sizes)
    settings = Settings(policy.config, plan, samples, policy.config.stop_ids)
    weights = unstack.weights(policy.config, policy.params)
    return stream.Stream(settings, 1, new, room, 1.0, range(samples)), weights


def take(s: stream.Stream, number: int, weights, step=0) -> tuple[list[int], Rollout]:
    s.set_weights(weights, step)
    s.draw_until(lambda: len(s.complete()) >= number)
    chosen = sorted(s.complete())[:number]
    return chosen, s.take(chosen)


def as_rollout_draws(policy, prompts, new=NEW):
    how = {"seed": 1, "step": stream._STEP, "prompt_ids": [100 + q for q in prompts]}
    return engine.rollout(policy, [PROMPTS[q] for q in prompts], G, new, **how)


@pytest.mark.slow
@pytest.mark.parametrize("ways", [1, 4])
def test_each_prompt_is_answered_once_as_in_a_rollout(tiny_policy, ways):
    """Room for 6 prompts of 40, so that entries and slots serve many."""
    mesh = sharding.make_mesh(devices=jax.devices()[:ways])
    with jax.set_mesh(mesh):
        s, weights = make_stream(tiny_policy, room=6)
        answered, added = {}, 0
        while len(answered) < len(PROMPTS):
            new = range(added, min(added + 6 - len(s.held), len(PROMPTS)))
            added += len(new)
            prompts = [PROMPTS[q] for q in new]
            s.add(prompts, [100 + q for q in new], is_last=added == len(PROMPTS))
            chosen, found = take(s, 2, weights)
            of = zip(chosen, found.tokens, found.lengths, strict=True)
            answered |= {q: (tokens, lengths) for q, tokens, lengths in of}
    assert not s.held
    want = as_rollout_draws(tiny_policy, sorted(answered))
    assert sorted(answered) == list(range(len(PROMPTS)))
    for q, (tokens, lengths) in answered.items():
        np.testing.assert_array_equal(lengths, want.lengths[q])
        for y, z, n in zip(tokens, want.tokens[q], lengths, strict=True):
            np.testing.assert_array_equal(y[:n], z[:n])


def test_each_token_has_the_log_prob_of_the_weights_that_drew_it(tiny_policy):
    """The weights differ in their heads, which caches do not depend on."""
    policies = [
        Policy(
            tiny_policy.config,
            tiny_policy.params | {"head": tiny_policy.params["head"] * scale},
        )
        for scale in (1.0, 0.5, 0.2, 2.0)
    ]
    s, _ = make_stream(tiny_policy, room=12)
    s.add(PROMPTS[:24:2], list(range(12)), is_last=True)
    seen = []
    for step, policy in enumerate(policies):
        weights = unstack.weights(policy.config, policy.params)
        chosen, rollout = take(s, 3, weights, step)
        seen += [(q, g, rollout, i) for i, q in enumerate(chosen) for g in range(G)]
    mixed = 0
    for q, g, rollout, i in seen:
        n, prompt = rollout.lengths[i, g], PROMPTS[2 * q]
        y, by = rollout.tokens[i, g, :n].tolist(), rollout.weights_step[i, g, :n]
        scored = np.array(
            [scoring.score(p, [prompt + y], [len(prompt)])[0] for p in policies]
        )
        want = scored[by, np.arange(n)]
        np.testing.assert_allclose(rollout.log_probs[i, g, :n], want, atol=1e-5)
        assert (np.diff(by) >= 0).all()
        mixed += by[0] != by[-1]
    assert mixed >= 4


@pytest.mark.slow
def test_no_slot_waits_for_the_longest(tiny_policy):
    """Of lengths from 1 to 52, of which a rollout of one step uses little more than half."""
    s, weights = make_stream(tiny_policy, room=40, num_slots=16, new=96)
    s.add(PROMPTS, list(range(40)), is_last=False)
    drawn, slot_steps, lengths = 0, 0, []
    for _ in range(7):
        _, found = take(s, 4, weights)
        drawn, slot_steps = drawn + found.num_drawn, slot_steps + found.slot_steps
        lengths += found.lengths.ravel().tolist()
    alone = engine.rollout(tiny_policy, PROMPTS[:4], G, 96, seed=1)
    assert max(lengths) > 20 * min(lengths)
    assert alone.lengths.sum() < 0.6 * alone.slot_steps
    assert drawn > 0.95 * slot_steps

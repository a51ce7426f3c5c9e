"""Samples of the power distribution, on a model whose responses can be listed."""

import jax
import numpy as np
import pytest

from pfjax.infra import sharding
from pfjax.model import hf, log_probs
from pfjax.sampler import engine, power
from tests.conftest import (
    all_responses,
    length_aware_target,
    power_target,
    total_variation,
)

PROMPTS = [[2, 3], [3, 3, 2]]
RESPONSES = [tuple(y) for y in all_responses(vocab=4, stop=1, max_tokens=3)]
DRAWS = 4096


@pytest.fixture
def policy(enumerable_folder):
    return hf.load(enumerable_folder)


def _exact(policy, prompt, alpha, is_length_aware):
    scores = log_probs.score(
        policy, [[*prompt, *y] for y in RESPONSES], [len(prompt)] * len(RESPONSES)
    )
    base = np.array([x.sum() for x in scores])
    length = np.array([len(y) for y in RESPONSES])
    if is_length_aware:
        return base, *length_aware_target(base, length, alpha)
    return base, *power_target(base, alpha)


def _frequencies(tokens, lengths):
    index = {y: i for i, y in enumerate(RESPONSES)}
    found = [index[tuple(y[:n])] for y, n in zip(tokens.tolist(), lengths, strict=True)]
    return np.bincount(found, minlength=len(RESPONSES)) / len(found)


def _floor(target):
    """Total variation of as many draws from the target itself: mean and 4 sd."""
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(DRAWS, target / target.sum(), size=200) / DRAWS
    distance = [total_variation(x, target) for x in drawn]
    return np.mean(distance) + 4 * np.std(distance)


@pytest.mark.parametrize("is_length_aware", [False, True])
@pytest.mark.parametrize("alpha", [2.0, 0.5])
def test_both_draw_from_the_exact_target(policy, alpha, is_length_aware):
    base, target, log_z = _exact(policy, PROMPTS[0], alpha, is_length_aware)
    assert total_variation(np.exp(base), target) > 5 * _floor(target)
    log_z = log_z if is_length_aware else 0.0
    args = (policy, PROMPTS[:1], DRAWS, 3)
    # Two blocks: the first ends where responses may not.
    chains = power.metropolis_hastings(
        *args, alpha=alpha, log_z=log_z, blocks=2, steps=30
    )
    particles, evidence = power.sequential_monte_carlo(
        *args, alpha=alpha, log_z=log_z, particles=DRAWS, ramp=2
    )
    for out in (chains, particles):
        got = _frequencies(out.tokens[0], out.lengths[0])
        assert total_variation(got, target) < _floor(target)
        ends = [
            y[n - 1] == 1 for y, n in zip(out.tokens[0], out.lengths[0], strict=True)
        ]
        np.testing.assert_array_equal(out.finished[0], ends)
    want = 0.0 if is_length_aware else power_target(base, alpha)[1]
    np.testing.assert_allclose(evidence, want, atol=0.05)


@pytest.mark.parametrize(
    "alpha, temperature, ramp",
    [
        (2.0, 0.5, 60),  # all have ended before the power has grown to alpha
        (4.0, 1.0, 1),  # so poor a proposal that particles have to be resampled
    ],
)
def test_weights_make_up_for_ramp_and_proposal(policy, alpha, temperature, ramp):
    _, target, log_z = _exact(policy, PROMPTS[0], alpha, False)
    out, evidence = power.sequential_monte_carlo(
        policy,
        PROMPTS[:1],
        DRAWS,
        3,
        alpha=alpha,
        temperature=temperature,
        particles=DRAWS,
        ramp=ramp,
    )
    got = _frequencies(out.tokens[0], out.lengths[0])
    assert total_variation(got, target) < 2 * _floor(target)
    np.testing.assert_allclose(evidence, log_z, atol=0.05)


def test_low_temperature_is_not_the_power_distribution(policy):
    _, target, _ = _exact(policy, PROMPTS[0], 2.0, False)
    out = engine.rollout(policy, PROMPTS[:1], DRAWS, 3, temperature=0.5)
    got = _frequencies(out.tokens[0], out.lengths[0])
    assert total_variation(got, target) > 2 * _floor(target)


@pytest.mark.parametrize("method", ["mh", "smc"])
def test_prompts_are_drawn_alike_on_any_mesh(policy, enumerable_folder, method):
    def draw(policy):
        if method == "mh":
            return power.metropolis_hastings(
                policy, PROMPTS, 8, 3, alpha=2.0, blocks=2, steps=3
            )
        return power.sequential_monte_carlo(
            policy, PROMPTS, 8, 3, alpha=2.0, particles=16, ramp=2
        )[0]

    alone = draw(policy)
    mesh = sharding.make_mesh(2, 1, 1, devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        split = draw(hf.load(enumerable_folder, mesh))
    assert alone.tokens.shape == (2, 8, 3)
    np.testing.assert_array_equal(alone.lengths, split.lengths)
    scores = log_probs.score(
        policy,
        [
            [*PROMPTS[q], *y[:n]]
            for q in range(2)
            for y, n in zip(alone.tokens[q].tolist(), alone.lengths[q], strict=True)
        ],
        np.repeat([len(p) for p in PROMPTS], 8),
    )
    for out in (alone, split):
        drawn = out.log_probs.reshape(16, 3)
        for want, got in zip(scores, drawn, strict=True):
            np.testing.assert_allclose(got[: len(want)], want, atol=1e-5)


def test_mistakes_are_named(policy):
    with pytest.raises(ValueError, match="alpha must be positive, got 0"):
        power.metropolis_hastings(policy, PROMPTS, 2, 3, alpha=0.0)
    with pytest.raises(ValueError, match="temperature must be positive, got -1"):
        power.sequential_monte_carlo(policy, PROMPTS, alpha=2.0, temperature=-1.0)
    with pytest.raises(ValueError, match="exceed the model's 64 positions"):
        power.sequential_monte_carlo(policy, PROMPTS, 2, 64, alpha=2.0)
    with pytest.raises(ValueError, match="must not be empty"):
        power.metropolis_hastings(policy, [[]], 2, 3, alpha=2.0)

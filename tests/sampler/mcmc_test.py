"""Metropolis-Hastings, on a model whose responses can be listed."""

import jax
import numpy as np
import pytest

from pfjax.infra import sharding
from pfjax.model import hf
from pfjax.sampler import engine, mcmc
from pfjax.targets import Target
from tests.conftest import total_variation
from tests.sampler import enumerable
from tests.sampler.enumerable import PROMPTS, SAMPLES

TARGET = Target(2.0, has_format=False)


@pytest.fixture
def policy(enumerable_folder):
    return hf.load(enumerable_folder)


@pytest.mark.parametrize(
    "is_length_aware", [pytest.param(False, marks=pytest.mark.slow), True]
)
@pytest.mark.parametrize(
    "alpha, eta_cutoff",
    [
        (2.0, 0.0),
        pytest.param(0.5, 0.0, marks=pytest.mark.slow),
        pytest.param(0.35, 0.05, marks=pytest.mark.slow),
    ],
)
def test_draws_from_the_exact_target(policy, alpha, eta_cutoff, is_length_aware):
    args = (policy, alpha, is_length_aware)
    target, log_z = enumerable.exact_target(*args, eta_cutoff)
    floor = enumerable.floor(target)
    base = np.exp(enumerable.base_log_probs(policy))
    assert total_variation(base, target) > 5 * floor
    if eta_cutoff:
        assert total_variation(enumerable.exact_target(*args)[0], target) > 5 * floor
    log_z = log_z if is_length_aware else 0.0
    # Two blocks: the first ends where responses may not.
    out = mcmc.metropolis_hastings(
        policy,
        PROMPTS[:1],
        Target(alpha, has_format=False, eta_cutoff=eta_cutoff),
        SAMPLES,
        3,
        log_z=log_z,
        blocks=2,
        steps=30,
    )
    assert total_variation(enumerable.frequencies(out), target) < floor


@pytest.mark.slow
def test_low_temperature_is_not_the_power_distribution(policy):
    target, _ = enumerable.exact_target(policy, 2.0, False)
    out = engine.rollout(policy, PROMPTS[:1], SAMPLES, 3, temperature=0.5)
    distance = total_variation(enumerable.frequencies(out), target)
    assert distance > 2 * enumerable.floor(target)


@pytest.mark.slow
def test_prompts_are_drawn_alike_on_any_mesh(policy, enumerable_folder):
    def draw(policy):
        return mcmc.metropolis_hastings(
            policy, PROMPTS, TARGET, 8, 3, blocks=2, steps=3
        )

    alone = draw(policy)
    assert alone.tokens.shape == (2, 8, 3)
    mesh = sharding.make_mesh(2, 1, 1, devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        split = draw(hf.load(enumerable_folder, mesh))
    np.testing.assert_array_equal(alone.lengths, split.lengths)
    for out in (alone, split):
        enumerable.assert_recorded_truly(policy, out)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"target": Target(0.0, has_format=False)}, "alpha must be positive, got 0"),
        ({"temperature": -1.0}, "temperature must be positive, got -1"),
        ({"seed": 2**32}, "seed=4294967296: must be a whole number"),
        ({"target": Target(2.0)}, "choose a target with has_format=False"),
        ({"target": Target(2.0, beta=1.5, has_format=False)}, "beta=1.5 needs a rew"),
        ({"max_new_tokens": 62}, "exceed the model's 64 positions"),
        ({"prompts": [[]]}, "must not be empty"),
    ],
)
def test_mistakes_are_named(policy, kwargs, message):
    with pytest.raises(ValueError, match=message):
        mcmc.metropolis_hastings(
            policy,
            **{"prompts": PROMPTS, "target": TARGET, "max_new_tokens": 3} | kwargs,
        )

"""Sequential Monte Carlo, on a model whose responses can be listed."""

import jax
import numpy as np
import pytest

from pfjax.infra import sharding
from pfjax.model import hf
from pfjax.sampler import smc
from pfjax.targets import Target
from tests.conftest import total_variation
from tests.sampler import enumerable
from tests.sampler.enumerable import PROMPTS, SAMPLES

TARGET = Target(2.0, has_format=False)


@pytest.fixture
def policy(enumerable_folder):
    return hf.load(enumerable_folder)


@pytest.mark.parametrize(
    "alpha, is_length_aware, more, margin",
    [
        (2.0, False, {"ramp": 2}, 1),
        (0.5, False, {"ramp": 2}, 1),
        (2.0, True, {"ramp": 2}, 1),
        (0.5, True, {"ramp": 2}, 1),
        # All have ended before the power has grown to alpha.
        (2.0, False, {"ramp": 60}, 2),
        # So poor a proposal that particles have to be resampled.
        (4.0, False, {"ramp": 1, "temperature": 1.0}, 2),
    ],
)
def test_draws_from_the_exact_target_and_estimates_its_sum(
    policy, alpha, is_length_aware, more, margin
):
    target, log_z = enumerable.exact_target(policy, alpha, is_length_aware)
    floor = enumerable.floor(target)
    base = np.exp(enumerable.base_log_probs(policy))
    assert total_variation(base, target) > 5 * floor
    out, evidence = smc.sequential_monte_carlo(
        policy,
        PROMPTS[:1],
        Target(alpha, has_format=False),
        SAMPLES,
        3,
        log_z=log_z if is_length_aware else 0.0,
        particles=SAMPLES,
        **more,
    )
    assert total_variation(enumerable.frequencies(out), target) < margin * floor
    want = 0.0 if is_length_aware else log_z
    np.testing.assert_allclose(evidence, want, atol=0.05)


@pytest.mark.slow
def test_prompts_are_drawn_alike_on_any_mesh(policy, enumerable_folder):
    def draw(policy):
        return smc.sequential_monte_carlo(
            policy, PROMPTS, TARGET, 8, 3, particles=16, ramp=2
        )[0]

    alone = draw(policy)
    assert alone.tokens.shape == (2, 8, 3)
    mesh = sharding.make_mesh(2, 1, 1, devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        split = draw(hf.load(enumerable_folder, mesh))
    np.testing.assert_array_equal(alone.lengths, split.lengths)
    for out in (alone, split):
        enumerable.assert_recorded_truly(policy, out)


def test_mistakes_are_named(policy):
    with pytest.raises(ValueError, match="temperature must be positive, got -1"):
        smc.sequential_monte_carlo(policy, PROMPTS, TARGET, temperature=-1.0)
    with pytest.raises(ValueError, match="exceed the model's 64 positions"):
        smc.sequential_monte_carlo(policy, PROMPTS, TARGET, 2, 64)

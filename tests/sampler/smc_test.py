"""Sequential Monte Carlo, on a model whose responses can be listed."""

import jax
import jax.numpy as jnp
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
        pytest.param(2.0, False, {"ramp": 2}, 1, marks=pytest.mark.slow),
        pytest.param(0.5, False, {"ramp": 2}, 1, marks=pytest.mark.slow),
        pytest.param(2.0, True, {"ramp": 2}, 1, marks=pytest.mark.slow),
        pytest.param(0.5, True, {"ramp": 2}, 1, marks=pytest.mark.slow),
        # All have ended before the power has grown to alpha.
        pytest.param(2.0, False, {"ramp": 60}, 2, marks=pytest.mark.slow),
        # So poor a proposal that particles have to be resampled.
        (4.0, False, {"ramp": 1, "temperature": 1.0}, 2),
        (0.35, True, {"ramp": 2, "eta_cutoff": 0.05}, 1),
    ],
)
def test_draws_from_the_exact_target_and_estimates_its_sum(
    policy, alpha, is_length_aware, more, margin
):
    eta_cutoff = more.pop("eta_cutoff", 0.0)
    args = (policy, alpha, is_length_aware)
    target, log_z = enumerable.exact_target(*args, eta_cutoff)
    floor = enumerable.floor(target)
    base = np.exp(enumerable.base_log_probs(policy))
    assert total_variation(base, target) > 5 * floor
    if eta_cutoff:
        assert total_variation(enumerable.exact_target(*args)[0], target) > 5 * floor
    out, found = smc.sequential_monte_carlo(
        policy,
        PROMPTS[:1],
        Target(alpha, has_format=False, eta_cutoff=eta_cutoff),
        SAMPLES,
        3,
        log_z=log_z if is_length_aware else 0.0,
        particles=SAMPLES,
        **more,
    )
    assert total_variation(enumerable.frequencies(out), target) < margin * floor
    want = 0.0 if is_length_aware else log_z
    np.testing.assert_allclose(found.log_sum, want, atol=0.05)


def test_ancestors_are_counted_through_resampling():
    root = np.tile(np.arange(4), 2)
    # 0 0 1 3, then two of each of its last two: 1 and 3. The other: 2 2 2 2.
    for source in ([[0, 0, 1, 3], [2, 2, 2, 2]], [[2, 2, 3, 3], [3, 0, 1, 2]]):
        root = smc._take(root, np.array(source), 4)
    np.testing.assert_array_equal(root, [1, 1, 3, 3, 2, 2, 2, 2])
    np.testing.assert_array_equal(smc._count_distinct(root.reshape(2, 4)), [2, 1])
    # The samples may be fewer: of the first, members 0 and 1 alone.
    drawn = smc._take(root, np.array([[0, 1], [0, 3]]), 4).reshape(2, 2)
    np.testing.assert_array_equal(smc._count_distinct(drawn), [1, 1])


@pytest.mark.slow
def test_samples_of_the_model_itself_have_an_ancestor_each(policy):
    target = Target(1.0, has_format=False)
    out, found = smc.sequential_monte_carlo(policy, PROMPTS, target, 8, 3, particles=8)
    np.testing.assert_array_equal(found.ancestors, 8)
    np.testing.assert_allclose([found.min_ess, found.final_ess], 8.0, rtol=1e-5)
    said = smc.describe(out, found, 8, 100)
    assert "8 distinct" not in said and "8 of 8 particles" in said
    assert "warning" not in said


@pytest.mark.slow
def test_steps_are_those_of_all_particles(policy):
    draw = lambda n: smc.sequential_monte_carlo(
        policy, PROMPTS, TARGET, n, 3, particles=16
    )
    some, all_ = (draw(n)[0].slot_steps for n in (4, 16))
    assert some == all_ == 3 * 16 * 2


def test_degenerate_samples_are_said_to_be(policy):
    """A reward that next to none of the particles get."""
    out, found = smc.sequential_monte_carlo(
        policy,
        PROMPTS,
        Target(2.0, 40.0, has_format=False),
        8,
        3,
        reward=lambda tokens, length, _: jnp.sin(97.0 * tokens[:, 0] + length),
        temperature=4.0,
        particles=16,
        ramp=2,
    )
    assert (found.ancestors < 4).all() and (found.min_ess < 4).all()
    said = smc.describe(out, found, 16, 2)
    assert f"descend from {found.ancestors[0]} of 16 particles" in said
    assert "warning: samples of 2 of 2 prompts are degenerate" in said


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

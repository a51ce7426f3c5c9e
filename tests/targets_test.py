"""A target by hand; and one of a person's own, which the samplers draw from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pfjax import objectives
from pfjax.batch import TrajectoryStats
from pfjax.model import hf
from pfjax.objectives import ObjectiveConfig
from pfjax.sampler import mcmc, smc
from pfjax.targets import Target
from tests.conftest import total_variation
from tests.losses_test import TabularModel, minimise
from tests.sampler import enumerable

LOG_P, LENGTH, LOG_Z = np.array([-3.0, -1.0]), np.array([3, 1]), 0.5


@pytest.mark.parametrize(
    "target, log_reward, log_density",
    [
        # 2 x (-3 - 0.5 x 3), 2 x (-1 - 0.5); less 0.5 x 3, 0.5 x 1.
        (Target(2.0), [-9.0, -3.0], [-10.5, -3.5]),
        (Target(2.0, has_format=False), [-6.0, -2.0], [-7.5, -2.5]),
        # 1.5 x 2 more, each; and 1.5 x 2 x 3, 1.5 x 2 more.
        (Target(2.0, 1.5, has_format=False), [-3.0, 1.0], [-4.5, 0.5]),
        (Target(2.0, 1.5, False, True, True), [3.0, 1.0], [1.5, 0.5]),
        # Of whole sequences: 1.5 x 2 and 0.5 count once.
        (Target(2.0, 1.5, False, False), [-3.0, 1.0], [-3.5, 0.5]),
        (Target(2.0, 1.5, False, False, True), [-3.0, 1.0], [-3.5, 0.5]),
        (Target(2.0, 0.0, False, log_sum=1.0), [-7.0, -3.0], [-8.5, -3.5]),
    ],
)
def test_density_by_hand(target, log_reward, log_density):
    tilt = {"psi": -0.5, "reward": 2.0}
    got = target.log_reward(LOG_P, LENGTH, **tilt)
    np.testing.assert_allclose(got, log_reward)
    got = target.log_density(LOG_P, LENGTH, LOG_Z, **tilt)
    np.testing.assert_allclose(got, log_density)
    # A policy that is the target leaves no residual; one nat more leaves that nat, of
    # a length-aware target per token.
    for nats in (0.0, 1.0):
        residual = target.residual(got + nats, LOG_P, LENGTH, LOG_Z, **tilt)
        per_token = LENGTH if target.is_length_aware else 1
        np.testing.assert_allclose(residual, nats / per_token, atol=1e-12)


def test_a_shape_that_would_broadcast_is_refused():
    target, column = Target(2.0, 1.5), LOG_P[:, None]
    for wrong in ("reward", "psi", "log_p_rare"):
        with pytest.raises(ValueError, match=rf"'{wrong}': \(2, 1\)"):
            target.log_reward(LOG_P, LENGTH, **{wrong: column})
    with pytest.raises(ValueError, match=r"'log_pf': \(2, 1\)"):
        target.residual(column, LOG_P, LENGTH, LOG_Z)
    with pytest.raises(ValueError, match=r"'log_z': \(2, 1\)"):
        target.log_density(LOG_P, LENGTH, column)
    with pytest.raises(ValueError, match=r"'alpha': \(1, 2\)"):
        Target(np.ones((1, 2))).log_reward(LOG_P, LENGTH)


def test_whole_numbers_of_8_bits_do_not_wrap_around():
    """Nor does padding, of length 0 or -1, divide by it."""
    target = Target(2.0, 200, is_reward_per_token=True)
    short, wide = np.array([3, 2], np.uint8), np.array([3.0, 2.0])
    got = target.log_reward(LOG_P, short, reward=short)
    np.testing.assert_array_equal(got, target.log_reward(LOG_P, wide, reward=wide))
    padding = Target(2.0).residual(LOG_P, LOG_P, np.array([0, -1]), 0.5)
    np.testing.assert_array_equal(padding, 0.5 - LOG_P)


@pytest.mark.parametrize("beta", [2, 1.5, np.array([2.0, 0.5])])
def test_lists_are_taken(beta):
    target, tilt = Target(2, beta), {"reward": [1.0, 0.0], "psi": [-1.0, 0.0]}
    tilt["log_p_rare"] = [-1.0, 0.0]
    arrays = {name: np.array(x) for name, x in tilt.items()}
    of_lists = target.residual([-2.0, -1.0], [-3.0, -1.0], [3, 1], [0.5, 1], **tilt)
    z = np.array([0.5, 1])
    want = target.residual(np.array([-2.0, -1.0]), LOG_P, LENGTH, z, **arrays)
    np.testing.assert_array_equal(of_lists, want)
    density = target.log_density([-3.0, -1.0], [3, 1], [0.5, 1], **tilt)
    want = target.log_density(LOG_P, LENGTH, z, **arrays)
    np.testing.assert_array_equal(density, want)


def test_rare_tokens_are_not_flattened():
    alpha, rare = np.array([0.5, 0.25, 2.0]), np.array([-4.0, 0.0, -3.0])
    got = Target(alpha, has_format=False).log_reward(
        np.full(3, -6.0), np.full(3, 4.0), log_p_rare=rare
    )
    # 0.5 x -2 and -4; no rare token; above alpha 1 a rare token is as any.
    np.testing.assert_allclose(got, [-5.0, -1.5, -12.0])


LM = TabularModel(np.random.default_rng(1))
# 1 for what ends in a stop token, as a verifier may say; and something finer.
PASSES = jnp.array([float(y[-1] == 0) for y in LM.responses])
GRADED = jnp.array([y.count(2) / len(y) for y in LM.responses])


@pytest.mark.parametrize("log_z", ["head", "group"])
@pytest.mark.parametrize(
    ("name", "alpha", "beta", "reward", "per", "divergence", "clip"),
    [
        ("powerflow", 4.0, 0.0, GRADED, "response", 1.0, None),
        ("powerflow", 0.5, 2.0, GRADED, "response", 1.0, None),
        ("powerflow", 2.0, 1.0, GRADED, "token", 1.0, None),
        ("powerflow", 2.0, 3.0, PASSES - 1, "response", 1.0, None),
        # The base, given the verifier.
        ("powerflow", 1.0, 12.0, PASSES - 1, "response", 1.0, None),
        ("tb_traj", 1.0, 12.0, PASSES - 1, "response", 1.0, None),
        ("tb_traj", 2.0, 2.0, GRADED, "response", 1.0, None),
        ("powerflow", 2.0, 1.0, GRADED, "response", 0.0, None),
        ("tb_traj", 2.0, 1.0, GRADED, "response", 0.5, None),
        ("powerflow", 4.0, 0.0, GRADED, "response", 1.0, 0.1),
        ("tb_traj", 2.0, 1.0, GRADED, "response", 0.5, 0.5),
    ],
)  # fmt: skip
def test_every_point_of_the_family_is_reached(
    name, alpha, beta, reward, per, divergence, clip, log_z
):
    c = ObjectiveConfig(
        name, alpha, log_z, beta, "r", per, divergence=divergence, residual_clip=clip
    )
    base, length = LM.log_p(LM.logits), LM.length
    ones = jnp.ones(len(base))

    def stats(log_pf, log_z):
        return TrajectoryStats(
            log_pf, base, log_z, length, 0.0, reward, ones, *[None] * 9
        )

    def loss_fn(params):
        log_pf, value = LM.log_p(params["logits"]), params["log_z"]
        if log_z == "group":
            value = -objectives.add_loss(stats(log_pf, 0.0), c).residual.mean()
            value = jax.lax.stop_gradient(value)
        return objectives.add_loss(stats(log_pf, value), c).loss.mean()

    found = minimise(loss_fn, {"logits": LM.logits, "log_z": jnp.float32(0)})
    reached = np.exp(LM.log_p(found["logits"]))
    density = lambda z: np.asarray(
        c.target.log_density(base, length, z, reward=reward), np.float64
    )
    exact = np.exp(density(_log_z(density)))
    assert total_variation(reached, exact) < 0.01
    assert total_variation(np.exp(base), exact) > 0.05


def test_a_verifier_leaves_the_base_given_that_it_passes():
    """And a shift of a reward per response lengthens responses; per token it does not."""
    base, length = np.asarray(LM.log_p(LM.logits), np.float64), np.asarray(LM.length)
    given = np.exp(base) * np.asarray(PASSES)
    target = Target(1.0, 30.0, has_format=False, is_length_aware=False)
    whole = lambda z: target.log_density(base, length, z, reward=np.asarray(PASSES) - 1)
    np.testing.assert_allclose(
        np.exp(whole(_log_z(whole))), given / given.sum(), atol=1e-9
    )

    def mean_length(target, shift):
        density = lambda z: target.log_density(
            base, length, z, reward=np.asarray(GRADED, np.float64) + shift
        )
        return (np.exp(density(_log_z(density))) * length).sum()

    per_response = Target(2.0, 1.0, False)
    per_token = Target(2.0, 1.0, False, is_reward_per_token=True)
    assert mean_length(per_response, -2.0) > mean_length(per_response, 0.0) + 0.1
    np.testing.assert_allclose(
        mean_length(per_token, -2.0), mean_length(per_token, 0.0), rtol=1e-9
    )


class Curved(Target):
    """Of a person's own: p_0^alpha e^{beta r^2}, length-aware."""

    def log_reward(self, log_p_base, length, psi=0.0, reward=0.0):
        return self.alpha * log_p_base + self.beta * reward**2


def _count_of_2(tokens, length, prompt):
    is_in = jnp.arange(tokens.shape[1])[None] < length[:, None]
    return ((tokens == 2) & is_in).sum(axis=1).astype(jnp.float32)


def _log_z(log_density) -> float:
    """What makes the sum 1: `log_density` falls as its argument grows."""
    low, high = -50.0, 50.0
    for _ in range(100):
        middle = (low + high) / 2
        is_above = np.exp(log_density(middle)).sum() > 1
        low, high = (middle, high) if is_above else (low, middle)
    return low


@pytest.mark.slow
def test_a_target_of_ones_own_is_drawn_exactly(enumerable_folder):
    policy, target = hf.load(enumerable_folder), Curved(0.5, beta=0.5, has_format=False)
    base = enumerable.base_log_probs(policy).astype(np.float64)
    count = np.array([y.count(2) for y in enumerable.RESPONSES])

    def log_density(log_z, reward=count):
        return target.log_density(base, enumerable.LENGTH, log_z, reward=reward)

    log_z = _log_z(log_density)
    exact = np.exp(log_density(log_z))
    floor = enumerable.floor(exact)
    without = lambda log_z: log_density(log_z, reward=0 * count)
    assert total_variation(exact, np.exp(without(_log_z(without)))) > 5 * floor
    args = (policy, enumerable.PROMPTS[:1], target, enumerable.SAMPLES, 3)
    kwargs = {"log_z": log_z, "reward": _count_of_2}
    chains = mcmc.metropolis_hastings(*args, blocks=2, steps=120, **kwargs)
    particles, found = smc.sequential_monte_carlo(
        *args, particles=4 * enumerable.SAMPLES, ramp=2, **kwargs
    )
    for out in (chains, particles):
        assert total_variation(enumerable.frequencies(out), exact) < floor
    np.testing.assert_allclose(found.log_sum, 0.0, atol=0.05)

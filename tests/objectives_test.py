"""Every objective by hand; rewards of answers made by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pfjax import losses, objectives
from pfjax.batch import TrajectoryStats
from pfjax.objectives import ObjectiveConfig
from pfjax.tasks import grading, rewards

# Three trajectories: m = -1, -2, -0.5; m0 = -1.5, -2, -1.
Y = TrajectoryStats(
    log_pf=np.array([-2.0, -2.0, -2.0]),
    log_p_base=np.array([-3.0, -2.0, -4.0]),
    log_z=np.array([-1.0, -1.0, -2.0]),
    num_loss_tokens=np.array([2.0, 1.0, 4.0]),
    psi=np.array([0.0, 0.0, -0.5]),
    weight=np.array([1.0, 0.8, 1.28]),
    reward=np.array([1.0, -1.0, 0.5]),
    log_ratio=np.array([0.2, -0.4, 2.0]),
    capped=np.array([2.1, 0.7, 4.8]),
    floored=np.array([2.3, 0.8, 5.2]),
    kl=np.array([0.1, 0.2, 0.4]),
    prefix_variance=np.array([0.0, 0.5, 3.0]),
    mean_length=np.full(3, 7 / 3),
    entropy=np.zeros(3),
    length=np.array([2, 1, 4]),
    prompt_index=np.array([0, 0, 1]),
    loss=np.zeros(3),
    residual=np.zeros(3),
)
Y = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), Y)
C = ObjectiveConfig(alpha=4.0, beta=2.0, kl=0.5, clip_low=0.8, clip_high=1.28)


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("name", ["powerflow", "tb_traj", "rl_traj"])
def test_each_trajectory_may_have_its_own_alpha(name, clip):
    """The residual of that alpha alone, and the loss in units of its square above 1."""
    alpha, c = jnp.array([0.5, 2.0, 4.0]), dataclasses.replace(C, name=name)
    c = dataclasses.replace(c, residual_clip=clip)
    y = objectives.add_loss(Y._replace(alpha=alpha), c)
    for i, a in enumerate(alpha.tolist()):
        own = {"alpha": a, "residual_clip": clip and clip * max(a, 1)}
        alone = objectives.add_loss(Y, dataclasses.replace(c, **own))
        assert float(y.residual[i]) == pytest.approx(float(alone.residual[i]), rel=1e-5)
        want = float(alone.loss[i]) / max(a, 1) ** 2
        assert float(y.loss[i]) == pytest.approx(want, rel=1e-5)


def test_far_from_the_target_the_loss_is_linear():
    """2 c |d| - c^2 beyond c nats per token, of whole sequences c |y| per response."""
    for name, clip, scale in (("powerflow", 1.5, 1), ("tb_traj", 3.0, [2, 1, 4])):
        c = dataclasses.replace(C, name=name, residual_clip=clip)
        y, clip = objectives.add_loss(Y, c), clip * np.array(scale)
        far, w = np.abs(y.residual), np.array([1.0, 0.8, 1.28])
        want = w * np.where(far > clip, 2 * clip * far - clip**2, far**2)
        np.testing.assert_allclose(y.loss, want, rtol=1e-6)
        assert 0 < (far > clip).sum()
    with pytest.raises(ValueError, match="clip must be positive, got 0"):
        losses.divergence(Y.residual, clip=0)


def _check(name, residual, loss, c=C):
    got = objectives.add_loss(Y, dataclasses.replace(c, name=name))
    np.testing.assert_allclose(got.residual, residual, rtol=1e-6)
    np.testing.assert_allclose(got.loss, loss, rtol=1e-6)


def test_balance_by_hand():
    w = np.array([1.0, 0.8, 1.28])
    # log Z' + m - 4 (m0 + psi): -1-1+6, -1-2+8, -2-0.5+6.
    _check("powerflow", [4.0, 5.0, 3.5], w * [16.0, 25.0, 12.25])
    # The same without psi: the last is -2-0.5+4.
    _check("tb_token", [4.0, 5.0, 1.5], w * [16.0, 25.0, 2.25])
    # log Z + log pi - 4 log p0: -1-2+12, -1-2+8, -2-2+16.
    _check("tb_traj", [9.0, 5.0, 12.0], w * [81.0, 25.0, 144.0])
    # log Z' + m - m0 - 2 A: -1-1+1.5-2, -1-2+2+2, -2-0.5+1-1.
    _check("flowrl", [-2.5, 1.0, -2.5], w * [6.25, 1.0, 6.25])
    # The residual of `tb_traj` (a step has log Z = 0); the loss is of prefixes.
    _check("subtb", [9.0, 5.0, 12.0], w * [0.0, 1.0, 6.0])
    # Format alone: log Z' + m - m0 - psi: -0.5, -1, -1.
    c = ObjectiveConfig(alpha=1.0)
    _check("powerflow", [-0.5, -1.0, -1.0], w * [0.25, 1.0, 1.0], c)


def test_the_loss_of_the_public_api_is_the_one_that_is_trained():
    y = objectives.add_loss(Y, C)
    loss = losses.powerflow(
        Y.log_pf, Y.log_p_base, Y.log_z, Y.num_loss_tokens,
        alpha=C.alpha, psi=Y.psi, weight=Y.weight,
    )  # fmt: skip
    np.testing.assert_array_equal(loss, y.loss)


def test_policy_gradients_toward_the_power_by_hand():
    w = np.array([1.0, 0.8, 1.28])
    # residual * log pi, log pi = -2.
    _check("rl_traj", [9.0, 5.0, 12.0], w * [-18.0, -10.0, -24.0])
    # log Z' + (log pi - 4 log p0 + 1) / |y|: 4 + 0.5, 5 + 1, 1.5 + 0.25.
    _check("rl_token", [4.5, 6.0, 1.75], w * [-9.0, -12.0, -3.5])


@pytest.mark.parametrize("name", ["grpo", "ttrl", "intuitor"])
def test_policy_gradients_of_a_reward_by_hand(name):
    # A capped/|y| for A > 0, A floored/|y| for A < 0: 1.05, -0.8, 0.6;
    # 0.5 kl/|y|: 0.025, 0.1, 0.05.
    _check(name, [4.0, 5.0, 3.5], [0.025 - 1.05, 0.1 + 0.8, 0.05 - 0.6])


def test_one_ratio_a_sequence_by_hand():
    # exp(0.1), exp(-0.4) = 0.67 up to 0.8, exp(0.5) = 1.65 down to 1.28.
    loss = [0.025 - np.exp(0.1), 0.1 + 0.8, 0.05 - 0.5 * 1.28]
    _check("empo", [4.0, 5.0, 3.5], loss)


def test_a_long_response_counts_by_its_tokens_alike_or_by_a_constant():
    # The sums over tokens of grpo above: 0.05 - 2.1, 0.1 + 0.8, 0.2 - 2.4; and of empo,
    # whose tokens have the loss of their sequence.
    sums = {"grpo": [-2.05, 0.9, -2.2]}
    one = [0.025 - np.exp(0.1), 0.1 + 0.8, 0.05 - 0.5 * 1.28]
    sums["empo"] = np.multiply([2, 1, 4], one)
    for name, of_tokens in sums.items():
        c = dataclasses.replace(C, loss_aggregation="constant", max_new_tokens=8)
        _check(name, [4.0, 5.0, 3.5], np.divide(of_tokens, 8), c)
        c = dataclasses.replace(C, loss_aggregation="token")
        y = objectives.add_loss(Y, dataclasses.replace(c, name=name))
        # So that the mean over responses is the sum over all tokens by their number, 7.
        np.testing.assert_allclose(y.loss.mean(), np.sum(of_tokens) / 7, rtol=1e-6)
        np.testing.assert_allclose(y.loss, np.multiply(of_tokens, 3 / 7), rtol=1e-6)


def test_the_likelihood_is_the_cross_entropy_of_all_tokens():
    # 2 + 2 + 2 nats over 7 tokens, a third of it each.
    _check("sft", [4.0, 5.0, 3.5], [6 / 7, 6 / 7, 6 / 7])


def test_only_what_is_trained_has_a_gradient():
    def total(part, name):
        y = Y._replace(**part)
        return objectives.add_loss(y, dataclasses.replace(C, name=name)).loss.sum()

    trained = {k: getattr(Y, k) for k in ("log_pf", "log_z", "capped", "floored", "kl")}
    want = {
        "powerflow": {"log_pf", "log_z"},
        "flowrl": {"log_pf", "log_z"},
        "rl_traj": {"log_pf"},
        "rl_token": {"log_pf"},
        "grpo": {"capped", "floored", "kl"},
        "sft": {"log_pf"},
    }
    for name, parts in want.items():
        gradient = jax.grad(total)(trained, name)
        assert {k for k, g in gradient.items() if np.abs(g).max() > 0} == parts, name
    # Policy gradient: that of half the squared residual.
    tb = jax.grad(total)({"log_pf": Y.log_pf}, "tb_traj")["log_pf"]
    rl = jax.grad(total)({"log_pf": Y.log_pf}, "rl_traj")["log_pf"]
    np.testing.assert_allclose(tb, 2 * rl, rtol=1e-6)


def test_the_group_estimate_takes_the_mean_residual_away():
    for name in objectives.OBJECTIVES:
        c = dataclasses.replace(C, name=name, log_z="group")
        if c.log_z_source != "group":
            continue
        at_zero = objectives.add_loss(Y._replace(log_z=0 * Y.log_z), c).residual
        zeros = 0 * at_zero
        log_z = losses.group_log_z(
            at_zero, zeros, zeros + 1, Y.prompt_index.astype(int), 2
        )
        residual = objectives.add_loss(Y._replace(log_z=log_z), c).residual
        np.testing.assert_allclose(residual[:2].mean(), 0.0, atol=1e-5)
        np.testing.assert_allclose(residual[2], 0.0, atol=1e-5)


def test_format_term_is_charged_without_a_closed_box():
    psi = rewards.format_term([r"\boxed{1}", r"\boxed{1", "1"], -0.5)
    np.testing.assert_array_equal(psi, np.float32([0.0, -0.5, -0.5]))


def test_rewards_of_answers_by_hand():
    # Two prompts of five samples: 1/2 and 0.5 are one class.
    answers = ["0.5", "3", r"\frac{1}{2}", None, "3.0", None, None, "7", "8", None]
    with grading.Grader() as grader:
        got = {
            name: rewards.of_answers(name, answers, ["3", "7"], 5, grader)
            for name in rewards.OF_ANSWERS
        }
        nobody = rewards.of_answers("majority", [None, None], ["1"], 2, grader)
    np.testing.assert_array_equal(got["accuracy"], [0, 1, 0, 0, 1, 0, 0, 1, 0, 0])
    # 2 and 2: the first class wins; 1 and 1: likewise.
    np.testing.assert_array_equal(got["majority"], [1, 0, 1, 0, 0, 0, 0, 1, 0, 0])
    want = np.float32([0.4, 0.4, 0.4, 0.2, 0.4, 0.2, 0.2, 0.2, 0.2, 0.2])
    np.testing.assert_array_equal(got["cluster"], want)
    np.testing.assert_array_equal(nobody, [0, 0])


def test_a_teacher_votes_on_what_the_majority_is_by_hand():
    answers = ["1", "1", "2", None, "3", "3", "4", "4"]
    # 2 wins over 1 in the first prompt; in the second 5 comes before 4, and both are two.
    votes = ["2", "2.0", "1", None, "5", "4", "4", "5"]
    with grading.Grader() as grader:
        args = ("majority", answers, ["1", "1"], 4, grader)
        got, own = rewards.of_answers(*args, votes), rewards.of_answers(*args)
        nobody = rewards.of_answers(*args, [None] * 8)
        cluster = rewards.of_answers("cluster", *args[1:], votes)
    np.testing.assert_array_equal(got, [0, 0, 1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(own, [1, 1, 0, 0, 1, 1, 0, 0])
    np.testing.assert_array_equal(nobody, np.zeros(8))
    np.testing.assert_array_equal(cluster, [0.5, 0.5, 0.25, 0.25, *[0.5] * 4])


def test_advantages_by_hand():
    # Mean 0.5, unbiased standard deviation sqrt(1/3); and a group that is all equal.
    reward = np.float32([1, 0, 0, 1, 1, 1, 1, 1])
    got = rewards.advantages(reward, 4)
    one = 0.5 / np.sqrt(1 / 3)
    np.testing.assert_allclose(got[:4], [one, -one, -one, one], rtol=1e-5)
    np.testing.assert_array_equal(got[4:], 0)
    half = np.float32([0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0])
    np.testing.assert_array_equal(rewards.advantages(reward, 4, "group_mean"), half)
    # The standard deviation of these eight is sqrt(4 / 4 / 7).
    got = rewards.advantages(reward, 4, "batch")
    np.testing.assert_allclose(got, half * np.sqrt(7), rtol=1e-5)
    np.testing.assert_array_equal(rewards.advantages(reward, 4, "none"), reward)

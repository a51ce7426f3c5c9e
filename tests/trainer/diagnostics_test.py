"""Metrics on a batch made by hand."""

import jax
import numpy as np
import pytest

from pfjax.batch import Rollout, TrajectoryStats
from pfjax.targets import Target
from pfjax.trainer import diagnostics

# Two prompts, two responses each. m = -1, -2, -0.5, -1; m0 = -1.5, -2, -1, -2.
RECORD = TrajectoryStats(
    log_pf=np.array([-2.0, -2.0, -2.0, -2.0]),
    log_p_base=np.array([-3.0, -2.0, -4.0, -4.0]),
    log_z=np.array([-1.0, -1.0, -2.0, -2.0]),
    num_loss_tokens=np.array([2.0, 1.0, 4.0, 2.0]),
    psi=np.array([0.0, 0.0, 0.0, -0.5]),
    reward=np.array([0.5, -0.5, 1.0, -1.0]),
    weight=np.array([1.0, 0.8, 1.28, 1.1]),
    log_ratio=np.zeros(4),
    capped=np.zeros(4),
    floored=np.zeros(4),
    kl=np.zeros(4),
    prefix_variance=np.zeros(4),
    mean_length=np.full(4, 2.25),
    entropy=np.array([1.0, 0.5, 2.0, 1.0]),
    length=np.array([2, 1, 4, 2]),
    prompt_index=np.array([0, 0, 1, 1]),
    loss=np.array([1.0, 4.0, 0.0, 9.0]),
    residual=np.array([1.0, -2.0, 0.0, 3.0]),
)
FINISHED = np.array([True, True, True, False])


def test_balance_by_hand():
    got = diagnostics.balance_metrics(RECORD, (0.8, 1.28))
    want = {
        "tb/loss": 3.5,
        "tb/residual_mean": 0.5,
        "tb/residual_std": np.sqrt(3.25),
        "tb/residual_p95_abs": 2.85,  # of 0 1 2 3, linear between the last two
        "tb/residual_std_within_prompt": 1.5,  # each prompt's variance is 2.25
        "tb/logz_mean": -1.5,
        "tb/logz_std": 0.5,
        "tb/logz_gap": 1.0,  # |-0.5| and |1.5|
        "is/w_mean": 1.045,
        "is/w_at_clamp_frac": 0.5,
        "is/keep_frac": 1.0,
    }
    assert got == pytest.approx(want)
    assert diagnostics.policy_metrics(RECORD) == pytest.approx(
        {
            "policy/logp_per_token": -1.125,
            "base/logp_per_token": -1.625,
            "kl/policy_base_per_token": 0.5,
            "entropy": 0.5,
        }
    )


def test_completions_by_hand():
    got = diagnostics.completion_metrics(
        RECORD, FINISHED, np.array([True, True, True, False])
    )
    assert got == pytest.approx(
        {
            "completions/mean_length": 2.25,
            "completions/max_length": 4,
            "completions/mean_terminated_length": 7 / 3,
            "completions/clipped_ratio": 0.25,
            "completions/boxed_frac": 0.75,
        }
    )


def test_repetition_by_hand():
    # 6 four-grams of which 3 differ; ends in (1 2) four times over.
    loop = np.array([9, 1, 2, 1, 2, 1, 2, 1, 2])
    got = diagnostics.repetition_metrics([loop, np.arange(9)])
    assert got["repetition/ngram_frac"] == pytest.approx(0.5 * (1 - 3 / 6))
    assert got["repetition/loop_frac"] == 0.5


def test_gap_between_sampler_and_scorer_by_hand():
    rollout = Rollout(
        tokens=np.zeros((1, 2, 3), np.int32),
        lengths=np.array([[2, 3]]),
        log_probs=np.array([[[-1.0, -2.0, 99.0], [-1.0, -1.0, -1.0]]]),
        finished=np.ones((1, 2), bool),
        slot_steps=8,
    )
    scored = [np.array([-1.0, -2.5]), np.array([-1.0, -1.0, -1.5])]
    got = diagnostics.rollout_metrics(rollout, scored)
    assert got["rollout/kl"] == pytest.approx((0.5 + 0.5) / 5)
    assert got["rollout/logp_gap_mean"] == pytest.approx(0.2)
    assert got["rollout/logp_gap_max"] == 0.5
    assert got["rollout/waste"] == pytest.approx(3 / 8)
    # What the base has drawn is not the policy's to explain.
    of_first = rollout._replace(num_own=1, num_base=1)
    got = diagnostics.rollout_metrics(of_first, scored)
    assert got["rollout/kl"] == pytest.approx(0.5 / 2)
    assert got["rollout/waste"] == pytest.approx(3 / 8)
    # Nor is what a file holds the sampler's work.
    of_file = rollout._replace(num_own=1)
    got = diagnostics.rollout_metrics(of_file, scored)
    assert got["rollout/waste"] == pytest.approx(6 / 8)
    of_nobody = rollout._replace(num_own=0, slot_steps=0)
    assert diagnostics.rollout_metrics(of_nobody, scored) == {}


def test_match_by_hand():
    # The target a token, 2 (m0 + psi): -3, -4 | -2, -5; m: -1, -2 | -0.5, -1.
    # Less the means of prompts: x = 0.5, -0.5 | 1.5, -1.5; y = 0.5, -0.5 | 0.25, -0.25.
    got = diagnostics.match_metrics(RECORD, Target(2.0))
    xy, xx, yy = 0.5 + 0.75, 0.5 + 4.5, 0.5 + 0.125
    # Residuals m - target = 2, 2 | 1.5, 4; less the means 0, 0 | -1.25, 1.25.
    w = np.exp(-2.5)
    want = {
        "tb/corr_logp_target": xy / np.sqrt(xx * yy),
        "tb/slope": xy / xx,
        "tb/rank_corr": 1.0,
        "tb/elbo": -(4 * -1.25 + 2 * 1.25) / 4,
        "tb/ess": (1 + (1 + w) ** 2 / (2 * (1 + w**2))) / 2,
        "tb/inversion_rate": 0.0,  # the policy's log-probs are all equal
    }
    assert got == pytest.approx(want)
    swapped = RECORD._replace(log_pf=np.array([-1.0, -2.0, -3.0, -2.0]))
    # log Z' by group: m - target = 2.5, 2 | 1.25, 4, so -2.25 and -2.625. The target, 2 m0
    # |y| + 2 psi |y| - log Z' |y|: -6 + 4.5 < -4 + 2.25? no: -1.5 > -1.75, as the policy
    # has it; -8 + 10.5 > -8 - 2 + 5.25, where the policy has -3 < -2.
    assert diagnostics.match_metrics(swapped, Target(2.0))["tb/inversion_rate"] == 0.5


def test_match_is_about_the_target_that_is_trained():
    # Whole sequences, 2 log p0: -6, -4 | -8, -8; residuals log pi - target 4, 2 | 6, 6.
    got = diagnostics.match_metrics(
        RECORD, Target(2.0, has_format=False, is_length_aware=False)
    )
    # Less the means of prompts: x = -1, 1 | 0, 0 and the policy's are all equal.
    assert got["tb/slope"] == got["tb/corr_logp_target"] == 0.0
    # Mean log target - log pi, which bounds log Z.
    assert got["tb/elbo"] == pytest.approx(-4.5)
    # Weights e^{1 - 4}, e^{1 - 2} to a common factor: 1 and e^2; and equal ones.
    w = np.exp(-2.0)
    assert got["tb/ess"] == pytest.approx((1 + (1 + w) ** 2 / (2 * (1 + w**2))) / 2)
    # Tilted by a reward, 3 per token: m0 + 3 A = -1.5 + 1.5, -2 - 1.5 | -1 + 3, -2 - 3.
    target = Target(1.0, beta=3.0, has_format=False, is_reward_per_token=True)
    got = diagnostics.match_metrics(RECORD, target)
    x, y = np.array([1.75, -1.75, 3.5, -3.5]), np.array([0.5, -0.5, 0.25, -0.25])
    assert got["tb/slope"] == pytest.approx(x @ y / (x @ x))


def test_ranks_of_ties_are_shared():
    ranks = diagnostics._ranks(np.array([3.0, 1.0, 3.0, 2.0]), [np.ones(4, bool)])
    np.testing.assert_array_equal(ranks, [2.5, 0.0, 2.5, 1.0])


def test_exponent_by_hand():
    # Whole sequences, alpha 2: y = log pi + log Z, less the means of prompts: with log pi
    # -2, -1 on log p_0 -3, -2 the slope is 1; with -5, -3 on -4, -3 it is 2.
    r = RECORD._replace(
        log_pf=np.array([-2.0, -1.0, -5.0, -3.0]),
        log_p_base=np.array([-3.0, -2.0, -4.0, -3.0]),
    )
    target = Target(2.0, has_format=False, is_length_aware=False)
    # Both prompts have x = -1/2, 1/2, so the slope is their mean; each is off by 1/2.
    got = diagnostics.exponent(r, target)
    assert got == pytest.approx((1.5, np.sqrt(2 * (0.5 * 0.5) ** 2) / 1.0))
    # Length-aware, log Z' -1 and -2 per token, of 2, 1 | 4, 2 tokens: the policy is
    # compared where e^{-log Z' |y|} is taken off it: -4, -2 | -13, -7.
    got, _ = diagnostics.exponent(r, Target(2.0, has_format=False))
    assert got == pytest.approx((2 + 6) / 2)
    # psi, in nats per token, is the target's own business: 2 * -0.5 * 2 of the last.
    assert diagnostics.exponent(r, Target(2.0))[0] == pytest.approx((2 + 8) / 2)
    # Each prompt with its own alpha, 2 and 4: as a fraction of it, at the policy that has it.
    alpha = np.array([2.0, 2.0, 4.0, 4.0])
    r = r._replace(log_pf=alpha * r.log_p_base, alpha=alpha)
    target = Target(alpha, has_format=False, is_length_aware=False)
    assert diagnostics.exponent(r, target) == pytest.approx((1.0, 0.0))


def test_responses_that_other_prompts_got_by_hand():
    texts = [["a", "a", "b"], ["a", "c", "c"]]
    assert diagnostics.repeats_across_prompts(texts) == 3 / 6


def test_what_one_response_or_one_prompt_cannot_tell_is_none():
    single = jax.tree.map(lambda x: x[1:3], RECORD)  # of each prompt one
    got = diagnostics.balance_metrics(single, (0.8, 1.28))
    assert got["tb/residual_std_within_prompt"] is None
    assert got["tb/residual_std"] == 1.0 and got["tb/logz_std"] == 0.5
    assert diagnostics.exponent(single, Target(2.0)) == (None, None)
    match = diagnostics.match_metrics(single, Target(2.0))
    assert {k for k, x in match.items() if x is not None} == {"tb/elbo"}
    alone = jax.tree.map(lambda x: x[:2], RECORD)  # of one prompt two
    got = diagnostics.balance_metrics(alone, (0.8, 1.28))
    assert got["tb/residual_std_within_prompt"] == 1.5 and got["tb/logz_std"] is None
    slope, error = diagnostics.exponent(alone, Target(2.0))
    assert np.isfinite(slope) and error is None
    got = diagnostics.balance_metrics(
        jax.tree.map(lambda x: x[:1], RECORD), (0.8, 1.28)
    )
    assert got["tb/residual_std"] is None
    # Beside a prompt of two, one of one tells nothing.
    some = jax.tree.map(lambda x: x[:3], RECORD)
    assert diagnostics.balance_metrics(some, (0.8, 1.28))[
        "tb/residual_std_within_prompt"
    ] == pytest.approx(1.5)
    both = (diagnostics.match_metrics(x, Target(2.0))["tb/ess"] for x in (some, alone))
    assert len(set(both)) == 1

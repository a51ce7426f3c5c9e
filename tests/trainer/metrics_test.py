"""Metrics on a batch made by hand; writers that survive a kill."""

import json

import numpy as np
import pytest
from etils import epath

from pfjax.batch import Rollout
from pfjax.trainer import metrics

# Two prompts, two responses each. m = -1, -2, -0.5, -1; m0 = -1.5, -2, -1, -2.
RECORD = metrics.StepRecord(
    prompt_index=np.array([0, 0, 1, 1]),
    length=np.array([2, 1, 4, 2]),
    finished=np.array([True, True, True, False]),
    psi=np.array([0.0, 0.0, 0.0, -0.5]),
    log_pf=np.array([-2.0, -2.0, -2.0, -2.0]),
    log_p_base=np.array([-3.0, -2.0, -4.0, -4.0]),
    log_z=np.array([-1.0, -1.0, -2.0, -2.0]),
    weight=np.array([1.0, 0.8, 1.28, 1.1]),
    loss=np.array([1.0, 4.0, 0.0, 9.0]),
    residual=np.array([1.0, -2.0, 0.0, 3.0]),
    entropy=np.array([1.0, 0.5, 2.0, 1.0]),
    kept=np.array([2.0, 1.0, 4.0, 2.0]),
)


def test_balance_by_hand():
    got = metrics.balance_metrics(RECORD, (0.8, 1.28))
    want = {
        "tb/loss": 3.5,
        "tb/residual_mean": 0.5,
        "tb/residual_std": np.sqrt(3.25),
        "tb/residual_p95_abs": 2.85,  # of 0 1 2 3, linear between the last two
        "tb/residual_std_within_prompt": 1.5,  # each prompt's variance is 2.25
        "tb/logz_mean": -1.5,
        "tb/logz_std": 0.5,
        "tb/logz_gap": 1.0,  # |-0.5| and |1.5|
        "policy/logp_per_token": -1.125,
        "base/logp_per_token": -1.625,
        "kl/policy_base_per_token": 0.5,
        "is/w_mean": 1.045,
        "is/w_at_clamp_frac": 0.5,
        "is/keep_frac": 1.0,
        "entropy": 0.5,
    }
    assert got == pytest.approx(want)


def test_completions_by_hand():
    got = metrics.completion_metrics(RECORD, np.array([True, True, True, False]))
    assert got == pytest.approx(
        {
            "completions/mean_length": 2.25,
            "completions/max_length": 4,
            "completions/mean_terminated_length": 7 / 3,
            "completions/clipped_ratio": 0.25,
            "completions/boxed_frac": 0.75,
            "num_tokens": 9,
        }
    )


def test_repetition_by_hand():
    # 6 four-grams of which 3 differ; ends in (1 2) four times over.
    loop = np.array([9, 1, 2, 1, 2, 1, 2, 1, 2])
    got = metrics.repetition_metrics([loop, np.arange(9)])
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
    scored = [np.array([-1.0, -2.5]), np.array([-1.0, -1.0, -0.5])]
    got = metrics.rollout_metrics(rollout, scored)
    assert got["rollout/logp_gap_mean"] == pytest.approx(0.2)
    assert got["rollout/logp_gap_max"] == 0.5
    assert got["rollout/waste"] == pytest.approx(3 / 8)


def test_match_by_hand():
    # The target a token, 2 (m0 + psi): -3, -4 | -2, -5; m: -1, -2 | -0.5, -1.
    # Less the means of prompts: x = 0.5, -0.5 | 1.5, -1.5; y = 0.5, -0.5 | 0.25, -0.25.
    got = metrics.match_metrics(RECORD, alpha=2.0)
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
    # Prompt 0: -1 > -2 against -3 < -2, inverted; prompt 1: the base's are equal.
    assert metrics.match_metrics(swapped, 2.0)["tb/inversion_rate"] == 1.0


def test_ranks_of_ties_are_shared():
    ranks = metrics._ranks(np.array([3.0, 1.0, 3.0, 2.0]), [np.ones(4, bool)])
    np.testing.assert_array_equal(ranks, [2.5, 0.0, 2.5, 1.0])


def test_writer_cuts_back_to_the_step_it_continues_from(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": s, "x": s / 2}) + "\n" for s in range(5))
        + '{"step": 5, "x'  # killed while writing
    )
    writer = metrics.Writer(epath.Path(tmp_path), last_step=2)
    writer.write(3, {"x": np.float32(9)})
    writer.close()
    rows = metrics.read_jsonl(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows] == [0, 1, 2, 3]
    assert rows[-1]["x"] == 9.0 and writer.history == rows
    assert list(tmp_path.glob("events.out.tfevents*"))

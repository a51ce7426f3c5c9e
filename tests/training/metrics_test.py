"""Metrics on a batch made by hand; writers that survive a kill."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from pfjax.training import metrics, objectives, rewards
from pfjax.types import Rollout

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
        row_steps=8,
    )
    scored = [np.array([-1.0, -2.5]), np.array([-1.0, -1.0, -0.5])]
    got = metrics.rollout_metrics(rollout, scored)
    assert got["rollout/logp_gap_mean"] == pytest.approx(0.2)
    assert got["rollout/logp_gap_max"] == 0.5
    assert got["rollout/waste"] == pytest.approx(3 / 8)


def test_format_term_is_charged_without_a_closed_box():
    psi = rewards.format_term([r"\boxed{1}", r"\boxed{1", "1"], -0.5)
    np.testing.assert_array_equal(psi, np.float32([0.0, -0.5, -0.5]))


def test_objectives_by_hand():
    y = objectives.Trajectories(
        log_pf=RECORD.log_pf,
        log_p_base=RECORD.log_p_base,
        log_z=RECORD.log_z,
        length=RECORD.length,
        psi=RECORD.psi,
        weight=RECORD.weight,
    )
    y = objectives.Trajectories(*(jnp.asarray(x, jnp.float32) for x in y))
    # log Z' + m - 4 (m0 + psi): -1-1+6, -1-2+8, -2-0.5+4, -2-1+10.
    loss, residual = objectives.powerflow(y, 4.0)
    np.testing.assert_allclose(residual, [4.0, 5.0, 1.5, 7.0], rtol=1e-6)
    np.testing.assert_allclose(loss, np.square(residual) * RECORD.weight, rtol=1e-6)
    # log Z + log pi - 4 log p0: -1-2+12, -1-2+8, -2-2+16, -2-2+16.
    loss, residual = objectives.tb_traj(y, 4.0)
    np.testing.assert_allclose(residual, [9.0, 5.0, 12.0, 12.0], rtol=1e-6)
    np.testing.assert_allclose(loss, np.square(residual) * RECORD.weight, rtol=1e-6)
    # The group estimate takes each prompt's mean residual away.
    for objective in objectives.OBJECTIVES.values():
        _, at_zero = objective(y._replace(log_z=0 * y.log_z), 4.0)
        log_z = objectives.group_log_z(at_zero, jnp.asarray(RECORD.prompt_index), 2)
        _, residual = objective(y._replace(log_z=log_z), 4.0)
        means = [residual[:2].mean(), residual[2:].mean()]
        np.testing.assert_allclose(means, 0.0, atol=1e-5)


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

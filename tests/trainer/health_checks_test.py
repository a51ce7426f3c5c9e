"""Symptoms of runs that go wrong; steps that are stuck; signals."""

import contextlib
import os
import signal
import sys
import threading
import time

import pytest

from pfjax.infra import dataset_io
from pfjax.trainer import health_checks, loop, preemption

LIMITS = {
    "length_floor": 0.25,
    "truncated_ceiling": 0.99,
    "rollout_kl": 0.05,
    "patience": 3,
    "has_target": True,
}


def _history(lengths, cut=0.0):
    rows = [{"step": 0, "eval/avg@8": 0.5}]
    return rows + [
        {"step": i, "completions/mean_length": n, "completions/clipped_ratio": cut}
        for i, n in enumerate(lengths, start=1)
    ]


@pytest.mark.parametrize(
    "lengths, is_wrong",
    [
        ([100, 110, 90, 60, 24, 24, 24], True),
        ([100, 110, 90, 60, 24, 26, 24], False),  # once above the floor
        ([100, 110, 90, 24, 24], False),  # not long enough
        ([100, 110, 90, 300, 300, 300], False),
        ([1, 1, 1], False),  # that is the start itself
    ],
)
def test_collapse_of_lengths(lengths, is_wrong):
    found = health_checks.symptoms(_history(lengths), **LIMITS)
    assert bool(found) == is_wrong
    if found:
        for text in ("up to step 7", "24.0 tokens, 100.0 at the start", "mean_length"):
            assert text in found[0]


def test_a_sampler_that_disagrees_with_the_scorer_is_noticed_in_one_step():
    rows = _history([100])
    # What bfloat16 alone did to 28 layers of random weights.
    rows[-1] |= {"rollout/kl": 0.007, "rollout/logp_gap_mean": 0.095}
    assert not health_checks.symptoms(rows, **LIMITS)
    rows[-1]["rollout/kl"] = 0.06
    (found,) = health_checks.symptoms(rows, **LIMITS)
    assert "diverges from the scorer by 0.06 nats per token at step 1" in found


def test_truncation_of_all():
    (found,) = health_checks.symptoms(_history([10, 10, 10], cut=1.0), **LIMITS)
    assert "100% were cut" in found and "completions/clipped_ratio" in found
    assert not health_checks.symptoms(_history([10, 10], cut=1.0), **LIMITS)
    assert not health_checks.symptoms(_history([10, 10, 10], cut=0.9), **LIMITS)
    rows = _history([10, 10, 10], cut=1.0)
    rows[-2]["completions/clipped_ratio"] = 0.9
    assert not health_checks.symptoms(rows, **LIMITS)


def test_a_log_z_that_lags_is_named_as_the_cause():
    rows = _history([10] * 3 + [30] * 3, cut=1.0)
    for row, mean in zip(rows[1:], [0.1] * 3 + [6.0] * 3, strict=True):
        row |= {"tb/residual_mean": mean, "tb/residual_std_within_prompt": 0.3}
    (found,) = health_checks.symptoms(rows, **LIMITS)
    assert "100% were cut" in found and "Likely log Z' lags behind" in found
    assert "max_new_tokens is too small" not in found
    (found,) = health_checks.symptoms(rows, **LIMITS | {"has_target": False})
    assert "Likely max_new_tokens is too small" in found


@pytest.mark.parametrize(
    ("spread", "nats", "has_target", "said"),
    [
        # The smoke recipe with four updates per rollout, which one of two seeds survives.
        (
            [0.28, 0.94, 1.02, 12.6, 26.2, 23.5],
            4.5,
            True,
            "at least 13, 0.75 at the start",
        ),
        ([0.28, 0.94, 1.02, 12.6, 2.2, 23.5], 4.5, True, ""),  # not for long enough
        ([0.28, 0.94, 1.02, 12.6, 26.2], 4.5, True, ""),
        ([0.0, 0.0, 0.0, 0.1, 0.1, 0.1], 0.01, True, ""),  # alpha 1
        ([0.28, 0.94, 1.02, 12.6, 26.2, 23.5], 4.5, False, ""),
    ],
)
def test_a_run_that_diverges(spread, nats, has_target, said):
    rows = _history([20] * len(spread))
    for row, x in zip(rows[1:], spread, strict=True):
        row |= {"tb/residual_std_within_prompt": x, "kl/policy_base_per_token": nats}
    found = health_checks.symptoms(rows, **LIMITS | {"has_target": has_target})
    assert len(found) == bool(said)
    if said:
        assert (
            said in found[0] and "up to step 6" in found[0] and "4.5 nats" in found[0]
        )


@pytest.mark.parametrize(
    "rewards, spread, is_constant",
    [
        ([0.5, 0.0, 0.0, 0.0], 0.0, True),
        ([1.0, 1.0, 1.0], 0.0, True),
        ([0.0, 0.0, 0.1], 0.0, False),  # prompts of the last step differ
        ([0.5, 0.5, 0.5], 0.5, False),  # responses to a prompt do
        ([0.0, 0.0], 0.0, False),  # not for long enough
        ([], 0.0, False),
    ],
)
def test_a_reward_that_is_constant_is_said(rewards, spread, is_constant):
    rows = [{"step": 0}] + [
        {"step": i, "reward/mean": x, "reward/std": spread}
        for i, x in enumerate(rewards, start=1)
    ]
    found = health_checks.suspicions(rows, patience=3)
    assert len(found) == is_constant
    if found:
        assert f"had the same reward, {rewards[-1]:g} " in found[0]


def _quiet(**changed):
    """Six steps of which the last three are otherwise as told."""
    row = {
        "completions/mean_length": 20.0,
        "completions/clipped_ratio": 0.0,
        "completions/repeats_across_prompts": 0.1,
        "tb/residual_mean": 0.05,
        "tb/residual_std_within_prompt": 0.4,
        "tb/exponent": 1.5,
    }
    later = row | {k: v for k, v in changed.items()}
    return [{"step": i, **(row if i < 4 else later)} for i in range(1, 7)]


@pytest.mark.parametrize(
    ("changed", "alpha", "said"),
    [
        ({}, 4.0, ""),
        ({"completions/repeats_across_prompts": 0.9}, 4.0, "one thing to all"),
        ({"completions/repeats_across_prompts": 0.35}, 4.0, ""),
        ({"completions/clipped_ratio": 0.3}, 0.5, "30% of the responses are cut"),
        ({"completions/clipped_ratio": 0.1}, 0.5, ""),
        # 1.5 of 4 is a sixth of the way, 3.4 four fifths.
        ({"tb/residual_std_within_prompt": 0.05}, 4.0, "power of 1.50 rather than 4"),
        ({"tb/residual_std_within_prompt": 0.2}, 4.0, ""),
        ({"tb/residual_std_within_prompt": 0.05, "tb/exponent": 3.4}, 4.0, ""),
        (
            {"tb/residual_std_within_prompt": 0.05, "tb/exponent": 0.9},
            0.5,
            "0.90 rather",
        ),
        ({"tb/residual_std_within_prompt": 0.05}, None, ""),
        # What all share: nothing beside what tells responses apart, or all there is.
        ({"tb/residual_mean": 0.7}, 0.5, ""),
        (
            {"tb/residual_mean": 0.9, "completions/clipped_ratio": 1.0},
            0.5,
            "rewards longer ones",
        ),
        ({"tb/residual_mean": -0.9}, 0.5, "rewards shorter ones"),
        # Near the target both are small, and the mean may be the larger.
        (
            {"tb/residual_mean": 0.3, "tb/residual_std_within_prompt": 0.1},
            4.0,
            "",
        ),
    ],
)
def test_a_match_that_is_none_is_said(changed, alpha, said):
    found = health_checks.suspicions(_quiet(**changed), patience=3, alpha=alpha)
    assert len(found) == bool(said)
    assert not said or said in found[0]


@pytest.mark.parametrize(
    "beta, is_per_token, end, warning",
    [
        (2.0, False, " (beta 2: odds change by up to e^2)", None),
        (
            2.0,
            True,
            " (beta 2 per token, at 12 tokens: odds change by up to e^24)",
            None,
        ),
        (5.0, True, "e^60)", "by 60 nats per response"),
        (0.009, False, "e^0.009)", "by 0.009 nats, next to nothing"),
        (None, False, "from 0 to 1", None),
    ],
)
def test_the_scale_of_a_reward_is_said(beta, is_per_token, end, warning):
    row = {"completions/mean_length": 12.0, "reward/mean": 0.41, "reward/std": 0.18}
    row |= {"reward/min": 0.0, "reward/max": 1.0}
    first, *more = health_checks.reward_scale(row, beta, is_per_token)
    start = "reward: mean 0.41, std within a prompt 0.18, from 0 to 1"
    assert first.startswith(start) and first.endswith(end)
    assert [warning in x for x in more] == [True] * bool(warning)
    del row["completions/mean_length"]  # of a step without samples of the policy
    of_such = health_checks.reward_scale(row, beta, is_per_token)
    assert of_such == [first.partition(" (beta")[0]] if is_per_token else [first, *more]
    del row["reward/mean"]
    assert health_checks.reward_scale(row, beta, is_per_token) == []


@pytest.mark.slow
def test_a_run_of_constant_reward_goes_on_and_says_so(config, tmp_path, capsys):
    """Responses of one token hold no answer."""
    config.objective, config.samples_per_prompt = "grpo", 8
    config.behavior.base = 0.0  # a policy gradient learns from its own
    config.health_checks.truncated_ceiling = 1.0
    with open(config.data.train, "w") as file:
        file.write('{"prompt": "a b", "answer": "7"}\n')
    loop.train_and_evaluate(config, str(tmp_path / "run"))
    said = capsys.readouterr().out
    assert said.count("warning: every response of the last 2") == 2
    assert said.count("reward: mean 0, std within a prompt 0, from 0 to 0\n") == 1


@pytest.fixture
def config(enumerable_folder, tmp_path):
    from configs import smoke

    c = smoke.get_config()
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a b"}\n')
    with c.unlocked():
        c.update_from_flattened_dict(
            {
                "model": str(enumerable_folder),
                "data.train": str(file),
                "data.eval": "",
                "num_steps": 4,
                "prompts_per_step": 8,
                "max_new_tokens": 1,  # which cuts nearly all
                "pack_length": 32,
                "microbatch_size": 1,
                "updates_per_rollout": 1,
                "mesh.data": 8,
                "mesh.fsdp": 1,
                "health_checks.patience": 2,
                "health_checks.truncated_ceiling": 0.5,
            }
        )
    return c


@pytest.mark.parametrize(
    "action",
    [
        pytest.param(x, marks=() if x == "stop" else pytest.mark.slow)
        for x in ("stop", "warn", "off")
    ],
)
def test_a_run_stops_or_warns_as_the_config_says(config, tmp_path, capsys, action):
    config.health_checks.action = action
    if action == "stop":
        with pytest.raises(
            health_checks.Unhealthy, match="after step 2: responses do not"
        ):
            loop.train_and_evaluate(config, str(tmp_path / "run"))
    else:
        loop.train_and_evaluate(config, str(tmp_path / "run"))
    rows = dataset_io.read_jsonl(tmp_path / "run/metrics.jsonl")
    assert [r["step"] for r in rows] == list(range(3 if action == "stop" else 5))
    assert capsys.readouterr().out.count("warning: responses") == 2 * (action == "warn")


@contextlib.contextmanager
def _stderr_in(path):
    """What this process writes to standard error, threads and C too, is in a file: pytest
    loses what is written while it reads."""
    saved, before = os.dup(2), sys.stderr
    with path.open("wb") as file:
        os.dup2(file.fileno(), 2)
        try:
            with open(2, "w", closefd=False, buffering=1) as sys.stderr:
                yield
        finally:
            sys.stderr = before
            os.dup2(saved, 2)
            os.close(saved)


def test_a_stuck_step_tells_where_it_stands(tmp_path):
    err = tmp_path / "stderr"
    with _stderr_in(err):
        _stuck_steps(err)


def _stuck_steps(err):
    end = threading.Event()
    others = [threading.Thread(target=end.wait) for _ in range(120)]
    for thread in others:  # faulthandler shows the youngest hundred
        thread.start()
    wanted = (
        "process 0: step 7 has taken more than 0.2 s",
        "Timeout",
        "in test_a_stuck_step_tells_where_it_stands",
    )
    patience = time.monotonic() + 120
    with health_checks.watch(7, 0.2):
        while not all(text in err.read_text() for text in wanted):
            assert time.monotonic() < patience, err.read_text()[:5000]
            time.sleep(0.1)
    end.set()
    with health_checks.watch(8, 2.0):
        pass
    time.sleep(2.5)
    assert "step 8" not in err.read_text()


@pytest.fixture
def interruptible():
    """Ctrl-C interrupts, as it does not in what a shell started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_the_first_signal_is_noted_and_the_second_does_what_it_did(capfd):
    with preemption.Preemption() as told:
        assert not told.is_asked
        signal.raise_signal(signal.SIGINT)
        assert told.is_asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert "SIGINT: saving after this step" in capfd.readouterr().err


def test_a_run_of_one_response_per_prompt_is_watched_too():
    """It has no spread among responses, and no exponent."""
    of_groups = ("tb/residual_std_within_prompt", "tb/exponent")
    drop = lambda rows: [
        {k: v for k, v in row.items() if k not in of_groups} for row in rows
    ]
    rows = drop(_quiet(**{"completions/repeats_across_prompts": 0.9}))
    (found,) = health_checks.suspicions(rows, 3, 4.0)
    assert "given to other prompts" in found
    assert health_checks.suspicions(drop(_quiet()), 3, 4.0) == []


@pytest.mark.parametrize(("low", "is_constant"), [(0.5, True), (0.0, False)])
def test_rewards_of_one_response_per_prompt_are_constant_if_all_are_equal(
    low, is_constant
):
    row = {"reward/mean": 0.5, "reward/min": low, "reward/max": 0.5}
    found = health_checks.suspicions([{"step": i} | row for i in range(3)], patience=3)
    assert len(found) == is_constant
    said = health_checks.reward_scale(row, None, False)[0]
    assert said == f"reward: mean 0.5, from {low:g} to 0.5"

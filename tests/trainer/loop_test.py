"""The whole trainer: where it ends, that it resumes, what it refuses."""

import collections
import dataclasses
import functools
import json
import pathlib
import re
import shutil
import signal

import jax
import ml_collections
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from configs import default, smoke
from pfjax import objectives
from pfjax.infra import dataset_io, hardware, sharding, uploads
from pfjax.model import attention, hf, hf_config, lora, scoring, tokenizer, transformer
from pfjax.report import runs
from pfjax.trainer import (
    behavior,
    checkpoint,
    config_checks,
    iteration,
    loop,
    match,
    preemption,
    setup,
)
from tests.conftest import (
    all_responses,
    count_compiles,
    length_aware_target,
    log_power,
    of_tokens,
    power_target,
    run_command,
    total_variation,
    use_one_device,
)
from tests.model import small_families

PROMPT = "a b"
ETA = 0.3  # under which some tokens of the model whose responses can be listed are rare


@pytest.fixture
def config(enumerable_folder, tmp_path) -> ml_collections.ConfigDict:
    """Trains the model whose responses can be listed, for 4 steps."""
    return small_config(enumerable_folder, tmp_path)


def small_config(model, folder) -> ml_collections.ConfigDict:
    prompts = folder / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": PROMPT, "answer": "1"}) + "\n")
    c = default.get_config()
    c.model = str(model)
    c.data.train = str(prompts)
    c.data.eval = ""
    c.format_penalty = 0.0  # nothing here has a box
    c.prompts_per_step = 8
    c.samples_per_prompt = 16
    c.max_new_tokens = 3
    c.microbatch_size = 1
    c.pack_length = 32
    c.dtype = "float32"
    c.mesh.data, c.mesh.fsdp = 8, 1
    c.optim.learning_rate = 3e-3
    c.optim.log_z_learning_rate = 3e-2
    c.optim.weight_decay = 0.0
    c.num_steps = 4
    c.checkpoint_every = 2
    c.log_every = 1000
    c.health_checks.action = "off"  # its target is cut at 3 tokens nearly always
    c.match_prompts = 0
    return c


@pytest.fixture(scope="module")
def whole(_enumerable_folder, tmp_path_factory):
    """Of a run that several tests look at: its config, with evaluations, and folder."""
    folder = tmp_path_factory.mktemp("whole")
    c = small_config(_enumerable_folder, folder)
    c.data.eval, c.eval_every = c.data.train, 2
    loop.train_and_evaluate(c, str(folder / "run"))
    return c, folder / "run"


def _distribution(folder):
    """log p and length of every response to the prompt."""
    responses = all_responses(vocab=4, stop=1, max_tokens=3)
    scores = scoring.score(
        hf.load(folder), [[2, 3, *y] for y in responses], [2] * len(responses)
    )
    return np.array([s.sum() for s in scores]), np.array([len(y) for y in responses])


@pytest.fixture
def converging(config, monkeypatch) -> ml_collections.ConfigDict:
    """Comes within half of what is asked for, with any seed.

    Of 1024 samples a step none that matters is rare. One device, as a step on eight takes
    twice as long and is the same.
    """
    use_one_device(monkeypatch)
    config.mesh.data = 1
    config.samples_per_prompt = 128
    config.microbatch_size, config.pack_length = 64, 64
    config.optim.learning_rate = 1e-2
    return config


@pytest.mark.long_running
@pytest.mark.parametrize(
    ("objective", "alpha", "log_z", "num_steps"),
    [
        pytest.param("powerflow", 4.0, "head", 100, marks=pytest.mark.slow),
        pytest.param("powerflow", 0.5, "group", 200, marks=pytest.mark.slow),
        pytest.param("tb_traj", 2.0, "head", 200, marks=pytest.mark.slow),
        pytest.param("tb_token", 2.0, "head", 200, marks=pytest.mark.slow),
        pytest.param("rl_traj", 2.0, "head", 200, marks=pytest.mark.slow),
        pytest.param("rl_token", 2.0, "head", 200, marks=pytest.mark.slow),
    ],
)
def test_training_reaches_the_exact_target(
    converging, tmp_path, objective, alpha, log_z, num_steps
):
    config = converging
    config.objective, config.alpha, config.log_z = objective, alpha, log_z
    config.num_steps = config.checkpoint_every = num_steps
    if alpha > 2:  # a rare response is far from its target, and must not kick
        config.optim.clip_norm = 0.05
    if (objective, alpha) in (("powerflow", 0.5), ("rl_token", 2.0)):
        # Fast steps leave directions of no return; rates that go to 0 leave no noise.
        config.optim.learning_rate, config.optim.schedule = 3e-3, "cosine"
    loop.train_and_evaluate(config, str(tmp_path / "run"))
    base, length = _distribution(config.model)
    trained, _ = _distribution(tmp_path / "run/hf")
    assert np.exp(base).sum() == pytest.approx(1, abs=1e-4)
    assert np.exp(trained).sum() == pytest.approx(1, abs=1e-4)
    last = dataset_io.read_jsonl(tmp_path / "run/metrics.jsonl")[-1]
    if objective in ("powerflow", "tb_token"):
        target, want_log_z = length_aware_target(base, length, alpha)
    elif objective == "rl_token":
        # sum p^alpha e^{-mu |y|} = e, as the penalty is a mean over tokens.
        target, want_log_z = length_aware_target(base - 1 / alpha, length, alpha)
    else:
        target, want_log_z = power_target(base, alpha)
    assert total_variation(np.exp(base), target) > 0.15
    assert total_variation(np.exp(trained), target) < 0.02
    assert last["tb/logz_mean"] == pytest.approx(want_log_z, abs=0.05)


def _of_family(name, folder, out):
    """A model of another family with the tokenizer of an enumerable one; its windows are of
    2 tokens, where prompt and response have up to 5."""
    config = small_families.config_of(name, hf.load(folder).config, window=2)
    params = transformer.init_params(config, jax.random.key(8))
    params["head"] = 2.0 * params["head"]
    hf.save(transformer.Policy(config, params), out)
    for file in folder.glob("*token*"):
        shutil.copy(file, out)
    return str(out)


@pytest.mark.long_running
@pytest.mark.slow
@pytest.mark.parametrize("name", small_families.NAMES)
def test_models_of_every_family_reach_the_exact_target(converging, tmp_path, name):
    config = converging
    config.model = _of_family(name, pathlib.Path(config.model), tmp_path / name)
    config.alpha, config.num_steps, config.checkpoint_every = 2.0, 200, 200
    config.optim.clip_norm, config.optim.schedule = 0.05, "cosine"
    base, length = _distribution(config.model)
    loop.train_and_evaluate(config, str(tmp_path / "run"))
    trained, _ = _distribution(tmp_path / "run/hf")
    target, _ = length_aware_target(base, length, 2.0)
    assert total_variation(np.exp(base), target) > 0.1
    assert total_variation(np.exp(trained), target) < 0.02
    rows = dataset_io.read_jsonl(tmp_path / "run/metrics.jsonl")
    assert max(x.get("rollout/logp_gap_max", 0.0) for x in rows) < 1e-4


@pytest.mark.long_running
@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "log_z", "replay"),
    [
        ("powerflow", "head", 0.0),
        ("powerflow", "head", 0.5),
        ("powerflow", "group", 0.0),
        ("tb_traj", "head", 0.0),
    ],
)
def test_the_target_is_the_same_whoever_draws(
    converging, tmp_path, objective, log_z, replay
):
    config = converging
    config.objective, config.alpha, config.log_z = objective, 2.0, log_z
    config.behavior.base, config.behavior.base_temperature = 0.5 - replay / 2, 1.5
    config.behavior.replay = replay
    config.match_prompts = 1
    config.optim.schedule = "cosine"
    config.num_steps = config.checkpoint_every = 200
    loop.train_and_evaluate(config, str(tmp_path / "run"))
    base, length = _distribution(config.model)
    trained, _ = _distribution(tmp_path / "run/hf")
    exact = power_target(base, 2.0)
    if objective == "powerflow":
        exact = length_aware_target(base, length, 2.0)
    assert total_variation(np.exp(trained), exact[0]) < 0.01
    last = dataset_io.read_jsonl(tmp_path / "run/metrics.jsonl")[-1]
    assert last["tb/logz_mean"] == pytest.approx(exact[1], abs=0.02)
    assert last["tb/exponent_base"] == pytest.approx(2.0, abs=0.1)
    # The policy's own samples are scored as they were drawn; the base's are not theirs.
    assert last["rollout/logp_gap_max"] < 1e-4
    found = json.loads((tmp_path / "run/match.json").read_text())
    assert found["total_variation"] < 0.02 and found["exponent"] == pytest.approx(
        2, abs=0.1
    )


@pytest.mark.parametrize("eta_cutoff", [0.0, ETA])
def test_below_alpha_1_the_match_is_of_the_whole_target(
    config, tmp_path, monkeypatch, eta_cutoff
):
    """The base draws for it at temperature 2, and is scored as it drew."""
    use_one_device(
        monkeypatch
    )  # eight that share two cores may wait for each other too long
    monkeypatch.setattr(match, "SAMPLES", 512)
    config.alpha, config.match_prompts, config.num_steps = 0.5, 1, 2
    config.eta_cutoff, config.mesh.data = eta_cutoff, 1
    loop.train_and_evaluate(config, str(tmp_path / "run"))
    (base, length), (trained, _) = map(
        _distribution, (config.model, tmp_path / "run/hf")
    )
    target, log_z = _flattened(base, length, eta_cutoff)
    found = json.loads((tmp_path / "run/match.json").read_text())
    want = total_variation(np.exp(trained), target)
    assert found["total_variation"] == pytest.approx(want, rel=0.1) and want > 0.1
    assert found["log_z"] == pytest.approx(log_z, abs=0.02)


@pytest.mark.long_running
@pytest.mark.slow
@pytest.mark.parametrize("log_z", ["head", "group"])
def test_rare_tokens_keep_the_power_1(converging, tmp_path, log_z):
    config = converging
    config.alpha, config.eta_cutoff, config.log_z = 0.5, ETA, log_z
    config.optim.learning_rate, config.optim.schedule = 3e-3, "cosine"
    config.num_steps = config.checkpoint_every = 200
    base, length = _distribution(config.model)
    target, want_log_z = _flattened(base, length, ETA)
    assert total_variation(target, length_aware_target(base, length, 0.5)[0]) > 0.1
    loop.train_and_evaluate(config, str(tmp_path / "run"))
    trained, _ = _distribution(tmp_path / "run/hf")
    assert total_variation(np.exp(trained), target) < 0.02
    last = dataset_io.read_jsonl(tmp_path / "run/metrics.jsonl")[-1]
    assert last["tb/logz_mean"] == pytest.approx(want_log_z, abs=0.05)
    assert last["tb/exponent"] == pytest.approx(0.5, abs=0.05)


def _flattened(log_p, length, eta_cutoff):
    """The square root of the model, but for rare tokens; and its log Z'."""
    return length_aware_target(log_power(log_p, 0.5, eta_cutoff), length, 1.0)


@pytest.mark.long_running
@pytest.mark.slow
@pytest.mark.parametrize("source", ["base", "file"])
def test_a_likelihood_ends_where_the_responses_come_from(converging, tmp_path, source):
    config = converging
    config.objective = "sft"
    base, length = _distribution(config.model)
    if source == "base":
        config.behavior.base, config.behavior.base_temperature = 1.0, 0.5
        wanted = _tempered(base, 0.5)
        assert total_variation(power_target(base, 2.0)[0], wanted) > 0.05
    else:
        wanted = length_aware_target(base, length, 2.0)[0]
        _write_listed(tmp_path / "target.jsonl", np.rint(4096 * wanted))
        config.behavior.file = str(tmp_path / "target.jsonl")
        config.behavior.from_file = 1.0
    # Each response divided by its own length would end here.
    other = wanted / length / (wanted / length).sum()
    assert min(total_variation(x, wanted) for x in (np.exp(base), other)) > 0.05
    # At three times the rate and half of the steps some seeds end at 0.02 and more.
    config.optim.learning_rate, config.optim.schedule = 3e-3, "cosine"
    config.num_steps = config.checkpoint_every = 300
    loop.train_and_evaluate(config, str(tmp_path / "run"))
    trained, _ = _distribution(tmp_path / "run/hf")
    assert total_variation(np.exp(trained), wanted) < 0.01


def _tempered(log_p, temperature):
    """All responses of the model at a temperature of sampling, from their log-probs."""

    def of_token(p, token):
        hot = p ** (1 / temperature)
        return hot[token] / hot.sum()

    return np.array(
        [np.prod([of_token(*x) for x in response]) for response in of_tokens(log_p)]
    )


def _write_listed(path, counts):
    """Each response to the prompt as often as it counts."""
    rows = (
        {"prompt_tokens": [2, 3], "completion_tokens": y}
        for y, n in zip(all_responses(4, 1, 3), counts, strict=True)
        for _ in range(int(n))
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
def test_steps_without_samples_of_the_policy_train_and_say_nothing_of_it(
    config, tmp_path, capsys
):
    """Step 1 is of a file, step 2 of the base, step 3 half of the policy."""
    given = {"prompt_id": 0, "prompt_tokens": [2, 3], "completion_tokens": [2, 1]}
    (tmp_path / "given.jsonl").write_text(json.dumps(given) + "\n")
    config.behavior.file = str(tmp_path / "given.jsonl")
    config.schedules = (
        "behavior.base:0@1,1@2,0.5@3,behavior.from_file:1@1,0@2,alpha:2@1,3@3"
    )
    config.num_steps, config.log_every = 3, 1
    config.health_checks.action, config.health_checks.patience = "warn", 1
    loop.train_and_evaluate(config, str(tmp_path / "run"))
    rows = dataset_io.read_jsonl(tmp_path / "run/metrics.jsonl")[-3:]
    assert all(np.isfinite(x) for row in rows for x in row.values())
    # Of a schedule, log Z' moves with alpha before the head has learned.
    assert rows[1]["tb/logz_mean"] < rows[0]["tb/logz_mean"] - 0.1
    of_policy = rows[2].keys() - rows[1].keys()
    assert {"entropy", "tb/slope", "rollout/kl", "completions/boxed_frac"} < of_policy
    # The file has one response, which tells no slope.
    assert rows[1].keys() - rows[0].keys() == {
        "rollout/waste",
        "tb/exponent",
        "tb/exponent_se",
        "tb/exponent_base",
        "tb/exponent_base_se",
    }
    assert rows[0]["num_tokens"] == 2 * 8 * 16
    assert "step 1/3  loss " in capsys.readouterr().out


@pytest.mark.long_running
@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "per", "beta"),
    [
        ("powerflow", "response", 6.0),
        ("powerflow", "token", 1.5),
        ("tb_traj", "response", 6.0),
    ],
)
def test_training_reaches_the_target_tilted_by_a_function(
    converging, tmp_path, objective, per, beta
):
    (tmp_path / "mine.py").write_text(
        "def twos(completion_ids, **kwargs):\n"
        "    return [y.count(2) / 2 for y in completion_ids]\n"
    )
    config = converging
    config.objective, config.reward_per = objective, per
    config.alpha, config.beta = 2.0, beta
    config.optim.learning_rate, config.optim.schedule = 3e-3, "cosine"
    config.reward = f"{tmp_path / 'mine.py'}:twos"
    config.num_steps = config.checkpoint_every = 400
    loop.train_and_evaluate(config, str(tmp_path / "run"))
    base, length = _distribution(config.model)
    trained, _ = _distribution(tmp_path / "run/hf")
    reward = np.array([y.count(2) / 2 for y in all_responses(4, 1, 3)])
    many = length if per == "token" else 1
    tilted = base + beta / 2 * reward * many
    normalised = power_target if objective == "tb_traj" else length_aware_target
    lengths = () if objective == "tb_traj" else (length,)
    target, untilted = (normalised(x, *lengths, 2.0)[0] for x in (tilted, base))
    # Of one response that has all of the mass, a correlation is noise.
    assert target.max() < 0.8 and total_variation(untilted, target) > 0.1
    assert total_variation(np.exp(trained), target) < 0.02
    last = dataset_io.read_jsonl(tmp_path / "run/metrics.jsonl")[-1]
    assert last["reward/mean"] > 0 and last["tb/corr_logp_target"] > 0.95


@pytest.mark.long_running
@pytest.mark.slow
@pytest.mark.parametrize("objective", ["powerflow", "rl_traj"])
def test_annealing_reaches_the_target_of_the_end(converging, tmp_path, objective):
    """log Z too, which its own steps of 0.001 could not bring there from 0."""
    config = converging
    config.objective, config.schedules = objective, "alpha:1@0,4@50"
    config.num_steps = config.checkpoint_every = 200
    config.optim.clip_norm, config.optim.schedule = 0.05, "cosine"
    config.optim.log_z_learning_rate = 1e-3
    loop.train_and_evaluate(config, str(tmp_path / "run"))
    base, length = _distribution(config.model)
    trained, _ = _distribution(tmp_path / "run/hf")
    target, log_z = power_target(base, 4.0)
    if objective == "powerflow":
        target, log_z = length_aware_target(base, length, 4.0)
    assert total_variation(np.exp(trained), target) < 0.02
    last = dataset_io.read_jsonl(tmp_path / "run/metrics.jsonl")[-1]
    assert last["tb/logz_mean"] == pytest.approx(log_z, abs=0.05)


@pytest.mark.slow
def test_every_prefix_that_may_stop_gets_its_share(converging, tmp_path):
    """Sub-trajectory balance says nothing of what is cut: the rest is p^alpha."""
    config = converging
    config.objective, config.alpha = "subtb", 2.0
    config.num_steps = config.checkpoint_every = 100
    loop.train_and_evaluate(config, str(tmp_path / "run"))
    ended = np.array([y[-1] == 1 for y in all_responses(4, 1, 3)])
    base = _distribution(config.model)[0][ended]
    trained = _distribution(tmp_path / "run/hf")[0][ended]
    target, _ = power_target(base, 2.0)
    start = np.exp(base) / np.exp(base).sum()
    assert total_variation(start, target) > 0.15
    assert total_variation(np.exp(trained) / np.exp(trained).sum(), target) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective",
    [k for k, o in objectives.OBJECTIVES.items() if o.reward],
)
def test_rivals_train_on_their_rewards(tmp_path, monkeypatch, objective):
    use_one_device(monkeypatch)
    c = smoke.get_config()
    c.objective = objective
    c.data.train, c.data.eval = "pfjax/toy/train_answered.jsonl", ""
    c.num_steps, c.prompts_per_step, c.microbatch_size = 3, 8, 64
    c.behavior.base = 0.0
    c.updates_per_rollout = 2 if objective in ("empo", "intuitor") else 1
    c.beta = 15.0 if objective == "flowrl" else 0.0
    loop.train_and_evaluate(c, str(tmp_path / "run"))
    rows = dataset_io.read_jsonl(tmp_path / "run/metrics.jsonl")[1:]
    assert len(rows) == 3
    for row in rows:
        assert row["grad_norm"] > 0
        # Right in half of all cases; sure by at most log 32 + KL(U || p).
        low, high = (3, 30) if objective == "intuitor" else (0.1, 0.95)
        assert low < row["reward/mean"] < high and row["reward/std"] > 0
    assert rows[-1]["rollout/logp_gap_max"] < 1e-4


@pytest.mark.slow
def test_a_run_on_random_rewards_continues_bit_for_bit(config, tmp_path, monkeypatch):
    use_one_device(monkeypatch)
    config.mesh.data, config.checkpoint_every = 1, 1
    config.objective, config.reward = "grpo", "random"
    pathlib.Path(config.data.train).write_text('{"prompt": "a b"}\n')  # no answer
    for folder, num_steps in (("whole", 2), ("parts", 1), ("parts", 2)):
        config.num_steps = num_steps
        loop.train_and_evaluate(config, str(tmp_path / folder))
    rows = _deterministic(tmp_path / "whole")
    assert _deterministic(tmp_path / "parts") == rows
    assert all(0.3 < r["reward/mean"] < 0.7 for r in rows[1:])
    assert rows[1]["reward/mean"] != rows[2]["reward/mean"]


@pytest.mark.slow
def test_a_run_with_a_teacher_continues_bit_for_bit(tmp_path, monkeypatch):
    use_one_device(monkeypatch)
    c = smoke.get_config()
    c.objective, c.teacher_decay, c.lora.rank = "ttrl", 0.5, 4
    c.data.eval, c.behavior.base, c.checkpoint_every = "", 0.0, 1
    c.optim.schedule = "constant"
    c.microbatch_size = 32
    for folder, num_steps in (("whole", 3), ("parts", 2), ("parts", 3)):
        c.num_steps = num_steps
        loop.train_and_evaluate(c, str(tmp_path / folder))
    rows = _deterministic(tmp_path / "whole")
    assert _deterministic(tmp_path / "parts") == rows
    # Without it the same responses of the first step are rewarded otherwise.
    c.teacher_decay, c.num_steps = 0.0, 1
    loop.train_and_evaluate(c, str(tmp_path / "alone"))
    first, alone = rows[1], _deterministic(tmp_path / "alone")[1]
    length, mean = "completions/mean_length", "reward/mean"
    assert first[length] == alone[length] and 0 < first[mean] < alone[mean]


@pytest.mark.long_running
@pytest.mark.slow
def test_a_policy_reaches_the_power_of_another_base_than_its_start(
    converging, enumerable_folder, tmp_path
):
    config = converging
    start = hf.load(enumerable_folder)
    noise = lambda x: x + 0.2 * np.random.default_rng(0).normal(size=x.shape)
    other = start._replace(params=jax.tree.map(noise, start.params))
    config.base = config.model
    config.model = str(tmp_path / "start")
    hf.save(other, config.model, base=config.base)
    config.alpha, config.num_steps, config.checkpoint_every = 2.0, 250, 250
    loop.train_and_evaluate(config, str(tmp_path / "run"))
    base, length = _distribution(config.base)
    trained, _ = _distribution(tmp_path / "run/hf")
    target, _ = length_aware_target(base, length, 2.0)
    assert total_variation(np.exp(trained), target) < 0.02
    own = length_aware_target(_distribution(config.model)[0], length, 2.0)[0]
    assert total_variation(own, target) > 0.05


def test_a_base_of_other_tokens_is_refused(config, tmp_path):
    config.base = "pfjax/toy"
    with pytest.raises(ValueError, match="pfjax/toy has another tokenizer than"):
        loop.train_and_evaluate(config, str(tmp_path / "run"))
    config.lora.rank = 2
    with pytest.raises(ValueError, match="with adapters the base is the policy's own"):
        loop.train_and_evaluate(config, str(tmp_path / "run"))


def test_what_grades_answers_refuses_prompts_without(config, tmp_path):
    config.objective = "grpo"
    pathlib.Path(config.data.train).write_text('{"prompt": "a"}\n')
    with pytest.raises(ValueError, match="1 of 1 prompts of .* have no answer"):
        loop.train_and_evaluate(config, str(tmp_path / "run"))
    config.objective, config.reward, config.beta = "powerflow", "accuracy", 1.0
    with pytest.raises(ValueError, match="no answer; give them .data.answer_field"):
        loop.train_and_evaluate(config, str(tmp_path / "run"))
    config.reward, config.beta = "", 0.0
    config.objective, config.samples_per_prompt = "ttrl", 1
    with pytest.raises(ValueError, match="samples_per_prompt must be at least 2"):
        loop.train_and_evaluate(config, str(tmp_path / "run"))


def _deterministic(folder):
    rows = dataset_io.read_jsonl(folder / "metrics.jsonl")
    timed = ("time/", "perf/")
    return [{k: v for k, v in r.items() if not k.startswith(timed)} for r in rows]


def test_a_continued_run_equals_one_never_stopped_bit_for_bit(whole, tmp_path):
    (config, whole), parts = whole, tmp_path / "parts"
    shorter = config.copy_and_resolve_references()
    shorter.num_steps = 2
    loop.train_and_evaluate(shorter, str(parts))
    loop.train_and_evaluate(config, str(parts))
    assert _deterministic(parts) == _deterministic(whole)
    assert [r["step"] for r in _deterministic(whole)] == [0, 1, 2, 3, 4]
    for file in ("hf/model.safetensors", "completions/step_000004.jsonl"):
        assert (parts / file).read_bytes() == (whole / file).read_bytes()
    with pytest.raises(ValueError, match="holds 4 steps already; num_steps=2"):
        loop.train_and_evaluate(shorter, str(parts))


@pytest.mark.slow
def test_a_run_killed_in_the_middle_of_a_schedule_ends_as_one_that_was_not(
    config, tmp_path, monkeypatch
):
    """With dropout too, which sampler and scorer know nothing of."""
    config.lora.rank, config.lora.dropout = 2, 0.25
    config.optim.schedule, config.optim.warmup_steps = "cosine", 2
    config.optim.learning_rate = 0.01
    loop.train_and_evaluate(config, str(tmp_path / "whole"))
    do, parts = iteration.train_iteration, tmp_path / "parts"

    def killed(trainer, state, cursor, step, grader):
        if step == 4:
            raise KeyboardInterrupt
        return do(trainer, state, cursor, step, grader)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(iteration, "train_iteration", killed)
        loop.train_and_evaluate(config, str(parts))
    loop.train_and_evaluate(config, str(parts))
    assert _deterministic(parts) == _deterministic(tmp_path / "whole")
    rows = _deterministic(parts)[1:]
    assert max(r["rollout/logp_gap_max"] for r in rows) < 1e-5
    rates = [r["lr"] for r in rows]
    assert rates == [0.005, 0.01, 0.0075, 0.0025]
    longer = config.copy_and_resolve_references()
    longer.num_steps = 8
    with pytest.raises(ValueError, match="num_steps=4 -> cosine over num_steps=8"):
        loop.train_and_evaluate(longer, str(parts))


@pytest.mark.slow
def test_a_run_that_replays_continues_bit_for_bit(config, tmp_path, monkeypatch):
    config.behavior.base = 0.25
    config.schedules = "behavior.replay:0.25@1,0.5@4"
    seen, draw = [], behavior.rollout

    def rollout(*args, **kwargs):
        seen.append(draw(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(behavior, "rollout", rollout)
    loop.train_and_evaluate(config, str(tmp_path / "whole"))
    # The prompt is new at step 1.
    assert [r.num_own for r in seen] == [12, 7, 5, 4]
    known = [
        {tuple(r.tokens[q, g, : r.lengths[q, g]]) for q in range(8) for g in own}
        for r in seen
        for own in (range(r.num_own), range(r.num_own + 4, 16))
    ]
    drawn, replayed = known[::2], known[1::2]
    for step in (1, 2, 3):
        assert replayed[step] and replayed[step] <= set().union(*drawn[:step])
    shorter = config.copy_and_resolve_references()
    shorter.num_steps = 3
    for c in (shorter, config):
        loop.train_and_evaluate(c, str(tmp_path / "parts"))
    assert _deterministic(tmp_path / "parts") == _deterministic(tmp_path / "whole")
    (of_whole,), (of_parts,) = (
        (tmp_path / x / "hf").glob("*.safetensors") for x in ("whole", "parts")
    )
    assert of_whole.read_bytes() == of_parts.read_bytes()
    config.behavior.replay = 0.5
    with pytest.raises(ValueError, match=r"behavior.replay: 0.0 -> 0.5"):
        loop.train_and_evaluate(config, str(tmp_path / "parts"))


@pytest.mark.slow
def test_a_run_with_schedules_is_one_program_and_continues_bit_for_bit(
    config, tmp_path
):
    config.reward, config.schedules = "length", "alpha:1@0,4@4, beta:0@1,2@3"
    config.checkpoint_every = 1
    with count_compiles() as count:
        loop.train_and_evaluate(config, str(tmp_path / "whole"))
    rows = _deterministic(tmp_path / "whole")
    assert [r["target/alpha"] for r in rows[1:]] == [1.75, 2.5, 3.25, 4.0]
    assert [r["target/beta"] for r in rows[1:]] == [0.0, 1.0, 2.0, 2.0]
    assert sum(n for k, n in count.items() if "train_step" in k) == 1, count
    for config.num_steps in (2, 4):
        loop.train_and_evaluate(config, str(tmp_path / "parts"))
    assert _deterministic(tmp_path / "parts") == rows
    files = [tmp_path / x / "hf/model.safetensors" for x in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()
    config.schedules = "alpha:1@0,4@5, beta:0@1,2@3"
    with pytest.raises(ValueError, match="another config:\n  schedules: alpha:1@0,4@4"):
        loop.train_and_evaluate(config, str(tmp_path / "parts"))


@pytest.mark.slow
def test_a_schedule_of_one_value_is_that_value(whole, config, tmp_path):
    """Loss, log Z and how well the policy matches, until the schedule moves."""
    config.schedules, config.alpha = "alpha:4@2,2@4", 0.5
    loop.train_and_evaluate(config, str(tmp_path / "run"))
    found, want = _deterministic(tmp_path / "run"), _deterministic(whole[1])
    for row, same in zip(found[1:3], want[1:3], strict=True):
        assert row.pop("target/alpha") == 4.0
        assert row == pytest.approx({k: same[k] for k in row}, rel=1e-3, abs=1e-5)
    # Two powers less are two times the mean log p_0 per token less.
    per_token = found[4]["base/logp_per_token"]
    change = found[4]["tb/logz_mean"] - want[4]["tb/logz_mean"]
    assert change == pytest.approx(-2 * per_token, rel=0.3)
    assert found[4]["tb/slope"] > 1.5 * want[4]["tb/slope"]


@pytest.mark.slow
def test_first_step_of_the_base_has_no_residual_and_no_gap(whole, config, tmp_path):
    config.num_steps = 1
    config.updates_per_rollout = 3  # of 3, 3 and 2 prompts
    loop.train_and_evaluate(config, str(tmp_path / "run"))
    row = dataset_io.read_jsonl(tmp_path / "run/metrics.jsonl")[-1]
    assert row["rollout/logp_gap_max"] < 1e-5
    # Only the first of the three updates is on policy: the mean weight is not 1.
    # (That its own are exactly 1 is shown in step_test.)
    assert 0.8 < row["is/w_mean"] != 1.0
    row = dataset_io.read_jsonl(whole[1] / "metrics.jsonl")[1]
    assert row["is/w_mean"] == 1.0
    assert abs(row["kl/policy_base_per_token"]) < 1e-5
    assert abs(row["tb/residual_mean"]) < 1e-5
    assert row["tb/logz_mean"] == pytest.approx(3.0 * row["base/logp_per_token"])


@pytest.mark.slow
def test_adapters_train_beside_a_base_that_stays(config, tmp_path):
    config.lora.rank, config.lora.alpha = 2, 4.0
    config.optim.learning_rate = 3e-2
    config.log_z = "group"
    loop.train_and_evaluate(config, str(tmp_path / "run"))
    rows = dataset_io.read_jsonl(tmp_path / "run/metrics.jsonl")
    # At first the policy is the base exactly; then it moves.
    assert abs(rows[1]["kl/policy_base_per_token"]) < 1e-6
    assert abs(rows[-1]["kl/policy_base_per_token"]) > 1e-3
    assert max(r.get("rollout/logp_gap_max", 0) for r in rows) < 1e-5
    # What was exported whole is the base with the exported adapters.
    import peft
    import torch
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained
    whole = load(tmp_path / "run/hf")
    parts = peft.PeftModel.from_pretrained(load(config.model), tmp_path / "run/adapter")
    tokens = torch.tensor([[2, 3, 2, 0, 3]])
    with torch.no_grad():
        a, b, c = (m(tokens).logits for m in (whole, parts, load(config.model)))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    assert (a - c).abs().max() > 1e-3


@pytest.mark.slow
def test_a_run_that_starts_from_an_adapter_keeps_its_base_as_the_target(
    config, tmp_path, capsys
):
    start, targets = tmp_path / "adapter", lora.projections("q_proj,v_proj,up_proj")
    model = dataclasses.replace(
        hf.load(config.model).config, lora_rank=2, lora_alpha=4.0, lora_targets=targets
    )
    # Both parts as B is scaled: neither is zero.
    made = lora.init_params(model, jax.random.key(0))["blocks"]
    noise = lambda k, x: 0.2 * jax.random.normal(jax.random.key(len(k)), x.shape)
    made = {"blocks": {k: noise(k, x) for k, x in made.items()}}
    lora.save_peft(transformer.Policy(model, made), start, config.model)
    config.lora.init_from, config.num_steps = str(start), 1
    config.optim.learning_rate = 1e-9  # it stays where it starts
    loop.train_and_evaluate(config, str(tmp_path / "run"))
    # Two layers of width 16: 2 x (16 + 16), 2 x (16 + 8) and 2 x (16 + 32) in each.
    assert (
        "training 416 of 5,296 parameters (LoRA rank 2 on q_proj, v_proj, up_proj), "
        f"starting from {start}\n"
    ) in capsys.readouterr().out
    row = dataset_io.read_jsonl(tmp_path / "run/metrics.jsonl")[1]
    # Off its base, and the first log Z' is the policy's, not the base's.
    assert abs(row["kl/policy_base_per_token"]) > 0.01
    assert abs(row["tb/residual_mean"]) < 1e-5
    assert row["rollout/logp_gap_max"] < 1e-5
    before, after = (
        safetensors.numpy.load_file(x / "adapter_model.safetensors")
        for x in (start, tmp_path / "run/adapter")
    )
    assert before.keys() == after.keys()
    for name, x in before.items():
        np.testing.assert_allclose(after[name], x, atol=1e-7)
    stored = json.loads((tmp_path / "run/config.json").read_text())["config"]
    assert stored["lora"]["rank"] == 2
    # Another adapter in the same place is another run.
    path = start / "adapter_model.safetensors"
    safetensors.numpy.save_file({k: 2 * x for k, x in before.items()}, path)
    with pytest.raises(ValueError, match=r"another run.*\n  adapter: \w+ -> \w+"):
        loop.train_and_evaluate(config, str(tmp_path / "run"))


@pytest.mark.slow
def test_adapters_on_a_base_that_training_rounds_leave_the_rest_as_it_came(
    config, tmp_path
):
    """float16 holds what bfloat16 does not."""
    hf.save(
        hf.load(config.model), tmp_path / "half", base=config.model, dtype="float16"
    )
    config.model, config.dtype = str(tmp_path / "half"), "bfloat16"
    config.lora.rank, config.num_steps = 2, 1
    config.optim.learning_rate = 1e-9  # the adapters stay next to nothing
    loop.train_and_evaluate(config, str(tmp_path / "run"))
    before, after = (
        safetensors.numpy.load_file(tmp_path / x / "model.safetensors")
        for x in ("half", "run/hf")
    )
    for name, x in before.items():
        assert after[name].dtype == np.float16
        np.testing.assert_array_equal(after[name], x, err_msg=name)
    # And from the checkpoint, on one device.
    done = run_command("pfjax.export", tmp_path / "run", f"--out={tmp_path / 'new'}")
    assert done.stdout.endswith(f"adapters: {tmp_path / 'new-adapter'}\n"), done.stderr
    for new, old in (("new", "hf"), ("new-adapter", "adapter")):
        for file in (tmp_path / "run" / old).iterdir():
            is_same = (tmp_path / new / file.name).read_bytes() == file.read_bytes()
            assert is_same or file.name == "README.md"  # which names the folder


def _other_prompt(config):
    prompts = pathlib.Path(config.data.train)
    prompts.write_text(json.dumps({"prompt": "b a", "answer": "1"}) + "\n")


def _other_template(config):
    template = "{% for m in messages %}b {{ m['content'] }}{% endfor %}"
    (pathlib.Path(config.model) / "chat_template.jinja").write_text(template)


def _write_samples(config, response):
    row = {"prompt_id": 0, "alpha": 4.0, "log_z": 0.0, "prompt_tokens": [2, 3]}
    text = json.dumps(row | {"completion_tokens": response}) + "\n"
    pathlib.Path(config.data.target).write_text(2 * text)


def _other_samples(config):
    _write_samples(config, [3, 1])


def _other_responses(config):
    path = pathlib.Path(config.behavior.file)
    path.write_text(path.read_text().replace("[2, 1]", "[3, 1]"))


def _other_tokens(config):
    path = pathlib.Path(config.model) / "tokenizer.json"
    path.write_text(path.read_text().replace('"a": 2', '"c": 2'))


@pytest.mark.parametrize(
    "change, what",
    [
        (_other_prompt, "prompts"),
        pytest.param(_other_template, "prompts", marks=pytest.mark.slow),
        pytest.param(_other_tokens, "tokens", marks=pytest.mark.slow),
        pytest.param(_other_samples, "samples of the target", marks=pytest.mark.slow),
        pytest.param(
            _other_responses, "responses to learn from", marks=pytest.mark.slow
        ),
    ],
)
def test_other_inputs_under_the_same_config_are_refused(config, tmp_path, change, what):
    config.num_steps = 1
    config.data.eval = str(shutil.copy(config.data.train, tmp_path / "eval.jsonl"))
    config.data.target = str(tmp_path / "target.jsonl")
    _write_samples(config, [2, 1])
    if change is _other_responses:
        given = shutil.copy(config.data.target, tmp_path / "given.jsonl")
        config.behavior.file = str(given)
    loop.train_and_evaluate(config, str(tmp_path / "run"))
    config.num_steps = 2
    change(config)
    with pytest.raises(
        ValueError, match=rf"another run.*\n(.*\n)*  {what}: \w+ -> \w+"
    ):
        loop.train_and_evaluate(config, str(tmp_path / "run"))


@pytest.mark.slow
def test_a_template_that_asks_for_the_time_is_told_that_of_the_start(
    config, tmp_path, monkeypatch, capsys
):
    (pathlib.Path(config.model) / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ 'b ' if strftime_now('%Y') == '1999' else 'a ' }}"
        "{{ m['content'] }}{% endfor %}"
    )
    config.num_steps, config.data.clock = 1, "1999-12-31T23:59:59"
    loop.train_and_evaluate(config, str(tmp_path / "run"))
    # The same command without that goes on with the prompts of then.
    config.num_steps, config.data.clock = 2, ""
    loop.train_and_evaluate(config, str(tmp_path / "run"))
    stored = json.loads((tmp_path / "run/config.json").read_text())
    assert stored["config"]["data"]["clock"] == "1999-12-31T23:59:59"
    assert capsys.readouterr().out.count("is told that it is 1999-12-31T23:59:59") == 2
    config.num_steps, config.data.clock = 3, "2026-01-01"
    with pytest.raises(ValueError, match=r"another run.*\n  prompts: \w+ -> \w+"):
        loop.train_and_evaluate(config, str(tmp_path / "run"))
    # One that begins now is told now, and keeps it.
    config.num_steps, config.data.clock = 1, ""
    loop.train_and_evaluate(config, str(tmp_path / "new"))
    new = json.loads((tmp_path / "new/config.json").read_text())
    assert new["config"]["data"]["clock"].startswith("20")


def _sets(config, folder):
    """Two sets of evaluations: of one prompt with an answer, and of two with one."""
    one, two = folder / "one.jsonl", folder / "two.jsonl"
    row = {"prompt": PROMPT, "answer": "1"}
    one.write_text(json.dumps(row) + "\n")
    two.write_text(json.dumps(row) + "\n" + json.dumps({"prompt": "b a"}) + "\n")
    config.data.eval, config.eval_every = f"{one}, {two}", 2
    config.num_steps, config.eval_samples = 2, 4
    return str(one), str(two)


@pytest.mark.slow
def test_several_sets_are_evaluated_each_as_alone(config, tmp_path, capsys):
    one, two = _sets(config, tmp_path)
    config.best_metric = "eval/two/length_mean"
    loop.train_and_evaluate(config, str(tmp_path / "run"))
    shown = capsys.readouterr().out
    assert (
        f"data.eval {one}: 1 prompts from column prompt, answers from column answer\n"
        in shown
    )
    assert "  1 of 2 have answers: the others are not graded" in shown
    assert f"data.train {config.data.train}: 1 prompts from column prompt" in shown
    assert shown.count("first prompt, as the model sees it: 'a b'") == 3
    assert "step 0  two  length_mean" in shown
    assert "eval/two/avg@4" in shown  # in the table of before and after
    rows = dataset_io.read_jsonl(tmp_path / "run/metrics.jsonl")
    assert {"eval/one/avg@4", "eval/two/pass@4", "eval/two/distinct"} <= rows[0].keys()
    assert not any(k.startswith("eval/avg") for row in rows for k in row)
    responses = dataset_io.read_jsonl(tmp_path / "run/completions/step_000000.jsonl")
    assert [r["set"] for r in responses] == ["one"] * 4 + ["two"] * 8
    steps = tmp_path / "run/checkpoints/2/metrics/metrics"
    assert json.loads(steps.read_text())["best"] == rows[-1]["eval/two/length_mean"]
    (run,) = runs.load([str(tmp_path / "run")])
    assert len(runs.read_problems(run, 2)) == 3
    # Alone a set has the same scores, under the plain names.
    config.data.eval, config.best_metric = two, "eval/avg"
    loop.train_and_evaluate(config, str(tmp_path / "alone"))
    alone = dataset_io.read_jsonl(tmp_path / "alone/metrics.jsonl")
    for row, plain in zip(rows, alone, strict=True):
        for name in ("avg@4", "length_mean", "distinct"):
            assert row.get(f"eval/two/{name}") == plain.get(f"eval/{name}")


@pytest.mark.slow
def test_other_prompts_are_evaluated_when_a_run_goes_on_and_it_is_said(
    config, tmp_path, capsys
):
    one, two = _sets(config, tmp_path)
    config.data.eval = one
    loop.train_and_evaluate(config, str(tmp_path / "run"))
    config.data.eval, config.num_steps = f"{one},{two}", 4
    capsys.readouterr()
    loop.train_and_evaluate(config, str(tmp_path / "run"))
    shown = capsys.readouterr().out
    assert "prompts of evaluations are others than before: scores up to step 2" in shown
    # Nothing that is trained has changed by it.
    config.data.eval = one
    loop.train_and_evaluate(config, str(tmp_path / "never"))
    a, b = (
        dataset_io.read_jsonl(tmp_path / x / "metrics.jsonl")[-1]
        for x in ("run", "never")
    )
    assert a["tb/loss"] == b["tb/loss"] and a["entropy"] == b["entropy"]
    assert a["eval/one/avg@4"] == b["eval/avg@4"]
    assert "others than before" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"best_metric": "eval/agv"}, "eval/agv: no such metric; did you mean eval/avg?"),
        ({"best_metric": "eval/avg@4"}, "eval/avg@4: no such metric; did you mean"),
        ({"best_metric": "tb/los"}, "did you mean tb/loss?"),
        ({"best_metric": "eval/elbo"}, "no such metric"),
        ({"best_metric": "eval/maj", "data.eval": ""}, "without any --config.data.eval"),
        (
            {"best_metric": "eval/maj", "data.eval": "pfjax/toy/train.jsonl"},
            "without answers in --config.data.eval",
        ),
        ({"data.prompt_field": "text"}, "data.prompt_field=text: no such column, there "),
        ({"data.eval": "a/x.jsonl,b/x.jsonl"}, "sets need different names"),
        ({"data.eval": "math50"}, "no benchmark 'math50'"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_or_read_is_said_before_anything_loads(
    config, tmp_path, monkeypatch, changes, message
):
    config.data.eval = config.data.train
    config.update_from_flattened_dict(changes)
    monkeypatch.setattr(hf, "load", None)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        loop.train_and_evaluate(config, str(tmp_path / "run"))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_answers_that_nothing_equals_are_said_before_training(config, tmp_path):
    path = tmp_path / "eval.jsonl"
    path.write_text(json.dumps({"prompt": PROMPT, "answer": "}{"}) + "\n")
    config.data.eval = str(path)
    with pytest.raises(ValueError, match=r"1 of 1 gold answers are not equal to them"):
        loop.train_and_evaluate(config, str(tmp_path / "run"))
    config.data.train, config.data.eval, config.objective = str(path), "", "grpo"
    with pytest.raises(ValueError, match=r"1 of 1 gold answers are not equal to them"):
        loop.train_and_evaluate(config, str(tmp_path / "run2"))


@pytest.mark.slow
def test_what_is_exported_answers_as_the_run_did(tmp_path, monkeypatch):
    """Greedy text and stops of `transformers.generate` are those of the evaluation."""
    import torch
    import transformers

    use_one_device(monkeypatch)
    c = smoke.get_config()
    c.num_steps, c.prompts_per_step, c.eval_samples = 1, 8, 1
    c.eval_sampling.temperature = 0.0
    loop.train_and_evaluate(c, str(tmp_path / "run"))
    folder = tmp_path / "run/hf"
    tok = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for row in dataset_io.read_jsonl(tmp_path / "run/completions/step_000001.jsonl")[
        :8
    ]:
        ids = tokenizer.encode_prompt(tok, row["prompt"])
        with torch.no_grad():
            out = model.generate(
                torch.tensor([ids]), max_new_tokens=c.max_new_tokens, do_sample=False
            )[0, len(ids) :].tolist()
        assert tok.decode(out, skip_special_tokens=True) == row["completion"]
        assert out[-1] in model.generation_config.eos_token_id


@pytest.mark.slow
def test_evaluation_has_sampling_options_of_its_own(config, tmp_path):
    config.data.eval, config.eval_samples, config.num_steps = config.data.train, 8, 1
    config.eval_sampling.temperature = 0.0
    loop.train_and_evaluate(config, str(tmp_path / "greedy"))
    rows = dataset_io.read_jsonl(tmp_path / "greedy/metrics.jsonl")
    assert rows[0]["eval/distinct"] == 1 / 8
    assert rows[1]["completions/mean_length"] < 3  # training draws as ever
    config.eval_sampling.temperature = 1.0
    config.eval_sampling.stop_strings = ("a", "b")
    loop.train_and_evaluate(config, str(tmp_path / "stops"))
    path = tmp_path / "stops/completions/step_000000.jsonl"
    rows = dataset_io.read_jsonl(path)
    assert rows and all(r["completion"].strip() == "" for r in rows)


def test_a_folder_with_another_config_is_refused_and_says_what_differs(
    config, tmp_path
):
    config.num_steps = 1
    # A run that failed before its first checkpoint leaves nothing to continue.
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text('{"config": {"alpha": 9.0}}')
    loop.train_and_evaluate(config, str(tmp_path / "run"))
    config.alpha, config.log_every, config.num_steps = 2.0, 7, 2
    with pytest.raises(ValueError, match=r"alpha: 4.0 -> 2.0") as error:
        loop.train_and_evaluate(config, str(tmp_path / "run"))
    assert "log_every" not in str(error.value) and "num_steps" not in str(error.value)
    config.alpha = 4.0
    loop.train_and_evaluate(config, str(tmp_path / "run"))
    assert len(_deterministic(tmp_path / "run")) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 0.0}, r"--config.alpha=0.0: must be positive"),
        ({"alpha": -1.0}, r"--config.alpha=-1.0: must be positive"),
        ({"objective": "powerflw"}, "did you mean 'powerflow'"),
        (
            {"remat": "ful"},
            "--config.remat=ful: must be one of .*; did you mean 'full'",
        ),
        ({"attention": "flash"}, "--config.attention=flash: must be one of .*'splash'"),
        ({"optim.mu_dtype": "float16"}, "--config.optim.mu_dtype=float16: must be one"),
        ({"offload_ref": True, "lora.rank": 4}, "adapters the base is the policy's"),
        # Two heads.
        (
            {"mesh.data": 1, "mesh.tensor": 8},
            "heads of size 2 does not divide over 8 devices .--config.mesh.tensor=8",
        ),
        (
            {"mesh.data": 4, "mesh.context": 2, "pack_length": 11},
            "pack_length=11 does not split into --config.mesh.context=2 parts: choose",
        ),
        ({"mesh.data": 3}, "--config.mesh.data=3 .* does not cover the 8 devices"),
        ({"rollout_tensor": 3}, "rollout_tensor=3 does not divide the 1 devices of a"),
        (
            {"mesh.data": 2, "mesh.fsdp": 4, "rollout_tensor": 4},
            "--config.rollout_tensor=4: heads of size 2 does not divide over 4 devices",
        ),
        ({"model": "/no/such/model"}, "model folder /no/such/model does not exist"),
        ({"data.train": "/no/prompts.jsonl"}, "/no/prompts.jsonl does not exist"),
        ({"pack_length": 4}, "pack_length=4 is too short for longest prompt 2"),
        ({"max_new_tokens": 100, "pack_length": 200}, "exceeds the model's 64"),
        ({"data.max_prompt_tokens": 1}, "all are too long"),
        ({"log_z": "group", "samples_per_prompt": 1}, "must be at least 2, got 1"),
        ({"schedules": "alhpa:1@1"}, r"alhpa:1@1: .* did you mean alpha\?"),
        (
            {"schedules": "alpha:1@1", "objective": "grpo"},
            "schedules=alpha:1@1: alpha has no effect on grpo, which has no target",
        ),
        (
            {"schedules": "alpha:2@1", "objective": "flowrl", "beta": 15.0},
            "alpha has no effect on flowrl, whose target has alpha 1",
        ),
        ({"schedules": "beta:1@1"}, "schedules=beta:1@1: beta weighs a reward in the"),
        (
            {"schedules": "beta:1@1", "objective": "grpo"},
            "schedules=beta:1@1: beta has no effect on grpo, which has no target",
        ),
    ],
)
def test_mistakes_are_refused_before_a_folder_is_made(
    config, tmp_path, changes, message
):
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        loop.train_and_evaluate(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_with_the_step_and_keeps_the_checkpoint(
    config, tmp_path, monkeypatch
):
    # They would refuse such a rate.
    monkeypatch.setattr(config_checks, "check", lambda *_: None)
    config.checkpoint_every = 1
    config.optim.clip_norm, config.optim.learning_rate = 1e30, 1e25
    with pytest.raises(FloatingPointError, match="at step 2; the last checkpoint"):
        loop.train_and_evaluate(config, str(tmp_path / "run"))
    assert [p.name for p in (tmp_path / "run/checkpoints").glob("[0-9]*")] == ["1"]
    assert [r["step"] for r in _deterministic(tmp_path / "run")] == [0, 1]


def test_a_base_that_waits_in_host_memory_changes_nothing(whole, tmp_path, monkeypatch):
    config, on_device = whole
    config = config.copy_and_resolve_references()
    config.offload_ref = True
    loop.train_and_evaluate(config, str(tmp_path / "host"))
    assert _deterministic(tmp_path / "host") == _deterministic(on_device)
    put, kinds = jax.device_put, set()

    def record(x, where):
        out = put(x, where)
        kinds.update(y.sharding.memory_kind for y in jax.tree.leaves(out))
        return out

    monkeypatch.setattr(jax, "device_put", record)
    mesh = sharding.make_mesh(**config.mesh)
    with jax.set_mesh(mesh):
        trainer, _, _ = setup.setup(ml_collections.FrozenConfigDict(config), mesh)
        assert "pinned_host" in kinds
        on_devices = jax.tree.leaves(trainer.base())
    assert {x.sharding.memory_kind for x in on_devices} == {"device"}


@pytest.mark.slow
def test_profile_holds_the_parts_of_the_steps_asked_for(config, tmp_path):
    config.profile_steps = (2, 4)
    loop.train_and_evaluate(config, str(tmp_path / "run"))
    # The .json.gz beside it leaves out what exceeds a million events.
    (trace,) = (tmp_path / "run/profile").rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    events = (
        event for plane in planes for line in plane.lines for event in line.events
    )
    names = collections.Counter(event.name for event in events)
    # Steps 2 and 3.
    assert names["rollout"] == names["base_pass"] == names["update"] == 2
    assert {"step"} <= {n.partition("#")[0] for n in names if n}
    config.profile_steps = (4, 2)
    with pytest.raises(ValueError, match="first step to trace and the first after"):
        loop.train_and_evaluate(config, str(tmp_path / "other"))


def test_metrics_tell_times_and_compilation(config, tmp_path, monkeypatch):
    monkeypatch.setitem(
        hardware.CHIPS, "x", hardware.CHIPS["v5e"]._replace(kinds=("cpu",))
    )
    config.checkpoint_every = config.num_steps  # a save compiles too
    with count_compiles() as count:
        loop.train_and_evaluate(config, str(tmp_path / "run"))
    rows = dataset_io.read_jsonl(tmp_path / "run/metrics.jsonl")[1:]
    for row in rows:
        parts = [row[f"time/{x}"] for x in ("rollout", "base_pass", "update")]
        assert 0 < sum(parts) <= row["time/step"]
        rate = row["num_tokens"] / row["time/step"]
        assert row["perf/tokens_per_s"] == pytest.approx(rate)
        assert 0 < row["perf/mfu"] < 1
    # What an update takes is compiled once, in the first step.
    for name in ("train_step", "score_step"):
        assert sum(n for k, n in count.items() if name in k) == 1, count
    assert rows[0]["time/compile"] > 0
    assert [r["time/compile"] for r in rows[1:]] == [0.0, 0.0, 0.0]


@pytest.mark.slow
def test_a_kernel_that_attends_wrongly_is_refused(config, tmp_path, monkeypatch):
    def blind(q, k, v, segment_ids):
        return attention._plain(q, k, v, 0 * segment_ids)  # sees other segments

    monkeypatch.setitem(attention._BACKENDS, "triton_interpret", blind)
    config.attention = "triton_interpret"
    with pytest.raises(
        RuntimeError, match="triton_interpret attention is wrong on cpu"
    ):
        loop.train_and_evaluate(config, str(tmp_path / "run"))
    monkeypatch.undo()
    config.num_steps = 1
    loop.train_and_evaluate(config, str(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("alpha", "psi", "beta", "eta_cutoff"),
    [(2.0, 0.0, 0.0, 0), (2.0, -0.5, 0.0, 0), (2.0, -0.5, 1.5, 0), (0.1, 0, 0, 0.05)],
)
def test_bounds_on_the_targets_sum_are_those_of_the_listed_target(
    config, tmp_path, rng, alpha, psi, beta, eta_cutoff
):
    """Of the base, before the first step: every expectation is a sum over responses."""
    lam, samples = -0.4, 1000
    base, length = _distribution(config.model)
    responses = all_responses(vocab=4, stop=1, max_tokens=3)
    reward = 0.5 * np.array([y.count(3) for y in responses])
    log_drawn_from = log_power(base, alpha, eta_cutoff) + beta * reward - lam * length
    drawn_from = np.exp(log_drawn_from)
    tilt = {}
    if beta:
        (tmp_path / "mine.py").write_text(
            "def threes(completion_ids, worth, **kwargs):\n"
            "    return [y.count(3) * w for y, w in zip(completion_ids, worth)]\n"
        )
        config.reward, config.beta = f"{tmp_path / 'mine.py'}:threes", beta
        with open(config.data.train, "w") as file:
            file.write(json.dumps({"prompt": PROMPT, "worth": 1.0}) + "\n")
        columns = {"prompt": PROMPT, "worth": 0.5}
        problem = {"question": PROMPT, "gold": None, "columns": columns}
        tilt = {"beta": beta, "reward": config.reward, "problem": problem}
    chosen = rng.choice(len(base), size=samples, p=drawn_from / drawn_from.sum())
    target = tmp_path / "target.jsonl"
    target.write_text(
        "".join(
            json.dumps(
                {
                    "prompt_id": 0, "alpha": alpha, "log_z": lam,
                    "prompt_tokens": [2, 3], "completion_tokens": responses[i],
                    "eta_cutoff": eta_cutoff,
                } | tilt
            ) + "\n"
            for i in chosen
        )
    )  # fmt: skip
    config.data.target, config.alpha, config.format_penalty = str(target), alpha, psi
    config.eta_cutoff = eta_cutoff
    config.num_steps = config.eval_every = 1
    loop.train_and_evaluate(config, str(tmp_path / "run"))
    row = dataset_io.read_jsonl(tmp_path / "run/metrics.jsonl")[0]
    log_target = log_drawn_from + alpha * psi * length
    log_sum = np.log(np.exp(log_target).sum())
    gap, p = log_target - base, np.exp(log_target - log_sum)
    # Means of `gap` under both, and the variances of their estimates: the upper one
    # weights draws from q by p / q.
    q = drawn_from / drawn_from.sum()
    for name, mean, variance in (
        ("elbo", np.exp(base) @ gap, np.exp(base) @ (gap - np.exp(base) @ gap) ** 2),
        ("eubo", p @ gap, q @ (p / q * (gap - p @ gap)) ** 2),
    ):
        assert abs(mean - log_sum) > 0.3
        error = abs(row[f"eval/{name}"] - mean)
        assert error < 4 * np.sqrt(variance / samples) < 0.4, name


def test_samples_of_another_target_are_refused(config, tmp_path):
    path = tmp_path / "target.jsonl"
    config.data.target = str(path)
    for rows, message in [
        ([{"alpha": 2.0, "log_z": 0.0}], "target.jsonl:1: alpha is 2.0, expected 4.0"),
        (
            [{"alpha": 4.0, "log_z": 0.0}, {"alpha": 4.0, "log_z": -1.0}],
            "target.jsonl:2: log_z is -1.0, expected 0.0",
        ),
        ([{"prompt": "a"}], "pfjax.sample --method=smc --alpha=4"),
        (
            [{"alpha": 4.0, "log_z": 0.0, "beta": 1.0, "reward": "format"}],
            "target.jsonl:1: beta is 1.0, expected 0.0",
        ),
        (
            [{"alpha": 4.0, "log_z": 0.0, "eta_cutoff": 0.003}],
            "target.jsonl:1: eta_cutoff is 0.003, expected 0.0",
        ),
    ]:
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        with pytest.raises(ValueError, match=message):
            loop.train_and_evaluate(config, str(tmp_path / "run"))

    config.reward, config.beta = "length", 0.5
    row = {"alpha": 4.0, "log_z": 0.0}
    for more, message in [
        ({}, "beta is 0.0, expected 0.5; .*--log_z=... --reward=length --beta=0.5"),
        ({"beta": 0.5, "reward": "format"}, "reward is 'format', expected 'length'"),
        ({"beta": 0.5, "reward": "length"}, "there is no 'problem'"),
    ]:
        path.write_text(json.dumps(row | more) + "\n")
        with pytest.raises(ValueError, match=message):
            loop.train_and_evaluate(config, str(tmp_path / "run"))
    for changes, message in [
        (
            {"reward_per": "token"},
            "has a reward per token, and samples are drawn by one",
        ),
        ({"reward": "majority"}, "majority is none of a response alone"),
        ({"objective": "flowrl"}, "reward of flowrl is relative to the other samples"),
    ]:
        other = config.copy_and_resolve_references()
        other.update_from_flattened_dict(changes)
        with pytest.raises(ValueError, match=message):
            loop.train_and_evaluate(other, str(tmp_path / "run"))


def test_in_a_bucket_metrics_of_a_step_are_written_before_its_checkpoint(
    config, bucket, monkeypatch
):
    """A run that is killed then finds the rows of all steps that it does not do again."""
    monkeypatch.setattr(uploads, "_EVERY", 3600.0)  # the background is too late
    found, save = [], checkpoint.Checkpoints.save

    def look(self, step, *args, **kwargs):
        rows = dataset_io.read_jsonl(f"{bucket}/run/metrics.jsonl")
        found.append((step, [r["step"] for r in rows]))
        save(self, step, *args, **kwargs)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", look)
    loop.train_and_evaluate(config, f"{bucket}/run")
    assert found == [(2, [0, 1, 2]), (4, [0, 1, 2, 3, 4])]


def test_a_step_is_saved_before_it_is_evaluated_and_rated_after(config, tmp_path):
    """Also where steps between two checkpoints are evaluated; a stop at the last step leaves
    the rest to the next call, which makes the evaluation up."""
    config.data.eval, config.eval_every, config.eval_samples = config.data.train, 1, 1
    config.num_steps, config.checkpoint_every, config.keep_best = 3, 100, 1
    folder, seen = tmp_path / "run", []

    def on_evaluation(step, values, rows):
        saved = checkpoint.saved_steps(epath.Path(folder / "checkpoints"))
        seen.append((step, saved))

    def on_step(step, values):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)

    run = functools.partial(loop.train_and_evaluate, config, str(folder))
    with pytest.raises(preemption.Preempted, match="saved after step 3"):
        run(on_step, on_evaluation)
    # The save of step 2 may still be written while it is evaluated.
    assert [step for step, _ in seen] == [0, 1, 2] and 1 in seen[-1][1]
    assert not (folder / "hf").exists()
    rated = lambda: [*(folder / "checkpoints").glob("*/metrics/metrics")]
    assert {x.parts[-3] for x in rated()} == {"2"}
    run(None, on_evaluation)
    rows = dataset_io.read_jsonl(folder / "metrics.jsonl")
    assert seen[-1][0] == 3 and "eval/avg@1" in rows[3] and (folder / "hf").exists()
    assert "eval/avg@1_se" not in rows[3]  # of one prompt there is none
    assert len({row["evaluation/fingerprint"] for row in rows}) == 1
    assert "3" in {x.parts[-3] for x in rated()}


def test_a_stop_after_the_last_step_ends_the_rest_at_once(
    config, tmp_path, monkeypatch
):
    config.num_steps = 1
    write = loop.export.write

    def told(*args):
        signal.raise_signal(signal.SIGTERM)
        write(*args)

    monkeypatch.setattr(loop.export, "write", told)
    with pytest.raises(
        preemption.Preempted, match="SIGTERM: interrupted after the last"
    ):
        loop.train_and_evaluate(config, str(tmp_path / "run"))
    assert not (tmp_path / "run/hf").exists()
    monkeypatch.undo()
    loop.train_and_evaluate(config, str(tmp_path / "run"))
    assert (tmp_path / "run/hf").exists()


def test_a_row_that_is_lost_is_not_taken_from_an_earlier_step(whole, tmp_path):
    config, folder = whole
    shutil.copytree(folder, tmp_path / "run")
    path = tmp_path / "run/metrics.jsonl"
    rows = dataset_io.read_jsonl(path)
    dataset_io.write_jsonl(path, rows[:3])  # up to an evaluation, of step 2
    loop.train_and_evaluate(config, str(tmp_path / "run"))
    found = dataset_io.read_jsonl(path)
    assert [row["step"] for row in found] == [0, 1, 2, 4]
    assert found[-1]["eval/avg@16"] == rows[-1]["eval/avg@16"]
    assert "tb/loss" not in found[-1]


@pytest.mark.parametrize(
    ("step", "said"),
    [(1, "step 1; nothing was learned yet"), (2, "the last checkpoint")],
)
def test_a_first_step_that_is_not_finite_speaks_of_no_checkpoint(step, said):
    with pytest.raises(FloatingPointError, match=said) as error:
        iteration._check_finite({"loss": np.nan, "grad_norm": 1.0}, step)
    assert ("checkpoint" in str(error.value)) == (step > 1)


def test_a_run_goes_on_with_its_prompts_from_elsewhere_but_no_others(config, tmp_path):
    """And what is refused leaves the folder as it was."""
    config.num_steps = 1
    loop.train_and_evaluate(config, str(tmp_path / "run"))
    place = tmp_path / "elsewhere"
    place.mkdir()
    config.data.train = str(shutil.copy(config.data.train, place))
    config.num_steps = 2
    loop.train_and_evaluate(config, str(tmp_path / "run"))
    kept = (tmp_path / "run/config.json").read_text()
    assert str(place) in kept and len(_deterministic(tmp_path / "run")) == 3
    other = place / "other" / pathlib.Path(config.data.train).name
    other.parent.mkdir()
    other.write_text('{"prompt": "b a"}\n')
    config.data.train = str(other)
    with pytest.raises(
        ValueError, match=r"another run.*\n(.*\n)*  prompts: \w+ -> \w+"
    ):
        loop.train_and_evaluate(config, str(tmp_path / "run"))
    assert (tmp_path / "run/config.json").read_text() == kept


def test_steps_that_the_metrics_lack_are_said_when_a_run_goes_on(
    whole, tmp_path, capsys
):
    config, folder = whole
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").write_text("")
    loop.train_and_evaluate(config, str(tmp_path / "run"))
    said = capsys.readouterr()
    assert "metrics.jsonl lacks 4 of the 4 steps done" in said.out + said.err


def test_a_model_folder_with_files_of_others_is_refused_before_training(
    config, tmp_path
):
    folder = tmp_path / "run/hf"
    folder.mkdir(parents=True)
    (folder / "notes.md").write_text("mine")
    with pytest.raises(ValueError, match=r"run/hf holds something other than a model"):
        loop.train_and_evaluate(config, str(tmp_path / "run"))
    assert (folder / "notes.md").read_text() == "mine"
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize("setting", ["model", "base", "lora.init_from"])
def test_what_a_run_is_made_from_is_not_where_it_writes(config, tmp_path, setting):
    name = "adapter" if setting == "lora.init_from" else "hf"
    folder = tmp_path / "run" / name
    if name == "hf":
        shutil.copytree(config.model, folder)
    else:
        model = dataclasses.replace(
            hf_config.read(pathlib.Path(config.model)), lora_rank=2
        )
        params = lora.init_params(model, jax.random.key(0))
        lora.save_peft(transformer.Policy(model, params), folder, config.model)
    before = {path: path.read_bytes() for path in folder.rglob("*")}
    config.update_from_flattened_dict({setting: str(folder)})
    with pytest.raises(ValueError, match=f"run/{name} is the .* which would be lost"):
        loop.train_and_evaluate(config, str(tmp_path / "run"))
    assert {path: path.read_bytes() for path in folder.rglob("*")} == before


@pytest.mark.slow
@pytest.mark.parametrize("max_staleness", [0, 1])
def test_values_are_the_same_whatever_jax_is_set_to(config, tmp_path, max_staleness):
    """By the process, which threads begin with."""
    config.num_steps, config.max_staleness = 2, max_staleness
    loop.train_and_evaluate(config, str(tmp_path / "want"))
    given = {"jax_enable_x64": True, "jax_default_prng_impl": "rbg"}
    before = {name: getattr(jax.config, name) for name in given}
    try:
        for name, value in given.items():
            jax.config.update(name, value)
        loop.train_and_evaluate(config, str(tmp_path / "got"))
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    want, got = (_deterministic(tmp_path / name) for name in ("want", "got"))
    assert got == want and want[-1]["step"] == config.num_steps

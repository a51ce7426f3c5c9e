"""One policy for every alpha: against the exact targets of a model whose responses are
listed, its base, and itself at one alpha."""

import dataclasses
import json
import re
import subprocess
import sys

import jax
import ml_collections
import numpy as np
import pytest

import pfjax
from configs import default
from pfjax.batch import PackShape
from pfjax.infra import dataset_io
from pfjax.model import dial, lora, scoring
from pfjax.model.transformer import Policy
from pfjax.packing import pack, to_segments
from pfjax.report import charts, runs
from pfjax.sampler import engine
from pfjax.sampler.options import Capacity
from pfjax.trainer import config_checks, loop, run_config
from tests.conftest import (
    ROOT,
    all_responses,
    length_aware_target,
    power_target,
    run_command,
    total_variation,
    use_one_device,
)

PROMPT = "a b"
RANGE = (0.25, 8.0)
NO_ADAPTERS = {"lora_rank": 0, "lora_alpha": 0.0, "alpha_range": ()}
DRAW = dial.draw
RESPONSES = all_responses(vocab=4, stop=1, max_tokens=3)
LENGTH = np.array([len(y) for y in RESPONSES])


@pytest.fixture
def config(enumerable_folder, tmp_path, monkeypatch):
    use_one_device(monkeypatch)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": PROMPT, "answer": "1"}) + "\n")
    c = default.get_config()
    c.model, c.data.train, c.data.eval = str(enumerable_folder), str(prompts), ""
    c.alpha_range, c.alpha, c.lora.rank, c.format_penalty = "0.25,8", 2.0, 8, 0.0
    c.prompts_per_step, c.samples_per_prompt, c.max_new_tokens = 8, 16, 3
    c.microbatch_size, c.pack_length, c.dtype = 64, 64, "float32"
    c.mesh.data, c.mesh.fsdp = 1, 1
    c.optim.learning_rate, c.optim.log_z_learning_rate = 3e-3, 3e-2
    c.optim.weight_decay = 0.0
    c.num_steps, c.checkpoint_every, c.log_every = 4, 2, 1000
    c.health_checks.action, c.match_prompts = "off", 0
    return c


@pytest.fixture
def policy(tiny_policy) -> Policy:
    """Random weights, adapters and scales, for every alpha."""
    return _with_adapters(tiny_policy)


def _with_adapters(base: Policy) -> Policy:
    fields = {"lora_rank": 4, "lora_alpha": 8.0, "alpha_range": RANGE}
    model = dataclasses.replace(base.config, **fields)
    adapters = lora.init_params(model, jax.random.key(2))
    noise = lambda k, x: x + 0.2 * jax.random.normal(k, x.shape)
    keys = jax.random.split(jax.random.key(3), len(adapters["blocks"]))
    blocks = {
        n: noise(k, x)
        for k, (n, x) in zip(keys, sorted(adapters["blocks"].items()), strict=True)
    }
    return Policy(model, lora.join(base.params, {"blocks": blocks}))


def log_density(policy) -> np.ndarray:
    """log p of every response to the prompt."""
    scores = scoring.score(
        policy, [[2, 3, *y] for y in RESPONSES], [2] * len(RESPONSES)
    )
    return np.array([x.sum() for x in scores])


def _packed(alpha) -> pfjax.batch.PackedBatch:
    """Two responses in one row and one in another, each of its own alpha."""
    shape = PackShape(1, 2, 12, 3)
    sequences = [
        np.array(x) for x in ([2, 3, 4, 5, 6], [3, 2, 7, 8], [5, 5, 9, 3, 2, 1])
    ]
    batch, placement, _ = pack(sequences, np.array([2, 2, 3]), shape)
    of_each = to_segments(np.float32(alpha), placement, batch.length.shape)
    return jax.tree.map(lambda x: x[0], batch._replace(alpha=of_each))


def test_packed_rows_hold_responses_of_several_alphas(policy):
    alpha = [0.5, 2.0, 8.0]
    batch = _packed(alpha)
    mixed = scoring.packed_log_probs(policy.config, policy.params, batch)[0]
    sums = pfjax.response_sum(mixed, batch)
    for i, a in enumerate(alpha):
        alone = pfjax.log_probs(pfjax.at_alpha(policy, a), batch._replace(alpha=None))
        at = (batch.alpha == a) & batch.is_real
        want = pfjax.response_sum(alone, batch)[at]
        np.testing.assert_allclose(sums[at], want, atol=1e-5)
        others = pfjax.response_sum(alone, batch)[~at & batch.is_real]
        assert (abs(sums[~at & batch.is_real] - others) > 1e-2).all(), i


def test_at_one_it_is_the_base_to_the_bit(policy, tiny_policy):
    batch = _packed([1.0, 1.0, 1.0])
    found = scoring.packed_log_probs(policy.config, policy.params, batch)[0]
    np.testing.assert_array_equal(found, pfjax.log_probs(tiny_policy, batch))
    np.testing.assert_array_equal(
        found, pfjax.log_probs(pfjax.at_alpha(policy, 1.0), batch)
    )


def test_each_prompt_is_answered_at_its_alpha(policy):
    """In few slots, whose prompts change: tokens and log-probs are those of a policy that
    has only this alpha."""
    prompts, alpha = (
        [[2, 3, 4], [5], [3, 3], [2, 3, 4], [7, 8]],
        [0.5, 2.0, 8.0, 4.0, 0.25],
    )
    how = {"samples_per_prompt": 3, "max_new_tokens": 12, "seed": 3}
    how["capacity"] = Capacity(num_slots=4)
    mixed = engine.rollout(policy, prompts, alpha=alpha, **how)
    np.testing.assert_array_equal(mixed.alpha, np.float32(alpha))
    for q, a in enumerate(alpha):
        alone = engine.rollout(pfjax.at_alpha(policy, a), prompts, **how)
        for g, n in enumerate(mixed.lengths[q]):
            np.testing.assert_array_equal(
                mixed.tokens[q, g, :n], alone.tokens[q, g, : alone.lengths[q, g]]
            )
            pair = (x.log_probs[q, g, :n] for x in (mixed, alone))
            np.testing.assert_allclose(*pair, atol=1e-5)


def test_alphas_are_log_uniform_and_follow_from_seed_and_number():
    drawn = dial.draw(RANGE, 3, range(4000))
    assert RANGE[0] <= drawn.min() < 0.26 and 7.7 < drawn.max() <= RANGE[1]
    u = np.log(drawn / RANGE[0]) / np.log(RANGE[1] / RANGE[0])
    assert np.abs(np.quantile(u, [0.25, 0.5, 0.75]) - [0.25, 0.5, 0.75]).max() < 0.03
    np.testing.assert_array_equal(dial.draw(RANGE, 3, [70, 5]), drawn[[70, 5]])
    assert (dial.draw(RANGE, 4, range(4000)) != drawn).all()
    assert dial.draw((), 3, [1]) is None


def test_merged_at_one_alpha_it_is_the_same(policy, tmp_path):
    """A plain folder, and what is saved beside the base, answer as the dial does."""
    prompt, response = [2, 3, 4], [5, 6, 7, 1]
    at = pfjax.at_alpha(policy, 2.0)
    want = pfjax.score(at, [prompt + response], [3])[0]
    base = Policy(dataclasses.replace(policy.config, **NO_ADAPTERS), _base(policy))
    pfjax.save(base, tmp_path / "base")
    pfjax.save(at, tmp_path / "merged")
    pfjax.save(policy, tmp_path / "dial", base=tmp_path / "base")
    merged, loaded = pfjax.load(tmp_path / "merged"), pfjax.load(tmp_path / "dial")
    assert loaded.config.alpha_range == RANGE
    assert "for alpha from 0.25 to 8" in repr(loaded)
    for found in (merged, pfjax.at_alpha(loaded, 2.0)):
        score = pfjax.score(found, [prompt + response], [3])[0]
        np.testing.assert_allclose(score, want, atol=1e-5)
    pfjax.save(pfjax.load("pfjax/toy"), tmp_path / "base")
    with pytest.raises(ValueError, match="no longer the model"):
        pfjax.load(tmp_path / "dial")


def test_it_is_saved_beside_a_base_whose_head_is_tied(tmp_path):
    policy, at = _with_adapters(pfjax.load("pfjax/toy")), ([[2, 10, 3, 4]], [2])
    pfjax.save(policy, tmp_path / "dial", base="pfjax/toy")
    loaded = pfjax.load(tmp_path / "dial")
    assert loaded.tokenizer.eos_token == "<|end|>"
    pair = (pfjax.score(pfjax.at_alpha(p, 2.0), *at)[0] for p in (policy, loaded))
    np.testing.assert_allclose(*pair, atol=1e-5)
    # And sampled from, which needs to know the positions of its base.
    args = (f"--model={tmp_path / 'dial'}", "--prompt=1+1", "--max_new_tokens=2")
    done = run_command("pfjax.sample", "--alpha=2", *args)
    assert done.returncode == 0 and '"tokens": 2' in done.stdout, done.stderr
    done = run_command("pfjax.sample", *args)
    assert done.returncode == 1 and "a policy for every alpha" in done.stderr


def _base(policy):
    adapters = lora.select(policy.params)["blocks"]
    blocks = {k: x for k, x in policy.params["blocks"].items() if k not in adapters}
    return {**policy.params, "blocks": blocks}


def test_a_policy_for_every_alpha_is_told_from_others(policy, tiny_policy, tmp_path):
    with pytest.raises(ValueError, match="for every alpha from 0.25 to 8"):
        pfjax.score(policy, [[2, 3]], [1])
    with pytest.raises(ValueError, match="one for each of the 1 prompts, got None"):
        pfjax.rollout(policy, [[2, 3]], 1, 4)
    with pytest.raises(ValueError, match="one for each of the 2 prompts"):
        engine.rollout(policy, [[2], [3]], 1, 4, alpha=[2.0])
    with pytest.raises(ValueError, match="alpha=9: the policy is for 0.25 to 8"):
        pfjax.rollout(policy, [[2, 3]], 1, 4, alpha=9.0)
    with pytest.raises(ValueError, match="not trained for every alpha"):
        pfjax.rollout(tiny_policy, [[2, 3]], 1, 4, alpha=2.0)
    with pytest.raises(ValueError, match="which this is not"):
        engine.rollout(tiny_policy, [[2, 3]], 1, 4, alpha=[2.0])
    for write in (lora.merge, lambda p: lora.save_peft(p, tmp_path / "a", "base")):
        with pytest.raises(ValueError, match="take it at one first"):
            write(policy)
    with pytest.raises(ValueError, match="give base"):
        pfjax.save(policy, tmp_path / "b")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"alpha_range": "8,0.25"}, "'8,0.25' is no range LOW,HIGH"),
        ({"alpha_range": "0.25"}, "'0.25' is no range LOW,HIGH"),
        ({"alpha": 16.0}, "--config.alpha=16, which is evaluated and exported"),
        ({"lora.rank": 0}, "--config.lora.rank=16"),
        ({"objective": "subtb"}, "powerflow, tb_token, tb_traj and rl_traj have"),
        ({"objective": "rl_token"}, "powerflow, tb_token, tb_traj and rl_traj have"),
        ({"objective": "flowrl"}, "powerflow, tb_token, tb_traj and rl_traj have"),
        ({"objective": "grpo"}, "powerflow, tb_token, tb_traj and rl_traj have"),
        ({"format_penalty": -0.5}, "which the format term would change"),
        ({"reward": "length", "beta": 1.0}, "which the reward would change"),
        ({"schedules": "alpha:1@1,4@9"}, "each prompt has its own alpha"),
    ],
)
def test_what_cannot_be_trained_for_every_alpha_is_refused(config, changes, said):
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=re.escape(said)):
        config_checks.check(ml_collections.FrozenConfigDict(config))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_staleness": 1, "log_z": "group"},
        {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "behavior.base": 0.5},
    ],
)
def test_sampler_and_update_have_the_same_alphas(
    config, tmp_path, monkeypatch, changes
):
    """Of 4 steps with large updates; a second run of the same command has the same bits."""
    if "mesh.tensor" in changes:
        monkeypatch.undo()
    config.update_from_flattened_dict(changes | {"optim.learning_rate": 3e-2})
    loop.train_and_evaluate(config, str(tmp_path / "run"))
    rows = dataset_io.read_jsonl(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4][-len(rows) :]
    gaps = [r["rollout/logp_gap_max"] for r in rows if "rollout/logp_gap_max" in r]
    assert gaps and max(gaps) < 1e-4
    # Where log Z is (alpha - 1) times the mean log-prob per token, the base's residual is 0.
    assert abs(rows[-4]["tb/residual_mean"]) < 0.2 * rows[-4]["tb/residual_std"]


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [0, 1])
def test_values_are_as_annotated_in_a_process_of_its_own(config, tmp_path, staleness):
    """Which checks every module, where these tests check those with arrays alone."""
    config.data.eval, config.eval_every, config.eval_samples = config.data.train, 4, 2
    config.max_staleness, config.match_prompts = staleness, 1
    changed = run_config.changed(ml_collections.FrozenConfigDict(config))
    args = [f"--config.{name}={value}" for name, value in changed.items()]
    command = [sys.executable, "-m", "pfjax.train", "--config=default", *args]
    subprocess.run([*command, f"--workdir={tmp_path}/run"], check=True, cwd=ROOT)
    assert (tmp_path / "run/dial").exists()


@pytest.mark.slow
def test_a_run_leaves_the_dial_and_itself_at_one_alpha(
    config, tmp_path, monkeypatch, capsys
):
    config.data.eval, config.eval_every, config.eval_samples = config.data.train, 4, 2
    config.match_prompts, config.optim.learning_rate = 1, 3e-2
    run = tmp_path / "run"
    trained = loop.train_and_evaluate(config, str(run))
    said = capsys.readouterr().out
    assert "alpha from 0.25 to 8, evaluated at 2" in said
    assert f"evaluate --model={run}/dial " in said
    assert " --alpha=0.25,0.5,1,2,4,8 " in said
    assert f"export {run} --alpha=2" in said
    card = (run / "hf/README.md").read_text()
    assert "one policy for every power of 0.25 to 8; this is\nit at 2." in card
    base, whole = log_density(pfjax.load(config.model)), pfjax.load(run / "dial")
    np.testing.assert_array_equal(log_density(pfjax.at_alpha(whole, 1.0)), base)
    found = log_density(pfjax.at_alpha(whole, 2.0))
    np.testing.assert_allclose(found, log_density(pfjax.load(run / "hf")), atol=1e-5)
    at_two = pfjax.at_alpha(trained, 2.0)
    np.testing.assert_allclose(found, log_density(at_two), atol=1e-5)
    assert np.abs(found - base).max() > 0.05
    assert json.loads((run / "adapter/adapter_config.json").read_text())["r"] == 8
    assert np.isfinite(json.loads((run / "match.json").read_text())["exponent"])

    monkeypatch.undo()  # commands have one device by themselves
    done = run_command("pfjax.export", run, "--alpha=0.5")
    assert done.returncode == 0, done.stderr
    exported = log_density(pfjax.load(run / "hf-step-4-alpha-0.5"))
    want = log_density(pfjax.at_alpha(whole, 0.5))
    np.testing.assert_allclose(exported, want, atol=1e-5)
    done = run_command("pfjax.export", run, "--alpha=9")
    assert "--alpha=9: the run's alpha_range is 0.25 to 8" in done.stderr

    flags = [f"--model={run / 'dial'}", "--max_new_tokens=3"]
    done = run_command(
        "pfjax.sample", *flags, "--prompt=a b", "--alpha=4", "--samples=9"
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    of = {
        tuple(y): p
        for y, p in zip(RESPONSES, log_density(pfjax.at_alpha(whole, 4.0)), strict=True)
    }
    for row in rows:
        want = of[tuple(row["completion_tokens"])]
        assert row["log_prob"] == pytest.approx(want, abs=1e-4)
    assert len(rows) == 9
    done = run_command("pfjax.sample", *flags, "--prompt=a b")
    assert "give --alpha=2, say" in done.stderr
    done = run_command(
        "pfjax.sample", *flags, "--prompt=a b", "--method=mh", "--alpha=2"
    )
    assert "--method=mh needs an ordinary model" in done.stderr
    plain = (f"--model={config.model}", "--prompt=a b", "--alpha=2")
    assert "is none" in run_command("pfjax.sample", *plain).stderr

    scores = [f"--out={run / 'scores'}", f"--benchmark={config.data.train}"]
    done = run_command(
        "pfjax.evaluate", *flags, *scores, "--samples=2", "--alpha=0.5,4"
    )
    assert done.returncode == 0, done.stderr
    assert ", alpha 0.5: 1 problems x 2" in done.stdout
    about = json.loads((run / "scores/alpha-4/prompts.json").read_text())
    assert about["settings"]["alpha"] == 4.0
    (chart,) = charts.draw(runs.group(runs.load([str(run)])))[0][-1:]
    assert chart["title"] == "Quality against diversity, by alpha"
    assert chart["curves"][0]["points"] == [0.5, 4.0]
    assert chart["curves"][0]["y"][1] == about["scores"]["avg@2"]
    assert chart["curves"][0]["x"][1] == about["scores"]["distinct"]


# Never trained at: what lies within a tenth of them is drawn anew.
HELD_OUT = (0.4, 1.4, 3.0)


def _draw_others(ends, seed, ids):
    def one(i):
        for again in range(99):
            (alpha,) = DRAW(ends, seed + 1000 * again, [i])
            if all(abs(np.log(alpha / x)) > 0.1 for x in HELD_OUT):
                return alpha
        raise AssertionError("nothing is left to draw")

    return np.array([one(i) for i in ids], np.float32) if ends else None


@pytest.mark.slow
@pytest.mark.long_running
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("objective", ["powerflow", "tb_traj"])
def test_every_alpha_reaches_its_exact_target(
    config, tmp_path, monkeypatch, objective, seed
):
    """With twice the rollouts of a run for alpha 4 alone, those of one for 1/2 (`loop_test`)."""
    monkeypatch.setattr(dial, "draw", _draw_others)
    config.objective, config.seed, config.samples_per_prompt = objective, seed, 128
    config.num_steps = config.checkpoint_every = 200
    config.optim.learning_rate, config.optim.schedule = 1e-2, "cosine"
    config.optim.clip_norm = 0.3
    loop.train_and_evaluate(config, str(tmp_path / "run"))
    base = log_density(pfjax.load(config.model))
    whole = pfjax.load(tmp_path / "run/dial")
    found = {}
    for alpha in (0.25, 0.5, 0.7, 1.0, 2.0, 8.0, *HELD_OUT):
        trained = np.exp(log_density(pfjax.at_alpha(whole, alpha)))
        target, _ = length_aware_target(base, LENGTH, alpha)
        if objective == "tb_traj":
            target, _ = power_target(base, alpha)
        found[alpha] = total_variation(trained, target)
    print(objective, seed, found)
    assert max(found.values()) < 0.04, found
    assert found[1.0] < 1e-5

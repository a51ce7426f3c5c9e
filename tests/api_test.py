"""The functions for Python: text in and out, log-probs to differentiate, training."""

import dataclasses
import inspect
import json
import warnings

import jax
import numpy as np
import optax
import pytest

import pfjax
from pfjax.model import hf
from pfjax.model.transformer import Policy
from tests.conftest import use_one_device

TOY = {"samples_per_prompt": 2, "max_new_tokens": 12}
MESSAGES = [{"role": "user", "content": "17+25"}]


@pytest.fixture(scope="module")
def toy() -> Policy:
    return pfjax.load("pfjax/toy")


def test_a_policy_brings_its_tokenizer_if_its_folder_has_one(toy, tmp_path):
    assert toy.tokenizer.eos_token == "<|end|>"
    assert toy.tokenizer is toy._replace(params={}).tokenizer
    hf.save(toy, tmp_path / "bare")
    bare = pfjax.load(tmp_path / "bare")
    assert bare.tokenizer is None
    with pytest.raises(ValueError, match="has no tokenizer for the prompt '17"):
        pfjax.rollout(bare, ["17+25"])
    drawn = pfjax.rollout(bare, [[2, 10]], **TOY)
    assert drawn.texts is None


def test_text_messages_and_ids_are_one_prompt(toy):
    text = toy.tokenizer.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    )
    ids = toy.tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == 7  # 17+25 between a user's and an assistant's token
    ways = ["17+25"], [MESSAGES], [ids], [np.array(ids)]
    draws = [pfjax.rollout(toy, prompts, **TOY) for prompts in ways]
    for other in draws[1:]:
        np.testing.assert_array_equal(other.tokens, draws[0].tokens)
        assert other.texts == draws[0].texts
    ((first, _),) = draws[0].texts
    n = draws[0].lengths[0, 0]
    want = toy.tokenizer.decode(draws[0].tokens[0, 0, :n], skip_special_tokens=True)
    assert first == want and first


def test_a_mesh_of_other_axes_is_refused(toy):
    mesh = jax.make_mesh((4, 2), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2)
    said = "axes data, model and needs data, fsdp, .* by pfjax.infra.sharding.make_mesh"
    with pytest.raises(ValueError, match=said):
        pfjax.load("pfjax/toy", mesh)
    for f in (
        lambda: pfjax.rollout(toy, ["17+25"], **TOY),
        lambda: pfjax.score(toy, [[2, 3, 4]], [2]),
    ):
        with jax.set_mesh(mesh), pytest.raises(ValueError, match=said):
            f()


@pytest.mark.slow
def test_responses_end_where_the_tokenizer_says(toy):
    # As of Qwen's base models, whose config does not name the end of a turn.
    config = dataclasses.replace(toy.config, stop_ids=(31,))
    drawn = pfjax.rollout(toy._replace(config=config), ["17+25"] * 4, 4, 32)
    assert drawn.finished.any()


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ("17+25", r"give \['17\+25'\]"),
        ([2, 10, 3], "got 2: prompts is a list of these"),
        (MESSAGES, "got {'role'.*: prompts is a list of these"),
        ([[]], "must not be empty"),
        ({"prompt": "17+25"}, "must be a list: give"),
        ([[3.0, 4.7]], r"\[3.0, 4.7\] is neither a text, nor a list of messages"),
        ([["3", "4"]], "is neither a text, nor"),
        ([[[3, 4]]], "is neither a text, nor"),
        ([[{"role": "user"}]], "no prompt can be made of .*'role': 'user'"),
    ],
)
def test_prompts_of_another_kind_are_refused(toy, prompts, said):
    unchecked = inspect.unwrap(pfjax.rollout)  # types are checked in tests alone
    with pytest.raises(ValueError, match=said):
        unchecked(toy, prompts, **TOY)


@pytest.mark.parametrize(
    ("f", "said"),
    [
        (lambda _: pfjax.rollout("pfjax/toy", ["1"]), "what pfjax.load returns, got"),
        (lambda p: pfjax.rollout(p, ["1"], 0), "samples_per_prompt=0: must be a whole"),
        (lambda p: pfjax.rollout(p, ["1"], 1, 0), "max_new_tokens=0: must be a whole"),
        (lambda p: pfjax.rollout(p, ["1"], 1, 2, seed=2**32), "seed=4294967296: must be"),
        (lambda p: pfjax.rollout(p, ["1"], 1, 2, seed=-1), "from 0 to 4294967295"),
        (lambda p: pfjax.rollout(p, ["1"], 1, 2, np.inf), "nor infinite, got inf"),
        (lambda p: pfjax.rollout(p, None), "prompts must be a list"),
        (lambda p: jax.jit(lambda: pfjax.rollout(p, ["1"], 1, 2))(), "inside jax.jit: samp"),
        (lambda p: jax.jit(lambda: pfjax.score(p, [[2, 3]], [1]))(), "inside jax.jit: samp"),
        (lambda p: pfjax.score(p, [[2, 2**32 + 3]], [1]), "token id 4294967299: no model"),
        (lambda _: pfjax.score("pfjax/toy", [[2, 3]], [1]), "what pfjax.load returns"),
        (lambda p: pfjax.score(p, [[2, 3], [2, 4]], [1]), "2 sequences but 1 prompt_len"),
        (lambda p: pfjax.score(p, [[2, 3.5]], [1]), "sequence 0: .*not a list of token"),
        (lambda p: pfjax.score(p, ["17"], [1]), "sequence 0: '17' is not a list of"),
        (lambda p: pfjax.score(p, [2, 3], [1, 1]), "sequence 0: 2 is not a list of"),
        (lambda p: pfjax.score(p, [[2, 3]], [1.5]), "whole numbers, got"),
        (lambda p: pfjax.score(p, [[2, 3]], 1), "a number for each sequence, got 1"),
        (lambda p: pfjax.score(p, [[2, 3]], [[1]]), "a number for each sequence, got"),
        (lambda p: pfjax.score(p, [[2, 3]], [1], "1"), "must be positive, got '1'"),
        (lambda p: pfjax.log_probs(p, np.array([[2, 3]])), "pfjax.pack_rollout returns, got"),
        (lambda _: pfjax.response_sum(pfjax.pack([[2, 3]], [1]), 0), "a int without tokens"),
        (lambda _: pfjax.response_sum(np.ones(64), pfjax.pack([[2, 3]], [1])), r"\(1, 64\)"),
        (lambda _: pfjax.pack([[2, 3]], [1], (1.0, 64.0)), "per row, .* got .1.0, 64.0."),
        (lambda p: pfjax.pack_rollout(pfjax.rollout(p, ["1"], 1, 2)._replace(prompts=None)),
         "holds no prompts"),
        (lambda _: pfjax.load(None), "None names no model"),
        (lambda _: pfjax.load(""), "'' names no model"),
        (lambda _: pfjax.pack([[2, 3.9]], [1]), "sequence 0: .*not a list of token"),
        (lambda _: pfjax.pack([[2, 3, 4]] * 9, [1] * 9, (1, 8)), "for pfjax.pack its shape"),
        (lambda _: pfjax.pack([[2, 3]], [1], 64), "rows and tokens per row, .* got 64"),
        (lambda _: pfjax.pack([[2, 3]], [1], (0, 64)), "per row, .* got .0, 64."),
        (lambda _: pfjax.pack([[2, 3]] * 17, [1] * 17, (1, 128)), "at most 16 trajectories"),
        (lambda p: pfjax.log_probs(p, _explicit(pfjax.pack([[2, 3]], [1]))), "explicit axes"),
        (lambda p: pfjax.log_probs(p, pfjax.pack([[2, 99]], [1])), "token id 99, the model"),
        (lambda p: pfjax.log_probs(p, pfjax.pack([[2, 3] * 400], [1])), "512 positions"),
        (lambda p: pfjax.log_probs(p, pfjax.pack([[2, 3]], [1]), remat="ful"), "'ful': must"),
        (lambda _: pfjax.fine_tune({"num_steps": 1}, "w"), "what pfjax.recipe returns"),
        (lambda _: pfjax.load("pfjax/toy", dtype="int8"), "dtype='int8': must be one of"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(toy, monkeypatch, f, said):
    for name in (
        "rollout", "score", "pack", "pack_rollout", "log_probs", "response_sum",
        "fine_tune", "load",
    ):  # fmt: skip
        monkeypatch.setattr(pfjax, name, inspect.unwrap(getattr(pfjax, name)))
    with pytest.raises(ValueError, match=said):
        f(toy)


@pytest.mark.parametrize(
    "setting",
    [
        jax.enable_x64(True),
        jax.default_prng_impl("rbg"),
        jax.threefry_partitionable(False),
        jax.numpy_dtype_promotion("strict"),
    ],
)
def test_values_are_the_same_whatever_jax_is_set_to(toy, setting):
    def values():
        drawn = pfjax.rollout(toy, ["17+25", "3"], 3, 8, seed=5)
        return drawn.tokens, *pfjax.score(toy, [[2, 3, 4], [2, 5]], [1, 1])

    want = values()
    with setting:
        got = values()
    for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(x, y)


def test_log_probs_mix_no_types_where_there_are_64_bits(toy):
    batch = pfjax.pack([[2, 10, 3, 4]], [2])
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.simplefilter("error")
        log_p = pfjax.log_probs(toy, batch)
        mask = batch._replace(is_response=batch.is_response.astype(np.float32))
        of_numbers = inspect.unwrap(pfjax.log_probs)(toy, mask)
        total = lambda p: pfjax.log_probs(p, batch).sum()
        gradient = jax.grad(total)(toy).params["final_norm"]
    assert log_p.dtype == gradient.dtype == np.float32
    np.testing.assert_array_equal(of_numbers, log_p)


def test_gradients_of_log_probs_are_had_where_types_do_not_mix(toy):
    batch = pfjax.pack([[2, 10, 3, 4], [2, 7, 1]], [3, 1])

    def total(params):
        log_p = pfjax.log_probs(toy._replace(params=params), batch)
        return pfjax.response_sum(log_p, batch).sum()

    want = jax.grad(total)(toy.params)
    with jax.numpy_dtype_promotion("strict"):
        got = jax.grad(total)(toy.params)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def _explicit(batch):
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Explicit,))
    return jax.device_put(batch, jax.NamedSharding(mesh, jax.P()))


def test_new_tokens_fit_the_positions(toy, monkeypatch):
    seen = []
    take = lambda policy, ids, samples, new, *rest: seen.append(new) or _nothing()
    monkeypatch.setattr("pfjax.sampler.engine.rollout", take)
    pfjax.rollout(toy, [[2] * 7, [2] * 100])
    pfjax.rollout(toy, [[2] * 7], max_new_tokens=5)
    assert seen == [512 - 100, 5]


def _nothing():
    from pfjax.batch import Rollout

    empty = np.zeros((0, 0, 0))
    return Rollout(empty, empty, empty, empty, 0)


SEQUENCES, PROMPT_LENGTHS = [[2, 10, 3, 4], [2, 3, 4, 5, 6], [2, 7, 1]], [3, 2, 1]


def test_log_probs_are_those_of_score_and_come_back_by_index(toy):
    batch = pfjax.pack(SEQUENCES, PROMPT_LENGTHS)
    log_pf = pfjax.response_sum(pfjax.log_probs(toy, batch), batch)
    want = [x.sum() for x in pfjax.score(toy, SEQUENCES, PROMPT_LENGTHS)]
    got = dict(
        zip(batch.prompt_index[batch.is_real], log_pf[batch.is_real], strict=True)
    )
    np.testing.assert_allclose([got[i] for i in range(3)], want, rtol=1e-5)


@pytest.mark.slow
def test_log_probs_are_of_a_part_where_a_trainer_splits_by_hand(toy):
    """By axes of its own; and with 64 bits they are the same."""
    batch, auto = pfjax.pack(SEQUENCES * 2, PROMPT_LENGTHS * 2, (8, 8)), jax.P("data")
    of_part = lambda policy, batch: pfjax.log_probs(policy, batch)
    want = jax.jit(of_part)(toy, batch)
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    how = {"in_specs": (jax.P(), auto), "out_specs": auto, "check_vma": False}
    over = jax.shard_map(of_part, mesh=mesh, **how)
    got = over(jax.device_put(toy, jax.NamedSharding(mesh, jax.P())), batch)
    np.testing.assert_allclose(got, want, atol=1e-5)
    apart = jax.tree.map(lambda x: x[:, None], batch)
    got = jax.pmap(of_part, in_axes=(None, 0))(toy, apart)
    np.testing.assert_allclose(got[:, 0], want, atol=1e-5)
    with jax.enable_x64(True):
        np.testing.assert_allclose(jax.jit(of_part)(toy, batch), want, atol=1e-5)


@pytest.mark.slow
def test_a_rollout_is_packed_in_its_order(toy):
    drawn = pfjax.rollout(toy, ["17+25", "11+9"], 3, 12)
    batch = pfjax.pack_rollout(drawn, (4, 64))
    assert (batch.prompt_index[batch.is_real] // 3).min() == 0
    assert (batch.prompt_index // 3)[~batch.is_real].max() == -1
    log_pf = pfjax.response_sum(pfjax.log_probs(toy, batch), batch)
    is_in = np.arange(12) < drawn.lengths[..., None]
    want = np.where(is_in, drawn.log_probs, 0).sum(axis=-1).ravel()
    np.testing.assert_allclose(
        log_pf[batch.is_real], want[batch.prompt_index[batch.is_real]], rtol=1e-4
    )


def test_a_batch_has_the_shape_that_is_asked_for():
    assert pfjax.pack(SEQUENCES, PROMPT_LENGTHS, (4, 8)).tokens.shape == (4, 8)
    # Eight at most in a row of 64: two rows; of five rows eight.
    assert pfjax.pack(SEQUENCES * 5, PROMPT_LENGTHS * 5).tokens.shape == (2, 64)
    assert pfjax.pack([[2] * 65] * 5, [1] * 5).tokens.shape == (8, 128)
    with pytest.raises(ValueError, match="only 1 were given"):
        pfjax.pack(SEQUENCES, PROMPT_LENGTHS, (1, 8))
    with pytest.raises(ValueError, match="3 sequences but 2 prompt_lengths"):
        pfjax.pack(SEQUENCES, [1, 2])


def test_a_policy_is_the_tree_of_its_parameters(toy):
    batch = pfjax.pack(SEQUENCES, PROMPT_LENGTHS, (1, 64))

    @jax.jit
    def update(policy, batch):
        loss = lambda policy: -pfjax.log_probs(policy, batch).sum()
        value, grads = jax.value_and_grad(loss)(policy)
        return optax.apply_updates(
            policy, jax.tree.map(lambda g: -1e-3 * g, grads)
        ), value

    first, before = update(toy, batch)
    _, after = update(first, batch)
    assert after < before
    assert first.config == toy.config and first.tokenizer is toy.tokenizer
    # The same model from another place is the same tree: no second program.
    assert jax.tree.structure(toy) == jax.tree.structure(pfjax.load("pfjax/toy"))


def test_a_policy_is_shown_in_a_line(toy, tiny_policy):
    want = "Policy(qwen2, 3 layers of width 64, 0.14 M parameters in float32, 1 cpu device)"
    assert repr(toy) == want
    shapes = jax.eval_shape(lambda: toy)
    assert repr(shapes) == want.replace(", 1 cpu device", "")
    assert jax.jit(lambda p: (repr(p), 0.0)[1])(toy) == 0.0
    half = toy._replace(params=jax.tree.map(lambda x: x.astype("bfloat16"), toy.params))
    assert "in bfloat16" in repr(half)


def test_a_recipe_takes_other_values():
    config = pfjax.recipe("smoke", num_steps=3, **{"optim.learning_rate": 1})
    assert (config.num_steps, config.optim.learning_rate) == (3, 1.0)
    with pytest.raises(ValueError, match="'lr'; did you mean optim.learning_rate"):
        pfjax.recipe("smoke", lr=1e-3)
    with pytest.raises(ValueError, match="'lora'; did you mean lora.rank"):
        pfjax.recipe("smoke", lora={"rank": 4})
    with pytest.raises(ValueError, match="num_steps='many': must be of type int"):
        pfjax.recipe("smoke", num_steps="many")


@pytest.fixture
def config(monkeypatch):
    """Two small steps of the toy, an evaluation after each."""
    use_one_device(monkeypatch)
    return pfjax.recipe(
        "smoke",
        num_steps=2,
        eval_every=1,
        checkpoint_every=100,
        prompts_per_step=4,
        samples_per_prompt=2,
        eval_samples=1,
        max_new_tokens=8,
        microbatch_size=4,
        updates_per_rollout=1,
        match_prompts=0,
        **{"health_checks.action": "off", "mesh.data": 1},
    )


def test_training_from_python(config, tmp_path):
    steps, evaluations = [], []
    with jax.enable_x64(True):  # of what else the caller computes
        policy = pfjax.fine_tune(
            config,
            tmp_path,
            on_step=lambda step, metrics: steps.append((step, metrics)),
            on_evaluation=lambda *args: evaluations.append(args),
        )
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    written = {row["step"]: row for row in map(json.loads, lines)}
    assert [step for step, _ in steps] == [1, 2]
    for step, metrics in steps:
        assert metrics["tb/loss"] == pytest.approx(written[step]["tb/loss"], rel=1e-5)
    assert [step for step, *_ in evaluations] == [0, 1, 2]
    for step, metrics, rows in evaluations:
        assert metrics["eval/avg@1"] == np.mean([row["correct"] for row in rows])
        assert metrics["eval/avg@1"] == pytest.approx(written[step]["eval/avg@1"])
    saved = pfjax.load(tmp_path / "hf")
    for x, y in zip(*map(jax.tree.leaves, (policy, saved)), strict=True):
        np.testing.assert_array_equal(x, y)
    assert "finished" not in pfjax.rollout(policy, ["17+25"], **TOY).texts[0][0]


class Mine(Exception):
    """Of a callback."""


@pytest.mark.slow
def test_an_exception_in_a_callback_stops_after_a_save(config, tmp_path):
    def fail_at(limit):
        def fail(step, *_):
            if step == limit:
                raise Mine(f"at {step}")

        return fail

    with pytest.raises(Mine, match="at 0"):
        pfjax.fine_tune(config, tmp_path, on_evaluation=fail_at(0))
    with pytest.raises(Mine, match="at 1") as caught:
        pfjax.fine_tune(config, tmp_path, on_step=fail_at(1))
    assert "stopped after step 1; the same call" in caught.value.__notes__[0]
    done = []
    with pytest.raises(Mine, match="at 2"):
        note = lambda step, _: done.append(step)
        pfjax.fine_tune(config, tmp_path, note, on_evaluation=fail_at(2))
    assert done == [2]  # the first was saved
    assert not (tmp_path / "hf").exists()
    again = []
    pfjax.fine_tune(config, tmp_path, on_step=lambda step, _: again.append(step))
    assert again == [] and (tmp_path / "hf").exists()


@pytest.mark.slow
def test_a_reward_from_python_tilts_the_target(config, tmp_path):
    asked = []

    def digits(completions, answer, **columns):
        asked.append((len(completions), len(answer)))
        return [sum(c.isdigit() for c in text) / 10 for text in completions]

    with pytest.raises(ValueError, match="set --config.beta above 0"):
        pfjax.fine_tune(config, tmp_path, reward=digits)
    config.beta = 1.0
    rewards = []
    pfjax.fine_tune(
        config,
        tmp_path,
        on_step=lambda step, metrics: rewards.append(metrics["reward/mean"]),
        reward=digits,
    )
    assert len(rewards) == 2 and min(rewards) > 0
    assert asked[:8] == [(2, 2)] * 8  # 4 prompts, 2 steps; then those of the match
    saved = json.loads((tmp_path / "config.json").read_text())["config"]
    assert saved["reward"].startswith("python:") and "digits" in saved["reward"]
    config.reward = saved["reward"]
    with pytest.raises(ValueError, match="call pfjax.fine_tune with it"):
        pfjax.fine_tune(config, tmp_path / "other")


@pytest.mark.slow
def test_a_format_term_from_python_takes_the_place_of_the_boxes(config, tmp_path):
    config.num_steps, config.match_prompts = 1, 0
    first = []
    how = {"on_step": lambda step, metrics: first.append(metrics["tb/logz_mean"])}
    config.format_penalty = 0.0
    pfjax.fine_tune(config, tmp_path / "none", **how)
    constant = lambda completions, **columns: [-0.25] * len(completions)
    pfjax.fine_tune(config, tmp_path / "own", format_term=constant, **how)
    # Calibrated at the first step: a constant psi moves log Z' by alpha times itself.
    assert first[1] - first[0] == pytest.approx(config.alpha * -0.25, abs=1e-5)
    saved = json.loads((tmp_path / "own/config.json").read_text())["config"]
    assert saved["format_term"].startswith("python:")
    words = lambda completions, **columns: ["good"] * len(completions)
    with pytest.raises(ValueError, match=r"^format_term python:.* 'good'"):
        pfjax.fine_tune(config, tmp_path / "words", format_term=words)


@pytest.mark.slow
def test_a_run_that_a_reward_has_ended_goes_on_when_it_is_mended(
    config, tmp_path, capsys
):
    code = tmp_path / "mine.py"
    code.write_text(
        "def halves(completions, state, **columns):\n"
        "    value = 0.5 if state[0]['step'] < 2 else float('nan')\n"
        "    return [value * (i + 1) for i in range(len(completions))]\n"
    )
    config.reward, config.beta, config.checkpoint_every = f"{code}:halves", 1.0, 1
    run = tmp_path / "run"
    with pytest.raises(ValueError, match="returned nan for a response"):
        pfjax.fine_tune(config, run)
    code.write_text(code.read_text().replace("nan", "1"))
    capsys.readouterr()
    steps = []
    pfjax.fine_tune(config, run, on_step=lambda step, metrics: steps.append(step))
    assert steps == [2]  # the first was saved
    said = capsys.readouterr().out
    assert "the code of the reward is another than before: rewards up to step 1" in said
    assert (
        "reward: mean 1.5, std within a prompt 0.5, from 1 to 2 (beta 1: odds" in said
    )

"""Where the study's runs ended, on training prompts too, and where they should have: what is
not listed counts."""

import dataclasses
import json
import shutil
import types

import jax
import numpy as np
import pytest

import pfjax
from examples import base_model, worlds
from examples.study import cells, ends, methods, search, tables, unlisted
from examples.study.ends import TRAIN
from examples.study.methods import TRAINED, Base
from examples.study.unlisted import Unlisted
from examples.worlds import exact as of_worlds
from examples.worlds.world import VOCAB_SIZE, WORDS
from pfjax.infra import dataset_io
from pfjax.model import scoring, tokenizer, transformer
from pfjax.model.transformer import Policy
from pfjax.targets import Target
from tests.examples import fake_study


@pytest.fixture
def base():
    return fake_study.base()


def test_powers_count_what_is_not_listed(base):
    """A list that was cut: with each of the others once it is the whole list again."""
    for is_length_aware in (True, False):
        whole = methods.power(base, 0.5, is_length_aware)
        cut, rest = _cut(base.rows[0], 1)
        of_rest = (rest.log_p0, np.zeros(2), rest.length, rest.is_correct)
        more = Unlisted(*of_rest, rest.log_p_rare)
        rows = base._replace(rows=[cut], unlisted=[more])
        (found,) = methods.power(rows, 0.5, is_length_aware)
        assert found == pytest.approx(whole[0])
        (of_list,) = methods.power(rows._replace(unlisted=None), 0.5, is_length_aware)
        assert of_list == pytest.approx([0.0])
        none_rare = [
            fake_study.listed(r.log_p0, r.length, r.is_correct) for r in base.rows
        ]
        all_flattened = methods.power(
            base._replace(rows=none_rare), 0.5, is_length_aware
        )
        assert all_flattened[0] != pytest.approx(whole[0])


def _cut(row, num):
    parts = []
    for part in (slice(num), slice(num, None)):
        arrays = (row.log_p0, row.length, row.is_correct, row.log_p_rare)
        parts.append(fake_study.listed(*(x[part] for x in arrays)))
    return parts


def test_what_is_not_listed_is_estimated_as_well_as_it_says(base):
    """Samples of all, of which those of the list are left out, against the whole sum."""
    rng = np.random.default_rng(0)
    log_p = np.log(rng.dirichlet(np.full(40, 0.3)))
    row = fake_study.listed(log_p, rng.integers(1, 6, 40), rng.random(40) < 0.5)
    cut, _ = _cut(row, 10)
    log_q = log_p * 0.5 - np.log(np.exp(log_p * 0.5).sum())

    def draw(alpha, num=400):
        at = rng.choice(40, size=num, p=np.exp(log_q))
        group, at = np.arange(num)[at >= 10] % unlisted.GROUPS, at[at >= 10]
        log_m = log_q[at] + np.log(num)
        of_each = (row.length[at], row.is_correct[at], row.log_p_rare[at])
        return [Unlisted(log_p[at], log_m, *of_each, group)]

    method = TRAINED["alpha_0.5"]
    target = np.exp(methods.power(base._replace(rows=[row]), 0.5)[0])
    wanted = {"listed": target[:10].sum(), "accuracy": target @ row.is_correct}
    wanted["length"] = target @ row.length
    cut = base._replace(rows=[cut], draw=draw)
    found = [ends.predict(cut, method) for _ in range(100)]
    assert found[0]["listed"] == pytest.approx(1) and 0.1 < wanted["listed"] < 0.9
    for key, value in wanted.items():
        all_ = np.array([x[f"all/{key}"] for x in found])
        errors = np.array([x[f"all/{key}_se"] for x in found])
        assert all_.mean() == pytest.approx(value, abs=4 * all_.std() / 10), key
        assert 0.75 < errors.mean() / all_.std() < 1.35, key
    # Without any of its groups a sample stands for as many as with all of them.
    (drawn,) = draw(0.5)
    count = lambda x: np.exp(-x.log_q).sum()
    parts = [count(drawn.without(g)) for g in range(unlisted.GROUPS)]
    assert np.mean(parts) == pytest.approx(count(drawn))
    assert "all/listed" not in ends.predict(cut, TRAINED["random"])  # no power


@pytest.fixture(scope="module")
def policy():
    """A base that has learned nothing, and is sure of it."""
    tok = base_model.make_tokenizer(WORDS)
    config = base_model.model_config(VOCAB_SIZE, tok.eos_token_id)
    config = dataclasses.replace(config, load_tokenizer=lambda: tok)
    params = transformer.init_params(config, jax.random.key(0))
    head = transformer.head_weight(params) / 0.3
    config = dataclasses.replace(config, tied_embeddings=False)
    return Policy(config, {**params, "head": head})


@pytest.mark.slow
def test_samples_of_a_model_give_what_is_not_listed(policy):
    """Of all responses of two tokens at most the list has some of those that end."""
    tok, problem = policy.tokenizer, worlds.WORLDS["detour"].problems()[0][0]
    stop = tok.eos_token_id
    # As likely as the likeliest word is it to stop.
    head, prompt = policy.params["head"], tokenizer.encode_prompt(tok, problem.prompt)
    drawn = pfjax.rollout(policy, [prompt], 1, 1, temperature=0.0)
    top = int(drawn.tokens[0, 0, 0])
    head = head.at[stop].set(head[top])
    policy = policy._replace(params={**policy.params, "head": head})
    first = [[x] for x in range(VOCAB_SIZE) if x != stop]
    all_ = [[stop], *([*x, y] for x in first for y in range(VOCAB_SIZE))]
    sequences = [prompt + y for y in all_]
    asked, eta = (policy, sequences, [len(prompt)] * len(all_)), 0.01
    total = lambda of_tokens: np.array([x.sum(dtype=float) for x in of_tokens])
    log_p0 = total(pfjax.score(*asked))
    rare = total(scoring.rare_log_probs(*asked, eta))
    assert 0.2 < np.mean(rare < 0) < 0.99
    assert np.exp(log_p0).sum() == pytest.approx(1, abs=1e-4)
    length = np.array([len(y) for y in all_])
    texts = ["", *WORDS[2:20]]
    ids = [[*tok.encode(text), stop] for text in texts]
    at = np.array([all_.index(y) for y in ids])
    of_list = (log_p0[at], length[at], np.zeros(len(at), bool), rare[at])
    row = fake_study.listed(*of_list)
    row.texts, row.problem = texts, problem
    world = worlds.WORLDS["detour"]
    for alpha in (0.5, 2.0):
        (drawn,) = unlisted.draw(policy, [row], 2, eta, alpha, num=2048)
        base = Base(world, policy, [row], lambda _, drawn=drawn: [drawn])
        for is_length_aware, name in ((True, "powerflow"), (False, "tb_traj")):
            target = Target(alpha, is_length_aware=is_length_aware)
            how = {"log_p_rare": rare}
            density = np.exp(of_worlds.target_on(log_p0, length, target, **how)[1])
            method = TRAINED[name]._replace(own_alpha=alpha)
            found = ends.predict(base, method)
            error = found["all/listed_se"]
            wanted = density[at].sum()
            assert 0.02 < wanted < 0.9 and error < 0.1 * wanted
            assert found["all/listed"] == pytest.approx(wanted, abs=3 * error)


@pytest.fixture(scope="module")
def study(tmp_path_factory, policy):
    """A study of one run of a base as it is, that has ended long ago."""
    out, cell = tmp_path_factory.mktemp("study"), cells.Cell("detour", 0, "random", 0)
    split = worlds.WORLDS["detour"].split(0)
    folder = cells.folder_of_base(out, "detour", 0)
    base_model.write(folder, policy, policy.tokenizer, split.train, split.held_out)
    cell.folder(out).mkdir(parents=True)
    shutil.copytree(folder, cell.folder(out) / "hf")
    cell.result(out).write_text(json.dumps(cell._asdict() | {"accuracy": 0.25}))
    return out, cell


@pytest.mark.slow
def test_prompts_of_training_are_trained_on(study):
    out, _ = study
    read = lambda name: [
        row["prompt"]
        for row in dataset_io.read_jsonl(
            cells.folder_of_base(out, "detour", 0) / f"{name}.jsonl"
        )
    ]
    asked = lambda base: [row.problem.prompt for row in base.rows]
    train = asked(cells.load_base(out, "detour", 0, is_train=True))
    assert train == read("train")[:64] and not {*train} & {*read("eval")}
    assert asked(cells.load_base(out, "detour", 0)) == read("eval")
    # Nor are they what a search holds out of them.
    assert len(read("train")) - search.NUM_VALIDATION >= len(train)


@pytest.mark.slow
def test_runs_that_have_ended_are_measured_on_training_prompts(study, monkeypatch):
    out, cell = study
    called = []
    monkeypatch.setattr(cells, "carry_out", called.extend)
    gone = cell._replace(seed=1)  # whose policy was not kept
    unknown = cell._replace(method="grpo")
    for other in (gone, unknown):
        other.folder(out).mkdir(parents=True)
        other.result(out).write_text(json.dumps(other._asdict()))
    (unknown.folder(out) / "hf").mkdir()
    cells.add_training(out, [cell, gone, unknown])
    ((_, function, args),) = called
    function(*args)
    found = json.loads(cell.result(out).read_text())
    assert found["accuracy"] == 0.25
    # The base should stay as it is, and has.
    assert found[f"{TRAIN}total_variation"] == pytest.approx(0, abs=1e-5)
    assert 0 <= found[f"{TRAIN}accuracy"] < 1 and found[f"{TRAIN}listed"] < 1
    called.clear()
    cells.add_training(out, [cell])
    assert not called


def test_what_was_only_memorised_shows(base, monkeypatch):
    """A policy that meets its target where it was trained, and is the base elsewhere."""
    method = TRAINED["powerflow"]
    bases = {"": base, TRAIN: base._replace(rows=base.rows[:1])}
    told = {
        "": methods.unchanged(base, 4.0),
        TRAIN: methods.power(bases[TRAIN], 4.0),
    }
    found, known = {}, {}
    base_policy = types.SimpleNamespace(tokenizer=None)
    for on, at in bases.items():
        monkeypatch.setattr(of_worlds, "score", lambda *_, on=on: told[on])
        measured = ends.measure(None, at._replace(policy=base_policy), method)
        found |= {f"{on}{k}": v for k, v in measured.items()}
        known |= {f"{on}{k}": v for k, v in ends.predict(at, method).items()}
    run = fake_study.run("powerflow", 0, 0, **found)
    world = tables.World("sums", 4.0, [run], {"powerflow": [known]})
    (row,) = fake_study.cells_of(tables.of_ends([world]))
    assert row["there"] == "**no**" and row["there, trained on"] == "yes"
    assert row["difference, trained on"] == "0.000"
    assert row["total variation, trained on"] == "0.000"
    assert float(row["total variation"]) > 0.05


def test_a_verdict_counts_what_is_not_listed():
    flat = fake_study.world()
    more = {"all/accuracy": 0.2, "all/accuracy_se": 0.003}
    more |= {"listed": 1.0, "all/listed": 0.4, "all/listed_se": 0.01}
    flat.predictions["powerflow"][:] = [
        {**x, **more} for x in flat.predictions["powerflow"]
    ]
    row = fake_study.cells_of(tables.of_ends([flat]))[0]
    assert row["of the list"] == "0.850" and row["listed"] == "0.400 ± 0.007"
    assert row["exact"] == "0.200 ± 0.002" and row["difference"].startswith("0.651")
    assert "0 of 2 cells" in tables.of_ends([flat])
    # As far as it is known.
    for x in flat.predictions["powerflow"]:
        x["all/accuracy_se"] = 0.5
    assert "1 of 2 cells" in tables.of_ends([flat])

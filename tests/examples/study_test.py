"""python -m examples.study: what it predicts, its statistics and tables, and its commands."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from examples.study import cells, ends, methods, search, statistics, tables
from examples.study.ends import TRAIN
from examples.study.methods import TRAINED, UNTRAINED
from pfjax.infra import dataset_io
from pfjax.trainer import recipes
from tests.conftest import ROOT, has_proc, run_command
from tests.examples import fake_study


@pytest.fixture
def base():
    return fake_study.base()


def test_best_of_n_is_what_drawing_n_times_gives(base):
    rng = np.random.default_rng(0)
    drawn = rng.choice(3, size=(100_000, 3), p=[0.5, 0.3, 0.2]).min(axis=1)
    found = np.bincount(drawn) / len(drawn)
    first, second = methods.best_of(base, 4.0, num=3)
    assert np.exp(first) == pytest.approx([1 - 0.5**3, 0.5**3 - 0.2**3, 0.2**3])
    assert np.exp(first) == pytest.approx(found, abs=0.005)
    assert second == pytest.approx([0])


def test_powers_sum_to_one_and_a_power_of_one_changes_nothing(base):
    for is_length_aware in (True, False):
        for row in methods.power(base, 2.0, is_length_aware):
            assert np.exp(row).sum() == pytest.approx(1)
    whole = np.exp(methods.power(base, 2.0, False)[0])
    assert whole == pytest.approx(np.array([25, 9, 4]) / 38)
    same = methods.power(base, 1.0)[0]
    assert same == pytest.approx(methods.unchanged(base, 1.0)[0])


def test_predictions_are_expectations(base):
    found = ends.predict(base, UNTRAINED["base"])
    assert found["accuracy"] == pytest.approx((0.5 + 1) / 2)
    assert found["length"] == pytest.approx((0.5 + 0.6 + 0.6 + 2) / 2)
    of_16 = lambda p: 1 - (1 - p) ** 16
    assert found["distinct_correct"] == pytest.approx((of_16(0.3) + of_16(0.2) + 1) / 2)
    assert found["distinct"] == pytest.approx(
        (of_16(0.5) + of_16(0.3) + of_16(0.2) + 1) / 2
    )
    assert ends.predict(base, TRAINED["grpo"]) is None


def test_distances_are_of_lists_and_what_is_not_listed_is_one_cell():
    p, q = np.log([0.5, 0.3]), np.log([0.2, 0.6])
    found = ends._distances(p, q)
    # Both leave 0.2 unlisted; given that it is listed, 5/8, 3/8 and 1/4, 3/4.
    of_p = 5 / 8 * np.log(5 / 2) + 3 / 8 * np.log(1 / 2)
    of_q = 1 / 4 * np.log(2 / 5) + 3 / 4 * np.log(2)
    assert found == pytest.approx((0.3, of_p, of_q))
    # The same given that it is listed, which the other half as often is.
    halved = ends._distances(p, p + np.log(0.5))
    assert halved == pytest.approx(((0.4 + 0.4) / 2, 0, 0))


def test_every_method_has_settings_that_there_are():
    for name, method in TRAINED.items():
        config = recipes.recipe(f"study:{name}")
        assert config.match_prompts == 0
        # What learns from samples of a file says how many; others draw their own.
        assert bool(method.samples) == (config.behavior.from_file == 1.0), name
    assert TRAINED["grpo"].is_apt("sums") and not TRAINED["grpo"].is_apt("stories")
    assert set(methods.MAIN) <= set(TRAINED)


def test_differences_are_paired():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(4, 5))
    found = statistics.intervals({"a": noise, "b": noise + 0.1}, reference="a")
    assert found["a"] == pytest.approx((0, 0, 0))
    assert found["b"] == pytest.approx((0.1, 0.1, 0.1))
    assert not found["b"].holds_zero
    unpaired = statistics.intervals({"a": noise, "b": noise[:, ::-1]}, reference="a")
    assert unpaired["b"].holds_zero


def test_intervals_hold_the_mean_as_often_as_they_say():
    rng = np.random.default_rng(1)
    held = []
    for _ in range(200):
        found = statistics.intervals({"a": rng.normal(size=(4, 10))})["a"]
        held.append(found.holds_zero)
    # Of 95; the bootstrap of ten seeds is a little narrow.
    assert 0.88 < np.mean(held) < 0.99


def test_a_world_has_a_row_per_method_exact_ones_first():
    rows = fake_study.cells_of(tables.of_world(fake_study.world()))
    names = [row[""] for row in rows]
    titles = [TRAINED[m].title for m in ("powerflow", "tb_traj", "grpo")]
    exact = [f"*{UNTRAINED[m].title}*" for m in ("base", "target")]
    assert names == exact + titles
    assert rows[0]["accuracy"] == "0.550"
    mean, interval = rows[2]["accuracy"].split(" ", 1)
    low, high = json.loads(interval)
    assert mean == "0.851" and low < 0.851 < high
    assert rows[2]["total variation"] == "0.020" and rows[2]["exponent"] == ""
    assert rows[2]["tokens"] == "1,000"


def test_ends_are_compared_with_what_was_predicted():
    text = tables.of_ends([fake_study.world()])
    there = {row["method"]: row["there"] for row in fake_study.cells_of(text)}
    assert there == {
        TRAINED["powerflow"].title: "yes",
        TRAINED["tb_traj"].title: "**no**",
    }
    assert text.endswith(
        "1 of 2 cells end within a point, or their interval, of the exact value.\n"
    )
    assert (
        fake_study.cells_of(text)[0]["difference, trained on"] == ""
    )  # results of a study before there were


def test_methods_are_ordered_only_where_their_interval_allows():
    found = {
        row["method"]: row
        for row in fake_study.cells_of(tables.of_all([fake_study.world()]))
    }
    ours = found[TRAINED["powerflow"].title]
    # A thousandth beyond the target at seed 1, of a way of 0.3.
    assert ours["of the way to the target"].startswith("1.003")
    assert ours[""] == ""
    assert found[TRAINED["grpo"].title][""] == "above"
    assert found[TRAINED["tb_traj"].title][""] == "below"
    same = fake_study.world()
    runs = [r | {"accuracy": 0.8} for r in same.runs if r["method"] == "grpo"]
    runs += [r for r in same.runs if r["method"] == "powerflow"]
    noisy = [r | {"accuracy": 0.8 + 0.05 * (r["seed"] - 1)} for r in runs]
    rows = fake_study.cells_of(tables.of_all([same._replace(runs=noisy)]))
    assert {row["method"]: row[""] for row in rows}[TRAINED["grpo"].title] == "no order"
    # A target that is hardly better than its base has no way to it.
    assert tables.of_all([fake_study.world(target=0.52)]) == ""


def test_a_run_that_was_once_below_the_base_is_counted(tmp_path, base):
    rows = [
        {"step": 0, "eval/avg@8": 0.1, "eval/avg@8_se": 0.01},
        {"step": 1, "num_tokens": 30},
        {"step": 2, "num_tokens": 20,
         "eval/avg@8": 0.74, "eval/avg@8_se": 0.01},
    ]  # fmt: skip
    dataset_io.write_jsonl(tmp_path / "metrics.jsonl", rows)
    found = ends.on_the_way(tmp_path, base)  # whose accuracy is 0.75
    assert found == {"tokens": 50, "fell_below_base": 0.0}
    rows[2]["eval/avg@8"] = 0.72
    dataset_io.write_jsonl(tmp_path / "metrics.jsonl", rows)
    assert ends.on_the_way(tmp_path, base)["fell_below_base"] == 1.0


def test_what_is_not_listed_is_taken_from_samples(base):
    for i, row in enumerate(base.rows):
        row.problem = types.SimpleNamespace(prompt=f"p{i}")
    row = {"prompt": "p0", "completion": "1", "terminated": True, "correct": True}
    rows = [
        row | {"tokens": 2},  # listed
        row | {"tokens": 9, "completion": "1 and on"},
        row | {"tokens": 32, "terminated": False},  # cut, so it is not what is listed
        row | {"tokens": 4, "completion": "7", "correct": False},
    ]
    found = {"accuracy": 0.25, "length": 2.0, "listed": 0.25}
    got = ends.with_samples(found, rows, base)
    assert got == {"accuracy": 0.25 + 0.75 * 2 / 3, "length": 0.5 + 0.75 * 45 / 3}
    world = types.SimpleNamespace(name="stories")
    got = ends.with_samples(found, rows, base._replace(world=world))
    assert got["accuracy"] == 0.25


def _fails():
    raise ValueError("detour 0 failed")


def test_the_first_failure_ends_it():
    with pytest.raises(ValueError, match="detour 0 failed"):
        cells.carry_out([("detour 0", _fails, ())])


def test_a_search_holds_prompts_out(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    rows = [{"prompt": str(i), "answer": "1"} for i in range(200)]
    for name in ("train", "train_answered"):
        dataset_io.write_jsonl(base / f"{name}.jsonl", rows)
    prompts = search._hold_out(base, tmp_path / "prompts")
    read = lambda name: {
        r["prompt"] for r in dataset_io.read_jsonl(prompts.folder / f"{name}.jsonl")
    }
    assert len(read("train")) == 72 and read("train") == read("train_answered")
    assert read("eval") == {str(i) for i in range(72, 200)}
    assert len(search.SETTINGS) == len({str(x) for x in search.SETTINGS}) == 20


@has_proc
def test_a_study_that_is_killed_leaves_no_process(tmp_path):
    pool = "import examples.study.cells as c, os, time"
    pool += "; p = c._pool(); print(p.submit(os.getpid).result(), flush=True)"
    pool += "; p.submit(time.sleep, 600).result()"
    command = [sys.executable, "-c", pool]
    study = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    worker = int(study.stdout.readline())
    assert study.poll() is None
    study.send_signal(signal.SIGTERM)
    study.wait()
    for _ in range(3000):
        if not _is_alive(worker):
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("a worker goes on")


def _is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = pathlib.Path(f"/proc/{pid}/stat")
    return not stat.exists() or ") Z " not in stat.read_text()


@pytest.mark.slow  # fits a base and trains four times, in processes of their own
def test_one_command_writes_tables_pictures_and_a_page(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", os.environ["PFJAX_TEST_CACHE"])
    args = (
        f"--out={tmp_path}", "--world=detour", "--bases=1", "--seeds=1",
        "--base_steps=10", "--num_steps=2",
    )  # fmt: skip
    names = ("--method=powerflow", "--method=grpo")
    printed = _study(*args, *names)
    assert "2/2" in printed
    text = (tmp_path / "tables.md").read_text()
    assert text in printed and "## Where runs should end" in text
    (run,) = [r for r in json.loads((tmp_path / "results.json").read_text())
              if r["method"] == "powerflow"]  # fmt: skip
    config = json.loads((tmp_path / "detour/0/powerflow/0/config.json").read_text())
    assert config["config"]["behavior"]["base"] == 0.5
    assert 0 < run["total_variation"] < 1 and run["tokens"] > 0
    assert TRAINED["powerflow"].title in (tmp_path / "report/index.html").read_text()
    png = (tmp_path / "pictures/detour/accuracy.png").read_bytes()
    assert png[:4] == b"\x89PNG"
    assert 0 < run[f"{TRAIN}total_variation"] < 1 and 0 < run[f"{TRAIN}exponent"]
    # A run that was measured on held-out prompts alone.
    path = tmp_path / "detour/0/powerflow/0/result.json"
    kept = {k: v for k, v in run.items() if not k.startswith(TRAIN)}
    path.write_text(json.dumps(kept))
    again = _study(*args, *names)
    assert "training prompts" in again
    assert (tmp_path / "tables.md").read_text() == text
    assert "## Where runs should end" in again
    # One of the settings of a search.
    monkeypatch.setattr(search, "SETTINGS", search.SETTINGS[:1])
    out = tmp_path / "search"
    search.search(out, "detour", ["powerflow"], {"num_steps": 1}, 10)
    (trial,) = json.loads((out / "search.json").read_text())["powerflow"]
    assert 0 <= trial["certificate"] <= 1 and 0 <= trial["accuracy"] <= 1


def _study(*args):
    done = run_command("examples.study", *args)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout

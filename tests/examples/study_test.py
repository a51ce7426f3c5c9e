"""python -m examples.study: its commands, and what it makes of their results."""

import importlib
import json
import os
import pathlib
import shutil
import subprocess
import threading
import time
import types

import pytest

from examples.study import jobs, search, study
from pfjax import objectives
from pfjax.infra import dataset_io
from pfjax.model import hf
from tests import fork_server
from tests.conftest import run_command
from tests.report import fake_runs

SHARED = {"num_steps": 2}


def _plan(tmp_path, names=("powerflow", "grpo"), alphas=("0.5", "2"), seeds=2):
    trained, sampled = jobs.plan(tmp_path, names, alphas, seeds, SHARED)
    return {j.name: j for j in [*trained, *(j for x in sampled.values() for j in x)]}


class _Results:
    """Stands in for processes: leaves what they would have left."""

    def __init__(self, accuracy=lambda job: 0.5):
        self.ran: list[str] = []
        self._accuracy = accuracy
        self._lock = threading.Lock()

    def __call__(self, job: jobs.Job) -> None:
        if job.name.startswith(("target", "alpha-2")):
            time.sleep(0.3)  # others need it, and must wait
        with self._lock:
            self.ran.append(job.name)
        if job.result.suffix == ".jsonl":
            problems = dataset_io.read(jobs.EVAL)
            row = {
                "sample": 0,
                "completion": r"\boxed{7}",
                "tokens": 3,
                "finished": True,
            }
            rows = [row | {"prompt_id": i} for i in range(len(problems))]
            dataset_io.write_jsonl(job.result, rows)
            return
        fake_runs.make(job.folder)
        rows = dataset_io.read_jsonl(job.folder / "metrics.jsonl")
        rows[-1] |= {
            "eval/avg@2": self._accuracy(job),
            "eval/elbo": 0.1,
            "eval/eubo": 0.2,
        }
        dataset_io.write_jsonl(job.folder / "metrics.jsonl", rows)
        shutil.copytree(hf.resolve("pfjax/toy"), job.result)


def test_every_objective_and_alpha_is_trained_on_every_seed(tmp_path):
    found = _plan(tmp_path)
    assert {n for n in found if n.endswith("/0")} == {
        "powerflow/0", "grpo/0", "alpha-0.5/0", "alpha-2/0", "back/0",
        "temperature 0.25/0", "SMC, whole sequences/0", "SMC, length-aware/0",
        "MH, length-aware/0",
    }  # fmt: skip
    assert len(found) == 2 * 9 + 1
    command = found["grpo/1"].command
    assert command[:2] == ("pfjax.train", "--config=configs/study.py:grpo")
    assert {"--config.seed=1", "--config.num_steps=2"} < set(command)
    back = found["back/1"]
    assert back.needs == "alpha-2/1" and back.label == "alpha 2, then 0.5"
    assert f"--config.model={tmp_path}/alpha-2/1/hf" in back.command
    assert "--config.alpha=0.5" in back.command
    target = found["powerflow/0"].needs
    assert (
        f"--config.data.target={found[target].result}" in found["powerflow/0"].command
    )
    assert "back/0" not in _plan(tmp_path, alphas=("0.5",))


def test_every_command_has_settings_that_there_are(tmp_path):
    config = importlib.import_module("configs.study")
    names = list(objectives.OBJECTIVES)
    second = [x for values in search._SECOND.values() for x in values]
    for job in _plan(tmp_path, names).values():
        if job.label:
            values = [x for x in job.command if x.startswith("--config.")]
            pairs = dict(x.removeprefix("--config.").split("=") for x in values)
            second.append({k: v for k, v in pairs.items() if k != "model"})
    for values in second:
        c = config.get_config()
        for key in values:
            *sections, last = key.split(".")
            section = c
            for name in sections:
                section = section[name]
            assert last in section, key


def test_what_is_needed_comes_first_and_what_is_there_is_kept(tmp_path, capsys):
    planned = list(_plan(tmp_path).values())
    run = _Results()
    jobs.carry_out(planned, run)
    assert sorted(run.ran) == sorted(j.name for j in planned)
    for job in planned:
        if job.needs:
            assert run.ran.index(job.needs) < run.ran.index(job.name)
    assert f"{len(planned)}/{len(planned)}" in capsys.readouterr().out
    planned[-1].result.unlink()
    again = _Results()
    jobs.carry_out(planned, again)
    assert again.ran == [planned[-1].name]


def test_the_first_failure_ends_it(tmp_path):
    def run(job):
        raise ValueError(f"{job.name} failed")

    with pytest.raises(ValueError, match="failed"):
        jobs.carry_out(list(_plan(tmp_path).values()), run)


def test_a_process_that_fails_says_why_and_a_part_is_no_result(tmp_path):
    path = tmp_path / "samples/x.jsonl"
    job = jobs.sampling("x", path, 0, ["--method=unknown"])
    with pytest.raises(ValueError, match=r"x failed .*x\.log.*:\n(.*\n)*.*unknown"):
        jobs.run(job)
    assert not path.exists()
    # Stands in for pfjax.sample: writes into the part.
    part = str(tmp_path / "samples/x.part")
    assert f"--out={part}" in job.command
    jobs.run(job._replace(command=("timeit", "-n1", "-r1", f"open({part!r}, 'w')")))
    assert path.exists() and not pathlib.Path(part).exists()


def test_tables_and_reports_are_of_all_runs(tmp_path, capsys):
    run = _Results()
    study.study(tmp_path, ["powerflow"], ["0.5"], 1, SHARED, run)
    table = (tmp_path / "table.md").read_text()
    for name in (
        "base", "powerflow, alpha 4", "powerflow, alpha 0.5", "temperature 0.25",
        "SMC, whole sequences", "SMC, length-aware", "MH, length-aware",
    ):  # fmt: skip
        assert f"| {name} |" in table
    assert "0.100 <= log of the target's sum <= 0.200" in table
    text = (tmp_path / "report/index.html").read_text()
    assert "powerflow, alpha 0.5" in text
    for name in ("all/length", "all/distinct", "figure/accuracy", "figure/quality"):
        assert (tmp_path / f"pictures/{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert table in capsys.readouterr().out


def test_search_tries_eight_settings_and_keeps_all(tmp_path, capsys):
    def accuracy(job):
        return 0.9 if "learning_rate=0.0003" in job.name else 0.1

    run = _Results(accuracy)
    search.search(tmp_path, ["tb_traj", "subtb"], SHARED, run)
    found = json.loads((tmp_path / "search.json").read_text())
    for name, second in (
        ("tb_traj", {"log_z", "optim.log_z_learning_rate"}), ("subtb", set())
    ):  # fmt: skip
        trials = found[name]
        assert len(trials) == len({str(t["values"]) for t in trials}) == 8
        best = max(trials[:6], key=lambda t: t["accuracy"])["values"]
        assert best["optim.learning_rate"] == 3e-4
        for trial in trials[6:]:
            assert best.keys() <= trial["values"].keys()
        assert {k for t in trials[6:] for k in t["values"]} - best.keys() == second
        assert name in capsys.readouterr().out or name == "subtb"
    finer = [t["values"]["optim.learning_rate"] for t in found["subtb"][6:]]
    assert finer == pytest.approx([3e-4 / 3**0.5, 3e-4 * 3**0.5])
    train, valid = (
        set((tmp_path / f"{name}.jsonl").read_text().splitlines())
        for name in ("train", "valid")
    )
    assert len(train) == 896 and len(valid) == 128 and not train & valid
    search.search(tmp_path, ["subtb"], SHARED, again := _Results(accuracy))
    assert again.ran == []


@pytest.fixture
def forked(monkeypatch):
    """Its commands are forked, which saves each the seconds of importing."""

    def run(command, *, stdout, stderr, env, **unused):
        _, _, module, *args = command
        how = {"env": env, "stdout": stdout, "stderr": stderr}
        process = fork_server.Process(module, *args, **how)
        return subprocess.CompletedProcess(command, process.wait())

    monkeypatch.setattr(jobs, "subprocess", types.SimpleNamespace(run=run))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", os.environ["PFJAX_TEST_CACHE"])
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


@pytest.mark.slow  # three trainings and six times samples, in processes of their own
def test_runs_tables_and_report_of_one_command(tmp_path, forked):
    args = ("--objectives=powerflow", "--alphas=2", f"--out={tmp_path}")
    printed = _study("--num_steps=2", "--seeds=1", *args)
    assert "8/8" in printed
    config = json.loads((tmp_path / "back/0/config.json").read_text())["config"]
    assert config["alpha"] == 0.5
    assert config["model"] == str(tmp_path / "alpha-2/0/hf")
    table = (tmp_path / "table.md").read_text()
    for name in ("base", "powerflow, alpha 4", "alpha 2, then 0.5", "MH, length-aware"):
        assert f"| {name} |" in table
    assert "<= log of the target's sum <=" in table
    page = (tmp_path / "report/index.html").read_text()
    assert "alpha 2, then 0.5" in page
    # Again: nothing is trained or sampled anew.
    assert "min  " not in _study("--num_steps=2", "--seeds=1", *args)
    assert (tmp_path / "table.md").read_text() == table


@pytest.mark.slow  # two trainings in processes of their own
def test_search_trains_on_its_own_prompts(tmp_path, monkeypatch, forked):
    monkeypatch.setattr(search, "RATES", (1e-4,))
    monkeypatch.setattr(search, "CLIPS", (1.0,))
    monkeypatch.setattr(search, "_FINER", (0.5,))
    search.search(tmp_path, ["subtb"], {"num_steps": 1})
    first, second = json.loads((tmp_path / "search.json").read_text())["subtb"]
    assert first["values"]["optim.learning_rate"] == 1e-4
    assert second["values"]["optim.learning_rate"] == 5e-5
    assert 0 <= second["accuracy"] <= 1
    path = next(tmp_path.glob("subtb/*/config.json"))
    data = json.loads(path.read_text())["config"]["data"]
    assert data["train"] == str(tmp_path / "train.jsonl")
    assert data["eval"] == str(tmp_path / "valid.jsonl")


def _study(*args):
    done = run_command("examples.study", *args)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout

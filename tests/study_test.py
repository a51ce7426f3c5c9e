"""python -m pfjax.study, on two steps."""

import json
import subprocess
import sys


def _study(*args):
    done = subprocess.run(
        [sys.executable, "-m", "pfjax.study", "--num_steps=2", "--seeds=1", *args],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_runs_tables_and_report_of_one_command(tmp_path):
    args = ("--objectives=powerflow", "--alphas=2", f"--out={tmp_path}")
    printed = _study(*args)
    assert "3/3" in printed
    config = json.loads((tmp_path / "back/0/config.json").read_text())["config"]
    assert config["alpha"] == 0.5
    assert config["model"] == str(tmp_path / "alpha-2/0/hf")
    table = (tmp_path / "table.md").read_text()
    for name in (
        "base", "powerflow, alpha 4", "powerflow, alpha 2", "alpha 2, then 0.5",
        "temperature 0.25", "SMC, length-aware", "MH, length-aware",
    ):  # fmt: skip
        assert f"| {name} |" in table
    assert "<= log of the target's sum <=" in table
    page = (tmp_path / "report/index.html").read_text()
    assert "alpha 2, then 0.5" in page and "<svg" in page
    # Again: nothing is trained or drawn anew.
    assert "min  " not in _study(*args)
    assert (tmp_path / "table.md").read_text() == table


def test_search_tries_eight_settings_and_keeps_all(tmp_path):
    printed = _study("--search", "--objectives=tb_traj", f"--out={tmp_path}")
    found = json.loads((tmp_path / "search.json").read_text())["tb_traj"]
    assert len(found) == len({str(t["values"]) for t in found}) == 8
    best = max(found[:6], key=lambda t: t["accuracy"])["values"]
    for trial in found[6:]:
        assert best.items() < trial["values"].items()
    assert "tb_traj" in printed
    train, valid = (
        set((tmp_path / f"{name}.jsonl").read_text().splitlines())
        for name in ("train", "valid")
    )
    assert len(train) == 896 and len(valid) == 128 and not train & valid

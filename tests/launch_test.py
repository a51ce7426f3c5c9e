"""The launch scripts: arguments, errors, and that set-up happens once."""

import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent
_TOOLS = [
    "awk",
    "bash",
    "cat",
    "cksum",
    "cp",
    "date",
    "df",
    "dirname",
    "env",
    "grep",
    "head",
    "mkdir",
    "paste",
    "sed",
    "tail",
]
# Stands in for an interpreter: records what it is asked, makes "environments".
PYTHON = """#!/usr/bin/env bash
echo "$@" >>"$RECORD"
case $1 in
  --version) echo "Python 3.12.1" ;;
  -c) exit "${VERSION_STATUS:-0}" ;;
  -m)
    if [[ $2 == venv ]]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; fi
    if [[ $2 == pip ]]; then echo "${PIP_SAYS:-}"; exit "${PIP_STATUS:-0}"; fi ;;
esac
"""


@pytest.fixture
def launch(tmp_path):
    """A checkout with spaces in its path, and a function that runs its scripts."""
    checkout = tmp_path / "a checkout"
    shutil.copytree(ROOT / "launch", checkout / "launch")
    shutil.copy(ROOT / "setup.py", checkout)
    # Only these on the PATH: the machine's own interpreters stay out.
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in _TOOLS:
        os.symlink(shutil.which(tool), tools / tool)
    for name in ("python3", "python"):
        (tools / name).write_text(PYTHON)
        (tools / name).chmod(0o755)
    record = tmp_path / "record"

    def run(script, *args, **env):
        record.write_text("")
        done = subprocess.run(
            ["bash", str(checkout / "launch" / script), *args],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": str(tools), "RECORD": str(record), "HOME": str(tmp_path)}
            | env,
        )
        return done, record.read_text().splitlines()

    run.checkout = checkout
    return run


def test_local_adds_only_what_is_not_given(launch):
    smoke = f"--config={launch.checkout}/configs/smoke.py"
    _, asked = launch("local.sh", "--config.alpha=0.5")
    assert asked[-1].startswith(
        f"-m pfjax.train {smoke} --workdir={launch.checkout}/runs/"
    )
    assert asked[-1].endswith(" --config.alpha=0.5")
    _, asked = launch("local.sh", "--workdir=my runs/1", "--config=other.py")
    assert asked[-1] == "-m pfjax.train --workdir=my runs/1 --config=other.py"


def test_study_is_a_run_of_its_own_door(launch):
    _, asked = launch("local.sh", "--study", "--seeds=1")
    out = f"--out={launch.checkout}/runs/study"
    assert asked[-1] == f"-m examples.study {out} --seeds=1"


def test_set_up_runs_once_and_again_when_dependencies_change(launch):
    _, first = launch("local.sh")
    assert sum("pip install" in line for line in first) == 1
    _, second = launch("local.sh")
    assert not any("pip" in line for line in second)
    with (launch.checkout / "setup.py").open("a") as file:
        file.write("# a new dependency\n")
    _, third = launch("test.sh", "-k", "x")
    assert any("pip install" in line and "[dev]" in line for line in third)
    assert third[-1].endswith("-k x")


def test_a_gpu_gets_its_build_of_jax(launch, tmp_path):
    smi = tmp_path / "bin/nvidia-smi"
    for driver, extra in (("580.65.06", "cuda13"), ("535.104", "cuda12")):
        smi.write_text(f"#!/bin/sh\necho {driver}\n")
        smi.chmod(0o755)
        _, asked = launch("local.sh")
        assert any(f"[{extra}]" in line for line in asked if "pip" in line)
    # A driver that does not answer is no GPU.
    smi.write_text("#!/bin/sh\necho NVIDIA-SMI has failed; exit 9\n")
    _, asked = launch("local.sh")
    assert not any("cuda" in line for line in asked)


def test_what_went_wrong_is_said(launch, tmp_path):
    done, _ = launch("local.sh", VERSION_STATUS="1")
    assert done.returncode == 1
    assert "Python 3.11 or newer is needed; found only Python 3.12.1" in done.stderr
    done, _ = launch("local.sh", PIP_STATUS="1", PIP_SAYS="NewConnectionError: x")
    assert "cannot be reached: no network?" in done.stderr
    done, _ = launch("local.sh", PIP_STATUS="1", PIP_SAYS="No space left on device")
    assert "the disk is full" in done.stderr
    # A failed set-up is not taken for a finished one.
    _, asked = launch("local.sh")
    assert any("pip install" in line for line in asked)
    (launch.checkout / "setup.py").write_text("")
    for name in ("python", "python3"):
        (tmp_path / "bin" / name).unlink()
    done, _ = launch("local.sh")
    assert "no Python found" in done.stderr


def test_help_is_the_comment_at_the_top(launch):
    done, asked = launch("local.sh", "--help")
    assert done.stdout.startswith("Trains on this machine") and not asked

"""What someone who installed a wheel meets: no checkout, an empty folder, the command."""

import json
import os
import pathlib
import subprocess
import sys
import sysconfig
import venv

import pytest

from pfjax.infra import dataset_io
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """Runs a line in an empty folder, with the wheel of this checkout installed."""
    place = tmp_path_factory.mktemp("newcomer")
    build = [
        sys.executable,
        "-I",
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "-w",
        place,
        ROOT,
    ]
    subprocess.run(build, check=True)
    (wheel,) = place.glob("*.whl")
    venv.create(place / "env", with_pip=True)
    python = place / "env/bin/python"
    install = [python, "-I", "-m", "pip", "install", "-q", "--no-deps", wheel]
    subprocess.run(install, check=True)
    # What the wheel requires is that of these tests, but for pfjax itself: of a folder
    # that a .pth file names, no .pth file is read, so that the checkout stays unseen.
    (site,) = (place / "env/lib").glob("python*/site-packages")
    (site / "requirements.pth").write_text(sysconfig.get_path("purelib"))
    folder = place / "empty"
    folder.mkdir()
    hidden = ("PYTHONPATH", "PFJAX_TEST_CACHE", "XLA_FLAGS", "VIRTUAL_ENV")
    env = {k: v for k, v in os.environ.items() if k not in hidden}
    env |= {"PATH": f"{place / 'env/bin'}:{env['PATH']}", "JAX_PLATFORMS": "cpu"}
    env["JAX_COMPILATION_CACHE_DIR"] = os.environ["PFJAX_TEST_CACHE"]
    # It compiles for longer than it computes.
    env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

    def run(line):
        how = {"cwd": folder, "env": env, "text": True, "capture_output": True}
        return subprocess.run(["bash", "-c", line], check=False, **how)

    run.folder = folder
    return run


@pytest.mark.slow
def test_a_wheel_in_an_empty_folder_trains_and_shows(shell):
    train = "pfjax train --config=smoke --workdir=runs/smoke --config.num_steps=2"
    outputs = {}
    for line, said in [
        ("python -c 'import pfjax; print(pfjax.__file__)'", "/env/lib/"),
        ("pfjax", "pfjax train --config=smoke"),
        ("pfjax --version", "pfjax 0."),
        ("pfjax train --help", "samples_per_prompt=32"),
        ("python -m pfjax.train --help", "samples_per_prompt=32"),
        (train, "hf"),
        (
            "pfjax sample --prompts=pfjax/toy/eval.jsonl --samples=4 | head -n 1",
            "prompt",
        ),
        ("pfjax plan --config=smoke --topology=h100:1", "fits"),
    ]:
        done = shell(line)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        assert said in done.stdout, (line, done.stdout, done.stderr)
        outputs[line] = done.stdout
    # What a run ends with: report, sample, evaluate, export.
    lines = outputs[train].partition("next:")[2].splitlines()
    after = [line for line in lines if line[:2] == "  "]
    assert len(after) == 4 and all(line.startswith("  pfjax ") for line in after)
    for line in after:
        done = shell(line)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    folder = pathlib.Path(shell.folder) / "runs/smoke"
    rows = dataset_io.read_jsonl(folder / "metrics.jsonl")
    assert [r["step"] for r in rows] == [0, 1, 2]
    assert (folder / "report/index.html").is_file()
    (card,) = folder.glob("hf-step-*/config.json")
    assert json.loads(card.read_text())["model_type"] == "qwen2"

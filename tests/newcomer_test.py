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

    def run(line):
        how = {"cwd": folder, "env": env, "text": True, "capture_output": True}
        return subprocess.run(["bash", "-c", line], check=False, **how)

    run.folder = folder
    return run


@pytest.mark.slow
def test_a_wheel_in_an_empty_folder_trains_and_shows(shell):
    where = shell("python -c 'import pfjax; print(pfjax.__file__)'")
    assert "/env/lib/" in where.stdout, where
    for line, said in [
        ("pfjax", "pfjax train --config=smoke"),
        ("pfjax --version", "pfjax 0."),
        ("pfjax train --help", "samples_per_prompt=32"),
        ("pfjax train --config=smoke --workdir=runs/smoke --config.num_steps=30", "hf"),
        ('pfjax sample --model=runs/smoke/hf --prompt="17+25"', "completion"),
        (
            "pfjax sample --prompts=pfjax/toy/eval.jsonl --samples=4 | head -n 1",
            "prompt",
        ),
        ("pfjax report runs/smoke --out=report", "report/index.html"),
        ("pfjax export runs/smoke --out=model", "model"),
        ("pfjax plan --config=smoke --topology=h100:1", "fits"),
        ("python -m pfjax.train --help", "samples_per_prompt=32"),
    ]:
        done = shell(line)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        assert said in done.stdout, (line, done.stdout, done.stderr)
    done = shell(
        "pfjax train --config=smoke --workdir=runs/smoke --config.num_steps=30"
    )
    after = [x for x in done.stdout.partition("next:")[2].splitlines() if x[:2] == "  "]
    assert len(after) == 4 and all(line.startswith("  pfjax ") for line in after)
    assert [shell(line).returncode for line in after] == [0] * 4
    rows = dataset_io.read_jsonl(
        pathlib.Path(shell.folder) / "runs/smoke/metrics.jsonl"
    )
    assert [r["step"] for r in rows] == list(range(31))
    card = json.loads((shell.folder / "model/config.json").read_text())
    assert card["model_type"] == "qwen2"

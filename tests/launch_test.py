"""The launch scripts: arguments, errors, and that set-up happens once."""

import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess

import pytest
from jax._src import hardware_utils
from packaging import requirements

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
    "sort",
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
    if [[ $2 == pip ]]; then
      [[ -z ${PIP_SECONDS:-} ]] || sleep "$PIP_SECONDS"
      echo "${PIP_SAYS:-}"; exit "${PIP_STATUS:-0}"
    fi ;;
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
    for driver, capability, extra in (
        ("580.65.06", "9.0", "cuda13"),
        ("580.65.06", "7.5", "cuda13"),
        ("580.65.06", "10.3", "cuda13"),
        ("580.65.06", "8.6\n7.0", "cuda12"),
        ("580.65.06", "6.1", "cuda12"),
        ("580.65.06", "Field is not valid", "cuda13"),
        ("535.104", "9.0", "cuda12"),
    ):
        of_field = f"case $1 in *compute_cap) printf '{capability}\n' ;; *) echo {driver} ;; esac"
        smi.write_text(f"#!/bin/sh\n{of_field}\n")
        smi.chmod(0o755)
        (launch.checkout / ".venv/.pfjax-ready").unlink(missing_ok=True)
        _, asked = launch("local.sh")
        assert any(f"[{extra}]" in line for line in asked if "pip" in line)
    # A driver that does not answer is no GPU.
    smi.write_text("#!/bin/sh\necho NVIDIA-SMI has failed; exit 9\n")
    _, asked = launch("local.sh")
    assert not any("cuda" in line for line in asked)


# What bash 3.2 of macOS lacks; there an array without elements is an unset variable.
_NEWER_BASH = re.compile(
    r"mapfile|readarray|(?:declare|local) -[An]|\$\{\w+(?:,,|\^\^)|@Q\}|&>>|\|&|\[\[ -v"
    r"|wait -n|\[-1\]"
)
_MAYBE_EMPTY = re.compile(r'(?<!\+)"\$\{(\w+)\[@\]\}"')


def test_scripts_for_laptops_run_in_the_bash_of_macos():
    for name in ("environment", "local", "test", "tpu"):
        text = (ROOT / f"launch/{name}.sh").read_text()
        assert not _NEWER_BASH.findall(text), name
        # Those of tpu.sh have elements where they are used.
        filled = {"where", "verb", "how", "args", "train"} if name == "tpu" else set()
        assert {*_MAYBE_EMPTY.findall(text)} <= filled, name


def test_macs_and_arm_are_not_asked_for_what_is_made_for_neither():
    """libtpu is for Linux on x86-64 alone."""
    wanted = importlib.metadata.requires("pfjax")
    for system, machine in (("darwin", "arm64"), ("linux", "aarch64")):
        where = {"sys_platform": system, "platform_machine": machine, "extra": "dev"}
        for x in map(requirements.Requirement, wanted):
            asked = x.marker is None or x.marker.evaluate(where)
            assert not (asked and "tpu" in x.extras), str(x)


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


def pci(root, **devices):
    """A bus with devices of a vendor, a device id and a class each."""
    for name, values in devices.items():
        folder = root / "sys/bus/pci/devices" / name
        folder.mkdir(parents=True)
        for file, value in zip(("vendor", "device", "class"), values, strict=True):
            (folder / file).write_text(f"{value}\n")
    return {"PFJAX_DEVICES_ROOT": str(root)}


def test_a_tpu_is_found_where_jax_finds_it(launch, tmp_path):
    # Since v5e they are handed out by vfio, without /dev/accel*.
    for device, version in hardware_utils._TPU_PCI_DEVICE_IDS.items():
        env = pci(tmp_path / version.name, tpu=("0x1ae0", device, "0x120000"))
        done, asked = launch("local.sh", **env)
        assert any("[tpu]" in line for line in asked if "pip" in line), version
        assert "no accelerator" not in done.stderr
        shutil.rmtree(launch.checkout / ".venv")
    accel = tmp_path / "accel"
    (accel / "dev").mkdir(parents=True)
    (accel / "dev/accel0").touch()
    _, asked = launch("local.sh", PFJAX_DEVICES_ROOT=str(accel))
    assert any("[tpu]" in line for line in asked if "pip" in line)


def test_a_machine_without_a_device_is_told_so(launch, tmp_path):
    # Google's network cards and disks have the vendor of its TPUs.
    google = pci(
        tmp_path / "google",
        network=("0x1ae0", "0x0042", "0x020000"),
        disk=("0x1ae0", "0x001f", "0x010802"),
    )
    other = pci(tmp_path / "other", card=("0x1234", "0x0063", "0x120000"))
    for env in (google, other, {"PFJAX_DEVICES_ROOT": str(tmp_path / "none")}):
        for args in ([], ["--study"]):
            done, asked = launch("local.sh", *args, **env)
            assert "no accelerator found: CPU" in done.stderr
            assert not any("tpu" in line for line in asked if "pip" in line)


def test_extras_are_installed_besides(launch):
    _, asked = launch("test.sh", PFJAX_EXTRAS="wandb,gguf")
    assert any("[dev,wandb,gguf]" in line for line in asked if "pip" in line)


def test_a_python_that_is_named_is_taken_or_refused(launch, tmp_path):
    done, asked = launch("local.sh", PFJAX_PYTHON="/nowhere/python")
    assert done.returncode == 1 and not asked
    assert "PFJAX_PYTHON=/nowhere/python is no Python 3.11 or newer" in done.stderr
    _, asked = launch("local.sh", PFJAX_PYTHON=str(tmp_path / "bin/python"))
    assert any("-m venv" in line for line in asked)


def test_a_relative_place_of_the_environment_is_of_where_it_was_given(launch, tmp_path):
    _, asked = launch("local.sh", PFJAX_VENV="an env")
    assert f"-m venv {tmp_path / 'an env'}" in asked


@pytest.mark.skipif(not shutil.which("flock"), reason="macOS has none")
def test_of_two_that_start_at_once_one_makes_the_environment(launch, tmp_path):
    for tool in ("flock", "sleep"):
        os.symlink(shutil.which(tool), tmp_path / "bin" / tool)
    record = tmp_path / "record"
    command = ["bash", str(launch.checkout / "launch/local.sh")]
    env = {"PATH": str(tmp_path / "bin"), "RECORD": str(record), "PIP_SECONDS": "1"}
    both = [subprocess.Popen(command, env=env, cwd=tmp_path) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    asked = record.read_text().splitlines()
    assert sum("pip install" in line for line in asked) == 1
    assert sum("pfjax.train" in line for line in asked) == 2


@pytest.fixture
def worker(launch, tmp_path):
    """Sets up a worker, whose python3 may not be installed into, and which has no other."""
    tools = tmp_path / "bin"
    for tool in ("hostname", "chmod"):
        os.symlink(shutil.which(tool), tools / tool)

    def run(**env):
        return launch("worker.sh", "setup", PIP_STATUS="1", **env)

    run.tools = tools
    return run


UV = """#!/usr/bin/env bash
echo "uv $*" >>"$RECORD"
[[ ${UV_STATUS:-0} == 0 ]] || exit "$UV_STATUS"
[[ $2 != find ]] || echo "$(dirname "$0")/python-of-uv"
"""


def interpreter(asked):
    return next(line for line in asked if "-m venv" in line).split()[0]


def test_a_worker_takes_any_python_that_is_new_enough(worker):
    # The stand-in says who it is; none is exactly the one with exact versions.
    for name in ("python3", "python-of-uv", "python3.11"):
        (worker.tools / name).write_text(PYTHON.replace("$@", '$(basename "$0") $@'))
        (worker.tools / name).chmod(0o755)
    os.symlink(shutil.which("basename"), worker.tools / "basename")
    _, asked = worker()
    assert interpreter(asked) == "python3.11"
    (worker.tools / "python3.11").unlink()
    done, asked = worker()
    assert "pip install --quiet --user uv" in asked[0]
    assert interpreter(asked) == "python3"
    assert "no Python 3.11 can be had (above); taking Python 3.12.1" in done.stderr
    (worker.tools / "uv").write_text(UV)
    (worker.tools / "uv").chmod(0o755)
    _, asked = worker()
    assert interpreter(asked) == "python-of-uv"
    # Installed, but without a network.
    _, asked = worker(UV_STATUS="1")
    assert interpreter(asked) == "python3"
    done, asked = worker(UV_STATUS="1", VERSION_STATUS="1")
    assert done.returncode == 1
    assert "error: Python 3.11 or newer is needed" in done.stderr


SCRIPTS = sorted(path.name for path in (ROOT / "launch").glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_comment_at_the_top(launch, script):
    first = (ROOT / "launch" / script).read_text().splitlines()
    first = next(x for x in first if x[:2] == "# " and not x.startswith("# shellcheck"))
    ways = {"tpu.sh": ["up"], "worker.sh": ["setup"], "local.sh": ["--study"]}
    for args in ([], ways.get(script, [])):
        done, asked = launch(script, *args, "--help")
        assert done.returncode == 0 and not done.stderr and not asked
        assert done.stdout.splitlines()[0] == first.removeprefix("# ")
        assert "set -e" not in done.stdout and "#SBATCH" not in done.stdout
    # Nothing was made or installed.
    assert sorted(x.name for x in launch.checkout.iterdir()) == ["launch", "setup.py"]

"""The script for Slurm, against stand-ins for what it calls; slurm_cluster.sh has a real one."""

import os
import pathlib
import shutil
import signal
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PATIENCE = 120  # seconds, with what hangs
TRAIN = ["--config=configs/smoke.py", "--workdir=/shared/1"]

# One task, which ends with the status $TASKS or waits to be told.
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$JOB/srun"
echo $$ >"$JOB/srun_pid"
trap 'kill -KILL "$(cat "$JOB/pid")" 2>/dev/null; exit 137' TERM
while [[ $1 == --* ]]; do shift; done
SLURM_PROCID=0 SLURMD_NODENAME=n1 "$@" &
wait $!
"""
SCANCEL = """#!/usr/bin/env bash
echo "scancel $*" >>"$JOB/log"
case $* in
  *--batch*) kill -"${2#--signal=}" "$(cat "$JOB/batch_pid")" ;;
  *) kill -TERM "$(cat "$JOB/pid")" ;;
esac
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >>"$JOB/log"
[[ $1 != update ]] || exit "${COUNTS:-0}"
echo "JobId=7 JobState=${STATE:-RUNNING} Reason=None"
echo "   Comment=${COMMENT:-} "
"""
# Makes an environment whose Python is this too, and trains.
PYTHON = """#!/usr/bin/env bash
case $* in
  -c*) exit ;;
  --version) echo Python 3.12.0 ;;
  '-m venv '*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  '-m pip '*) ;;
  *)
    echo "${JAX_LOCAL_DEVICE_IDS-one}" >"$JOB/gpus"
    echo $$ >"$JOB/pid"
    [[ $TASKS != killed ]] || kill -KILL $$
    [[ $TASKS == wait ]] || exit "$TASKS"
    trap 'exit 75' TERM
    while true; do sleep 0.02; done ;;
esac
"""


@pytest.fixture
def slurm(tmp_path):
    """Starts the job with these arguments; its log is in a file."""
    job = tmp_path / "job"
    job.mkdir()
    (job / "log").write_text("")
    for name, text in (
        ("srun", SRUN),
        ("scancel", SCANCEL),
        ("scontrol", SCONTROL),
        ("python3", PYTHON),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    # Slurm runs a copy.
    script = shutil.copy(ROOT / "launch/slurm.sh", job / "slurm_script")

    def start(*args, **env):
        process = subprocess.Popen(
            ["bash", script, *args],
            stderr=subprocess.PIPE,
            text=True,
            env={
                "PATH": f"{tmp_path}:{os.environ['PATH']}",
                "JOB": str(job),
                "PFJAX_VENV": str(job / "venv"),
                "SLURM_JOB_ID": "7",
                "SLURM_JOB_CPUS_PER_NODE": "64(x2),48",
                "SLURM_TASKS_PER_NODE": "8(x2),4",
                "SLURM_SUBMIT_DIR": str(ROOT),
            }
            | env,
        )
        (job / "batch_pid").write_text(str(process.pid))
        return process

    start.job = job
    return start


def _end(job):
    """Status and last words of a job."""
    _, said = job.communicate(timeout=PATIENCE)
    return job.returncode, said.splitlines()[-1]


def _changes(slurm):
    """What was done to the job."""
    lines = (slurm.job / "log").read_text().splitlines()
    return [x for x in lines if x != "scontrol show job 7"]


def test_help_is_the_comment_at_the_top():
    said = subprocess.check_output(
        ["bash", str(ROOT / "launch/slurm.sh"), "--help"], text=True
    )
    assert said.startswith("Trains") and "launch/slurm.sh" in said
    assert "takes whole nodes" in said and "at most 10 times" in said
    assert "set -e" not in said and "#SBATCH" not in said


@pytest.mark.parametrize("status", [0, 1, 2])
def test_runs_training_and_ends_as_it_does(slurm, status):
    words = ["--config=a b.py", "--workdir=/shared/it's"]
    job = slurm(*words, TASKS=str(status))
    _, said = job.communicate(timeout=PATIENCE)
    assert job.returncode == (status > 0), said
    asked = (slurm.job / "srun").read_text().splitlines()
    python = str(slurm.job / "venv/bin/python")
    training = [python, "-m", "pfjax.train", *words, "--multihost"]
    assert asked[-len(training) :] == training
    assert all("requeue" not in line for line in _changes(slurm))
    assert (f"task 0 on n1 ended with status {status}" in said) == (status > 0)


@pytest.mark.parametrize(
    ("env", "cpus"),
    [
        ({}, 6),  # of the smallest node for most tasks
        ({"SLURM_JOB_CPUS_PER_NODE": "4"}, 1),
        ({"SLURM_CPUS_PER_TASK": "3"}, 3),
    ],
)
def test_tasks_share_the_cores_of_their_node(slurm, env, cpus):
    slurm(*TRAIN, TASKS="0", **env).communicate(timeout=PATIENCE)
    asked = (slurm.job / "srun").read_text().splitlines()
    assert f"--cpus-per-task={cpus}" in asked


@pytest.mark.parametrize(
    ("tasks", "gpus"), [("8(x2),4", "one"), ("1(x2)", "0,1,2,3"), ("1", "0,1,2,3")]
)
def test_one_task_per_node_has_all_of_its_gpus(slurm, tasks, gpus):
    env = {"SLURM_TASKS_PER_NODE": tasks, "SLURM_GPUS_ON_NODE": "4"}
    slurm(*TRAIN, TASKS="0", **env).communicate(timeout=PATIENCE)
    assert (slurm.job / "gpus").read_text() == f"{gpus}\n"


def test_training_saves_ahead_of_the_time_limit_and_is_queued_again(slurm):
    job = slurm(*TRAIN, TASKS="wait")
    while not (slurm.job / "pid").exists():
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    status, said = _end(job)
    assert status == 75 and said == "the run has saved and is queued again"
    assert _changes(slurm) == ["scancel --signal=TERM 7", "scontrol requeue 7"]


@pytest.mark.parametrize(
    ("comment", "counted"),
    [
        ("", "task deaths: 1"),
        ("for Ann", "for Ann task deaths: 1"),
        ("for Ann task deaths: 9", "for Ann task deaths: 10"),
    ],
)
def test_a_task_that_dies_has_the_job_queued_again(slurm, comment, counted):
    status, said = _end(slurm(*TRAIN, TASKS="killed", COMMENT=comment))
    assert status
    number = counted.rpartition(" ")[2]
    assert said == (
        f"a task died: queued again from the last checkpoint, {number} of 10"
    )
    assert _changes(slurm) == [
        "scancel --batch --signal=USR1 7",
        f"scontrol update JobId=7 Comment={counted}",
        "scontrol requeue 7",
    ]


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"COMMENT": "task deaths: 10"}, "after 10 restarts"),
        ({"COUNTS": "1"}, "cannot be counted"),  # forbidden here
    ],
)
def test_a_task_that_dies_too_often_ends_the_job(slurm, env, says):
    status, said = _end(slurm(*TRAIN, TASKS="134", **env))
    assert status == 1 and said.startswith("error: a task died, ") and says in said
    assert "scontrol requeue 7" not in _changes(slurm)


@pytest.mark.parametrize("notice", [signal.SIGUSR1, signal.SIGUSR2])
def test_the_others_do_not_outlive_a_task_that_ended(slurm, notice):
    job = slurm(*TRAIN, TASKS="wait")
    while not (slurm.job / "pid").exists():
        time.sleep(0.01)
    job.send_signal(notice)  # from a task elsewhere
    job.send_signal(notice)
    status, _ = _end(job)
    is_final = notice is signal.SIGUSR2
    assert status == 1 if is_final else status
    assert ("scontrol requeue 7" in _changes(slurm)) != is_final


@pytest.mark.parametrize("how", ["75", "killed"])
def test_a_cancelled_job_does_not_come_back(slurm, how):
    _end(slurm(*TRAIN, TASKS=how, STATE="CANCELLED"))
    assert all(x.startswith("scancel") for x in _changes(slurm))


def test_what_is_missing_is_refused(slurm):
    for args, env, says in (
        (TRAIN[:1], {}, "--workdir"),
        (TRAIN[1:], {}, "--config"),
        (TRAIN, {"SLURM_JOB_ID": ""}, "sbatch"),
        (TRAIN, {"SLURM_SUBMIT_DIR": "/"}, "not the checkout"),
    ):
        job = slurm(*args, TASKS="0", **env)
        _, said = job.communicate(timeout=PATIENCE)
        assert job.returncode == 1 and said.startswith("error: ") and says in said
        assert said.count("\n") == 1 and not (slurm.job / "srun").exists()


def test_a_job_has_whole_nodes_and_a_task_for_each_gpu_and_is_told_ahead():
    lines = (ROOT / "launch/slurm.sh").read_text().splitlines()
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in lines
        if line.startswith("#SBATCH")
    )
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    # Slurm reads them up to the first command.
    assert max(i for i, line in enumerate(lines) if line.startswith("#SBATCH")) < (
        lines.index("set -euo pipefail")
    )
    assert options["signal"] == "B:TERM@120" and "requeue" in options
    assert "exclusive" in options and options["mem"] == "0"

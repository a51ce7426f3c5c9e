"""Runs that are killed, told to stop, cut off from their disk or from each other.

All of them are processes of `pfjax.train`. Those that train are slow.
"""

import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from pfjax.infra import dataset_io, storage
from tests import fork_server
from tests.conftest import ROOT, run_command

STEPS = 8
ARGS = [
    "--config=configs/smoke.py",
    "--config.match_prompts=0",
    "--config.optim.schedule=constant",  # which knows no last step
    f"--config.num_steps={STEPS}",
    "--config.prompts_per_step=8",
    "--config.microbatch_size=8",
    "--config.checkpoint_every=1",
    "--config.eval_every=4",
    "--config.eval_samples=1",
    # Adam divides a gradient by its size, rounding too where it is nothing else: so is
    # the first gradient of log Z', which is calibrated. Small rates keep that small.
    "--config.optim.learning_rate=1e-6",
    "--config.optim.log_z_learning_rate=1e-5",
]

ENV = {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": os.environ["PFJAX_TEST_CACHE"],
    # It compiles for longer than it computes.
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
}


def start(workdir, *args, **kwargs):
    """Starts a run; of several processes the list of them."""
    return start_command("pfjax.train", *ARGS, f"--workdir={workdir}", *args, **kwargs)


def start_command(module, *args, processes=1, devices=1, **env):
    env = {
        **os.environ,
        **ENV,
        "JAX_NUM_CPU_DEVICES": str(devices),
        **env,
    }
    if processes == 1:
        return fork_server.Process(module, *args, env=env)
    env["PFJAX_COORDINATOR"] = f"localhost:{_free_port()}"
    env["PFJAX_NUM_PROCESSES"] = str(processes)
    return [
        fork_server.Process(
            module, *args, "--multihost", env=env | {"PFJAX_PROCESS_ID": str(i)}
        )
        for i in range(processes)
    ]


def _free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


# Where something hangs; nothing is said of how long it takes.
PATIENCE = 900


def finish(process, timeout=PATIENCE):
    """Exit status and what was said on standard error."""
    try:
        _, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        _, errors = process.communicate()
        pytest.fail(f"did not end in {timeout} s: {errors[-2000:]}")
    return process.returncode, errors


def run(workdir, *args, **kwargs):
    status, errors = finish(start(workdir, *args, **kwargs))
    assert status == 0, errors
    return errors


def rows(workdir):
    """Of the metrics, but for those of time."""
    found = dataset_io.read_jsonl(f"{workdir}/metrics.jsonl")
    return [
        {k: v for k, v in r.items() if not k.startswith(("time/", "perf/"))}
        for r in found
    ]


def wait_for(condition, process, seconds=PATIENCE):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def wait_for_step(workdir, step, process):
    wait_for(lambda: any(r["step"] >= step for r in rows(workdir)), process)


def same(workdir, other):
    assert rows(workdir) == rows(other)
    assert [r["step"] for r in rows(workdir)] == list(range(STEPS + 1))
    for file in ("hf/model.safetensors", f"completions/step_{STEPS:06d}.jsonl"):
        a, b = (pathlib.Path(x) / file for x in (workdir, other))
        assert a.read_bytes() == b.read_bytes(), file


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("faults") / "whole"
    run(folder)
    return folder


def is_saving(workdir):
    return any((pathlib.Path(workdir) / "checkpoints").glob("*tmp*"))


def kill_and_resume(workdir, rng, kills, *args, **how):
    """Kills a run `kills` times at random; returns how often during a save."""
    during_save = 0
    for _ in range(kills):
        process = start(workdir, *args, **how)
        done = max((r["step"] for r in rows(workdir)), default=-1)
        if done >= STEPS - 1:  # start anew: there has to be something to kill
            process.kill()
            process.communicate()
            shutil.rmtree(workdir)
            process, done = start(workdir, *args, **how), -1
        kind = rng.random()
        if kind < 0.2:  # while it starts
            time.sleep(rng.uniform(0, 3))
        else:
            wait_for_step(workdir, max(done, 0) + 1, process)
            if kind < 0.6:
                time.sleep(rng.uniform(0, 0.3))
            else:
                end = time.monotonic() + 2
                while not is_saving(workdir) and time.monotonic() < end:
                    time.sleep(0.001)
        during_save += is_saving(workdir)
        process.kill()
        process.communicate()
    run(workdir, *args, **how)
    return during_save


@pytest.mark.slow
def test_a_folder_with_a_living_run_is_refused(tmp_path):
    """Before its first checkpoint too, when nothing else tells of its settings."""
    names = ("num_steps", "checkpoint_every", "eval_every")
    long = [f"--config.{name}=100000" for name in names]
    first = start(tmp_path / "run", *long)
    wait_for_step(tmp_path / "run", 1, first)
    status, errors = finish(start(tmp_path / "run", "--config.alpha=2", *long))
    assert status == 1 and "belongs to a run that is alive: process" in errors
    first.send_signal(signal.SIGTERM)
    assert finish(first)[0] == 75
    assert not (tmp_path / "run/owner.json").exists()


@pytest.mark.slow
def test_runs_killed_twenty_times_some_during_a_save_end_as_if_never_stopped(
    whole, tmp_path
):
    rng, during_save = random.Random(1), 0
    for i, kills in enumerate((7, 7, 6)):
        during_save += kill_and_resume(tmp_path / f"run{i}", rng, kills)
        same(tmp_path / f"run{i}", whole)
    assert during_save >= 3


@pytest.mark.slow
def test_runs_killed_with_responses_in_flight_end_as_if_never_stopped(tmp_path):
    """A device draws beside one that learns, and checkpoints are few."""
    args = ("--config.max_staleness=2", "--config.mesh.rollout=1")
    args += ("--config.checkpoint_every=3",)
    run(tmp_path / "whole", *args, devices=2)
    kill_and_resume(tmp_path / "run", random.Random(2), 4, *args, devices=2)
    same(tmp_path / "run", tmp_path / "whole")
    ages = [r["rollout/staleness_max"] for r in rows(tmp_path / "whole") if r["step"]]
    assert max(ages) == 2


@pytest.mark.slow
def test_a_signal_saves_and_ends_with_a_status_of_its_own(whole, tmp_path):
    workdir = tmp_path / "run"
    # Step 4 has an evaluation, which the first signal comes before.
    for saves, (number, step) in enumerate([(signal.SIGTERM, 3), (signal.SIGINT, 5)]):
        process = start(workdir, "--config.checkpoint_every=1000")
        wait_for_step(workdir, step, process)
        process.send_signal(number)
        status, errors = finish(process)
        assert status == 75, errors
        assert f"{number.name}: saving after this step" in errors
        assert "the same command continues" in errors
        found = len(list((workdir / "checkpoints").glob("[0-9]*")))
        assert found == saves + 1
    run(workdir)
    same(workdir, whole)


def _flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(bytes(data))


DAMAGE = {
    "truncated": lambda f: f.write_bytes(f.read_bytes()[: f.stat().st_size // 2]),
    "flipped": _flip,
}


def _largest(folder):
    return max(
        (x for x in folder.rglob("*") if x.is_file()), key=lambda x: x.stat().st_size
    )


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of 4 steps of 8, with the checkpoints 3 and 4."""
    folder = tmp_path_factory.mktemp("faults") / "stopped"
    run(folder, "--config.num_steps=4")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_damaged_checkpoint_is_passed_over(stopped, whole, tmp_path, damage):
    workdir = tmp_path / "run"
    shutil.copytree(stopped, workdir)
    DAMAGE[damage](_largest(workdir / "checkpoints/4"))
    run(workdir)
    same(workdir, whole)
    assert (workdir / "checkpoints/damaged-4").exists()


@pytest.mark.slow
def test_when_all_are_damaged_nothing_is_begun_anew(stopped, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(stopped, workdir)
    before = rows(workdir)
    for step in (3, 4):
        DAMAGE["truncated"](_largest(workdir / f"checkpoints/{step}"))
    status, errors = finish(start(workdir))
    assert status == 1 and "no checkpoint in" in errors and "Traceback" not in errors
    assert rows(workdir) == before


@pytest.mark.slow
def test_another_base_is_refused_with_the_difference(stopped, tmp_path):
    workdir, model = tmp_path / "run", tmp_path / "model"
    shutil.copytree(stopped, workdir)
    # The file that tells early is lost; the checkpoint knows too.
    (workdir / "config.json").unlink()
    shutil.copytree(ROOT / "pfjax/assets/toy", model)
    _flip(next(model.glob("*.safetensors")))
    status, errors = finish(start(workdir, f"--config.model={model}"))
    assert status == 1 and "checkpoints of another run" in errors
    assert (
        "weights of the model: " in errors and f"model: pfjax/toy -> {model}" in errors
    )


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(whole, tmp_path):
    small, out = tmp_path / "small", tmp_path / "out"
    small.mkdir()
    first = f"{sys.executable} -m pfjax.train {' '.join(ARGS)} --workdir={small}/run"
    script = f"""
        mount -t tmpfs -o size=5m tmpfs {small} || exit 99
        {first}; echo "status $?" >&2
        ls {small}/run/checkpoints >&2
        mount -o remount,size=200m {small}
        {first} || exit
        cp -r {small}/run {out}
    """
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "bash", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=2 * PATIENCE,
        env=os.environ | ENV,
    )
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip(f"no small disk can be made here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    assert "status 1" in done.stderr
    assert "No space left" in done.stderr or "disk is full" in done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    same(out, whole)


def _same_losses(one, two):
    for a, b in zip(rows(one), rows(two), strict=True):
        assert a["step"] == b["step"]
        if a["step"]:
            assert a["tb/loss"] == pytest.approx(b["tb/loss"], abs=1e-5)


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """The first 4 steps by one process of 8 devices and by two of 4, and what they were told.
    Each step has all prompts, and replays responses of the steps before."""
    folder = tmp_path_factory.mktemp("faults")
    one, two = folder / "one", folder / "two"
    prompts = (ROOT / "pfjax/assets/toy/train.jsonl").read_text().splitlines()[:8]
    (folder / "prompts.jsonl").write_text("\n".join(prompts))
    args = [f"--config.data.train={folder}/prompts.jsonl"]
    args += ["--config.behavior.base=0.25", "--config.behavior.replay=0.25"]
    ends = ("--config.num_steps=4", "--config.match_prompts=2")
    run(one, *args, *ends, devices=8)
    of_two = (*args, *ends, "--config.mesh.data=2")
    for process in start(two, *of_two, processes=2, devices=4):
        status, errors = finish(process)
        assert status == 0, errors
    return one, two, args


@pytest.mark.slow
def test_two_processes_train_as_one(halves):
    assert [r["step"] for r in rows(halves[0])] == list(range(5))
    _same_losses(*halves[:2])
    one, two = (json.loads((x / "match.json").read_text()) for x in halves[:2])
    assert one["num_prompts"] == two["num_prompts"] == 2
    for name in ("exponent", "total_variation"):
        assert one[name] == pytest.approx(two[name], abs=1e-4), name


@pytest.mark.slow
def test_two_processes_and_one_read_each_others_checkpoints(halves):
    (one, two, args), mesh = halves, "--config.mesh.data=2"
    # Each goes on from what the other has written.
    for folder, other in ((one, two), (two, one)):
        shutil.copytree(folder, f"{folder}-then")
        shutil.rmtree(f"{folder}-then/checkpoints")
        shutil.copytree(other / "checkpoints", f"{folder}-then/checkpoints")
    run(f"{one}-then", *args, devices=8)
    for process in start(f"{two}-then", *args, mesh, processes=2, devices=4):
        status, errors = finish(process)
        assert status == 0, errors
    _same_losses(f"{one}-then", f"{two}-then")
    assert len(rows(f"{one}-then")) == STEPS + 1


APART = ("--config.max_staleness=2", "--config.mesh.rollout=2", "--config.data.eval=")


@pytest.mark.slow
def test_two_processes_that_draw_on_devices_of_their_own_train_as_one(tmp_path):
    args = (*APART, "--config.checkpoint_every=5", "--config.match_prompts=2")
    run(tmp_path / "one", *args, devices=4)
    for process in start(tmp_path / "two", *args, processes=2, devices=2):
        status, errors = finish(process)
        assert status == 0, errors
    _same_losses(tmp_path / "one", tmp_path / "two")
    # Which weights drew what follows from the config alone.
    for step in range(1, STEPS + 1):
        name = f"schedule/step_{step:06d}.jsonl"
        one, two = ((tmp_path / x / name).read_text() for x in ("one", "two"))
        assert one == two


def _tell_one_to_stop(both):
    both[1].send_signal(signal.SIGTERM)
    for process in both:
        status, errors = finish(process)
        assert status == 75, errors


_ENDLESS = """
import threading, time
import jax
from pfjax.infra import distributed, sharding
from pfjax.trainer import actor

class Endless:
    held, looks = [], 0
    set_weights = add = lambda *unused, **named: None
    complete = lambda self: []
    def draw_until(self, is_enough):
        while not is_enough():
            self.looks += 1

def draw():
    try:
        made.draw({}, actor.Cursor(), 1)
    except BaseException as error:
        print(type(error).__name__)

distributed.join()
stream, one = Endless(), lambda x: x
made = actor.Actor(
    sharding.rollout_mesh(2, 1), lambda: [stream], one, dict, one, one, [[1]] * 9,
    prompts_per_step=1, num_steps=9, checkpoint_every=9, max_staleness=1, ahead=1,
)
with made:
    thread = threading.Thread(target=draw)
    thread.start()
    while not stream.looks:
        time.sleep(0.01)
    time.sleep(0.5 + jax.process_index())
thread.join()
print(stream.looks)
"""


@pytest.mark.slow
def test_actors_that_are_stopped_at_different_times_stop_at_one_token():
    env = os.environ | ENV | {"JAX_NUM_CPU_DEVICES": "2"}
    env |= {
        "PFJAX_COORDINATOR": f"localhost:{_free_port()}",
        "PFJAX_NUM_PROCESSES": "2",
    }
    both = [
        subprocess.Popen(
            [sys.executable, "-c", _ENDLESS],
            cwd=ROOT,
            env=env | {"PFJAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    said = [process.communicate(timeout=PATIENCE)[0].split() for process in both]
    (error, looks), other = (words[-2:] for words in said)  # behind what Gloo says
    assert [error, looks] == other and error == "CancelledError" and int(looks) > 0


@pytest.mark.slow
def test_a_signal_ends_all_actors_wherever_they_are(tmp_path):
    workdir = tmp_path / "run"
    args = (*APART, "--config.num_steps=1000", "--config.checkpoint_every=1000")
    for _ in range(2):
        before = len(rows(workdir)) if workdir.exists() else 0
        both = start(workdir, *args, processes=2, devices=2)
        wait_for_step(workdir, before + 3, both[0])
        _tell_one_to_stop(both)
    steps = [r["step"] for r in rows(workdir)]
    assert steps == list(range(len(steps)))


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_a_signal_to_one_saves_and_ends_both(
    tmp_path,
):
    workdir, args = tmp_path / "run", ("--config.num_steps=1000", "--config.data.eval=")
    both = start(workdir, *args, processes=2, devices=1)
    wait_for_step(workdir, 2, both[1])
    both[1].kill()
    # Within a minute or so, on a machine that is idle: see tests/infra/distributed_test.py.
    status, errors = finish(both[0])
    assert status not in (0, 1, 2, 75), (
        errors
    )  # none that the launch scripts take for final
    assert errors.splitlines()[-1].startswith(
        "error: another process of this run is gone"
    )
    both[1].communicate()
    before = len(rows(workdir))
    # The restart goes on.
    both = start(workdir, *args, processes=2, devices=1)
    wait_for_step(workdir, before + 1, both[0])
    _tell_one_to_stop(both)
    steps = [r["step"] for r in rows(workdir)]
    assert steps == list(range(len(steps)))
    assert (workdir / f"checkpoints/{steps[-1]}").is_dir()


@pytest.mark.slow
def test_two_processes_in_a_bucket_are_killed_go_on_and_draw_as_in_a_folder(
    bucket, tmp_path
):
    """Model and prompts are in the bucket too; all is as on this machine."""
    toy = ROOT / "pfjax/assets/toy"
    storage.upload(toy, storage.place(f"{bucket}/model"))
    in_bucket = [f"--config.model={bucket}/model"]
    in_bucket += [f"--config.data.train={bucket}/model/train.jsonl"]
    shared = ["--config.num_steps=4", "--config.data.eval="]
    two = {"processes": 2, "devices": 1}
    for folder, given, is_killed in (
        (f"{bucket}/run", in_bucket, True),
        (tmp_path / "run", [], False),
    ):
        if is_killed:
            both = start(folder, *shared, *given, **two)
            wait_for_step(folder, 2, both[0])
            for process in both:
                process.kill()
                process.communicate()
        for process in start(folder, *shared, *given, **two):
            status, errors = finish(process)
            assert status == 0, errors
    assert rows(f"{bucket}/run") == rows(tmp_path / "run")
    assert [r["step"] for r in rows(f"{bucket}/run")] == list(range(5))
    prompts = "pfjax/toy/eval.jsonl"
    for where in (bucket, tmp_path):
        model = [f"--model={where}/run/hf", "--max_new_tokens=16", "--samples=2"]
        sample = [*model, f"--prompts={prompts}", f"--out={where}/drawn.jsonl"]
        evaluate = [*model, f"--benchmark={prompts}", f"--out={where}/scores"]
        for args in (["pfjax.sample", *sample], ["pfjax.evaluate", *evaluate]):
            for process in start_command(*args, **two):
                status, errors = finish(process)
                assert status == 0, errors
    for name in ("run/hf/model.safetensors", "drawn.jsonl", "scores/eval.jsonl"):
        there = storage.read_bytes(f"{bucket}/{name}")
        assert there == (tmp_path / name).read_bytes(), name


@pytest.mark.slow
def test_a_process_that_cannot_join_ends_with_a_message(tmp_path):
    process = start(
        tmp_path / "run",
        "--multihost",
        PFJAX_COORDINATOR="localhost:1",
        PFJAX_NUM_PROCESSES="2",
        PFJAX_PROCESS_ID="1",
        PFJAX_JOIN_SECONDS="2",
    )
    status, errors = finish(process)
    assert status == 1
    assert "joining the other processes, for at most 2 s" in errors
    *_, where, why = errors.splitlines()  # no stacks after it
    assert where == "--multihost: process 1 of 2, first at localhost:1"
    assert why.startswith("error: --multihost: the first process was not reached")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_first_process_says_who_is_missing_and_that_its_port_is_taken(tmp_path):
    with socket.create_server(("", 0)) as other:
        taken = other.getsockname()[1]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        for where, says in (
            (port, "2 of 3 processes did not come"),
            (taken, f"cannot listen at port {taken}: Address already in use"),
        ):
            process = start(
                tmp_path / "run",
                "--multihost",
                PFJAX_COORDINATOR=f"localhost:{where}",
                PFJAX_NUM_PROCESSES="3",
                PFJAX_PROCESS_ID="0",
                PFJAX_JOIN_SECONDS="2",
            )
            status, errors = finish(process)
            assert status == 1
            assert errors.splitlines()[-1].startswith("error: --multihost: ")
            assert says in errors.splitlines()[-1]


@pytest.mark.slow
def test_a_process_that_knows_no_others_ends_with_a_message(tmp_path):
    status, errors = finish(start(tmp_path / "run", "--multihost"))
    assert status == 1 and "found neither a TPU pod nor Slurm" in errors
    assert errors.splitlines()[-1].startswith("error: ")


def test_a_variable_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PFJAX_COORDINATOR", "localhost:1")
    done = run_command(
        "pfjax.train", *ARGS, f"--workdir={tmp_path / 'run'}", "--multihost"
    )
    assert done.returncode == 1 and "all of these have to be set" in done.stderr
    assert "PFJAX_NUM_PROCESSES=, PFJAX_PROCESS_ID=\n" in done.stderr


def test_one_worker_of_a_pod_alone_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "10.0.0.1,10.0.0.2")
    done = run_command("pfjax.train", *ARGS, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 1 and "one of 2 workers of a TPU pod" in done.stderr

"""The scripts for TPUs, Slurm and GKE, against stand-ins for what they call."""

import contextlib
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PATIENCE = 300  # seconds, with what hangs
COMMANDS = ["create", "setup", "run", "logs", "status", "stop", "delete", "up"]
TRAIN = ["--config=configs/smoke.py", "--workdir=gs://bucket/runs/1"]

# A cloud of one TPU. Its coming states are in the file "tpu" (the last one stays), its
# workers' home folder is "worker", which is new with each TPU.
GCLOUD = f"""#!{sys.executable} -IS
import json, os, pathlib, shutil, subprocess, sys

folder = pathlib.Path(os.environ["CLOUD"])
args = sys.argv[1:]
with (folder / "log").open("a") as file:
    file.write(json.dumps(args) + "\\n")
scenario = json.loads((folder / "scenario").read_text())
words = [word for word in args if not word.startswith("-")]
command = words[words.index("tpus") + 2] if "tpus" in words else "storage"
worker = folder / "worker"

def states(new=None):
    if new:
        (folder / "new").write_text(json.dumps(new))
        (folder / "new").rename(folder / "tpu")
    return json.loads((folder / "tpu").read_text())

if command in scenario.get("fail", {{}}):
    text = scenario["fail"][command]
    sys.exit("ERROR: (gcloud) " + text)
if command == "create":
    coming = scenario["created"]
    states(coming[0])
    (folder / "scenario").write_text(json.dumps(scenario | {{"created": coming[1:] or coming}}))
    shutil.rmtree(worker, ignore_errors=True)
    worker.mkdir()
elif command == "describe":
    now, *later = states()
    states(later)
    if now == "ABSENT":
        sys.exit("ERROR: (gcloud) NOT_FOUND: Resource 'pfjax' was not found.")
    if now == "UNREACHABLE":
        sys.exit("ERROR: (gcloud) network is unreachable")
    print(now)
    print("Updates are available.", file=sys.stderr)
elif command == "delete":
    states(["ABSENT"])
elif command == "scp":
    shutil.copy(words[4], worker)
elif command == "ssh":
    if states()[0] != "ACTIVE":
        sys.exit(255)
    said = [arg for arg in args if arg.startswith("--command=")][0]
    if scenario.get("status") and "worker.sh status" in said:
        print(scenario["status"].pop(0))
        (folder / "scenario").write_text(json.dumps(scenario))
        sys.exit()
    sys.exit(subprocess.run(
        ["bash", "-c", said.removeprefix("--command=")],
        cwd=worker,
        env=os.environ | {{"HOME": str(worker)}},
    ).returncode)
"""
# An interpreter that makes "environments", and trains by what is next in "training": ends
# with a number, waits to be told, or is preempted.
PYTHON = """#!/usr/bin/env bash
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip") echo "$*" >>"$CLOUD/installed"; exit "${PIP_STATUS:-0}" ;;
  "-m pfjax.train")
    printf '%s\\0' "${@:3}" >>"$CLOUD/trained"
    echo "step 1 of training"
    next=$(head -n 1 "$CLOUD/training")
    sed -i 1d "$CLOUD/training"
    case $next in
      preempted) echo '["SUSPENDED"]' >"$CLOUD/tpu"; kill -KILL 0 ;;
      rebooted) kill -KILL 0 ;;
      wait)
        trap 'echo saved; exit 75' TERM
        touch "$CLOUD/waits"
        while true; do sleep 0.02; done ;;
      *) exit "$next" ;;
    esac ;;
esac
"""
# Says TRUE once for a notice.
CURL = """#!/usr/bin/env bash
until rm "$CLOUD/notice" 2>/dev/null; do sleep 0.05; done
echo TRUE
"""


def write_tool(path, text):
    path.write_text(text)
    path.chmod(0o755)


class Cloud:
    """A checkout with spaces in its path, and stand-ins for what its scripts call."""

    def __init__(self, folder):
        self.folder = folder / "the cloud"
        self.folder.mkdir()
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        self.checkout = folder / "a checkout"
        shutil.copytree(ROOT / "launch", self.checkout / "launch")
        shutil.copy(ROOT / "setup.py", self.checkout)
        for line in ("init -q", "add .", "commit -q -m 1"):
            subprocess.run(
                [*shlex.split("git -c user.name=x -c user.email=x"), *line.split()],
                cwd=self.checkout,
                check=True,
            )
        tools = folder / "bin"
        tools.mkdir()
        for name, text in (("gcloud", GCLOUD), ("python3.11", PYTHON), ("curl", CURL)):
            write_tool(tools / name, text)
        self.env = {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "CLOUD": str(self.folder),
            "HOME": str(folder),
            "PFJAX_PYTHON": str(tools / "python3.11"),
            "PFJAX_POLL": "0",
            "TMPDIR": str(self.temporary),
            "LC_ALL": "C.UTF-8",
        }
        self.is_in()

    def is_in(
        self, *states, training=("0",), created=(("ACTIVE",),), fail=None, status=()
    ):
        self.write("tpu", json.dumps(states or ["ABSENT"]))
        scenario = {"created": created, "fail": fail or {}, "status": status}
        self.write("scenario", json.dumps(scenario))
        self.write("training", "".join(f"{line}\n" for line in training))
        self.write("log", "")
        self.write("trained", "")
        (self.folder / "worker").mkdir(exist_ok=True)

    def write(self, name, text):
        # At once, for who reads it meanwhile.
        (self.folder / "written").write_text(text)
        (self.folder / "written").rename(self.folder / name)

    def command(self, *args):
        return ["bash", str(self.checkout / "launch/tpu.sh"), *args]

    def run(self, *args, **env):
        return subprocess.run(
            self.command(*args),
            env=self.env | env,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )

    def start(self, *args):
        return subprocess.Popen(
            self.command(*args),
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # Tests that were themselves begun with & or nohup ignore them; so would this.
            preexec_fn=_heed_signals,  # noqa: PLW1509
        )

    def asked(self):
        """Arguments of each gcloud, without those for the copies of logs."""
        lines = (self.folder / "log").read_text().splitlines()
        return [args for line in lines if "tpus" in (args := json.loads(line))]

    def did(self):
        """What was changed, in a word each: create, scp, setup, run, stop, delete."""
        words = []
        for args in self.asked():
            verb = args[args.index("tpus") + 2]
            if verb == "ssh":
                said = shlex.split(find(args, "--command="))
                verb = "setup" if said[:2] == ["bash", "-c"] else said[2]
            words.append(verb)
        return [word for word in words if word not in ("describe", "status")]

    def trained(self):
        """Arguments of each training."""
        runs = (self.folder / "trained").read_text().split("--multihost\0")[:-1]
        return [run.split("\0")[:-1] for run in runs]

    def wait_for(self, name):
        end = time.monotonic() + PATIENCE
        while not (self.folder / name).exists():
            assert time.monotonic() < end, f"no {name}"
            time.sleep(0.01)


def find(args, option):
    return next(arg.removeprefix(option) for arg in args if arg.startswith(option))


def _heed_signals():
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def read_to(process, *texts):
    for text in texts:
        while text not in (line := process.stderr.readline()):
            assert line, f"ended without {text}"


def live_in_session(number):
    lines = subprocess.check_output(
        ["ps", "-eo", "sid=,stat=,args="], text=True
    ).splitlines()
    fields = [line.split(maxsplit=2) for line in lines]
    return [
        args for sid, stat, *args in fields if int(sid) == number and stat[0] != "Z"
    ]


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path)
    yield cloud
    # A failed test may leave a training that waits.
    train = cloud.folder / "worker/pfjax-run/train"
    if train.exists():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(train.read_text()), signal.SIGTERM)


# --- commands -------------------------------------------------------------------------


def test_create_asks_for_what_was_named_and_waits(cloud):
    cloud.is_in(created=[["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]])
    done = cloud.run(
        "create", "--name", "a name", "--zone=z", "--project=p", "--type=v6e-16"
    )
    assert done.returncode == 0, done.stderr
    asked = next(args for args in cloud.asked() if "create" in args)
    assert asked[:5] == ["compute", "tpus", "queued-resources", "create", "a name"]
    assert {
        "--node-id=a name",
        "--zone=z",
        "--project=p",
        "--accelerator-type=v6e-16",
        "--runtime-version=v2-alpha-tpuv6e",
        "--valid-until-duration=7200s",
    } <= set(asked)
    assert "waiting for a name: in the queue for v6e-16 (on-demand)" in done.stderr
    assert "waiting for a name: PROVISIONING" in done.stderr
    assert (
        "COSTS MONEY until: gcloud compute tpus queued-resources delete a\\ name"
        in (done.stderr)
    )


def test_each_way_of_provisioning_has_its_flags(cloud):
    for option, flag, verb in (
        ("spot", "--spot", "compute"),
        ("flex-start", "--max-run-duration=1d", "alpha"),
        ("reservation", "--reserved", "compute"),
    ):
        cloud.is_in()
        assert cloud.run("create", f"--provisioning={option}").returncode == 0
        asked = next(args for args in cloud.asked() if "create" in args)
        assert flag in asked and asked[0] == verb
    cloud.is_in()
    cloud.run("create", "--provisioning=reservation", PFJAX_RESERVATION="a b")
    assert "--reservation=a b" in next(
        args for args in cloud.asked() if "create" in args
    )


def test_create_takes_what_is_there_and_replaces_what_is_dead(cloud):
    cloud.is_in("ACTIVE")
    assert cloud.run("create").returncode == 0 and cloud.did() == []
    cloud.is_in("WAITING_FOR_RESOURCES", "ACTIVE")
    assert cloud.run("create").returncode == 0 and cloud.did() == []
    for dead in ("SUSPENDED", "FAILED"):
        cloud.is_in(dead)
        assert cloud.run("create").returncode == 0
        assert cloud.did() == ["delete", "create"]
    # Taken away while it was waited for.
    cloud.is_in(created=[["PROVISIONING", "SUSPENDED"], ["ACTIVE"]])
    assert cloud.run("create").returncode == 0
    assert cloud.did() == ["create", "delete", "create"]


def test_create_uses_what_somebody_made_meanwhile(cloud):
    cloud.is_in("ABSENT", "ACTIVE", fail={"create": "ALREADY_EXISTS: it is there"})
    done = cloud.run("create")
    assert done.returncode == 0 and "by somebody else meanwhile" in done.stderr
    assert cloud.did() == ["create"]


def test_a_failed_create_is_explained_and_leaves_nothing(cloud):
    cloud.is_in(fail={"create": "PERMISSION_DENIED: not you"})
    done = cloud.run("create")
    assert done.returncode == 1 and "not you" in done.stderr
    assert "error: gcloud could not create pfjax" in done.stderr
    assert cloud.did() == ["create"] and "MONEY" not in done.stderr
    for text in ("Quota limit 'TPUS' has been exceeded", "RESOURCE_EXHAUSTED"):
        cloud.is_in(fail={"create": text})
        done = cloud.run("create", "--zone=z")
        assert done.returncode == 1
        assert "error: no quota for v5litepod-16 (on-demand) in z" in done.stderr
    # gcloud failed, but the request had been taken.
    cloud.is_in("ABSENT", "ACCEPTED", fail={"create": "connection reset"})
    assert cloud.run("create").returncode == 1
    assert cloud.did() == ["create", "delete"]
    # Refused later.
    cloud.is_in(created=[["ACCEPTED", "FAILED"]])
    done = cloud.run("create")
    assert done.returncode == 1 and "it will not come" in done.stderr
    assert cloud.did() == ["create", "delete"]
    # Nothing is asked for blindly.
    cloud.is_in("UNREACHABLE")
    assert cloud.run("create").returncode == 1 and cloud.did() == []


def test_a_wait_that_is_too_long_gives_back_what_was_asked_for(cloud):
    cloud.is_in(created=[["WAITING_FOR_RESOURCES"]])
    done = cloud.run("create", "--deadline=1")
    assert done.returncode == 124
    assert "still WAITING_FOR_RESOURCES after 1 s" in done.stderr
    assert cloud.did() == ["create", "delete"]
    # What was there before is not this call's to delete.
    cloud.is_in("WAITING_FOR_RESOURCES")
    done = cloud.run("create", "--deadline=0")
    assert done.returncode == 124 and cloud.did() == []
    assert "left as it is (WAITING_FOR_RESOURCES) and COSTS MONEY" in done.stderr


def test_the_steps_one_by_one(cloud):
    cloud.is_in("ACTIVE", training=["wait"])
    done = cloud.run("setup")
    assert done.returncode == 0, done.stderr
    assert "[tpu]" in (cloud.folder / "installed").read_text()
    assert not list(cloud.temporary.iterdir())
    assert "nothing was started" in cloud.run("status").stdout
    assert cloud.run("logs").returncode == 1
    done = cloud.run("run", *TRAIN)
    assert "started" in done.stdout and "COSTS MONEY until" in done.stderr
    cloud.wait_for("waits")
    run = int((cloud.folder / "worker/pfjax-run/pid").read_text())
    assert os.getsid(run) == run
    # Again: nothing is made twice.
    assert cloud.run("setup").returncode == 0
    assert len((cloud.folder / "installed").read_text().splitlines()) == 1
    assert "runs already" in cloud.run("run", *TRAIN).stdout
    assert cloud.trained() == [TRAIN]
    assert cloud.run("status").stdout.splitlines()[0] == "pfjax: ACTIVE"
    assert "running" in cloud.run("status").stdout
    assert cloud.run("logs").stdout == "step 1 of training\n"
    done = cloud.run("stop")
    assert done.returncode == 0 and ": ended 75" in done.stdout
    assert ": ended 75" in cloud.run("status").stdout
    assert "nothing runs" in cloud.run("stop").stdout
    # Nor is anything left of it.
    deadline = time.monotonic() + PATIENCE
    while (left := live_in_session(run)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left
    assert cloud.run("logs", "--follow").stdout == "step 1 of training\nsaved\n"
    assert cloud.run("delete").returncode == 0
    assert cloud.run("delete").returncode == 0
    assert cloud.run("status").stdout == "pfjax: ABSENT\n"


def test_the_log_is_kept_in_the_workdir(cloud):
    cloud.is_in("ACTIVE", training=["3"])
    cloud.run("setup")
    cloud.run("run", *TRAIN)
    for _ in range(50):
        if "ended 3" in cloud.run("status").stdout:
            break
    lines = (cloud.folder / "log").read_text().splitlines()
    copy = next(args for line in lines if "storage" in (args := json.loads(line)))
    assert copy[-1].startswith("gs://bucket/runs/1/logs/") and copy[-2].endswith("log")


def test_following_a_log_ends_with_the_run(cloud):
    cloud.is_in("ACTIVE", training=["wait"])
    cloud.run("setup")
    cloud.run("run", *TRAIN)
    with cloud.start("logs", "--follow") as follows:
        assert follows.stdout.readline() == "step 1 of training\n"
        cloud.run("stop")
        assert follows.stdout.read() == "saved\n"
    assert follows.returncode == 0


def test_a_failed_delete_says_that_it_still_costs(cloud):
    cloud.is_in("ACTIVE", fail={"delete": "PERMISSION_DENIED"})
    done = cloud.run("delete", "--zone=z")
    assert done.returncode == 1 and "PERMISSION_DENIED" in done.stderr
    assert (
        "STILL ACTIVE and COSTS MONEY until: gcloud compute tpus queued-resources "
        "delete pfjax --force --quiet --zone=z" in done.stderr
    )


def test_delete_waits_for_what_cannot_be_deleted_yet(cloud):
    cloud.is_in("PROVISIONING", "DELETING", "ABSENT", fail={"delete": "being made"})
    done = cloud.run("delete")
    assert done.returncode == 0 and "pfjax is gone" in done.stderr


def test_words_reach_training_as_they_are(cloud):
    words = [
        "--config=configs/a b.py",
        "--workdir=gs://bucket/it's $HOME",
        '--config.model=a"b; touch $CLOUD/hurt; `touch $CLOUD/hurt`',
        "--config.system_prompt=two\nlines, *, \\ and é",
        "--config.empty=",
    ]
    cloud.is_in("ACTIVE")
    cloud.run("setup")
    done = cloud.run("run", *words)
    assert done.returncode == 0, done.stderr
    assert cloud.trained() == [words]
    assert not (cloud.folder / "hurt").exists()


# --- up -------------------------------------------------------------------------------


def test_up_goes_from_nothing_to_the_end_and_gives_the_tpu_back(cloud):
    done = cloud.run("up", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert cloud.did() == ["create", "scp", "setup", "run", "delete"]
    assert cloud.trained() == [TRAIN]
    cloud.is_in()
    done = cloud.run("up", "--keep", *TRAIN)
    assert done.returncode == 0 and "delete" not in cloud.did()
    assert "is kept (--keep) and COSTS MONEY until" in done.stderr


def test_up_begins_again_on_a_new_tpu_after_preemption(cloud):
    cloud.is_in(training=["preempted", "0"])
    done = cloud.run("up", *TRAIN)
    assert done.returncode == 0, done.stderr
    steps = ["create", "scp", "setup", "run", "delete"]
    assert cloud.did() == steps * 2
    assert cloud.trained() == [TRAIN, TRAIN]


def test_up_begins_again_after_preemption_before_the_run(cloud):
    cloud.is_in(created=[["ACTIVE", "SUSPENDED"], ["ACTIVE"]], fail={"scp": "reset"})
    cloud.run("up", "--restarts=1", *TRAIN)
    assert cloud.did()[:4] == ["create", "scp", "delete", "create"]


def test_up_begins_again_in_place_when_told_to_stop(cloud):
    cloud.is_in(training=["75", "0"])
    done = cloud.run("up", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert cloud.did() == ["create", *["scp", "setup", "run"] * 2, "delete"]
    assert cloud.trained() == [TRAIN] * 2


def test_up_goes_by_all_workers(cloud):
    looks = (
        "a: running\nb: ended 75",  # still saves
        "a: ended 1\nb: ended 75",  # was left alone
        "a: running\nb: ended 0",
        "a: ended 0\nb: ended 0",
    )
    cloud.is_in(training=["0"] * 2, status=looks)
    done = cloud.run("up", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert cloud.did() == ["create", *["scp", "setup", "run"] * 2, "delete"]
    assert json.loads((cloud.folder / "scenario").read_text())["status"] == []


def test_up_does_not_wait_for_workers_that_another_has_left(cloud):
    cloud.is_in(status=["a: running\nb: ended 2"])
    done = cloud.run("up", *TRAIN)
    assert done.returncode == 1 and "failed with exit status 2" in done.stderr


def test_up_begins_again_only_so_often(cloud):
    # 143: told before it could save.
    cloud.is_in(training=["143"] * 3)
    done = cloud.run("up", "--restarts=1", *TRAIN)
    assert done.returncode == 1 and "more than 1 times" in done.stderr
    assert len(cloud.trained()) == 2 and cloud.did()[-1] == "delete"


def test_up_begins_again_when_a_worker_was_rebooted(cloud):
    cloud.is_in(training=["rebooted", "0"])
    done = cloud.run("up", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert "has lost the run" in done.stderr
    assert cloud.did() == ["create", "scp", "setup", "run", "delete"] * 2


def test_the_notice_of_a_preemption_has_training_save(cloud):
    cloud.is_in(training=["wait", "0"])
    with cloud.start("up", *TRAIN) as up:
        cloud.wait_for("waits")
        cloud.write("notice", "")
        said = up.stderr.read()
    assert up.returncode == 0 and "was interrupted" in said, said
    assert len(cloud.trained()) == 2


def test_up_shows_the_log_of_a_failure_and_gives_the_tpu_back(cloud):
    cloud.is_in(training=["3"])
    done = cloud.run("up", *TRAIN)
    assert done.returncode == 1
    assert "step 1 of training" in done.stderr
    assert "failed with exit status 3" in done.stderr
    assert cloud.did()[-2:] == ["logs", "delete"]


def test_up_says_what_it_could_not_give_back(cloud):
    cloud.is_in(training=["3"], fail={"delete": "INTERNAL"})
    done = cloud.run("up", *TRAIN)
    assert done.returncode == 1 and "STILL ACTIVE and COSTS MONEY" in done.stderr


def test_up_gives_the_tpu_back_when_it_cannot_be_set_up(cloud):
    done = cloud.run("up", *TRAIN, PIP_STATUS="1")
    assert done.returncode == 1 and "could not start the run" in done.stderr
    assert cloud.did() == ["create", "scp", "setup", "delete"]


def test_up_waits_while_nothing_can_be_reached(cloud):
    cloud.is_in(training=["wait", "0"])
    with cloud.start("up", *TRAIN) as up:
        cloud.wait_for("waits")
        read_to(up, "it goes on")
        cloud.write("tpu", json.dumps(["UNREACHABLE"] * 12 + ["ACTIVE"]))
        read_to(up, *["unreachable"] * 12)
        cloud.write("notice", "")
        said = up.stderr.read()
    assert up.returncode == 0, said


def test_up_gives_up_when_only_the_workers_are_silent(cloud):
    cloud.is_in(training=["wait"])
    with cloud.start("up", *TRAIN) as up:
        cloud.wait_for("waits")
        read_to(up, "it goes on")
        cloud.write("scenario", json.dumps({"fail": {"ssh": "no route"}}))
        said = up.stderr.read()
    assert up.returncode == 1
    assert "not all workers of pfjax have answered for 10 looks" in said
    assert cloud.did()[-1] == "delete"


def test_interrupting_up_leaves_the_run_alone(cloud):
    for sign, status in ((signal.SIGINT, 130), (signal.SIGHUP, 129)):
        cloud.is_in(training=["wait"])
        with cloud.start("up", "--poll=1", *TRAIN) as up:
            read_to(up, "it goes on")
            os.killpg(up.pid, sign)
            _, said = up.communicate(timeout=PATIENCE)
        assert up.returncode == status, said
        assert "left as it is (ACTIVE) and COSTS MONEY until: gcloud compute" in said
        assert cloud.did() == ["create", "scp", "setup", "run"]
        assert "running" in cloud.run("status").stdout
        cloud.run("stop")


def test_interrupting_a_wait_in_the_queue_gives_the_request_back(cloud):
    cloud.is_in(created=[["WAITING_FOR_RESOURCES"]])
    with cloud.start("up", "--poll=1", *TRAIN) as up:
        read_to(up, "in the queue")
        os.killpg(up.pid, signal.SIGINT)
        up.communicate(timeout=PATIENCE)
    assert up.returncode == 130
    assert cloud.did() == ["create", "delete"]


# --- arguments ------------------------------------------------------------------------


def test_a_dry_run_prints_commands_and_runs_none(cloud):
    needs = {"run": TRAIN, "up": [*TRAIN, "--config.model=it's $1"]}
    slept = cloud.folder / "slept"
    write_tool(cloud.folder.parent / "bin/sleep", f"#!/bin/sh\ntouch '{slept}'\n")
    for command in COMMANDS:
        done = cloud.run(
            command, "--dry-run", "--name=a b", "--poll=60", *needs.get(command, [])
        )
        assert done.returncode == 0 and done.stderr == ""
        lines = [shlex.split(line) for line in done.stdout.splitlines()]
        assert lines and all(
            line[0] == "gcloud" and "a b" in " ".join(line) for line in lines
        )
    assert cloud.asked() == [] and not slept.exists()
    # What `up` prints last is what it does: the arguments, and the archive it names.
    said = [shlex.split(find(line, "--command=")) for line in lines if "ssh" in line]
    run = next(words for words in said if words[2] == "run")
    assert run[3:] == [*needs["up"], "--multihost"]
    archive = next(line for line in lines if "scp" in line)[5]
    assert pathlib.Path(archive).is_file()


def test_mistakes_are_refused_in_one_line(cloud):
    for args, says in (
        (["fly"], "no command 'fly'"),
        (["create", "--colour=red"], "unknown option --colour=red"),
        (["create", "--name"], "--name needs a value"),
        (["create", "--name="], "--name="),
        (["create", "--poll=soon"], "--poll=soon"),
        (["create", "--provisioning=gift"], "--provisioning=gift"),
        (["create", "--type=abacus"], "--type=abacus"),
        (["up", TRAIN[1]], "up needs --config"),
        (["up", TRAIN[1], "--config.a= --config=b"], "up needs --config"),
        (["run", TRAIN[0]], "run needs --workdir"),
        (["run", TRAIN[0], "--workdir=/tmp/1"], "run needs --workdir=gs://"),
    ):
        done = cloud.run(*args)
        assert done.returncode == 1 and cloud.asked() == []
        assert done.stderr.startswith("error: ") and says in done.stderr
        assert done.stderr.count("\n") == 1
    worker = subprocess.run(
        ["bash", str(ROOT / "launch/worker.sh"), "fly"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert worker.returncode == 1 and worker.stderr.startswith("error: ")


def test_help_is_the_comment_at_the_top(cloud):
    for command in [[], *[[command] for command in COMMANDS]]:
        done = cloud.run(*command, "--help")
        assert done.returncode == 0 and done.stdout.startswith("Trains on a Google")
        assert "--workdir=gs://" in done.stdout and "set -e" not in done.stdout
    for name in ("worker.sh", "slurm.sh"):
        said = subprocess.check_output(
            ["bash", str(ROOT / "launch" / name), "--help"], text=True
        )
        assert said.startswith(("What", "Trains")) and f"launch/{name}" in said
        assert "set -e" not in said and "#SBATCH" not in said


# --- Slurm ----------------------------------------------------------------------------

SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$JOB/srun"
trap 'exit 75' TERM
echo $$ >"$JOB/pid"
[[ $TASKS == wait ]] || exit "$TASKS"
while true; do sleep 0.02; done
"""
SCANCEL = """#!/usr/bin/env bash
echo "scancel $*" >>"$JOB/log"
kill -TERM "$(cat "$JOB/pid")"
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >>"$JOB/log"
echo "JobId=7 JobState=${STATE:-RUNNING} Reason=None"
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
        write_tool(tmp_path / name, text)
    # Slurm runs a copy.
    script = shutil.copy(ROOT / "launch/slurm.sh", job / "slurm_script")

    def start(*args, **env):
        return subprocess.Popen(
            ["bash", script, *args],
            stderr=subprocess.PIPE,
            text=True,
            env={
                "PATH": f"{tmp_path}:{os.environ['PATH']}",
                "CLOUD": str(job),
                "JOB": str(job),
                "PFJAX_VENV": str(job / "venv"),
                "SLURM_JOB_ID": "7",
                "SLURM_SUBMIT_DIR": str(ROOT),
            }
            | env,
        )

    start.job = job
    return start


def test_slurm_runs_training_and_keeps_its_status(slurm):
    for status in (0, 3):
        words = ["--config=a b.py", "--workdir=/shared/it's"]
        job = slurm(*words, TASKS=str(status))
        _, said = job.communicate(timeout=PATIENCE)
        assert job.returncode == status, said
        assert (slurm.job / "log").read_text() == ""
        asked = (slurm.job / "srun").read_text().splitlines()
        python = str(slurm.job / "venv/bin/python")
        assert asked[1:] == [python, "-m", "pfjax.train", *words, "--multihost"]


def test_slurm_has_training_save_and_queues_the_job_again(slurm):
    job = slurm(*TRAIN, TASKS="wait")
    while not (slurm.job / "pid").exists():
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    _, said = job.communicate(timeout=PATIENCE)
    assert (slurm.job / "log").read_text().splitlines() == [
        "scancel --signal=TERM 7",
        "scontrol show job 7",
        "scontrol requeue 7",
    ], said


def test_slurm_does_not_bring_back_a_cancelled_job(slurm):
    slurm(*TRAIN, TASKS="75", STATE="CANCELLED").communicate(timeout=PATIENCE)
    assert (slurm.job / "log").read_text() == "scontrol show job 7\n"


def test_slurm_refuses_what_is_missing(slurm):
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


def test_slurm_starts_a_task_for_each_gpu_and_is_told_ahead(slurm):
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


# --- GKE ------------------------------------------------------------------------------


def test_the_manifest_for_gke_agrees_with_itself():
    yaml = pytest.importorskip("yaml")
    manifest = yaml.safe_load((ROOT / "launch/gke.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == (
        "jobset.x-k8s.io/v1alpha2",
        "JobSet",
    )
    (replicated,) = manifest["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    # One pod a host of the slice.
    select = pod["nodeSelector"]
    assert select["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5-lite-podslice"
    chips = 1
    for side in select["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(side)
    a_host = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"]["google.com/tpu"] == a_host
    assert job["parallelism"] == job["completions"] == chips // a_host > 1
    assert job["completionMode"] == "Indexed" and replicated["replicas"] == 1
    assert "--multihost" in container["args"]
    # The job fails as a whole: by its limit when interrupted, else by its policy, and only
    # the latter ends the JobSet.
    disruption, code = job["podFailurePolicy"]["rules"]
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    assert disruption["action"] == "Count"
    assert disruption["onPodConditions"] == [{"type": "DisruptionTarget"}]
    assert code["action"] == "FailJob"
    assert code["onExitCodes"] == {
        "containerName": container["name"],
        "operator": "NotIn",
        "values": [75],
    }
    (rule,) = manifest["spec"]["failurePolicy"]["rules"]
    assert rule == {
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert pod["terminationGracePeriodSeconds"] >= 30


# --- all ------------------------------------------------------------------------------


def test_scripts_are_clean():
    done = subprocess.run(
        [
            str(pathlib.Path(sys.executable).parent / "shellcheck"),
            "--external-sources",
            "--source-path=SCRIPTDIR",
            *sorted((ROOT / "launch").glob("*.sh")),
            ROOT / ".ci/run",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr

"""The scripts for TPUs, against stand-ins for what they call."""

import contextlib
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

# Plays the workers too, which are Linux.
pytestmark = pytest.mark.skipif(
    not shutil.which("setsid"), reason="no setsid, which TPU VMs have"
)

ROOT = pathlib.Path(__file__).parent.parent
PATIENCE = 300  # seconds, with what hangs
COMMANDS = ["create", "setup", "run", "logs", "status", "stop", "delete", "up"]
TRAIN = ["--config=configs/smoke.py", "--workdir=gs://bucket/runs/1"]

# What gcloud documents for each command that is used (528.0.0), beside FLAGS_OF_ALL.
SSH_FLAGS = (
    "--dry-run --force-key-file-overwrite --internal-ip --plain --ssh-key-expiration "
    "--ssh-key-expire-after --ssh-key-file --strict-host-key-checking --worker --zone"
)
CREATE_FLAGS = (
    "--accelerator-type --async --data-disk --description --guaranteed --internal-ips "
    "--labels --metadata --metadata-from-file --network --node-count --node-id "
    "--node-prefix --range --reservation-host-folder --reservation-host-organization "
    "--reservation-host-project --reserved --runtime-version --scopes --service-account "
    "--shielded-secure-boot --spot --subnetwork --tags --topology --type "
    "--valid-after-duration --valid-after-time --valid-until-duration "
    "--valid-until-time --zone"
)
FLAGS = {
    "compute tpus queued-resources create": CREATE_FLAGS,
    "alpha compute tpus queued-resources create": (
        f"{CREATE_FLAGS} --autocheckpoint-enabled --best-effort --boot-disk "
        "--max-run-duration --network-config --provisioning-model --reservation "
        "--workload-type"
    ),
    "compute tpus queued-resources describe": "--zone",
    "compute tpus queued-resources delete": "--async --force --zone",
    "compute tpus tpu-vm ssh": f"{SSH_FLAGS} --command --output-directory --ssh-flag",
    "alpha compute tpus tpu-vm ssh": (
        f"{SSH_FLAGS} --command --output-directory --ssh-flag --batch-size "
        "--tunnel-through-iap"
    ),
    "compute tpus tpu-vm scp": f"{SSH_FLAGS} --compress --recurse --scp-flag",
    "alpha compute tpus tpu-vm scp": (
        f"{SSH_FLAGS} --compress --recurse --scp-flag --batch-size --tunnel-through-iap"
    ),
    "storage cp": "--recursive --no-clobber --gzip-in-flight",
    "storage rm": "--recursive --continue-on-error",
    "storage ls": "--recursive --long",
    "config get-value": "",
    "version": "",
}
FLAGS_OF_ALL = (
    "--access-token-file --account --billing-project --configuration --flags-file "
    "--flatten --format --help --impersonate-service-account --log-http --project "
    "--quiet --trace-token --user-output-enabled --verbosity"
)
# A cloud of one TPU. Its coming states are in the file "tpu" (the last one stays), its
# workers' home folder is "worker", which is new with each TPU.
GCLOUD = f"""#!{sys.executable} -IS
import json, os, pathlib, shutil, subprocess, sys

FLAGS, FLAGS_OF_ALL = {FLAGS!r}, {FLAGS_OF_ALL!r}
folder = pathlib.Path(os.environ["CLOUD"])
args = sys.argv[1:]
with (folder / "log").open("a") as file:
    file.write(json.dumps(args) + "\\n")
scenario = json.loads((folder / "scenario").read_text())
words = [word for word in args if not word.startswith("-")]
name = max((x for x in FLAGS if " ".join(args).startswith(x)), key=len)
command = name.split()[-1] if "tpus" in name else name
worker = folder / "worker"
on_worker = os.environ["HOME"] == str(worker)
known = [*FLAGS[name].split(), *FLAGS_OF_ALL.split(), "-"]
unknown = [x for x in args if x.startswith("-") and x.partition("=")[0] not in known]

def fail(text, status=1):
    print(f"ERROR: (gcloud.{{name.replace(' ', '.')}}) {{text}}", file=sys.stderr)
    sys.exit(status)

def out(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False)

if unknown:
    fail("unrecognized arguments:\\n  " + "\\n  ".join(unknown), 2)

def states(new=None):
    if new:
        (folder / "new").write_text(json.dumps(new))
        (folder / "new").rename(folder / "tpu")
    return json.loads((folder / "tpu").read_text())

failing = scenario.get("fail", {{}})
where = f"{{command}} on worker"
if (where if on_worker else command) in failing:
    fail(failing[where if on_worker else command])
if command == "version":
    print("Google Cloud SDK 528.0.0\\n" + scenario.get("components", "alpha 2025.06.20"))
elif command == "config get-value":
    print(scenario.get("zone", ""))
elif command == "create":
    coming = scenario["created"]
    states(coming[0])
    (folder / "scenario").write_text(json.dumps(scenario | {{"created": coming[1:] or coming}}))
    shutil.rmtree(worker, ignore_errors=True)
    worker.mkdir()
elif command == "describe":
    now, *later = states()
    states(later)
    if now == "ABSENT":
        fail("NOT_FOUND: Resource 'pfjax' was not found.")
    if now == "UNREACHABLE":
        fail("network is unreachable")
    print(now)
    print("Updates are available.", file=sys.stderr)
elif command == "delete":
    states(["ABSENT"])
elif command == "scp":
    # Only where there are several workers, as there are here.
    key = os.environ["HOME"] + "/.ssh/google_compute_engine"
    print_of_key, agent = out("ssh-keygen", "-lf", key), out("ssh-add", "-l")
    if agent.returncode == 0 and print_of_key.stdout.split()[1] not in agent.stdout:
        fail(
            'SSH Key is not present in the SSH agent. Please run "ssh-add '
            f'{{key}}" to add it, and try again.'
        )
    *sources, _ = words[words.index("scp") + 1 :]
    for source in sources:
        shutil.copy(source, worker)
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
    printenv -0 >"$CLOUD/variables"
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
# The metadata server, which says TRUE once for a notice, and the hub, which has one answer.
CURL = """#!/usr/bin/env bash
if [[ $* == */auth-check* ]]; then
  { printf '%s\\n' "$@"; cat; } >>"$CLOUD/hub"
  cat "$CLOUD/answer"
  exit
fi
until rm "$CLOUD/notice" 2>/dev/null; do sleep 0.05; done
echo TRUE
"""


def write_tool(path, text):
    path.write_text(text)
    path.chmod(0o755)


class Cloud:
    """A checkout with spaces in its path, and stand-ins for what its scripts call."""

    def __init__(self, folder, key):
        self.folder = folder / "the cloud"
        self.folder.mkdir()
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        self.checkout = folder / "a checkout"
        for part in ("launch", "configs"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / part, self.checkout / part, ignore=ignored)
        shutil.copy(ROOT / "setup.py", self.checkout)
        self.git("init -q")
        self.commit()
        shutil.copytree(key, folder / ".ssh")
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
            "PFJAX_HOLD": "0",
            "TMPDIR": str(self.temporary),
            "LC_ALL": "C.UTF-8",
        }
        self.is_in()

    def is_in(
        self, *states, training=("0",), created=(("ACTIVE",),), fail=None, **scenario
    ):
        self.write("tpu", json.dumps(states or ["ABSENT"]))
        scenario |= {"created": created, "fail": fail or {}}
        self.write("scenario", json.dumps(scenario))
        self.write("training", "".join(f"{line}\n" for line in training))
        self.write("log", "")
        self.write("trained", "")
        self.write("answer", "200")
        (self.folder / "worker").mkdir(exist_ok=True)

    def git(self, line):
        words = shlex.split(f"git -c user.name=x -c user.email=x {line}")
        subprocess.run(words, cwd=self.checkout, check=True)

    def commit(self):
        self.git("add .")
        self.git("commit -q -m 1")

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

    def start(self, *args, **env):
        return subprocess.Popen(
            self.command(*args),
            env=self.env | env,
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

    def created(self):
        """Arguments of the gcloud that asked for a TPU."""
        return next(args for args in self.asked() if "create" in args)

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


@pytest.fixture(scope="session")
def ssh_key(tmp_path_factory):
    """A folder with the key that gcloud makes."""
    folder = tmp_path_factory.mktemp("ssh")
    make_key(folder / "google_compute_engine")
    return folder


def make_key(path, passphrase=""):
    line = ["ssh-keygen", "-q", "-t", "rsa", "-N", passphrase, "-f", path]
    subprocess.run(line, check=True)


@pytest.fixture
def cloud(tmp_path, ssh_key):
    cloud = Cloud(tmp_path, ssh_key)
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
    bound = "--provisioning-model=reservation-bound"
    for options, flags, verb in (
        (["spot"], ["--spot"], "compute"),
        (["flex-start"], ["--max-run-duration=1d"], "alpha"),
        (["reservation"], ["--reserved"], "compute"),
        (["reservation", "--reservation=a b"], ["--reservation=a b"], "alpha"),
        (["calendar", "--reservation=a"], ["--reservation=a", bound], "alpha"),
    ):
        cloud.is_in()
        done = cloud.run("create", f"--provisioning={options[0]}", *options[1:])
        assert done.returncode == 0, done.stderr
        asked = cloud.created()
        assert set(flags) <= set(asked) and asked[0] == verb
        # Only future reservations in calendar mode bind, by Google's documentation.
        assert (bound in asked) == (options[0] == "calendar")


def test_any_reservation_is_looked_for_in_the_zone_that_gcloud_is_set_to(cloud):
    cloud.is_in(zone="us-x1-a")
    assert cloud.run("create", "--provisioning=reservation").returncode == 0
    assert "--zone=us-x1-a" in cloud.created()


def test_each_type_has_its_runtime(cloud):
    for kind, runtime in (
        ("v2-8", "tpu-ubuntu2204-base"),
        ("v3-32", "tpu-ubuntu2204-base"),
        ("v4-8", "tpu-ubuntu2204-base"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-8", "v2-alpha-tpuv6e"),
    ):
        cloud.is_in()
        assert cloud.run("create", f"--type={kind}").returncode == 0
        assert f"--runtime-version={runtime}" in cloud.created()


@pytest.mark.slow
def test_networks_and_accounts_are_passed_on(cloud):
    cloud.is_in()
    network = ["--network=n", "--subnetwork=s", "--service-account=a@b"]
    done = cloud.run("up", *network, *TRAIN)
    assert done.returncode == 0 and set(network) <= set(cloud.created())
    assert "--internal-ips" not in cloud.created()
    for option, verb in (
        ("--internal-ip", "compute"),
        ("--tunnel-through-iap", "alpha"),
    ):
        cloud.is_in()
        done = cloud.run("up", option, *TRAIN)
        assert done.returncode == 0, done.stderr
        assert ("--internal-ips" in cloud.created()) == (option == "--internal-ip")
        reaching = [args for args in cloud.asked() if {"ssh", "scp"} & set(args)]
        assert len(reaching) >= 4  # scp, set-up, run, and looks
        assert all(option in args and args[0] == verb for args in reaching)


def test_the_stand_in_refuses_what_gcloud_does_not_document(cloud):
    for line in (
        "compute tpus queued-resources create x --max-run-duration=1d",
        "compute tpus tpu-vm ssh x --tunnel-through-iap",
        "compute tpus queued-resources delete x --forced",
    ):
        done = subprocess.run(
            ["gcloud", *line.split()], env=cloud.env, capture_output=True, check=False
        )
        assert done.returncode == 2 and b"unrecognized arguments" in done.stderr


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


@pytest.mark.slow
def test_up_begins_again_in_place_when_told_to_stop(cloud):
    cloud.is_in(training=["75", "0"])
    done = cloud.run("up", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert cloud.did() == ["create", *["scp", "setup", "run"] * 2, "delete"]
    assert cloud.trained() == [TRAIN] * 2


@pytest.mark.slow
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


@pytest.mark.slow
def test_up_begins_again_when_a_worker_is_gone(cloud):
    """Those it has left end with 76, unless it has ended by a mistake of its own."""
    cloud.is_in(training=["76", "0"])
    done = cloud.run("up", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert cloud.trained() == [TRAIN] * 2
    cloud.is_in(status=["a: ended 76\nb: ended 1"])
    done = cloud.run("up", *TRAIN)
    assert done.returncode == 1 and "failed with exit status 1" in done.stderr


@pytest.mark.slow
def test_up_begins_again_only_so_often(cloud):
    # 143: told before it could save.
    cloud.is_in(training=["143"] * 3)
    done = cloud.run("up", "--restarts=1", *TRAIN)
    assert done.returncode == 1 and "more than 1 times" in done.stderr
    assert len(cloud.trained()) == 2 and cloud.did()[-1] == "delete"


@pytest.mark.slow
def test_up_begins_again_when_a_worker_was_rebooted(cloud):
    cloud.is_in(training=["rebooted", "0"])
    done = cloud.run("up", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert "has lost the run" in done.stderr
    assert cloud.did() == ["create", "scp", "setup", "run", "delete"] * 2


@pytest.mark.slow
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


def test_up_gives_the_tpu_back_when_nobody_mends_its_set_up(cloud):
    done = cloud.run("up", "--hold=1", *TRAIN, PIP_STATUS="1")
    assert "kept for 1 s (--hold)" in done.stderr
    assert done.returncode == 1 and "could not start the run" in done.stderr
    assert cloud.did() == ["create", "scp", "setup", "delete"]


@pytest.mark.slow
def test_a_tpu_whose_set_up_failed_is_kept_to_go_on_with(cloud):
    cloud.is_in(created=[["ACTIVE"]], fail={"scp": "reset"})
    with cloud.start("up", "--hold=600", "--poll=1", *TRAIN) as up:
        read_to(up, "kept for 600 s (--hold), costs money")
        # The promise holds without the terminal, too.
        os.killpg(up.pid, signal.SIGHUP)
        time.sleep(1.5)
        assert up.poll() is None
        os.killpg(up.pid, signal.SIGINT)
        _, said = up.communicate(timeout=PATIENCE)
    assert up.returncode == 130
    assert "is kept; the same command goes on with it" in said
    assert "left as it is (ACTIVE) and COSTS MONEY until: gcloud compute" in said
    assert cloud.did() == ["create", "scp"]
    cloud.write("scenario", json.dumps({}))
    done = cloud.run("up", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert cloud.did() == ["create", "scp", "scp", "setup", "run", "delete"]


def test_a_service_account_that_may_not_write_is_told_before_anything_is_made(cloud):
    cloud.is_in(fail={"storage cp on worker": "403: a@b does not have access"})
    done = cloud.run("up", *TRAIN)
    assert done.returncode == 1 and "a@b does not have access" in done.stderr
    assert "roles/storage.objectUser on the bucket" in done.stderr
    assert cloud.did() == ["create", "scp", "setup", "delete"]
    assert not (cloud.folder / "installed").exists()


@pytest.mark.slow
def test_what_ends_by_itself_is_not_taken_for_preempted(cloud):
    for options in (["flex-start"], ["calendar", "--reservation=r"]):
        cloud.is_in(training=["preempted", "0"])
        args = f"--provisioning={options[0]}", *options[1:], *TRAIN
        done = cloud.run("up", *args)
        assert done.returncode == 75, done.stderr
        assert "is over" in done.stderr and "preempted" not in done.stderr
        assert "the same command goes on from the last checkpoint" in done.stderr
        assert cloud.did() == ["create", "scp", "setup", "run", "delete"]
    # A new command asks anew.
    cloud.is_in("SUSPENDED")
    assert cloud.run("up", "--provisioning=flex-start", *TRAIN).returncode == 0
    assert cloud.did()[:2] == ["delete", "create"]


@pytest.mark.slow
def test_a_run_is_asked_to_save_before_its_time_is_over(cloud):
    flex = ["--provisioning=flex-start", "--max-run=2s"]
    for options, limit in (
        (flex, "--max-run=2s"),
        (["--max-hours=0"], "--max-hours=0"),
    ):
        cloud.is_in(training=["wait"])
        done = cloud.run("up", *options, *TRAIN)
        assert done.returncode == 75, done.stderr
        assert f"the time is over ({limit})" in done.stderr
        # 143: told before it knew how to save.
        assert re.search(r": ended (75|143)\n", done.stderr)
        assert cloud.did() == ["create", "scp", "setup", "run", "stop", "delete"]


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


# --- before anything costs money ------------------------------------------------------


def refused(cloud, *args, **env):
    """What is said of a mistake that is found before a TPU is asked for."""
    done = cloud.run("up", *(args or TRAIN), **env)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, (
        done.stderr
    )
    assert cloud.did() == []
    return done.stderr


@pytest.fixture
def agent(tmp_path):
    """The environment of an ssh-agent, and a function that gives it keys."""
    socket = str(tmp_path / "agent")
    process = subprocess.Popen(
        ["ssh-agent", "-D", "-a", socket], stdout=subprocess.DEVNULL
    )
    env = {"SSH_AUTH_SOCK": socket}
    while not os.path.exists(socket):
        time.sleep(0.01)

    def add(key, passphrase=""):
        ask = tmp_path / "ask"
        write_tool(ask, f"#!/bin/sh\necho '{passphrase}'\n")
        asking = {"SSH_ASKPASS": str(ask), "SSH_ASKPASS_REQUIRE": "force"}
        line = ["ssh-add", "-q", str(key)]
        subprocess.run(line, env=os.environ | env | asking, check=True)

    yield env, add
    process.terminate()
    process.wait()


@pytest.mark.slow
def test_an_agent_without_the_key_is_no_hindrance(cloud, agent, tmp_path):
    env, add = agent
    make_key(tmp_path / "other")
    add(tmp_path / "other")
    scp = ["gcloud", *["compute", "tpus", "tpu-vm", "scp", "x", "y:"]]
    done = subprocess.run(scp, env=cloud.env | env, capture_output=True, check=False)
    assert b"SSH Key is not present in the SSH agent" in done.stderr
    done = cloud.run("up", *TRAIN, **env)
    assert done.returncode == 0, done.stderr
    # Nor for the commands alone.
    cloud.is_in("ACTIVE")
    assert cloud.run("setup", **env).returncode == 0


@pytest.mark.slow
def test_a_key_with_a_passphrase_needs_an_agent(cloud, agent, tmp_path):
    env, add = agent
    key = tmp_path / ".ssh/google_compute_engine"
    key.unlink()
    make_key(key, "secret")
    make_key(tmp_path / "other")
    add(tmp_path / "other")
    assert f"&& ssh-add {key}" in refused(cloud)
    assert f"&& ssh-add {key}" in refused(cloud, **env)
    add(key, "secret")
    assert cloud.run("up", *TRAIN, **env).returncode == 0


def test_a_missing_key_is_made_and_half_of_one_refused(cloud, tmp_path):
    shutil.rmtree(tmp_path / ".ssh")
    done = cloud.run("up", *TRAIN)
    assert done.returncode == 0, done.stderr
    key = tmp_path / ".ssh/google_compute_engine"
    assert key.stat().st_mode & 0o777 == 0o600
    key.unlink()
    cloud.is_in()
    assert "is missing" in refused(cloud)


def test_a_bucket_is_tried_before_a_tpu_is_asked_for(cloud):
    for text, says in (
        ("gs://bucket not found: 404.", "there is no bucket"),
        ("[a@b] does not have permission to access b instance [x]", "may not write"),
    ):
        cloud.is_in(fail={"storage cp": text})
        said = refused(cloud)
        assert says in said and "gcloud storage buckets create gs://bucket" in said
    cloud.is_in(fail={"storage rm": "a@b does not have storage.objects.delete access"})
    assert "may not write" in refused(cloud)
    cloud.is_in(fail={"storage cp": "the network is down"})
    done = cloud.run("create", *TRAIN)
    assert done.returncode == 1 and cloud.did() == []
    assert "network is down" in done.stderr and "could not write there" in done.stderr


@pytest.mark.slow
def test_what_a_run_reads_has_to_be_in_the_commit(cloud):
    mine = cloud.checkout / "configs/mine.py"
    assert "no configs/mine.py in the commit" in refused(
        cloud, "--config=mine", TRAIN[1]
    )
    recipe = 'c = pfjax.recipe("smoke")\nc.data.train = "prompts.jsonl"\n'
    mine.write_text(recipe)
    for name in ("mine", "configs/mine.py", "./configs/mine.py", "configs/mine.py:x"):
        said = refused(cloud, f"--config={name}", TRAIN[1])
        assert "configs/mine.py is not in the commit" in said
    assert "configs/mine.py\n" in refused(cloud, f"--config={mine}", TRAIN[1])
    cloud.commit()
    # Of the recipe itself, of the one that it starts from, and of the command line.
    own = [f"--config={mine.stem}", TRAIN[1]]
    assert "there is no prompts.jsonl in the commit" in refused(cloud, *own)
    (cloud.checkout / "configs/more.py").write_text('c = pfjax.recipe("mine")\n')
    cloud.commit()
    assert "no prompts.jsonl" in refused(cloud, "--config=more", TRAIN[1])
    prompts = cloud.checkout / "prompts.jsonl"
    prompts.write_text("{}")
    assert "prompts.jsonl is not in the commit" in refused(cloud, *own)
    cloud.commit()
    assert cloud.run("up", *own).returncode == 0
    cloud.is_in()
    prompts.write_text("{ }")
    assert "prompts.jsonl differs from the commit" in refused(cloud, *own)
    # Only what is used.
    other = "--config.data.train=pfjax/toy/train.jsonl"
    assert cloud.run("up", *own, other).returncode == 0
    cloud.commit()
    cloud.is_in()
    (cloud.checkout / "folder").mkdir()
    for setting, says in (
        ("data.eval=math500,set.jsonl", "no set.jsonl"),
        ("data.train=/home/me/set.jsonl", "do not have it"),
        ("reward=accuracy, 0.1 * mine.py:brief", "no mine.py"),
        ("reward=judge:judge.toml", "no judge.toml"),
        ("objective=own/loss.py:NAME", "no own/loss.py"),
        ("model=folder", "folder is not in the commit"),
        ("model=out/run/hf", "no out/run/hf"),
        ("lora.init_from=~/adapter", "do not have it"),
    ):
        said = refused(cloud, *TRAIN, f"--config.{setting}")
        assert says in said and f"--config.{setting}: " in said
    cloud.is_in(fail={"storage ls": "One or more URLs matched no objects."})
    said = refused(cloud, *TRAIN, "--config.data.train=gs://bucket/none.jsonl")
    assert "there is no gs://bucket/none.jsonl" in said
    # What a pattern or a name happens to look like is none.
    cloud.is_in()
    done = cloud.run(
        "up", *TRAIN, '--config.reward=regex:"a/b.py"', "--config.suffix=x.py"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_settings_are_checked_where_an_environment_is_at_hand(cloud):
    python = cloud.checkout / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    (cloud.checkout / ".venv/.pfjax-ready").touch()
    (cloud.checkout / ".git/info/exclude").write_text(".venv\n")
    # The checkout of the test has only what is shipped of it.
    write_tool(
        python, f"#!/bin/sh\nPYTHONPATH='{ROOT}' exec '{sys.executable}' \"$@\"\n"
    )
    args = ["--config=smoke", TRAIN[1]]
    said = refused(cloud, *args, "--config.alhpa=4")
    assert said == (
        "error: there is no setting --config.alhpa; did you mean --config.alpha?\n"
    )
    assert "must be positive" in refused(cloud, *args, "--config.alpha=-4")
    assert cloud.run("up", *args, "--config.alpha=2").returncode == 0
    # One that is no longer whole says nothing of the settings.
    cloud.is_in()
    write_tool(python, "#!/bin/sh\necho Traceback >&2; exit 1\n")
    assert cloud.run("up", *args).returncode == 0


@pytest.mark.slow
def test_the_hub_is_asked_with_the_token_of_the_workers(cloud):
    hub = cloud.folder / "hub"
    wanted = ["--config.model=org/gated@main", "--config.data.train=org/set:train[:9]"]
    done = cloud.run("up", *TRAIN, *wanted, "--env=HF_TOKEN", HF_TOKEN="hf_1")
    assert "did not say" not in done.stderr
    assert done.returncode == 0, done.stderr
    asked = hub.read_text()
    assert "https://huggingface.co/api/models/org/gated/auth-check" in asked
    assert "https://huggingface.co/api/datasets/org/set/auth-check" in asked
    # By its standard input, after its arguments.
    assert asked.count('\nheader = "Authorization: Bearer hf_1"\n') == 2
    for status in ("401", "403", "404"):
        cloud.is_in()
        cloud.write("answer", status)
        # The one of here is not theirs.
        assert "--env=HF_TOKEN" in refused(cloud, *TRAIN, wanted[0], HF_TOKEN="hf_1")
        args = [*TRAIN, wanted[0], "--env=HF_TOKEN=hf_1"]
        assert "to the owner of HF_TOKEN" in refused(cloud, *args)
    cloud.write("answer", "000")
    done = cloud.run("up", *TRAIN, wanted[0])
    assert done.returncode == 0 and "did not say whether" in done.stderr
    cloud.is_in()
    hub.unlink()
    assert cloud.run("up", *TRAIN).returncode == 0 and not hub.exists()


@pytest.mark.slow
def test_a_tracker_needs_its_package_and_its_key(cloud):
    args = [*TRAIN, "--config.wandb_project=p"]
    assert "--extras=wandb" in refused(cloud, *args)
    assert "--env=WANDB_API_KEY" in refused(cloud, *args, "--extras=wandb")
    assert "has no extra wanbd" in refused(cloud, *args, "--extras=gguf,wanbd")
    args += ["--env=WANDB_API_KEY"]
    done = cloud.run("up", *args, WANDB_API_KEY="k", PFJAX_EXTRAS="wandb")
    assert done.returncode == 0, done.stderr
    # Once: the run finds what the set-up has made.
    (installed,) = (cloud.folder / "installed").read_text().splitlines()
    assert installed.endswith("[wandb,tpu]")


def test_commands_that_are_installed_apart_are_looked_for(cloud):
    cloud.is_in(components="core 2025.06.20")
    for option in ("--provisioning=flex-start", "--tunnel-through-iap"):
        assert "gcloud components install alpha" in refused(cloud, option, *TRAIN)
    assert cloud.run("up", *TRAIN).returncode == 0


# --- variables ------------------------------------------------------------------------


def variables(cloud):
    """Those that training had."""
    text = (cloud.folder / "variables").read_text()
    return dict(line.partition("=")[::2] for line in text.split("\0")[:-1])


@pytest.mark.slow
def test_variables_reach_training_and_nobody_else(cloud):
    odd = "a b'c\"d$(x)\\\n e"
    cloud.is_in(training=["wait"])
    with cloud.start(
        "up",
        "--env=HF_TOKEN",
        "--env",
        "ODD=given=1",
        f"--env=TWO={odd}",
        *TRAIN,
        HF_TOKEN="hf_secret",
    ) as up:
        cloud.wait_for("waits")
        read_to(up, "it goes on")
        listed = subprocess.check_output(["ps", "-eo", "args="], text=True)
        assert "given=1" not in listed and "hf_secret" not in listed
        file = cloud.folder / "worker/pfjax-env"
        assert file.stat().st_mode & 0o777 == 0o600
        cloud.write("training", "0\n")
        cloud.run("stop")
        said = up.stderr.read()
    assert up.returncode == 0, said
    had = variables(cloud)
    assert (had["HF_TOKEN"], had["ODD"], had["TWO"]) == ("hf_secret", "given=1", odd)
    log = (cloud.folder / "log").read_text()
    assert "given=1" not in log and "hf_secret" not in log + said
    assert not list(cloud.temporary.iterdir())
    # Another set-up has its own.
    cloud.is_in("ACTIVE")
    cloud.run("setup")
    cloud.run("run", *TRAIN)
    assert "ODD" not in variables(cloud)


def test_a_dry_run_shows_no_values(cloud):
    done = cloud.run("up", "--dry-run", "--env=HF_TOKEN=hf_secret", *TRAIN)
    assert done.returncode == 0 and "hf_secret" not in done.stdout + done.stderr
    (file,) = cloud.temporary.glob("*/pfjax-env")
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.read_text().strip() == "HF_TOKEN=***"
    assert str(file) in done.stdout


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
        (["create", "--type=v5e-16"], "v5litepod-16"),
        (["create", "--type=tpu7x-8", "--runtime=x"], "use GKE (launch/gke.yaml)"),
        (["create", "--provisioning=calendar"], "needs --reservation=NAME"),
        # It would be left out, and a TPU on demand paid for.
        (["create", "--reservation=mine"], "needs --provisioning=reservation or"),
        (["up", "--provisioning=flex-start", "--max-run=8d"], "--max-run=8d"),
        (["up", "--provisioning=flex-start", "--max-run=soon"], "--max-run=soon"),
        (["up", "--max-hours=x"], "--max-hours=x"),
        (["setup", "--env=NOT_SET"], "is not set here"),
        (["setup", "--env=1X=secret"], "--env=1X: must be"),
        (["setup", "--env=UID=1"], "--env=UID: belongs to the shell"),
        (["run", "--env=HOME", *TRAIN], "run takes no --env"),
        (["run", "--extras=wandb", *TRAIN], "run takes no --env and no --extras"),
        (["up", TRAIN[1]], "up needs --config"),
        (["up", TRAIN[1], "--config.a= --config=b"], "up needs --config"),
        (["run", TRAIN[0]], "run needs --workdir"),
        (["run", TRAIN[0], "--workdir=/tmp/1"], "run needs --workdir=gs://"),
    ):
        done = cloud.run(*args)
        assert done.returncode == 1 and cloud.asked() == []
        assert done.stderr.startswith("error: ") and says in done.stderr
        assert done.stderr.count("\n") == 1 and "secret" not in done.stderr
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
    done = cloud.run()
    assert done.returncode == 2 and done.stderr.startswith("Trains on a Google")


# --- all ------------------------------------------------------------------------------


def test_scripts_are_clean():
    done = subprocess.run(
        [
            str(pathlib.Path(sys.executable).parent / "shellcheck"),
            "--external-sources",
            "--source-path=SCRIPTDIR",
            *sorted((ROOT / "launch").rglob("*.sh")),
            ROOT / "tests/slurm_cluster.sh",
            ROOT / ".ci/run",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr

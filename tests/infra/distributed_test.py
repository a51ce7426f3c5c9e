"""How processes find each other: what JAX is asked for. The rest is in faults_test.py."""

import http.server
import os
import sys
import threading

import jax
import pytest
from jax._src.clusters import cloud_tpu_cluster

from pfjax import cli
from pfjax.infra import distributed, rendezvous


@pytest.fixture
def asked(monkeypatch):
    """What `jax.distributed.initialize` was called with, where all processes have met."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **kw: calls.append(kw))
    monkeypatch.setattr(rendezvous, "meet", lambda place, seconds: None)
    return calls


def _set(monkeypatch, *values):
    for name, value in zip(distributed.VARIABLES, values, strict=True):
        monkeypatch.setenv(name, value)


@pytest.fixture
def tpu_vm(monkeypatch):
    """Makes this the second of some hosts of a TPU, as its metadata server tells."""

    def start(endpoints):
        told = {
            "agent-worker-number": "1",
            "worker-network-endpoints": endpoints,
            "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-16'\nZONE: 'us-west4-a'\n",
        }

        class Answer(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                assert self.headers["Metadata-Flavor"] == "Google"
                attribute = self.path.removeprefix(
                    "/computeMetadata/v1/instance/attributes/"
                )
                self.send_response(200)
                self.end_headers()
                self.wfile.write(told[attribute].encode())

            def log_message(self, *unused):
                pass

        server = http.server.ThreadingHTTPServer(("localhost", 0), Answer)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started.append(server)
        monkeypatch.setenv("GCE_METADATA_IP", f"localhost:{server.server_port}")
        monkeypatch.setenv("NO_PROXY", "localhost")
        monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
        monkeypatch.delenv("TPU_WORKER_HOSTNAMES", raising=False)
        monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)

    started = []
    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def test_a_dead_process_is_noticed_within_a_minute(asked, monkeypatch):
    _set(monkeypatch, "host:1", "2", "1")
    distributed.join()
    (kwargs,) = asked
    assert kwargs["heartbeat_timeout_seconds"] <= 60


def test_the_environment_says_where_and_how_long(asked, monkeypatch, capsys):
    _set(monkeypatch, "host:1", "2", "1")
    monkeypatch.setenv("PFJAX_JOIN_SECONDS", "5")
    distributed.join()
    (kwargs,) = asked
    assert kwargs["initialization_timeout"] == 5
    assert kwargs["coordinator_address"] == "host:1"
    assert (kwargs["num_processes"], kwargs["process_id"]) == (2, 1)
    said = capsys.readouterr().err
    assert "joining the other processes, for at most 5 s" in said
    assert "process 1 of 2, first at host:1\n" in said


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (("host", "2", "1"), "PFJAX_COORDINATOR=host has to be host:port"),
        (("host:http", "2", "1"), "PFJAX_COORDINATOR=host:http has to be host:port"),
        (("host:1", "2", ""), "all of these have to be set: .*, PFJAX_PROCESS_ID=$"),
        (("host:1", "2", "2"), "PFJAX_NUM_PROCESSES=2, PFJAX_PROCESS_ID=2: numbers"),
        (("host:1", "two", "0"), "PFJAX_NUM_PROCESSES=two, PFJAX_PROCESS_ID=0: num"),
    ],
)
def test_what_is_wrong_with_the_variables_is_one_line(asked, monkeypatch, values, says):
    _set(monkeypatch, *values)
    with pytest.raises(ValueError, match=says) as error:
        distributed.join()
    assert "\n" not in str(error.value) and not asked


@pytest.mark.parametrize("seconds", ["0", "-1", "5s", "1.5"])
def test_seconds_that_are_no_number_are_refused(asked, monkeypatch, seconds):
    monkeypatch.setenv("PFJAX_JOIN_SECONDS", seconds)
    with pytest.raises(ValueError, match=f"PFJAX_JOIN_SECONDS={seconds}: must be"):
        distributed.join()


def test_under_slurm_the_address_is_said(asked, monkeypatch, capsys):
    told = {
        "SLURM_JOB_ID": "5",
        "SLURM_STEP_NODELIST": "gpu[07-09],gpu12",
        "SLURM_NTASKS": "16",
        "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1",
    }
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    distributed.join()
    (kwargs,) = asked
    assert "process 9 of 16, first at gpu07:61445\n" in capsys.readouterr().err
    assert kwargs["coordinator_address"] == "gpu07:61445"
    assert (kwargs["num_processes"], kwargs["process_id"]) == (16, 9)
    # JAX takes the one of the GPU from its number on the node, if it is not told.
    assert "local_device_ids" not in kwargs


@pytest.mark.parametrize("form", ["localhost,10.0.0.9", "a:0:localhost,b:1:10.0.0.9"])
def test_on_a_tpu_vm_the_address_is_said(asked, tpu_vm, capsys, form):
    tpu_vm(form)
    distributed.join()
    assert "process 1 of 2, first at localhost:8482\n" in capsys.readouterr().err
    assert asked[0]["coordinator_address"] == "localhost:8482"


def test_a_tpu_vm_that_has_no_name_yet_is_said(asked, tpu_vm, monkeypatch):
    tpu_vm("no.such.host.invalid,10.0.0.9")
    monkeypatch.setenv("PFJAX_JOIN_SECONDS", "1")
    with pytest.raises(ValueError, match="first process was not found: .*no.such.host"):
        distributed.join()
    assert not asked


def test_one_worker_of_a_pod_of_tpu_vms_is_told_so(tpu_vm, monkeypatch):
    tpu_vm("10.0.0.1,10.0.0.2,10.0.0.3,10.0.0.4")
    with pytest.raises(ValueError, match="one of 4 workers of a TPU pod"):
        distributed.check_alone()
    # One host of it by itself, which libtpu is told in this way.
    monkeypatch.setenv("TPU_PROCESS_BOUNDS", "1,1,1")
    distributed.check_alone()


def test_a_tpu_vm_of_its_own_is_alone(tpu_vm):
    tpu_vm("10.0.0.1")
    distributed.check_alone()


@pytest.mark.parametrize(
    ("text", "is_loss"),
    [
        ("UNKNOWN: Gloo AllGather failed: Connection reset by peer", True),
        ("INTERNAL: NCCL operation ncclAllReduce failed: remote process exited", True),
        ("UNAVAILABLE: connection to 10.0.0.2:8476 refused", True),
        ("RESOURCE_EXHAUSTED: out of memory", False),
        ("INTERNAL: no algorithm was found", False),
        ("of the file the type is UNKNOWN: give one", False),
    ],
)
def test_the_loss_of_another_process_is_no_mistake(monkeypatch, capsys, text, is_loss):
    monkeypatch.setattr(os, "_exit", lambda status: sys.exit(status))
    for is_one_of_several in (True, False):
        monkeypatch.setattr(
            jax.distributed, "is_initialized", lambda given=is_one_of_several: given
        )
        with pytest.raises(SystemExit) as end, cli.mistakes_in_one_line():
            raise ValueError(text)
        is_lost = end.value.code == distributed.LOST_STATUS
        assert is_lost == (is_loss and is_one_of_several)
        said = capsys.readouterr().err
        assert ("another process of this run is gone: " + text in said) == is_lost

"""One owner per folder: the living are refused, the dead are succeeded."""

import json
import os
import subprocess
import sys
import time

import pytest
from etils import epath

from pfjax.trainer import lease
from pfjax.trainer.lease import Lease
from tests.conftest import has_proc


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path)


def _owned(folder, **owner):
    (folder / "owner.json").write_text(json.dumps({"time": 0.0, **owner}))


@has_proc
def test_a_living_process_is_refused_and_a_dead_one_succeeded(folder):
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    host = Lease(folder)._me["host"]
    _owned(folder, host=host, process=lease._name_of(sleeper.pid))
    with pytest.raises(
        ValueError, match=rf"alive: process {sleeper.pid}@\d+ on {host}"
    ):
        Lease(folder).__enter__()
    sleeper.kill()
    sleeper.wait()
    with Lease(folder):
        owner = json.loads((folder / "owner.json").read_text())
        assert owner["process"].startswith(f"{os.getpid()}@")
    assert not (folder / "owner.json").exists()


def test_another_process_of_the_same_number_is_no_owner(folder):
    _owned(folder, host=Lease(folder)._me["host"], process=f"{os.getppid()}@1")
    with Lease(folder):
        pass


def test_of_another_host_one_that_renews_is_refused(folder, monkeypatch):
    monkeypatch.setattr(lease, "_RENEWED_EVERY", 0.2)
    _owned(folder, host="elsewhere", process="7@7")
    with Lease(folder):  # it gives no sign
        pass
    other = Lease(folder)
    other._me = {"host": "elsewhere", "process": "7@7"}
    with other, pytest.raises(ValueError, match="alive: process 7@7 on elsewhere"):
        Lease(folder).__enter__()


def test_damage_is_no_owner(folder):
    (folder / "owner.json").write_text('{"host"')
    with Lease(folder):
        pass


@has_proc
def test_a_container_with_the_same_name_has_processes_of_its_own(folder, monkeypatch):
    """Number 7 there is none of ours, so that only its signs tell that it lives."""
    monkeypatch.setattr(lease, "_RENEWED_EVERY", 0.2)
    mine = Lease(folder)._me
    assert "pid:[" in mine["processes"]
    other = Lease(folder)
    other._me = mine | {"process": "7@7", "processes": "another pid:[1]"}
    with other, pytest.raises(ValueError, match="alive: process 7@7 on"):
        Lease(folder).__enter__()
    # Nor is one there with our number us, or gone at once.
    _owned(folder, **mine | {"processes": "another pid:[1]", "time": time.time()})
    assert not Lease(folder)._is_mine(Lease(folder)._read())
    with Lease(folder):
        pass


def test_two_runs_of_one_process_do_not_share_a_folder(folder):
    with Lease(folder):
        for same in (folder, folder / ".." / folder.name):
            with pytest.raises(ValueError, match=f"alive: process {os.getpid()}@"):
                Lease(same).__enter__()
    with Lease(folder):  # nor keeps it one that has ended
        pass


@has_proc
def test_a_reboot_ended_the_owner_at_once(folder):
    gone = {"process": "7@7", "processes": "an earlier boot pid:[1]"}
    _owned(folder, host=Lease(folder)._me["host"], **gone)
    begin = time.monotonic()
    with Lease(folder):
        pass
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("owner", ['{"a": 1}', "[]", '{"host": "x", "process": 7'])
def test_what_another_program_wrote_is_no_owner(folder, owner):
    (folder / "owner.json").write_text(owner)
    with Lease(folder):
        pass
    _owned(folder, host=Lease(folder)._me["host"], process="abc")
    with Lease(folder):
        pass

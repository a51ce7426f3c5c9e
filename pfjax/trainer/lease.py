"""One run per folder: two that write into one would each lose what the other wrote."""

import contextlib
import json
import os
import pathlib
import socket
import sys
import threading
import time
from typing import Any

from etils import epath

from pfjax.infra import storage

# Seconds between two signs of life.
_RENEWED_EVERY = 20.0
_held: set[str] = set()  # folders whose owner is this process


class Lease(contextlib.AbstractContextManager):
    """`owner.json` in a folder: host, process and time, renewed while the process lives.

    One whose process is gone is taken over, also if a reboot ended it. Of another host, or of
    a container whose processes cannot be seen from here, that is known by the time, which then
    does not change.

    Raises:
      ValueError: on entering, if the owner lives.
    """

    def __init__(self, folder: epath.Path):
        self._path, self._is_over = folder / "owner.json", threading.Event()
        self._place = (
            os.path.realpath(folder) if not storage.is_remote(folder) else str(folder)
        )
        self._me = {"host": socket.gethostname(), "process": _name_of(os.getpid())}
        self._me["processes"] = _processes()

    def __enter__(self) -> "Lease":  # noqa: PYI034
        owner = self._read()
        if owner and self._is_alive(owner):
            raise ValueError(
                f"{self._path.parent} belongs to a run that is alive: process "
                f"{owner['process']} on {owner['host']}; stop it, or choose another "
                "--workdir"
            )
        _held.add(self._place)
        self._renew()
        threading.Thread(target=self._keep, daemon=True).start()
        return self

    def __exit__(self, *unused) -> None:
        self._is_over.set()
        _held.discard(self._place)
        if self._is_mine(self._read()):
            self._path.unlink(missing_ok=True)

    def _keep(self) -> None:
        while not self._is_over.wait(_RENEWED_EVERY):
            with contextlib.suppress(OSError):  # the next time, then
                self._renew()

    def _renew(self) -> None:
        storage.write_text(self._path, json.dumps(self._me | {"time": time.time()}))

    def _read(self) -> dict[str, Any] | None:
        try:
            owner = json.loads(storage.read_text(self._path))
            return {
                **owner,
                "process": str(owner["process"]),
                "host": str(owner["host"]),
            }
        # None, a write that was cut short, or another program's.
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _is_mine(self, owner: dict[str, Any] | None) -> bool:
        return bool(owner) and all(owner.get(k) == v for k, v in self._me.items())

    def _is_alive(self, owner: dict[str, Any]) -> bool:
        # An older pfjax did not say whose numbers they are.
        numbers = owner.get("processes", self._me["processes"])
        if (owner["host"], numbers) == (self._me["host"], self._me["processes"]):
            pid = owner["process"].partition("@")[0]
            if pid == str(os.getpid()):
                return self._place in _held
            return pid.isdigit() and owner["process"] == _name_of(int(pid))
        # On a host of the same name that is another one, it would have renewed since.
        if owner["host"] == self._me["host"] and owner.get("time", 0.0) < _booted():
            return False
        print(
            f"{self._path.parent} belongs to process {owner['process']} on {owner['host']}: "
            f"waiting {2.5 * _RENEWED_EVERY:.0f} s for a sign that it is alive",
            file=sys.stderr,
        )
        # Clocks of hosts differ: it lives if it renews.
        end = time.monotonic() + 2.5 * _RENEWED_EVERY
        while time.monotonic() < end:
            time.sleep(0.1)
            if self._read() != owner:
                return self._read() is not None
        return False


def _processes() -> str:
    """Where numbers of processes mean the same: a boot of a machine, or a container in it."""
    try:
        boot = (
            pathlib.Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip()
        )
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return ""


def _booted() -> float:
    """When this machine began, in seconds since 1970; 0 if it does not say."""
    try:
        lines = pathlib.Path("/proc/stat").read_text("utf-8").splitlines()
    except OSError:  # not Linux
        return 0.0
    return next((float(x.split()[1]) for x in lines if x.startswith("btime")), 0.0)


def _name_of(pid: int) -> str:
    """The process of that number, told from a later one by when it began."""
    try:
        fields = (
            pathlib.Path(f"/proc/{pid}/stat")
            .read_text("utf-8")
            .rpartition(")")[2]
            .split()
        )
        return f"{pid}@{fields[19]}"
    except OSError:  # gone, or not Linux
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, 0)
            return f"{pid}@"
        return "gone"

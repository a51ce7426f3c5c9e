"""Processes of one run meet before JAX connects them, so that who is missing can be said.

JAX's service ends a process that waits in vain by a crash: with stacks of C++, but without
which host, port or process it was. So the first process listens at the port that JAX
will have, and lets everyone go on once all have called.
"""

import os
import re
import select
import socket
import time
from typing import NamedTuple

_PAUSE_SECONDS = 0.5  # between tries
_TRY_SECONDS = 5.0  # that a host has to answer a try
_GO = "go"
_REFUSED = "refused: "


class Place(NamedTuple):
    """Where the processes meet, how many they are, and which of them this is."""

    host: str
    port: int
    num_processes: int
    index: int

    @property
    def address(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[IPv6]:port`; ValueError if it is neither."""
    match = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^\[\]:]+)):(\d+)", address)
    port = int(match[3]) if match else 0
    if not match or not 0 < port < 2**16:
        raise ValueError(f"{address} has to be host:port, as in node1:8476")
    return match[1] or match[2], port


def meet(place: Place, seconds: float) -> None:
    """Returns once all processes have called it, after at most `seconds`.

    Raises:
      ValueError: that says what failed: the host is unknown, nothing listens there, the
        port is taken, or some processes have not come, and which.
    """
    if place.num_processes == 1:
        return
    until = time.monotonic() + seconds
    if place.index == 0:
        with _listen(place, until, seconds) as listener:
            _gather(listener, place, until, seconds)
    else:
        _call(place, until, seconds)


def _listen(place: Place, until: float, seconds: float) -> socket.socket:
    """A socket at the port, which the end of the run before may still hold."""
    bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS")
    host, port = parse_address(bind) if bind else ("", place.port)
    both = not host and socket.has_dualstack_ipv6()
    is_v6 = both or ":" in host
    while True:
        try:
            return socket.create_server(
                (host, port),
                family=socket.AF_INET6 if is_v6 else socket.AF_INET,
                backlog=min(place.num_processes, socket.SOMAXCONN),
                dualstack_ipv6=both,
            )
        except OSError as error:
            if time.monotonic() + _PAUSE_SECONDS > until:
                raise ValueError(
                    f"this is the first process, and cannot listen at port {port}: "
                    f"{os.strerror(error.errno)}, for {seconds:.0f} s. Does another run, or "
                    "another first process, use it?"
                ) from error
        time.sleep(_PAUSE_SECONDS)


def _gather(
    listener: socket.socket, place: Place, until: float, seconds: float
) -> None:
    """Waits for a call of each process, then lets all go on, or tells all who is missing."""
    come: dict[int, socket.socket] = {}
    strangers: list[socket.socket] = []  # have not said who they are
    try:
        while len(come) < place.num_processes - 1:
            if time.monotonic() > until:
                raise ValueError(_missing(come, place, seconds))
            wait = max(until - time.monotonic(), 0)
            everyone = [listener, *strangers, *come.values()]
            for ready in select.select(everyone, [], [], wait)[0]:
                if ready is listener:
                    strangers.append(listener.accept()[0])
                elif ready in strangers:
                    strangers.remove(ready)
                    _admit(ready, come, place)
                else:  # Those who wait say nothing: this one has ended.
                    index = next(i for i, x in come.items() if x is ready)
                    come.pop(index).close()
        for caller in come.values():
            _answer(caller, _GO)
        for caller in come.values():
            # It closes first, which leaves the port free for JAX.
            caller.settimeout(_TRY_SECONDS)
            _receive(caller)
    except ValueError as error:
        for caller in come.values():
            _answer(caller, f"{_REFUSED}{error}")
        raise
    finally:
        for caller in (*come.values(), *strangers):
            caller.close()


def _admit(caller: socket.socket, come: dict[int, socket.socket], place: Place) -> None:
    """Counts a process that has said who it is, or closes with the reason."""
    words = re.fullmatch(r"pfjax (\d+) of (\d+)\n", _receive(caller))
    if not words:  # a scanner of ports
        caller.close()
        return
    index, num_processes = int(words[1]), int(words[2])
    refused = ""
    if num_processes != place.num_processes:
        refused = (
            f"process {index} was started as one of {num_processes}, "
            f"the first as one of {place.num_processes}"
        )
    elif index in come:
        refused = f"two processes were started as number {index}"
    if refused:
        _answer(caller, f"{_REFUSED}{refused}")
        caller.close()
    else:
        come[index] = caller


def _missing(come: dict[int, socket.socket], place: Place, seconds: float) -> str:
    missing = sorted(set(range(1, place.num_processes)) - set(come))
    named = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
    return (
        f"{len(missing)} of {place.num_processes} processes did not come to "
        f"{place.address} in {seconds:.0f} s: number {named} (from 0)"
    )


def _call(place: Place, until: float, seconds: float) -> None:
    """Calls the first process until it lets this one go on."""
    while True:
        try:
            problem = _call_once(place, until)
        except socket.gaierror as error:
            problem = f"the host {place.host} is unknown ({error.strerror})"
        except ConnectionRefusedError:
            problem = "nothing listens there (closed port); is process 0 up?"
        except TimeoutError:
            problem = "it does not answer; is the port open between the hosts?"
        except OSError as error:
            problem = error.strerror or str(error)
        if not problem:
            return
        if time.monotonic() + _PAUSE_SECONDS > until:
            raise ValueError(
                f"the first process was not reached at {place.address} in {seconds:.0f} s: "
                f"{problem}"
            )
        time.sleep(_PAUSE_SECONDS)


def _call_once(place: Place, until: float) -> str:
    """Nothing if this process may go on, else why another try may help.

    Raises ValueError where none does."""
    wait = min(_TRY_SECONDS, max(until - time.monotonic(), 0.1))
    with socket.create_connection((place.host, place.port), timeout=wait) as caller:
        _answer(caller, f"pfjax {place.index} of {place.num_processes}\n")
        # A little longer than the first process waits, which knows who is missing.
        caller.settimeout(max(until - time.monotonic(), 0.1) + _PAUSE_SECONDS)
        try:
            answer = _receive(caller)
        except TimeoutError:
            return (
                "it lets no one go on; have others not come, or is it another program?"
            )
    if answer.startswith(_REFUSED):
        raise ValueError(answer.removeprefix(_REFUSED))
    if answer and answer != _GO:
        return "another program listens there; has the run before not ended?"
    return "" if answer else "it ended before all had come"


def _answer(peer: socket.socket, text: str) -> None:
    """Sends a text to a process, which may have ended."""
    try:
        peer.sendall(text.encode())
    except OSError:
        pass


def _receive(peer: socket.socket) -> str:
    """What a process sends, which is one short text; nothing if it has ended."""
    try:
        return peer.recv(1024).decode(errors="replace")
    except TimeoutError:
        raise
    except OSError:
        return ""

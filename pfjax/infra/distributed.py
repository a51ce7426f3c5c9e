"""Runs of several processes: how they find each other, and how they agree."""

import os
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

JOIN_SECONDS = 300  # that a process waits for the others at the start
HEARTBEAT_SECONDS = 60  # of silence, after which a process is dead and the others end
# Where JAX cannot find out by itself, as it can on TPU pods and under Slurm.
VARIABLES = ("PFJAX_COORDINATOR", "PFJAX_NUM_PROCESSES", "PFJAX_PROCESS_ID")


def join() -> None:
    """Joins the other processes of this run, before anything asks JAX for devices.

    On TPU pods and under Slurm JAX finds them; elsewhere the environment says where the
    first process listens (`PFJAX_COORDINATOR=host:port`), how many there are
    (`PFJAX_NUM_PROCESSES`), and which this is (`PFJAX_PROCESS_ID`, from 0). One that
    finds no others in `JOIN_SECONDS`, or `PFJAX_JOIN_SECONDS`, is ended.

    Raises:
      ValueError: if it is not known where they are.
    """
    seconds = int(os.environ.get("PFJAX_JOIN_SECONDS", JOIN_SECONDS))
    given = {name: os.environ.get(name) for name in VARIABLES}
    address, num, index = given.values()
    where = {}
    if any(given.values()):
        if not (address and num and num.isdigit() and index and index.isdigit()):
            names = ", ".join(f"{n}={x}" for n, x in given.items())
            raise ValueError(f"--multihost: all of these have to be set: {names}")
        where = {
            "coordinator_address": address,
            "num_processes": int(num),
            "process_id": int(index),
        }
    # JAX ends the process itself when time is up, with no word of what to do.
    print(
        f"--multihost: joining the other processes{f' at {address}' if address else ''}, "
        f"for at most {seconds} s. Each has to be started by then, with the same arguments",
        file=sys.stderr,
        flush=True,
    )
    try:
        jax.distributed.initialize(
            **where,
            initialization_timeout=seconds,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"--multihost: could not join the other processes: {error}\n"
            f"Outside of TPU pods and Slurm set {', '.join(VARIABLES)}"
        ) from error


def check_alone() -> None:
    """Raises ValueError on one worker of a TPU pod, which would wait without a word."""
    workers = [x for x in os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if x]
    if len(workers) > 1:
        raise ValueError(
            f"this is one of {len(workers)} workers of a TPU pod: start all of them with "
            "--multihost (bash launch/tpu.sh run does)"
        )


def is_first() -> bool:
    """Whether this process writes what only one may write."""
    return jax.process_index() == 0


def any_of(flags: tuple[bool, ...]) -> tuple[bool, ...]:
    """Each flag, true if it is on any process. All processes have to call it."""
    everyone = multihost_utils.process_allgather(np.array(flags))
    return tuple(everyone.any(axis=0).tolist())


def text_from_first(text: str) -> str:
    """The first process's `text`, of at most 64 bytes, on all of them. All have to call it."""
    padded = np.frombuffer(text.encode().ljust(64, b"\0"), np.uint8)
    return from_first(padded).astype(np.uint8).tobytes().rstrip(b"\0").decode()


def leave() -> None:
    """Ends what `join` began: processes may then end at different times."""
    if jax.process_count() > 1:
        jax.distributed.shutdown()


def from_first(x: np.ndarray) -> np.ndarray:
    """The first process's `x`, on all of them. All processes have to call it."""
    return np.asarray(multihost_utils.broadcast_one_to_all(x))

"""Runs of several processes: how they find each other, and how they agree."""

import functools
import os
import re
import sys
import time
from collections.abc import Callable
from typing import NoReturn

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pfjax.infra import rendezvous

JOIN_SECONDS = 300  # that a process waits for the others at the start
HEARTBEAT_SECONDS = 60  # of silence, after which a process is dead and the others end
# A run that ends because another process of it is gone ends with this status (EX_PROTOCOL of
# sysexits.h) or by a signal; to the launch scripts 1 and 2 are mistakes.
LOST_STATUS = 76
# What XLA says of it. A lack of memory, or an argument that is none, is this process's own.
_LOST = re.compile(
    r"(ABORTED|CANCELLED|DATA_LOSS|DEADLINE_EXCEEDED|UNAVAILABLE|UNKNOWN): |.*\b(Gloo|NCCL) "
)
# Where JAX cannot find out by itself, as it can on TPU pods and under Slurm.
VARIABLES = ("PFJAX_COORDINATOR", "PFJAX_NUM_PROCESSES", "PFJAX_PROCESS_ID")


def join() -> None:
    """Joins the other processes of this run, before anything asks JAX for devices.

    On TPU pods and under Slurm JAX finds them; elsewhere the environment says where the
    first process listens (`PFJAX_COORDINATOR=host:port`), how many there are
    (`PFJAX_NUM_PROCESSES`), and which this is (`PFJAX_PROCESS_ID`, from 0). One that
    finds no others in `JOIN_SECONDS`, or `PFJAX_JOIN_SECONDS`, is ended.

    Raises:
      ValueError: if it is not known where they are, or some do not come.
    """
    seconds = os.environ.get("PFJAX_JOIN_SECONDS", str(JOIN_SECONDS))
    if not seconds.isdigit() or seconds == "0":
        raise ValueError(
            f"PFJAX_JOIN_SECONDS={seconds}: must be a whole number above 0"
        )
    until = time.monotonic() + int(seconds)
    _say(
        f"joining the other processes, for at most {seconds} s. Each has to be started "
        "by then, with the same arguments"
    )
    try:
        place = _given_place() or _detected_place(int(seconds))
        _say(
            f"process {place.index} of {place.num_processes}, first at {place.address}"
        )
        rendezvous.meet(place, max(until - time.monotonic(), 1))
        jax.distributed.initialize(
            coordinator_address=place.address,
            num_processes=place.num_processes,
            process_id=place.index,
            initialization_timeout=int(seconds),
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"--multihost: {error}") from error


def _say(text: str) -> None:
    print(f"--multihost: {text}", file=sys.stderr, flush=True)


def _given_place() -> rendezvous.Place | None:
    """Where the processes meet by the variables, if they are set."""
    given = {name: os.environ.get(name, "") for name in VARIABLES}
    if not any(given.values()):
        return None
    address, num, index = given.values()
    words = ", ".join(f"{name}={value}" for name, value in given.items())
    if not all(given.values()):
        raise ValueError(f"all of these have to be set: {words}")
    if not (num.isdigit() and index.isdigit() and int(index) < int(num)):
        raise ValueError(f"{words}: numbers from 0 up to below how many there are")
    try:
        return rendezvous.Place(
            *rendezvous.parse_address(address), int(num), int(index)
        )
    except ValueError as error:
        raise ValueError(f"PFJAX_COORDINATOR={error}") from None


def _detected_place(seconds: int) -> rendezvous.Place:
    """Where they meet by what JAX knows of TPU pods, Slurm and Open MPI."""
    # Its public functions do not say what they have found.
    from jax._src import clusters

    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    try:
        address, num, index, _ = detect(address, None, None, None, None, seconds)
    except (RuntimeError, OSError) as error:  # a pod, whose hosts have no names yet
        raise ValueError(f"the first process was not found: {error}") from error
    if address is None or num is None or index is None:
        raise ValueError(
            "found neither a TPU pod nor Slurm; elsewhere set " + ", ".join(VARIABLES)
        )
    return rendezvous.Place(*rendezvous.parse_address(address), num, index)


def check_alone() -> None:
    """Raises ValueError on one worker of a TPU pod, which would wait without a word."""
    num_workers = _num_pod_workers()
    if num_workers > 1:
        raise ValueError(
            f"this is one of {num_workers} workers of a TPU pod: start all of them with "
            "--multihost (bash launch/tpu.sh run does)"
        )


def _num_pod_workers() -> int:
    """Workers of the TPU pod that this process is on; 1 where it is on none."""
    from jax._src.clusters import cloud_tpu_cluster

    # Whoever has set it to one host means to use that host alone.
    if os.environ.get("TPU_PROCESS_BOUNDS") == "1,1,1":
        return 1
    # GKE sets one of them; on a TPU VM the metadata server says it.
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if workers := [x for x in os.environ.get(name, "").split(",") if x]:
            return len(workers)
    vm = cloud_tpu_cluster.GceTpuCluster
    return vm.get_process_count() if vm.is_env_present() else 1


def is_loss(error: Exception) -> bool:
    """Whether an error of JAX says that another process of this run is gone."""
    return jax.distributed.is_initialized() and bool(_LOST.match(str(error)))


def end_lost(error: Exception) -> NoReturn:
    """Ends this process with one line, since another of its run is gone."""
    print(f"error: another process of this run is gone: {error}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # In order, JAX would wait for the one that is gone, and then crash.
    os._exit(LOST_STATUS)


def is_first() -> bool:
    """Whether this process writes what only one may write."""
    return jax.process_index() == 0


def any_of(flags: tuple[bool, ...]) -> tuple[bool, ...]:
    """Each flag, true if it is on any process; see `of_all`."""
    return tuple(of_all(np.array(flags)).any(axis=0).tolist())


def of_all(x: np.ndarray) -> np.ndarray:
    """`x` of each process, `[processes, *x.shape]`. All of them have to call it.

    It runs on the devices of the current mesh, or on all without one: others may be drawing,
    and the processes have to start what a device runs in one order.
    """
    if jax.process_count() == 1:
        return x[None]
    mesh = jax.sharding.get_mesh()
    devices = jax.devices() if mesh.empty else mesh.devices.flat
    devices = sorted(devices, key=lambda d: (d.process_index, d.id))
    own = [d for d in devices if d.process_index == jax.process_index()]
    grid = np.array(devices).reshape(-1, len(own))
    mesh = Mesh(grid, ("process", "device"), (AxisType.Auto,) * 2)
    where = NamedSharding(mesh, PartitionSpec("process"))
    make, parts = jax.make_array_from_single_device_arrays, [x[None]] * len(own)
    with jax.set_mesh(mesh):
        x = make((len(grid), *x.shape), where, jax.device_put(parts, own))
        return np.asarray(_replicated(mesh)(x))


@functools.cache
def _replicated(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))


def from_first(x: np.ndarray) -> np.ndarray:
    """The first process's `x`, on all of them. All processes have to call it."""
    return of_all(np.asarray(x))[0]


def text_from_first(text: str) -> str:
    """The first process's `text`, of at most 64 bytes, on all of them. All have to call it."""
    padded = np.frombuffer(text.encode().ljust(64, b"\0"), np.uint8)
    return from_first(padded).astype(np.uint8).tobytes().rstrip(b"\0").decode()


def leave() -> None:
    """Ends what `join` began: processes may then end at different times."""
    if jax.process_count() > 1:
        jax.distributed.shutdown()

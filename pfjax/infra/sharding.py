"""The device mesh, and the one table from logical axes to mesh axes."""

import collections
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from pfjax.infra import numerics

AnyMesh = Mesh | AbstractMesh
MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")

# Logical axis of a parameter or an activation -> mesh axes it is split over.
RULES: dict[str | None, tuple[str, ...]] = {
    None: (),
    "batch": ("data", "fsdp", "expert"),
    "tokens": ("context",),  # of a packed row
    "layers": (),
    "embed": ("fsdp", "expert", "context"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "experts": ("expert", "tensor"),
    # The head's vocabulary takes every device that holds weights: then no chunk
    # of the log-prob scan gathers it. Measured in AOT compiles for TPU v5e.
    "vocab": ("fsdp", "expert", "context", "tensor"),
}


def make_mesh(
    data: int = 0,
    fsdp: int = -1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
    context: int = 1,
    rollout: int = 0,
    expert: int = 1,
) -> Mesh:
    """A mesh of `MESH_AXES` over all devices but those that `split_off` sets apart, which
    draw responses and nothing else; see `mesh_sizes`.

    Where a multiple of the nodes holds whole copies of the weights, a copy lies within
    one node: what it is split over stays on fast links.

    Raises:
      ValueError: if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if rollout:
        devices, _ = split_off(devices, rollout)
    nodes = num_nodes(devices)
    sizes = mesh_sizes(data, fsdp, tensor, len(devices), nodes, context, expert)
    # Two of the four devices of a side, say, may be an axis.
    split = {"allow_split_physical_axes": True}
    if not _is_box(devices):
        grid = np.array(sorted(devices, key=_place)).reshape(sizes)
    elif nodes > 1 and sizes[0] % nodes == 0:
        inside = (sizes[0] // nodes, *sizes[1:])
        grid = mesh_utils.create_hybrid_device_mesh(
            inside, (nodes, *(1,) * len(inside[1:])), devices, **split
        )
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, **split)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _place(device: jax.Device) -> tuple[int, int]:
    return getattr(device, "slice_index", 0), device.process_index


def _is_box(devices: Sequence[jax.Device]) -> bool:
    """Whether TPUs of each slice fill a box, as JAX asks where it orders them by their
    links: not where others draw. Of other devices it asks nothing."""
    if devices[0].platform != "tpu":
        return True
    of_slice = collections.defaultdict(list)
    for device in devices:
        of_slice[_place(device)[0]].append((*device.coords, device.core_on_chip))
    return all(
        len(x) == np.prod(np.ptp(x, axis=0) + 1)
        for x in map(np.array, of_slice.values())
    )


def num_learning(devices: int, rollout: int, processes: int) -> int:
    """Counts the devices that learn beside those for rollouts.

    Raises:
      ValueError: if there are none, or the processes would not give equally many.
    """
    if rollout >= devices:
        raise ValueError(
            f"--config.mesh.rollout={rollout} leaves none of {devices} devices to learn"
        )
    if rollout % processes or devices % processes:
        raise ValueError(
            f"--config.mesh.rollout={rollout}: each of the {processes} processes that have the "
            f"{devices} devices sets equally many apart: give a multiple of {processes}"
        )
    return devices - rollout


def split_off(
    devices: Sequence[jax.Device], rollout: int
) -> tuple[list[jax.Device], list[jax.Device]]:
    """Devices that learn and the `rollout` others, equally many of each process, so that
    weights need not leave a machine to be drawn by. Raises what `num_learning` does.

    They are the last of each process. Of TPUs they are those in the middle of their slice:
    libtpu compiles no collectives for some sets of devices with regular gaps.
    """
    of_process = collections.defaultdict(list)
    for device in sorted(devices, key=_from_the_middle(devices)):
        of_process[device.process_index].append(device)
    num_learning(len(devices), rollout, len(of_process))
    each = rollout // len(of_process)
    apart = {d.id for own in of_process.values() for d in own[:each]}
    learn = [d for d in devices if d.id not in apart]
    return learn, [d for d in devices if d.id in apart]


def _from_the_middle(
    devices: Sequence[jax.Device],
) -> Callable[[jax.Device], tuple[float, int]]:
    """Squared distance of TPUs to the middle of their slice, 0 of others; then the last."""
    if devices[0].platform != "tpu":
        return lambda d: (0.0, -d.id)
    of_slice = collections.defaultdict(list)
    for device in devices:
        of_slice[_place(device)[0]].append(device.coords)
    middle = {i: (np.min(x, 0) + np.max(x, 0)) / 2 for i, x in of_slice.items()}
    far = lambda d: float(np.square(d.coords - middle[_place(d)[0]]).sum())
    return lambda d: (far(d), -d.id)


def rollout_mesh(
    rollout: int, tensor: int, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The mesh of the devices that `make_mesh` has left out."""
    _, apart = split_off(jax.devices() if devices is None else devices, rollout)
    return make_mesh(data=1, tensor=tensor, devices=apart)


def regrouped(mesh: AnyMesh, tensor: int) -> AnyMesh:
    """A mesh of the same devices in the same order, of which `tensor` share each matrix
    and none a row or a layer's experts: for rollouts, which keep weights whole otherwise.
    0 means as many as before.

    Raises:
      ValueError: if it does not divide the devices of a copy of the weights.
    """
    before = axis_sizes(mesh)
    data, *inside = before.values()
    tensor, inside = tensor or before["tensor"], math.prod(inside)
    if inside % tensor:
        raise ValueError(
            f"--config.rollout_tensor={tensor} does not divide the {inside} devices of a "
            "copy of the weights (mesh.fsdp * mesh.expert * mesh.context * mesh.tensor)"
        )
    sizes = (data, inside // tensor, 1, 1, tensor)
    if sizes == tuple(mesh.shape.values()):
        return mesh
    if isinstance(mesh, AbstractMesh):
        return mesh.update(axis_sizes=sizes)
    return Mesh(mesh.devices.reshape(sizes), MESH_AXES, axis_types=mesh.axis_types)


def current_mesh() -> Mesh:
    """The mesh of `jax.set_mesh`, for a function that runs programs of its own.

    Raises:
      ValueError: inside a program, where none can be run.
    """
    try:
        return jax.sharding.get_mesh()
    except ValueError as error:
        raise ValueError(
            "called inside jax.jit: sampling and scoring run programs of their own and return "
            "host arrays, so call them outside; pfjax.log_probs may be jitted"
        ) from error


def for_rollouts(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f` run with the current mesh `regrouped`, where it has devices that share rows or a
    layer's experts: a token that is drawn has no row to share, and every part of the batch
    takes as many steps as it needs. And with `numerics.as_promised`."""

    @functools.wraps(f)
    def run(*args, **kwargs):
        with numerics.as_promised():
            mesh = current_mesh()
            if mesh.empty or (regrouped_mesh := regrouped(mesh, 0)) is mesh:
                return f(*args, **kwargs)
            with jax.set_mesh(regrouped_mesh):
                return f(*args, **kwargs)

    return run


def num_nodes(devices: Sequence[jax.Device]) -> int:
    """Counts groups of devices with fast links inside and slow ones between: slices of
    TPUs, hosts of GPUs or their NVLink domains. One if these differ in size."""
    is_cpu = lambda device: device.platform == "cpu"
    sizes = collections.Counter(
        0 if is_cpu(device) else getattr(device, "slice_index", 0) for device in devices
    )
    return len(sizes) if len({*sizes.values()}) == 1 else 1


def mesh_sizes(
    data: int,
    fsdp: int,
    tensor: int,
    devices: int,
    nodes: int = 1,
    context: int = 1,
    expert: int = 1,
) -> tuple[int, ...]:
    """Resolves the sizes of the axes, in the order of `MESH_AXES`: one may be -1, which
    takes what is left; `data=0` is one copy of the weights per node, or what is left if
    all others are given.

    Raises:
      ValueError: if they do not multiply to the number of devices.
    """
    sizes = dict(zip(MESH_AXES, (data, fsdp, expert, context, tensor), strict=True))
    if data == 0:
        of_copy = (fsdp, expert, context, tensor)
        inside = math.prod(size for size in of_copy if size != -1)
        is_open, fits = -1 in of_copy, devices % (nodes * max(inside, 1)) == 0
        sizes["data"] = -1 if not is_open else nodes if fits else 1
    free = [name for name, size in sizes.items() if size == -1]
    given = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or given < 1 or devices % given or (not free and given != devices):
        flags = " ".join(f"--config.mesh.{k}={v}" for k, v in sizes.items())
        raise ValueError(
            f"a mesh of {flags} does not cover the {devices} devices here: the sizes "
            "must multiply to that number (one of them may be -1)"
        )
    sizes |= {name: devices // given for name in free}
    return tuple(sizes.values())


def axis_sizes(mesh: AnyMesh) -> Mapping[str, int]:
    """Devices along each axis of a mesh of `make_mesh`; 1 where a caller splits by hand."""
    if set(MESH_AXES) <= set(mesh.shape):
        return mesh.shape
    if set(mesh.shape) <= set(mesh.manual_axes):  # its own `shard_map` or `pmap`
        return dict.fromkeys(MESH_AXES, 1)
    raise ValueError(
        f"the mesh has the axes {', '.join(mesh.shape)} and needs {', '.join(MESH_AXES)}: "
        "make it by pfjax.infra.sharding.make_mesh(devices=...)"
    )


def spec(
    mesh: AnyMesh,
    axes: tuple[str | None, ...],
    shape: tuple[int, ...],
    only: tuple[str, ...] = MESH_AXES,
) -> PartitionSpec:
    """The partition of an array whose dimensions have these logical axes, over the mesh
    axes of `only`.

    Key/value heads too few to split are replicated; so is an axis whose mesh axes an
    earlier dimension took, or `shard_map.over_batch` did.

    Raises:
      ValueError: if another dimension does not divide by its mesh axes, or the mesh lacks
        one of `MESH_AXES`.
    """
    sizes = axis_sizes(mesh)
    free, parts = set(only) - set(mesh.manual_axes), []
    for axis, size in zip(axes, shape, strict=True):
        names = tuple(n for n in RULES[axis] if n in free and sizes[n] > 1)
        ways = math.prod(sizes[n] for n in names)
        if size % ways and axis == "kv_heads":
            names = ()
        elif size % ways:
            flags = ", ".join(f"--config.mesh.{n}={sizes[n]}" for n in names)
            raise ValueError(
                f"{axis} of size {size} does not divide over {ways} devices ({flags}); "
                f"choose mesh sizes whose product divides {size}"
            )
        free.difference_update(names)
        parts.append(names)
    return PartitionSpec(*parts)


def tree_shardings(
    mesh: AnyMesh, axes: Any, shapes: Any, only: tuple[str, ...] = MESH_AXES
) -> Any:
    """Shardings of a tree of parameters from their logical axes and shapes."""
    return jax.tree.map(
        lambda x, a: NamedSharding(mesh, spec(mesh, a, x.shape, only)), shapes, axes
    )


def rollout_shardings(mesh: AnyMesh, axes: Any, shapes: Any) -> Any:
    """The same for rollouts, which read all weights for every token: every part of the
    batch has them whole, split over "tensor" alone."""
    return tree_shardings(mesh, axes, shapes, only=("tensor",))


def describe(sizes: Mapping[str, int]) -> str:
    """A mesh as `data 1 x fsdp 8 x tensor 1`; the other axes where they have devices."""
    is_shown = lambda axis: axis not in ("expert", "context") or sizes[axis] > 1
    shown = {k: v for k, v in sizes.items() if is_shown(k)}
    return " x ".join(f"{k} {v}" for k, v in shown.items())


def part_bytes(tree: Any) -> int:
    """Bytes of the part of a tree of shapes that one device holds."""
    part = lambda x: x.sharding.shard_shape(x.shape) if x.sharding else x.shape
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(part(x)) * np.dtype(x.dtype).itemsize for x in leaves)


def replicated(mesh: AnyMesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_ways(mesh: AnyMesh) -> int:
    """Number of devices that a batch is split over."""
    return math.prod(axis_sizes(mesh)[axis] for axis in RULES["batch"])


def put_batch(mesh: Mesh, tree: Any, dim: int = 0) -> Any:
    """Places host arrays on the mesh, dimension `dim` split as "batch".

    Every process passes the same whole arrays and keeps its own part. That they are the
    same is not looked at: it would take all devices, of which some may be drawing.
    """

    def put(x: np.ndarray) -> jax.Array:
        where = of_batch(mesh, x.shape, dim)
        if jax.process_count() == 1:
            return jax.device_put(x, where)
        return jax.make_array_from_callback(x.shape, where, lambda part: x[part])

    return jax.tree.map(put, tree)


def copied(x: jax.Array, where: NamedSharding) -> jax.Array:
    """`x` on other devices, each part from a device of the same process that has it: without
    the host, and without the other processes."""
    have = collections.defaultdict(collections.deque)
    for part in x.addressable_shards:
        have[str(part.index)].append(part.data)
    wanted = where.addressable_devices_indices_map(x.shape)
    parts = []
    for index in wanted.values():  # from each in turn
        parts.append(have[str(index)][0])
        have[str(index)].rotate(-1)
    parts = jax.device_put(parts, list(wanted))
    return jax.make_array_from_single_device_arrays(x.shape, where, parts)


def of_batch(mesh: AnyMesh, shape: tuple[int, ...], dim: int) -> Any:
    """The sharding of an array whose dimension `dim` is split as "batch"."""
    axes = ("batch" if i == dim else None for i in range(len(shape)))
    return NamedSharding(mesh, spec(mesh, tuple(axes), shape))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Asks for an activation's sharding; does nothing outside `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(mesh, axes, x.shape))


def axes_of(axis: str) -> tuple[str, ...]:
    """Mesh axes of more than one device that a logical axis is split over, but for those
    that are split by hand already."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return ()
    sizes = axis_sizes(mesh)
    is_split = lambda n: sizes[n] > 1 and n not in mesh.manual_axes
    return tuple(n for n in RULES[axis] if is_split(n))


def platform() -> tuple[str, str]:
    """Platform ("cpu", "gpu" or "tpu") and kind of the devices a program is for.

    Those of the mesh where one is set: it may be of devices that are not here.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and (device := mesh.abstract_device) is not None:
        return kind_of(device)
    return kind_of(jax.devices()[0])


def kind_of(device: Any) -> tuple[str, str]:
    """Platform and kind of a device, of this machine or of a mesh."""
    return device.platform, device.device_kind


def fetch(tree: Any) -> Any:
    """Whole host arrays of device arrays, on every process."""
    return multihost_utils.process_allgather(tree, tiled=True)

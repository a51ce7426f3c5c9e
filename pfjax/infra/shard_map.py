"""Functions run by each part of the mesh on what it holds, by `jax.shard_map`."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

from pfjax.infra import sharding


def over_batch(f: Callable[..., Any], num_whole: int) -> Callable[..., Any]:
    """`f` run by each part of the mesh that holds a part of the batch, on its own.

    The first `num_whole` arguments are passed whole; the others and the results are
    split along the first dimension of every array. Nothing is exchanged between the
    parts, so each may loop as often as it needs to; "tensor" is still split
    automatically. Outside `jax.set_mesh`, `f` itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or sharding.batch_ways(mesh) == 1:
        return f
    whole, split = PartitionSpec(), PartitionSpec(sharding.RULES["batch"])
    # With "tensor" too when it is one device: kernels need every axis by hand.
    names = set(sharding.RULES["batch"]) | {a for a, n in mesh.shape.items() if n == 1}

    def parts(*args):
        specs = (whole,) * num_whole + (split,) * (len(args) - num_whole)
        return jax.shard_map(
            f, in_specs=specs, out_specs=split, axis_names=names, check_vma=False
        )(*args)

    return parts


def by_copy(f: Callable[..., Any], dim: int) -> Callable[..., Any]:
    """`f(whole, split) -> total, split` run by each copy of the weights ("data") on its
    part of the batch; the other axes are still split automatically.

    Arrays of `split` are split along dimension `dim`. What the copies have for `total` is
    added up once, at the end: a sum over the micro-batches of a loop in `f` costs one
    exchange between copies, which may be on different nodes. Outside `jax.set_mesh`, of one
    copy, and of copies split along two axes, `f` itself, of which XLA splits "data" too.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not has_copies(sharding.axis_sizes(mesh)):
        return f
    whole, split = PartitionSpec(), PartitionSpec(*[None] * dim, "data")
    # Kernels need every axis by hand.
    names = {"data"} | {a for a, n in mesh.shape.items() if n == 1}

    def of_copy(*args):
        total, parts = f(*args)
        return jax.lax.psum(total, "data"), parts

    def copies(shared, batch):
        of_batch = jax.tree.map(lambda x: split if x.ndim > dim else whole, batch)
        return jax.shard_map(
            of_copy,
            in_specs=(whole, of_batch),
            out_specs=(whole, split),
            axis_names=names,
            check_vma=False,
        )(shared, batch)

    return copies


def has_copies(sizes: Mapping[str, int]) -> bool:
    """Whether a mesh of these sizes holds copies of the weights that `by_copy` separates."""
    # Of copies split along two axes XLA's partitioner aborts, at the embedding (jax 0.10.2).
    inside = [n for axis, n in sizes.items() if axis != "data" and n > 1]
    return sizes["data"] > 1 and len(inside) < 2


def by_device(f: Callable[..., Any], in_axes: Any, out_axes: Any) -> Callable[..., Any]:
    """`f` run on each device's part of its arguments: for kernels, which jit cannot
    split, and where the exchange between devices is written by hand.

    Outside `jax.set_mesh`, and where one device holds everything, `f` itself.

    Args:
      in_axes: logical axes of each argument.
      out_axes: of the results, a tree of tuples; each logical axis is split as it is
        in the arguments.
    """
    mesh = jax.sharding.get_abstract_mesh()
    names = set(mesh.shape) - set(mesh.manual_axes)
    if mesh.empty or mesh.size == 1 or not names:
        return f
    is_axes = lambda x: type(x) is tuple and set(x) <= set(sharding.RULES)

    def parts(*args):
        pairs = zip(in_axes, args, strict=True)
        specs = tuple(sharding.spec(mesh, axes, x.shape) for axes, x in pairs)
        split = {None: None}
        for axes, of_axes in zip(in_axes, specs, strict=True):
            split |= dict(zip(axes, of_axes, strict=True))
        place = lambda axes: PartitionSpec(*(split[a] for a in axes))
        out_specs = jax.tree.map(place, out_axes, is_leaf=is_axes)
        return jax.shard_map(
            f, in_specs=specs, out_specs=out_specs, axis_names=names, check_vma=False
        )(*args)

    return parts

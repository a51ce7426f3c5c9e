"""Fewer slots, and wider caches, in the course of a rollout."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pfjax.infra import shard_map
from pfjax.model import delta
from pfjax.model.layers import KeyValue
from pfjax.sampler.buffers import Cache, Prompts, Settings, Slots, placed
from pfjax.targets import Array


class Sizes(NamedTuple):
    slots: int
    width: int  # tokens kept of each
    samples_per_prefix: int  # width of the grid


def resize(
    prompts: Prompts,
    slots: Slots,
    cache: Cache,
    *,
    s: Settings,
    before: Sizes,
    after: Sizes,
) -> tuple[Prompts, Slots, Cache]:
    """Other numbers of slots, of tokens per slot, and width of the grid.

    With fewer slots the busy ones, which must fit, move together. Slots may become fewer,
    and the grid narrower (with a width of 1 each slot has a prompt of its own), only after
    the last sample of the queue has begun.
    """
    widths = s.plan.response_widths(after.width)
    if after.slots < before.slots:
        sizes = {"before": before, "after": after, "widths": widths}
        return _fewer(prompts, slots, cache, s=s, **sizes)
    # A cache that holds its layer's window stays where it is, and takes no memory twice.
    pairs = zip(widths, s.plan.response_widths(before.width), strict=True)
    changed = [i for i, (new, old) in enumerate(pairs) if new != old]
    of_changed = tuple(widths[i] for i in changed)
    fitted = _fitted([cache[i] for i in changed], s=s, widths=of_changed)
    by_layer = dict(zip(changed, fitted, strict=True))
    return prompts, slots, [by_layer.get(i, x) for i, x in enumerate(cache)]


@functools.partial(jax.jit, static_argnames=("s", "widths"))
def _fitted(cache: Cache, *, s: Settings, widths: tuple[int, ...]) -> Cache:
    local = lambda cache: placed(_fit(s, cache, widths))
    return shard_map.over_batch(local, 0)(cache)


def _fit(s: Settings, cache: Cache, widths: tuple[int, ...]) -> Cache:
    """Caches cut or padded to a number of tokens each."""

    def fit(x: Array, width: int, axis: int) -> Array:
        x = lax.slice_in_dim(x, 0, min(width, x.shape[axis]), axis=axis)
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, width - x.shape[axis])
        return jnp.pad(x, padding)

    def of_layer(x: KeyValue | delta.State, width: int) -> KeyValue | delta.State:
        if isinstance(x, delta.State):
            return x
        return fit(x[0], width, key_axis), fit(x[1], width, 2)

    key_axis = 3 if s.plan.backend == "xla" else 2
    return [of_layer(*x) for x in zip(cache, widths, strict=True)]


@functools.partial(jax.jit, static_argnames=("s", "before", "after", "widths"))
def _fewer(
    prompts: Prompts,
    slots: Slots,
    cache: Cache,
    *,
    s: Settings,
    before: Sizes,
    after: Sizes,
    widths: tuple[int, ...],
) -> tuple[Prompts, Slots, Cache]:
    def local(prompts, slots, cache):
        idle_last = jnp.argsort(slots.sample, stable=True)
        order = idle_last[: after.slots]
        names = ("sample", "grid_index", "drawn", "last")
        slots = slots._replace(**{x: getattr(slots, x)[order] for x in names})
        cache = _fit(s, jax.tree.map(lambda x: x[order], cache), widths)
        prefix_slot = slots.grid_index // before.samples_per_prefix
        prefix_slot = jnp.minimum(prefix_slot, len(prompts.length) - 1)
        if after.samples_per_prefix == 1:
            prompts = jax.tree.map(lambda x: x[prefix_slot], prompts)
            slots = slots._replace(grid_index=jnp.arange(after.slots, dtype=jnp.int32))
        elif after.samples_per_prefix < before.samples_per_prefix:
            earlier = jnp.tri(after.slots, k=-1, dtype=bool)
            rank = (earlier & (prefix_slot[:, None] == prefix_slot[None])).sum(axis=1)
            grid_index = prefix_slot * after.samples_per_prefix + rank
            slots = slots._replace(grid_index=grid_index.astype(jnp.int32))
        prompts = prompts._replace(cache=placed(prompts.cache))
        return prompts, slots, placed(cache)

    return shard_map.over_batch(local, 0)(prompts, slots, cache)

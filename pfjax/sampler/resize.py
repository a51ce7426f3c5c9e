"""Fewer slots, and wider caches, in the course of a rollout."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pfjax.batch import Array
from pfjax.infra import sharding
from pfjax.sampler.decode import Cache, Prompts, Settings, Slots, placed


class Sizes(NamedTuple):
    slots: int
    width: int  # tokens kept of each
    samples_per_prefix: int  # width of the grid


@functools.partial(jax.jit, static_argnames=("s", "before", "after"))
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

    With fewer slots the busy ones, which must fit, move together. That, a narrower grid,
    or a prompt of its own for every slot (a width of 1), only after the last sample of the
    queue has begun.
    """

    def fit(x: Array, axis: int) -> Array:
        x = lax.slice_in_dim(x, 0, min(after.width, x.shape[axis]), axis=axis)
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, after.width - x.shape[axis])
        return jnp.pad(x, padding)

    is_fewer = after.slots < before.slots

    def local(prompts, slots, cache):
        if is_fewer:
            idle_last = jnp.argsort(slots.sample, stable=True)
            order = idle_last[: after.slots]
            names = ("sample", "grid_index", "drawn", "last")
            slots = slots._replace(**{x: getattr(slots, x)[order] for x in names})
            cache = jax.tree.map(lambda x: x[order], cache)
        key_axis = 3 if s.plan.backend == "xla" else 2
        cache = [(fit(k, key_axis), fit(v, 2)) for k, v in cache]
        prefix_slot = slots.grid_index // before.samples_per_prefix
        prefix_slot = jnp.minimum(prefix_slot, len(prompts.length) - 1)
        if is_fewer and after.samples_per_prefix == 1:
            prompts = jax.tree.map(lambda x: x[prefix_slot], prompts)
            slots = slots._replace(grid_index=jnp.arange(after.slots, dtype=jnp.int32))
        elif after.samples_per_prefix < before.samples_per_prefix:
            earlier = jnp.tri(after.slots, k=-1, dtype=bool)
            rank = (earlier & (prefix_slot[:, None] == prefix_slot[None])).sum(axis=1)
            grid_index = prefix_slot * after.samples_per_prefix + rank
            slots = slots._replace(grid_index=grid_index.astype(jnp.int32))
        prompts = prompts._replace(cache=placed(prompts.cache))
        return prompts, slots, placed(cache)

    return sharding.over_batch(local, 0)(prompts, slots, cache)

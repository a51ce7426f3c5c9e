"""Fewer slots, and wider caches, in the course of a rollout."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pfjax.batch import Array
from pfjax.infra import sharding
from pfjax.sampler.decode import Cache, Prompts, Settings, Slots, placed


@functools.partial(
    jax.jit,
    static_argnames=(
        "s",
        "to_slots",
        "width",
        "samples_per_prefix",
        "to_samples_per_prefix",
        "private_prefix",
    ),
)
def resize(
    prompts: Prompts,
    slots: Slots,
    cache: Cache,
    *,
    s: Settings,
    to_slots: int,
    width: int,
    samples_per_prefix: int,
    to_samples_per_prefix: int,
    private_prefix: bool,
) -> tuple[Prompts, Slots, Cache]:
    """Other numbers of slots, of tokens per slot, and width of the grid.

    With fewer slots the busy ones, which must fit, move together. A narrower grid, or
    a prompt of its own for every slot (`private_prefix`), only after the last sample of
    the queue has begun.
    """

    def fit(x: Array, axis: int) -> Array:
        now = x.shape[axis]
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, max(width - now, 0))
        return jnp.pad(lax.slice_in_dim(x, 0, min(width, now), axis=axis), padding)

    def local(prompts, slots, cache):
        if to_slots < len(slots.sample):
            order = jnp.argsort(slots.sample, stable=True)[:to_slots]  # idle ones last
            names = ("sample", "grid_index", "drawn", "last")
            slots = slots._replace(**{x: getattr(slots, x)[order] for x in names})
            cache = jax.tree.map(lambda x: x[order], cache)
        key_axis = 3 if s.backend == "xla" else 2
        cache = [(fit(k, key_axis), fit(v, 2)) for k, v in cache]
        prefix_slot = jnp.minimum(
            slots.grid_index // samples_per_prefix, len(prompts.length) - 1
        )
        if private_prefix:
            prompts = jax.tree.map(lambda x: x[prefix_slot], prompts)
            slots = slots._replace(grid_index=jnp.arange(to_slots, dtype=jnp.int32))
        elif to_samples_per_prefix < samples_per_prefix:
            earlier = jnp.tri(to_slots, k=-1, dtype=bool)
            rank = (earlier & (prefix_slot[:, None] == prefix_slot[None])).sum(axis=1)
            slots = slots._replace(
                grid_index=(prefix_slot * to_samples_per_prefix + rank).astype(
                    jnp.int32
                )
            )
        prompts = prompts._replace(cache=placed(prompts.cache))
        return prompts, slots, placed(cache)

    return sharding.over_batch(local, 0)(prompts, slots, cache)

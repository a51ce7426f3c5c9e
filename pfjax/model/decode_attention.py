"""Attention of one new token over the caches of its prompt and of its own past.

Key/value heads are grouped (H a multiple of K); logits and softmax are in float32; `q`
comes unscaled. There is a back end a platform; "xla" is the reference.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from pfjax.infra import hardware, shard_map
from pfjax.model import decode_kernel
from pfjax.model.decode_kernel import MASKED, Part
from pfjax.model.layers import KeyValue
from pfjax.targets import Array


def decode_attention(
    q: Float[Array, "s h c"],
    own: KeyValue,
    prompts: KeyValue,
    own_length: Int[Array, "s"],
    prompt_length: Int[Array, "prefix_slots"],
    grid_index: Int[Array, "s"],
    samples_per_prefix: int,
    backend: str,
    own_start: Int[Array, "s"] | None = None,
    prompt_start: Int[Array, "s"] | None = None,
) -> Float[Array, "s h c"]:
    """Attention of one token per slot over its prompt and its own past, itself included.

    A prompt's keys and values are stored once, in a prefix slot, and read by all of its
    samples: their queries are laid on a grid, `prefix_slots x samples_per_prefix`.

    Args:
      own: caches of the slots, see `cache_shapes`.
      prompts: caches of the prefix slots.
      own_length: filled part of `own`.
      prompt_length: filled part of `prompts`; may be 0.
      grid_index: where each slot stands on the grid (prefix slot times
        `samples_per_prefix` plus column), no two on one. A slot past the grid reads garbage.
      samples_per_prefix: width of the grid.
      own_start: index into `own` before which a slot sees nothing; 0 if not given.
      prompt_start: the same of its prompt. A slot may see nothing of it.
    """
    s, h, c = q.shape
    num_kv = own[0].shape[1]
    prefix_slots = prompts[0].shape[0]
    group = h // num_kv
    rows = q.reshape(s, num_kv, group, c)
    slot = jnp.zeros(prefix_slots * samples_per_prefix, jnp.int32)
    slot = slot.at[grid_index].set(jnp.arange(s, dtype=jnp.int32), mode="drop")
    grid = rows[slot].reshape(prefix_slots, samples_per_prefix, num_kv, -1, c)
    grid = jnp.swapaxes(grid, 1, 2).reshape(prefix_slots, num_kv, -1, c)
    prefix_slot, column = jnp.divmod(grid_index, samples_per_prefix)
    prefix_slot = jnp.minimum(prefix_slot, prefix_slots - 1)

    of_rows = lambda x: jnp.broadcast_to(x[:, None], (len(x), group))

    def of_slots(x):
        shape = (prefix_slots, num_kv, samples_per_prefix, -1, *x.shape[3:])
        return x.reshape(shape)[prefix_slot, :, column]

    if prompt_start is not None:
        # Where no slot stands nothing is seen: no block of the cache is read for it.
        start = jnp.full(slot.shape, jnp.iinfo(jnp.int32).max)
        start = start.at[grid_index].set(prompt_start, mode="drop")
        prompt_start = of_rows(start).reshape(prefix_slots, -1)
    if own_start is not None:
        own_start = of_rows(own_start)
    first = _part(backend, grid, prompts, prompt_length, prompt_start)
    first = jax.tree.map(of_slots, first)
    out = merge(first, _part(backend, rows, own, own_length, own_start))
    return out.reshape(q.shape).astype(q.dtype)


def _part(
    backend: str,
    q: Float[Array, "n k m c"],
    cache: KeyValue,
    length: Int[Array, "n"],
    start: Int[Array, "n m"] | None,
) -> Part:
    """Attention of query rows over one cache, by the back end."""
    block = functools.partial(_BLOCKS[backend], scale=q.shape[-1] ** -0.5)
    args = (q, *cache, length) if start is None else (q, *cache, length, start)
    if backend != "xla":
        heads = (None, "kv_heads", None, None)
        axes = (heads, heads, heads, (None,), (None, None))[: len(args)]
        block = shard_map.by_device(block, axes, Part(heads, heads[:3], heads[:3]))
    return block(*args)


def merge(a: Part, b: Part) -> Array:
    """One softmax from two parts of it."""
    top = jnp.maximum(a.top, b.top)
    scale_a, scale_b = jnp.exp(a.top - top), jnp.exp(b.top - top)
    total = scale_a * a.total + scale_b * b.total
    out = scale_a[..., None] * a.out + scale_b[..., None] * b.out
    return out / total[..., None]


def cache_shapes(
    backend: str, batch: int, num_kv: int, width: int, head_dim: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a layer's keys and values of `batch` sequences of `width` tokens.

    The plain form keeps keys with the width last: 1.4 times as fast on CPU.
    """
    values = (batch, num_kv, width, head_dim)
    return (batch, num_kv, head_dim, width) if backend == "xla" else values, values


def write(
    backend: str, cache: KeyValue, new: KeyValue, at: Int[Array, "s"]
) -> KeyValue:
    """Puts the key and value of one token per slot at index `at` of its cache."""

    def put(axis, c, x):
        x = jnp.expand_dims(x.astype(c.dtype), axis)
        one = functools.partial(lax.dynamic_update_slice_in_dim, axis=axis - 1)
        return jax.vmap(one)(c, x, at)

    key_axis = 3 if backend == "xla" else 2
    return put(key_axis, cache[0], new[0]), put(2, cache[1], new[1])


def write_prompts(
    backend: str,
    cache: KeyValue,
    new: KeyValue,
    prefix_slot: Int[Array, "b t"],
    at: Int[Array, "b t"],
) -> KeyValue:
    """Puts packed prompts' keys and values in their prefix slots; -1 drops them."""
    prefix_slot = jnp.where(prefix_slot < 0, len(cache[0]), prefix_slot)
    every = slice(None)
    of_values = (prefix_slot, every, at)
    of_keys = (prefix_slot, every, every, at) if backend == "xla" else of_values
    put = lambda c, index, x: c.at[index].set(x.astype(c.dtype), mode="drop")
    return put(cache[0], of_keys, new[0]), put(cache[1], of_values, new[1])


def _plain_block(
    q: Float[Array, "n k m c"],
    keys: Float[Array, "n k c w"],
    values: Float[Array, "n k w c"],
    length: Int[Array, "n"],
    start: Int[Array, "n m"] | None = None,
    *,
    scale: float,
) -> Part:
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    logits = scale * dot("nkmc,nkcw->nkmw", q.astype(keys.dtype), keys)
    is_seen = (jnp.arange(keys.shape[-1])[None] < length[:, None])[:, None, None]
    if start is not None:
        at = jnp.arange(keys.shape[-1])[None, None]
        is_seen &= (at >= start[..., None])[:, None]
    logits = jnp.where(is_seen, logits, MASKED)
    top = logits.max(axis=-1)
    # A part without any token counts nothing, whatever is in its cache.
    weights = jnp.where(is_seen, jnp.exp(logits - top[..., None]), 0)
    out = dot("nkmw,nkwc->nkmc", weights.astype(values.dtype), values)
    return Part(out, top, weights.sum(axis=-1))


def _gpu_block(*args, **kwargs) -> Part:
    # Imported for GPUs only: JAX means to part with Pallas's back end for Triton.
    from pfjax.model import decode_kernel_gpu

    return decode_kernel_gpu.partial_attention(*args, **kwargs)


_BLOCKS = {
    "xla": _plain_block,
    "tpu": decode_kernel.partial_attention,
    "tpu_interpret": functools.partial(decode_kernel.partial_attention, interpret=True),
    "gpu": _gpu_block,
    "gpu_interpret": functools.partial(_gpu_block, interpret=True),
}
BACKENDS = tuple(_BLOCKS)
# Cache widths are multiples of this: kernels read blocks.
WIDTH_MULTIPLE = {b: 16 if b == "xla" else 128 for b in BACKENDS}


def decode_backend(platform: str, kind: str, head_dim: int) -> str:
    """The back end of `decode_attention` for devices, see `sharding.platform`."""
    if hardware.runs_triton(platform, kind) and head_dim in (64, 128, 256):
        return "gpu"
    # On half its width the TPU copies the cache into another layout at every step.
    if platform == "tpu" and head_dim % 128 == 0:
        return "tpu"
    return "xla"

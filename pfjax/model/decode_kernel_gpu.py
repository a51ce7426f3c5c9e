"""Attention of a few query rows over the filled part of a cache: a GPU kernel.

Of the contract of the TPU kernel, `decode_kernel`, in Pallas for Triton. A step of
decoding has few rows and long caches: what is filled of a cache is dealt out evenly to
several programs, and their parts are joined after.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Float, Int

from pfjax.model.decode_kernel import MASKED, UNSEEN, Part
from pfjax.targets import Array

# Triton multiplies matrices of at least 16 rows.
_MIN_ROWS = 16
# Of queries, and of keys and values: a program holds a block of queries and two each of
# keys and values. Compiled for compute capability 8.0, 8.9 and 9.0, in bfloat16 and in
# float32, that is at most 80 KiB of shared memory (consumer cards have 99), and no spills but
# 60 bytes with starts, of float32 with heads of 64 for 8.9.
_MAX_ROWS, _BLOCK_BYTES = 64, 2**14
# Tokens of a full cache that a program is dealt: fewer where sequences are few, until
# there are some four programs for each multiprocessor of a large card.
_MIN_SHARE, _MAX_SHARE, _PROGRAMS = 128, 512, 512


def partial_attention(
    q: Float[Array, "n k m c"],
    keys: Float[Array, "n k w c"],
    values: Float[Array, "n k w c"],
    length: Int[Array, "n"],
    start: Int[Array, "n m"] | None = None,
    *,
    scale: float,
    interpret: bool = False,
) -> Part:
    """Attention over the first `length` of W cached tokens; W a multiple of 128.

    What is past the filled part is neither read nor computed; nor what is before the least
    `start` of a block of query rows, from which on each sees the cache.
    """
    n, k, m, c = q.shape
    width = keys.shape[2]
    block = min(_MAX_ROWS, _BLOCK_BYTES // (c * keys.dtype.itemsize))
    rows = min(max(pl.next_power_of_2(m), _MIN_ROWS), block)
    row_blocks = pl.cdiv(m, rows)
    to_fill = pl.cdiv(_PROGRAMS, n * k * row_blocks)
    splits = max(width // _MAX_SHARE, min(width // _MIN_SHARE, to_fill))

    # The first axis of the grid runs fastest: rows that read the same keys, side by side.
    of_rows = lambda r, s, i, head: (i, head, r, 0)
    of_sequence = lambda r, s, i, head: (i, head, 0, 0)
    of_part = lambda r, s, i, head: (s, i, head, r, 0)
    cached = pl.BlockSpec((None, None, width, c), of_sequence)
    sums = pl.BlockSpec((None, None, None, rows), lambda r, s, i, head: (s, i, head, r))
    result = lambda *shape: jax.ShapeDtypeStruct((splits, n, k, m, *shape), jnp.float32)
    starts, of_starts = [], []
    if start is not None:
        of_starts = [pl.BlockSpec((None, rows), lambda r, s, i, head: (i, r))]
        starts = [start]
    parts = pl.pallas_call(
        functools.partial(_kernel, block=block, num_rows=m, scale=scale),
        grid=(row_blocks, splits, n, k),
        in_specs=[
            pl.BlockSpec((n,), lambda r, s, i, head: (0,)),
            *of_starts,
            pl.BlockSpec((None, None, rows, c), of_rows),
            cached,
            cached,
        ],
        out_specs=[pl.BlockSpec((None, None, None, rows, c), of_part), sums, sums],
        out_shape=[result(c), result(), result()],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="decode_attention",
    )(length, *starts, q.astype(keys.dtype), keys, values)
    return _join(Part(*parts))


def _join(parts: Part) -> Part:
    """One part from those along the first axis."""
    top = parts.top.max(axis=0)
    shrink = jnp.exp(parts.top - top[None])
    out = (shrink[..., None] * parts.out).sum(axis=0)
    return Part(out, top, (shrink * parts.total).sum(axis=0))


def _kernel(length_ref, *refs, block, num_rows, scale):
    *start_ref, q_ref, k_ref, v_ref, out_ref, top_ref, total_ref = refs
    dot = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)
    rows, c = q_ref.shape
    row = pl.program_id(0) * rows + jnp.arange(rows)
    is_row = row < num_rows
    length = length_ref[pl.program_id(2)]
    num_blocks, start = pl.cdiv(length, block), None
    if start_ref:
        nowhere = jnp.iinfo(jnp.int32).max
        start = plgpu.load(start_ref[0], mask=is_row, other=nowhere)
        first = jnp.minimum(start.min() // block, num_blocks)
        num_blocks -= first
    share = pl.cdiv(num_blocks, pl.num_programs(1))
    begin = pl.program_id(1) * share
    end = jnp.minimum(begin + share, num_blocks)
    if start is not None:
        begin, end = begin + first, end + first
    q = plgpu.load(q_ref, mask=is_row[:, None], other=0)

    def add(j, carry):
        out, top_before, total = carry
        at = j * block + jnp.arange(block)
        is_filled = at < length
        here = pl.ds(j * block, block)
        k = plgpu.load(k_ref.at[here, :], mask=is_filled[:, None], other=0)
        v = plgpu.load(v_ref.at[here, :], mask=is_filled[:, None], other=0)
        logits = scale * dot(q, k, (((1,), (1,)), ((), ())))
        is_seen, unseen = is_filled[None], MASKED
        if start is not None:
            is_seen, unseen = is_seen & (at[None] >= start[:, None]), UNSEEN
        logits = jnp.where(is_seen, logits, unseen)
        top = jnp.maximum(top_before, logits.max(axis=1))
        weights = jnp.exp(logits - top[:, None])
        shrink = jnp.exp(top_before - top)
        new = dot(weights.astype(v.dtype), v, (((1,), (0,)), ((), ())))
        return shrink[:, None] * out + new, top, shrink * total + weights.sum(axis=1)

    nothing = (
        jnp.zeros((rows, c), jnp.float32),
        jnp.full((rows,), MASKED, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
    )
    out, top, total = lax.fori_loop(begin, end, add, nothing)
    plgpu.store(out_ref, out, mask=is_row[:, None])
    plgpu.store(top_ref, top, mask=is_row)
    plgpu.store(total_ref, total, mask=is_row)

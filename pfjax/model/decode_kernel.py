"""Attention of a few query rows over the filled part of a cache: a TPU kernel.

JAX's paged attention for TPU does not return the sums of its softmax, so it could not
share a prompt's part among the samples of a group: each would read the prompt again.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from pfjax.targets import Array

# Finite, so that a fully masked row yields numbers rather than NaN.
MASKED = -1e30
# Less than the top of a row that has seen nothing yet, where it weighs 0 as well.
UNSEEN = 2 * MASKED
# Tokens read at once: 2 heads x 512 x 128 of bfloat16 are 0.25 MB.
_BLOCK = 512
_LANES = 128


class Part(NamedTuple):
    """A part of a softmax average: `out / total` is the average over this part."""

    out: Array  # float32 [n, k, m, c], sum of exp(logit - top) * value
    top: Array  # float32 [n, k, m], largest logit
    total: Array  # float32 [n, k, m], sum of exp(logit - top)


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

    Blocks past the filled part are neither read nor computed; nor those before the least
    `start` of a sequence, from which on its query rows see the cache.
    """
    n, k, m, c = q.shape
    width = keys.shape[2]
    block = next(b for b in (_BLOCK, 256, _LANES) if width % b == 0)
    numbers = (length,) if start is None else (length, start.min(axis=1))

    of_sequence = lambda i, j, *numbers: (i, 0, 0, 0)

    def of_block(i, j, length, first=None):
        # Past the end the index stays, and the same block is not fetched again.
        last = jnp.maximum(pl.cdiv(length[i], block) - 1, 0)
        if first is not None:
            j = jnp.maximum(j, first[i] // block)
        return i, 0, jnp.minimum(j, last), 0

    queries = pl.BlockSpec((1, k, m, c), of_sequence)
    cached = pl.BlockSpec((1, k, block, c), of_block)
    lanes = pl.BlockSpec((1, k, m, _LANES), of_sequence)
    result = lambda width: jax.ShapeDtypeStruct((n, k, m, width), jnp.float32)
    semantics = ("parallel", "arbitrary")
    starts, of_starts = [], []
    if start is not None:
        starts = [jnp.broadcast_to(start[..., None], (n, m, _LANES))]
        of_starts = [pl.BlockSpec((1, m, _LANES), lambda i, j, *numbers: (i, 0, 0))]
    out, top, total = pl.pallas_call(
        functools.partial(_kernel, block=block, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(numbers),
            grid=(n, width // block),
            in_specs=[*of_starts, queries, cached, cached],
            out_specs=[queries, lanes, lanes],
        ),
        out_shape=[result(c), result(_LANES), result(_LANES)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
        interpret=interpret,
        name="decode_attention",
    )(*numbers, *starts, q.astype(keys.dtype), keys, values)
    return Part(out, top[..., 0], total[..., 0])


def _kernel(length, *refs, block, scale):
    # With starts: the least of them of each sequence, and that of each row.
    first, start_ref = refs[:-6] or (None, None)
    q_ref, k_ref, v_ref, out_ref, top_ref, total_ref = refs[-6:]
    j, length = pl.program_id(1), length[pl.program_id(0)]
    dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)

    @pl.when(j == 0)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)
        top_ref[...] = jnp.full_like(top_ref, MASKED)
        total_ref[...] = jnp.zeros_like(total_ref)

    is_needed = j * block < length
    if first is not None:
        is_needed &= (j + 1) * block > first[pl.program_id(0)]

    @pl.when(is_needed)
    def _():
        for head in range(q_ref.shape[1]):
            q, k, v = q_ref[0, head], k_ref[0, head], v_ref[0, head]
            logits = scale * dot(q, k, (((1,), (1,)), ((), ())))
            at = j * block + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
            is_seen, unseen = at < length, MASKED
            if start_ref is not None:
                is_seen, unseen = is_seen & (at >= start_ref[0][:, :1]), UNSEEN
            logits = jnp.where(is_seen, logits, unseen)
            before = top_ref[0, head][:, :1]
            top = jnp.maximum(before, logits.max(axis=1, keepdims=True))
            weights = jnp.exp(logits - top)
            shrink = jnp.exp(before - top)
            out = dot(weights.astype(v.dtype), v, (((1,), (0,)), ((), ())))
            out_ref[0, head] = shrink * out_ref[0, head] + out
            total = shrink * total_ref[0, head][:, :1] + weights.sum(1, keepdims=True)
            lanes = top_ref.shape[2:]
            top_ref[0, head] = jnp.broadcast_to(top, lanes)
            total_ref[0, head] = jnp.broadcast_to(total, lanes)

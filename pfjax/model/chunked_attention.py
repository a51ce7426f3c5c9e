"""Causal attention inside segments, block by block, in plain JAX.

Blocks of logits exist one at a time, in the backward pass too. Blocks of keys before the
segment of a block of queries, or before its sliding window, are skipped: work follows the
lengths of the segments, and no more than the window.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Int

from pfjax.targets import Array

# By this name a policy of rematerialisation keeps what a backward pass needs.
SAVED = "attention"
_BLOCK = 128
_MASKED = -1e30


def attend(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array,
    split: tuple[str, ...] = (),
    window: int = 0,
) -> Array:
    """See `attention.packed_attention`. A token of padding attends to itself.

    Args:
      split: mesh axes over which the queries of a row are split, while keys, values and
        `segment_ids` are of all of it.
    """
    b, t, h, c = q.shape
    block = math.gcd(_BLOCK, t) if split else min(_BLOCK, t)
    q, k, v, segment_ids = (pad(x, block) for x in (q, k, v, segment_ids))
    num_kv = k.shape[2]

    def blocks(x):  # [b, t, k * g, c] -> [t / block, b, k, g * block, c]
        x = x.reshape(b, x.shape[1] // block, block, num_kv, -1, c)
        return x.transpose(1, 0, 3, 4, 2, 5).reshape(
            -1, b, num_kv, x.shape[4] * block, c
        )

    numbers = jnp.arange(k.shape[1] // block, dtype=jnp.int32)[None]
    number = part(numbers, q.shape[1] // block, split)[0]
    start = part(_first_seen(segment_ids, window), q.shape[1], split)
    start = start.reshape(b, -1, block).swapaxes(0, 1)
    out = _attend(c**-0.5, blocks(q), blocks(k), blocks(v), start, number)
    out = out.reshape(-1, b, num_kv, h // num_kv, block, c)
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(b, -1, h, c)[:, :t]


def part(x: Array, num: int, split: tuple[str, ...]) -> Array:
    """This device's `num` of the columns of `[b, t]` that are split over mesh axes."""
    if not split:
        return x
    return lax.dynamic_slice_in_dim(x, lax.axis_index(split) * num, num, axis=1)


def pad(x: Array, multiple: int) -> Array:
    """Rows `[b, t, ...]` with zeros up to a multiple of tokens."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % multiple)] + [(0, 0)] * (x.ndim - 2))


def _first_seen(segment_ids: Int[Array, "b t"], window: int) -> Int[Array, "b t"]:
    """Index of the first token that each token may attend to."""
    is_first = (jnp.diff(segment_ids, prepend=-1) != 0) | (segment_ids == 0)
    at = lax.broadcasted_iota(jnp.int32, segment_ids.shape, 1)
    start = lax.cummax(jnp.where(is_first, at, 0), axis=1)
    return jnp.maximum(start, at - window + 1) if window else start


_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _logits(scale: float, q: Array, k: Array, start: Array, i: Array, j: Array):
    """Of a block of queries and one of keys, masked: [b, k, g * n, n], float32."""
    n = k.shape[-2]
    at = jnp.arange(n, dtype=jnp.int32)
    query, key = (i * n + at)[None, :, None], (j * n + at)[None, None]
    is_seen = (key <= query) & (key >= start[..., None])
    logits = scale * _dot("bkmc,bknc->bkmn", q, k)
    grouped = logits.reshape(*logits.shape[:2], -1, n, n)
    return jnp.where(is_seen[:, None, None], grouped, _MASKED).reshape(logits.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale, q, k, v, start, number):
    return _forward(scale, q, k, v, start, number)[0]


def _forward(scale, q, k, v, start, number):
    def of_queries(_, xs):
        i, q, start = xs

        def of_keys(j, carry):
            out, top, total = carry
            logits = _logits(scale, q, k[j], start, i, j)
            new = jnp.maximum(top, logits.max(axis=-1))
            weights, shrink = jnp.exp(logits - new[..., None]), jnp.exp(top - new)
            part = _dot("bkmn,bknc->bkmc", weights.astype(v.dtype), v[j])
            total = shrink * total + weights.sum(axis=-1)
            return shrink[..., None] * out + part, new, total

        rows = jnp.zeros(q.shape[:-1], jnp.float32)
        empty = (jnp.zeros(q.shape, jnp.float32), rows + _MASKED, rows)
        first = start.min() // start.shape[-1]  # block of keys that is seen
        out, top, total = lax.fori_loop(first, i + 1, of_keys, empty)
        out = (out / total[..., None]).astype(q.dtype)
        return None, (out, top + jnp.log(total))

    _, found = lax.scan(of_queries, None, (number, q, start))
    return found


def _attend_forward(scale, q, k, v, start, number):
    found = checkpoint_name(_forward(scale, q, k, v, start, number), SAVED)
    return found[0], (q, k, v, start, number, *found)


def _attend_backward(scale, saved, d_out):
    q, k, v, start, number, out, log_total = saved
    # Of the softmax: the share of d(out) that goes along out.
    along = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def of_queries(carry, xs):
        i, q, start, d_out, log_total, along = xs

        def of_keys(j, carry):
            dq, dk, dv = carry
            logits = _logits(scale, q, k[j], start, i, j)
            weights = jnp.exp(logits - log_total[..., None])
            d_weights = _dot("bkmc,bknc->bkmn", d_out, v[j])
            d_logits = weights * (d_weights - along[..., None]) * scale
            d_logits, weights = d_logits.astype(q.dtype), weights.astype(d_out.dtype)
            dv = dv.at[j].add(_dot("bkmn,bkmc->bknc", weights, d_out))
            dk = dk.at[j].add(_dot("bkmn,bkmc->bknc", d_logits, q))
            return dq + _dot("bkmn,bknc->bkmc", d_logits, k[j]), dk, dv

        dq = jnp.zeros(q.shape, jnp.float32)
        first = start.min() // start.shape[-1]
        dq, dk, dv = lax.fori_loop(first, i + 1, of_keys, (dq, *carry))
        return (dk, dv), dq.astype(q.dtype)

    zeros = jnp.zeros(k.shape, jnp.float32)
    xs = (number, q, start, d_out, log_total, along)
    (dk, dv), dq = lax.scan(of_queries, (zeros, zeros), xs)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None


_attend.defvjp(_attend_forward, _attend_backward)

"""Rows of unequal segments, and attention over them by the formulas, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pfjax.model import attention
from tests.model import cudnn_emulation

NATIVE = {"gpu": ["triton", "cudnn"], "tpu": ["splash"]}
BACKENDS = [
    "plain",
    "chunked",
    *NATIVE.get(jax.default_backend(), ["splash_interpret", "triton_interpret"]),
    *([] if jax.default_backend() == "gpu" else ["cudnn_emulated"]),
]
B, T, H, K, C = 3, 300, 4, 2, 64  # rows that are no whole number of blocks


def draw(rng):
    """Queries, keys, values, segments, and what to multiply the output by."""
    lengths = ([150, 3, 97, 40], [300], [129, 128, 30])
    segment_ids = np.zeros((B, T), np.int32)
    for row, some in enumerate(lengths):
        used = np.repeat(np.arange(len(some)) + 1, some)
        segment_ids[row, : len(used)] = used
    draw = lambda heads: rng.standard_normal((B, T, heads, C)).astype(np.float32)
    q, k, v, weight = draw(H), draw(K), draw(K), draw(H)
    return q, k, v, segment_ids, weight * (segment_ids > 0)[..., None, None]


def attend_with(name, monkeypatch, window=0):
    """A back end, and how far its rounding may take it."""
    if name == "cudnn_emulated":
        cudnn_emulation.install(monkeypatch)
        name = "cudnn"
    is_half = name == "cudnn"
    # Natively TPUs and GPUs multiply float32 in fewer bits.
    native = jax.default_backend() != "cpu"
    tolerance = 3e-2 if is_half or native else 5e-6

    def attend(q, k, v, segment_ids):
        if is_half:
            q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
        out = attention.packed_attention(q, k, v, segment_ids, name, 5, window)
        return out.astype(jnp.float32)

    return jax.jit(attend), tolerance


def seen(segment_ids, window=0):
    """Whether each token attends to each, [row, query, key]."""
    at = np.arange(segment_ids.shape[1])
    ago = at[:, None] - at[None]
    same = segment_ids[:, :, None] == segment_ids[:, None]
    return same & (ago >= 0) & (ago < (window or ago.size))


def oracle(q, k, v, segment_ids, weight, window=0):
    """Output, and gradients of its product with `weight`, by the formulas."""
    q, k, v, weight = (x.astype(np.float64) for x in (q, k, v, weight))
    mask = seen(segment_ids, window)
    k, v = (np.repeat(x, H // K, axis=2) for x in (k, v))
    logits = np.einsum("bthc,bshc->bhts", q, k) * C**-0.5
    p = np.exp(np.where(mask[:, None], logits, -np.inf))
    p /= p.sum(-1, keepdims=True)
    dp = np.einsum("bthc,bshc->bhts", weight, v)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * C**-0.5
    grouped = lambda x: x.reshape(B, T, K, H // K, C).sum(3)
    return np.einsum("bhts,bshc->bthc", p, v), (
        np.einsum("bhts,bshc->bthc", ds, k),
        grouped(np.einsum("bhts,bthc->bshc", ds, q)),
        grouped(np.einsum("bhts,bthc->bshc", p, weight)),
    )


def gradients(attend, q, k, v, segment_ids, weight):
    loss = lambda q, k, v: jnp.sum(weight * attend(q, k, v, segment_ids))
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)


def agrees_with_one_device(backend, mesh, args, weight, window=0):
    run = functools.partial(attention.packed_attention, window=window)
    plain, other = (functools.partial(run, backend=x) for x in ("plain", backend))
    want, want_gradients = plain(*args), gradients(plain, *args, weight)
    split = NamedSharding(mesh, P(("data", "fsdp"), "context"))
    with jax.set_mesh(mesh):
        put = [jax.device_put(x, split) for x in args]
        got, got_gradients = jax.jit(other)(*put), gradients(other, *put, weight)
    is_real = args[3] > 0
    np.testing.assert_allclose(got[is_real], want[is_real], atol=5e-6)
    for a, b in zip(got_gradients, want_gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6 * np.abs(b).max())


def lengthened(data, rows, length):
    """One row more of padding, all of them `length` long."""
    fill = lambda x: np.pad(
        x, [(0, rows - B), (0, length - T)] + [(0, 0)] * (x.ndim - 2)
    )
    return map(fill, data)

"""cuDNN's packed attention as it is documented, for machines without it.

JAX's own code runs down to the custom call: the rule of differentiation and the
conversion of lengths and offsets of each row to those of the whole batch. Only what
the custom call computes is written here, from the flattened batch, as cuDNN sees it.
A token of no segment gets NaN.
"""

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.interpreters import mlir


def install(monkeypatch) -> None:
    """Lets JAX's cuDNN attention run, or be lowered for CUDA, on this machine."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91100)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda x: x == "9.0")
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda _: False)
    for primitive, run in (
        (cudnn._dot_product_attention_fwd_p, _forward),
        (cudnn._dot_product_attention_bwd_p, _backward),
    ):
        rule = mlir.lower_fun(run, multiple_results=True)
        mlir.register_lowering(primitive, rule, platform="cpu")


def _flat(x):  # [B, T, N, H] -> [B * T, N, H]
    return x.reshape(-1, *x.shape[2:]).astype(jnp.float32)


def _place(x, length, offset):
    """Segment of each token of the flattened batch, and its place there.

    A token of no segment has one past the last.
    """
    b, t, n, h = x.shape
    at = jnp.arange(b * t)[:, None]
    start = offset.ravel()[: length.size][None] // (n * h)
    is_member = (at >= start) & (at < start + length.ravel()[None])
    segment = jnp.where(is_member.any(1), is_member.argmax(1), length.size)
    return segment, at[:, 0] - start[0, segment]


def _logits(q, k, q_length, k_length, q_offset, k_offset, scale, window):
    """Logits, which of them count, and segments and places of the queries."""
    of_q, q_at = _place(q, q_length, q_offset)
    of_k, k_at = _place(k, k_length, k_offset)
    is_seen = (of_q[:, None] == of_k[None]) & (of_q < q_length.size)[:, None]
    is_seen &= q_at[:, None] >= k_at[None]
    if window is not None:  # (at - window, at]
        is_seen &= k_at[None] > q_at[:, None] - window
    logits = scale * jnp.einsum("inc,jnc->nij", _flat(q), _flat(k))
    return logits, is_seen[None], of_q, q_at


def _forward(q, k, v, bias, *args, scale, sliding_window_length, is_training, **kwargs):
    del bias
    mask_type, layout = kwargs["mask_type"], kwargs["layout"]
    assert (mask_type, layout) == (cudnn.MaskType.PADDING_CAUSAL, 0)
    how = (scale, sliding_window_length)
    logits, is_seen, segment, at = _logits(q, k, *args[:4], *how)
    logits = jnp.where(is_seen, logits, -jnp.inf)
    log_total = jax.nn.logsumexp(logits, axis=-1)
    weights = jnp.exp(logits - log_total[..., None])
    out = jnp.einsum("nij,jnc->inc", weights, _flat(v))
    out = jnp.where((segment < args[0].size)[:, None, None], out, jnp.nan)
    out = out.reshape(q.shape).astype(q.dtype)
    if not is_training:
        return (out,)
    size = (args[0].size, q.shape[2], q.shape[1])
    saved = jnp.full(size, jnp.nan).at[segment, :, at].set(log_total.T, mode="drop")
    return out, saved


def _backward(q, k, v, bias, *args, scale, sliding_window_length, **kwargs):
    del bias, kwargs
    *extents, _, _, saved, out, d_out = args
    how = (scale, sliding_window_length)
    logits, is_seen, segment, at = _logits(q, k, *extents, *how)
    log_total = saved[segment, :, at].T
    weights = jnp.where(is_seen, jnp.exp(logits - log_total[..., None]), 0.0)
    along = jnp.sum(_flat(out) * _flat(d_out), axis=-1).T
    d_weights = jnp.einsum("inc,jnc->nij", _flat(d_out), _flat(v))
    d_logits = jnp.where(is_seen, weights * (d_weights - along[..., None]), 0.0)
    gradients = (
        scale * jnp.einsum("nij,jnc->inc", d_logits, _flat(k)),
        scale * jnp.einsum("nij,inc->jnc", d_logits, _flat(q)),
        jnp.einsum("nij,inc->jnc", weights, _flat(d_out)),
    )
    real = jnp.where((segment < extents[0].size)[:, None, None], 1.0, jnp.nan)
    return [(x * real).reshape(q.shape).astype(q.dtype) for x in gradients]

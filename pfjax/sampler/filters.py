"""Filters of tokens where they act: top-k, top-p, min-p.

They are for evaluation only. A filtered sampler gives some responses probability 0; the
objectives assume that whatever the policy can say is drawn at its own rate, and the
balance of what is never drawn is never trained.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from pfjax.sampler.options import TokenFilters
from pfjax.targets import Array

# As far below every logit as float32 sampling notices.
_NEVER = -1e30


def apply(c: TokenFilters, logits: Float[Array, "s v"]) -> Float[Array, "s v"]:
    """Logits with those of the tokens that may not be drawn lowered to -1e30.

    Ties at a threshold are all kept. The likeliest token is never dropped.
    """
    if 0 < c.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, c.top_k)[0][:, -1:]
        logits = jnp.where(logits < kth, _NEVER, logits)
    if c.top_p < 1:
        falling = -jnp.sort(-logits, axis=-1)
        p = jax.nn.softmax(falling, axis=-1)
        before = jnp.cumsum(p, axis=-1) - p  # mass of the tokens likelier than it
        last = jnp.sum(before < c.top_p, axis=-1, keepdims=True) - 1
        least = jnp.take_along_axis(falling, jnp.maximum(last, 0), axis=-1)
        logits = jnp.where(logits < least, _NEVER, logits)
    if c.min_p > 0:
        least = logits.max(axis=-1, keepdims=True) + jnp.log(c.min_p)
        logits = jnp.where(logits < least, _NEVER, logits)
    return logits

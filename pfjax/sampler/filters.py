"""Which tokens may be drawn: temperature, top-k, top-p, min-p, greedy.

All but a positive temperature are for evaluation only. A truncated sampler gives some
responses probability 0; the objectives assume that whatever the policy can say is
drawn at its own rate, and the balance of what is never drawn is never trained.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float

from pfjax.batch import Array

# As far below every logit as float32 sampling notices.
_NEVER = -1e30


@dataclasses.dataclass(frozen=True)
class Truncation:
    """Filters, applied in this order to the logits divided by the temperature.

    References:
      top-p: Holtzman et al., arXiv 1904.09751; min-p: Nguyen et al., arXiv 2407.01082.
    """

    greedy: bool = False  # the most likely token; the rest is then ignored
    top_k: int = 0  # keep the k most likely tokens; 0 for all
    top_p: float = 1.0  # keep the fewest most likely tokens whose mass is at least p
    min_p: float = 0.0  # keep tokens at least this likely relative to the likeliest

    def __post_init__(self):
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"min_p must be in [0, 1), got {self.min_p}")


ALL_TOKENS = Truncation()


def truncate(c: Truncation, logits: Float[Array, "s v"]) -> Float[Array, "s v"]:
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

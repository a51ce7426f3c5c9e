r"""A dial: one policy for every alpha of a range.

Adapters of rank r add A diag(s(alpha)) B to a projection in the place of A B. With

.. math:: u = \log\alpha / \max|\log\text{of the range's ends}|

each of the r scales is a learned polynomial in u without a constant: at alpha = 1 it is 0 and
the policy is the base, exactly. At any one alpha the scales go into B, and the policy is one
with usual adapters (`lora.at`).

References:
  Kim et al., arXiv 2310.02823 (scales that are learned functions of the temperature, in a
  GFlowNet of graphs).
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from pfjax.batch import PackedBatch
from pfjax.targets import Array

TERMS = 4  # powers of u


def parse(text: str) -> tuple[float, ...]:
    """The ends of a range: "0.25,8"; of "" there are none.

    Raises:
      ValueError: unless they are two positive numbers, the smaller first.

    >>> parse("0.25,8")
    (0.25, 8.0)
    """
    if not text:
        return ()
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low = high = np.nan
    if not 0 < low < high < np.inf:
        raise ValueError(f"{text!r} is no range LOW,HIGH of two positive numbers")
    return low, high


def draw(
    ends: tuple[float, ...], seed: int, ids: Sequence[int]
) -> Float[np.ndarray, "p"] | None:
    """An alpha for each prompt, log-uniform in the range; None without one.

    It depends on the seed and the prompt's number alone, so that neither company nor order
    change it.
    """
    if not ends:
        return None
    uniform = [np.random.default_rng((seed, i)).random() for i in ids]
    low, high = np.log(ends)
    return np.exp(low + (high - low) * np.array(uniform)).astype(np.float32)


def features(ends: tuple[float, ...], alpha: Float[Array, "*n"]) -> Array:
    """What scales are polynomials of: the powers of u, `[*n, TERMS]`.

    Args:
      alpha: 0, of padding, stands for 1.
    """
    u = jnp.log(jnp.where(alpha > 0, alpha, 1.0)) / np.abs(np.log(ends)).max()
    return jnp.stack([u**k for k in range(1, TERMS + 1)], axis=-1)


def log_z_features(ends: tuple[float, ...], alpha: Float[Array, "*n"]) -> Array:
    """What log Z is a linear function of, `[*n, 1 + TERMS]`: (alpha - 1), which it grows with
    for a policy that is the base, and the powers of u. All are 0 at alpha = 1, where log Z
    is."""
    alpha = jnp.where(alpha > 0, alpha, 1.0)
    first = (alpha - 1) / max(abs(x - 1) for x in ends)
    return jnp.concatenate([first[..., None], features(ends, alpha)], axis=-1)


def of_tokens(
    ends: tuple[float, ...], batch: PackedBatch
) -> Float[Array, "b t k"] | None:
    """The features of every token of packed rows, of its trajectory's alpha."""
    if not ends or batch.alpha is None:
        return None
    segment = jnp.maximum(batch.segment_ids - 1, 0)
    of_segments = features(ends, batch.alpha)
    return jnp.take_along_axis(of_segments, segment[..., None], axis=1)

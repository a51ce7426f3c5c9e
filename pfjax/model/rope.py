"""Rotary position embeddings and the ways checkpoints stretch them.

References:
  Su et al., arXiv 2104.09864; linear: Chen et al., arXiv 2306.15595; YaRN: Peng et
  al., arXiv 2309.00071; llama3: the Llama 3.1 release.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from pfjax.batch import Array

# Kind of scaling -> what it depends on, beside the original positions.
KINDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "beta_fast", "beta_slow", "truncate", "attention_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Base and scaling, named as in Hugging Face's `rope_parameters`."""

    theta: float
    kind: str = "default"  # one of KINDS
    factor: float = 1.0  # how many times longer than it was trained for
    original_positions: int = 0  # positions it was trained for; yarn and llama3
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the range of dimensions outwards
    attention_factor: float = 1.0  # scales cosine and sine; yarn


def frequencies(c: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians a position of each rotated pair, float32 `[C/2]`.

    "dynamic" scaling begins past the model's `max_positions`, which nothing here goes
    beyond, so it is "default".
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    freq = (1.0 / np.float32(c.theta) ** exponent).astype(np.float32)
    if c.kind == "linear":
        return freq / np.float32(c.factor)
    if c.kind == "llama3":
        # Slow pairs are stretched, fast ones kept, those between blended.
        turns = c.original_positions * freq / (2 * np.pi)  # in the trained context
        keep = (turns - c.low_freq_factor) / (c.high_freq_factor - c.low_freq_factor)
        keep = np.clip(keep, 0.0, 1.0)
        return (freq * (keep + (1.0 - keep) / c.factor)).astype(np.float32)
    return _yarn(c, freq, head_dim) if c.kind == "yarn" else freq


def _yarn(c: RopeConfig, freq: np.ndarray, head_dim: int) -> np.ndarray:
    """As llama3, but blended linearly in the index of the pair."""

    def index_of(turns: float) -> float:
        """The pair that turns this often in the trained context."""
        ratio = c.original_positions / (turns * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(c.theta))

    low, high = index_of(c.beta_fast), index_of(c.beta_slow)
    if c.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 * (low == high)
    stretch = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
    return (freq * (1.0 - stretch + stretch / c.factor)).astype(np.float32)


def angles(
    c: RopeConfig, head_dim: int, positions: Int[Array, "*b"]
) -> tuple[Float[Array, "*b 1 c"], Float[Array, "*b 1 c"]]:
    """Cosine and sine of the angles at each position, in float32."""
    freq = np.expand_dims(frequencies(c, head_dim), tuple(range(positions.ndim + 1)))
    angle = positions[..., None, None] * freq
    scale = np.float32(c.attention_factor)
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def rotate(
    x: Float[Array, "*b h c"], cos: Float[Array, "*b 1 d"], sin: Float[Array, "*b 1 d"]
) -> Float[Array, "*b h c"]:
    """Rotates pairs (i, i + C/2) of each head, the layout of HF checkpoints."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)

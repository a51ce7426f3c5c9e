"""Rotary position embeddings and the ways checkpoints stretch them.

References:
  Su et al., arXiv 2104.09864; linear: Chen et al., arXiv 2306.15595; YaRN: Peng et
  al., arXiv 2309.00071; llama3: the Llama 3.1 release.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from pfjax.targets import Array

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
    rotated: float = 1.0  # the part of each head that is rotated, its first dimensions


def frequencies(c: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians a position of each rotated pair, float32 `[C/2]`.

    "dynamic" scaling begins past the model's `max_positions`, which nothing here goes
    beyond, so it is "default".
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # The power is rounded once, as in torch: NumPy's in float32 is off by a last bit in one
    # of five, which moves angles at position 32,768 by 0.004.
    power = np.float64(c.theta) ** exponent.astype(np.float64)
    freq = np.float32(1.0) / power.astype(np.float32)
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
    c: RopeConfig | None, head_dim: int, positions: Int[Array, "*b"]
) -> tuple[Float[Array, "*b 1 c"], Float[Array, "*b 1 c"]]:
    """Cosine and sine of the angles at each position, in float32; without `c` of none."""
    if c is None:
        zeros = jnp.zeros((*positions.shape, 1, head_dim // 2))
        return zeros + 1, zeros
    rotated = int(head_dim * c.rotated)
    freq = np.expand_dims(frequencies(c, rotated), tuple(range(positions.ndim + 1)))
    angle = positions[..., None, None] * freq
    scale = np.float32(c.attention_factor)
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def rotate(
    x: Float[Array, "*b h c"], cos: Float[Array, "*b 1 d"], sin: Float[Array, "*b 1 d"]
) -> Float[Array, "*b h c"]:
    """Rotates pairs (i, i + d) of the first 2 d dimensions of each head, the layout of HF
    checkpoints."""
    d = cos.shape[-1]
    a, b, rest = jnp.split(x.astype(jnp.float32), [d, 2 * d], axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1).astype(
        x.dtype
    )


_SCALING = set().union(*KINDS.values())
_READ = _SCALING | {
    "mscale", "mscale_all_dim", "original_max_position_embeddings",
    "partial_rotary_factor", "rope_theta", "rope_type", "type",
}  # fmt: skip
_NO_BOUNDS = {
    "mscale", "mscale_all_dim", "partial_rotary_factor", "rope_type", "truncate", "type",
}  # fmt: skip
# Kind of scaling -> what a config has to say of it.
_NEEDED = dict.fromkeys(KINDS, ("factor",)) | {"default": (), "llama3": KINDS["llama3"]}
# Kinds of layers that may have a rope each.
_LAYER_TYPES = ("full_attention", "sliding_attention")


def from_json(json: dict[str, Any], theta: float = 10_000.0) -> RopeConfig:
    """What a config.json says, in the spelling of transformers 4 (`rope_scaling`) or 5
    (`rope_parameters`).

    Args:
      theta: the base where none is said.

    Raises:
      ValueError: for what is not supported, "sets field=value: ...".
    """
    p = json.get("rope_parameters") or json.get("rope_scaling") or {}
    said = f"sets rope_scaling (rope_parameters) {p}"
    if not isinstance(p, dict):
        raise ValueError(f"{said}: must be an object of numbers")  # noqa: TRY004
    kind = p.get("rope_type") or p.get("type") or "default"
    if kind not in list(KINDS):
        raise ValueError(f"{said}: {kind!r} is none of {', '.join(KINDS)}")
    are_numbers = not any(
        isinstance(v, list | dict) or (isinstance(v, str) and "type" not in k)
        for k, v in p.items()
    )
    if not are_numbers:
        raise ValueError(f"{said}: must be an object of numbers")
    if set(p) - _READ or p.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{said}: not supported")
    for name in p.keys() - _NO_BOUNDS:
        is_bool = isinstance(p[name], bool)
        if is_bool or not (p[name] is None or 0 < p[name] < math.inf):
            raise ValueError(f"{said}: {name} must be a positive number")
    if any((p.get(name) or 0) < 0 for name in ("mscale", "mscale_all_dim")):
        raise ValueError(f"{said}: mscale must not be negative")
    for name in _NEEDED[kind]:
        if not p.get(name):
            raise ValueError(f"{said} but no {name}")
    original = "original_max_position_embeddings"
    inside = {name: p.get(name) for name in ("rope_theta", original)}
    if json.get("rope_parameters"):
        inside["rope_scaling"] = p
    for field, same in inside.items():
        if same is not None and json.get(field) not in (None, same):
            raise ValueError(
                f"sets {field}={json[field]} beside rope_parameters={p}, and they "
                "differ; keep one"
            )
    theta = float(p.get("rope_theta") or json.get("rope_theta") or theta)
    low, high = p.get("low_freq_factor"), p.get("high_freq_factor")
    if theta <= 1 or (low and high and low >= high):
        raise ValueError(
            f"sets rope_theta={theta}, and rope_scaling (rope_parameters) {p}: the base "
            "must be above 1, and low_freq_factor below high_freq_factor"
        )
    positions = p.get(original) or json.get(original) or json["max_position_embeddings"]
    fields = {k: float(p[k]) for k in _SCALING if p.get(k) and k != "truncate"}
    fields["attention_factor"] = _yarn_attention_factor(p) if kind == "yarn" else 1.0
    return RopeConfig(
        theta=theta,
        kind=kind,
        original_positions=int(positions) if kind in ("yarn", "llama3") else 0,
        truncate=bool(p.get("truncate", True)),
        **fields,
    )


def from_json_by_type(
    json: dict[str, Any], theta: float, local_theta: float
) -> dict[str, RopeConfig]:
    """As `from_json`, of the two types of layers: "rope" of those that attend to all, and
    "local_rope" of those with a window, which transformers 4 did not scale."""
    p = json.get("rope_parameters") or {}
    if not isinstance(p, dict) or set(p) - set(_LAYER_TYPES):
        # transformers passes over what is not under a type.
        raise ValueError(
            f"sets rope_parameters={p}: must be one object for each type of layers, "
            f"{' and '.join(_LAYER_TYPES)}"
        )
    full, local = (json | {"rope_parameters": p.get(x) or {}} for x in _LAYER_TYPES)
    # What stands beside is of the layers that attend to all.
    local |= dict.fromkeys(("rope_scaling", "rope_theta"))
    local = from_json(local, local_theta)
    return {"rope": from_json(full, theta), "local_rope": local}


def to_json_by_type(rope: RopeConfig, local_rope: RopeConfig) -> dict[str, Any]:
    """The `rope_parameters` that `from_json_by_type` reads."""
    return dict(zip(_LAYER_TYPES, map(to_json, (rope, local_rope)), strict=True))


def to_json(c: RopeConfig) -> dict[str, Any]:
    """The `rope_parameters` that `from_json` reads back as `c`."""
    out: dict[str, Any] = {"rope_theta": c.theta, "rope_type": c.kind}
    if c.rotated != 1.0:
        out["partial_rotary_factor"] = c.rotated
    if c.kind in ("yarn", "llama3"):
        out["original_max_position_embeddings"] = c.original_positions
    return out | {name: getattr(c, name) for name in KINDS[c.kind]}


def older_names(json: dict[str, Any]) -> dict[str, Any]:
    """What transformers 4 reads in the place of the `rope_parameters` of a config.json, where
    it is not there."""
    p = json.get("rope_parameters") or {}
    full, local = (p.get(x) or {} for x in _LAYER_TYPES)
    full = full or p
    out = {"rope_theta": full.get("rope_theta")}
    if full.get("rope_type", "default") != "default":
        out["rope_scaling"] = full
    if json.get("model_type") == "gemma3_text":
        out["rope_local_base_freq"] = local.get("rope_theta")
    is_new = lambda name, value: value is not None and json.get(name) is None
    return {name: value for name, value in out.items() if is_new(name, value)}


def _yarn_attention_factor(p: dict[str, Any]) -> float:
    """YaRN's temperature, as a factor of cosine and sine: 0.1 m ln(factor) + 1."""
    if p.get("attention_factor") is not None:
        return float(p["attention_factor"])
    of = lambda m: 0.1 * m * math.log(max(p["factor"], 1.0)) + 1.0
    has_both = p.get("mscale") and p.get("mscale_all_dim")
    return of(p["mscale"]) / of(p["mscale_all_dim"]) if has_both else of(1.0)

"""What the benchmarks share: random models, summaries, the machine."""

import datetime
import platform
import resource

import jax
import numpy as np

from pfjax.infra import gpu_memory
from pfjax.model import rope, transformer
from pfjax.model.families import qwen2

gpu_memory.set_default()  # as commands do

_SMALL = {
    "vocab_size": 256,
    "embed_dim": 256,
    "num_layers": 4,
    "num_heads": 8,
    "num_kv_heads": 2,
    "head_dim": 32,
    "mlp_dim": 1024,
    "max_positions": 4096,
    "tied_embeddings": False,
}
_SHAPES = {
    "small": _SMALL,
    "small_large_vocabulary": {**_SMALL, "vocab_size": 151_936},
    "qwen2_5_1_5b": {
        "vocab_size": 151_936,
        "embed_dim": 1536,
        "num_layers": 28,
        "num_heads": 12,
        "num_kv_heads": 2,
        "head_dim": 128,
        "mlp_dim": 8960,
        "max_positions": 32_768,
        "tied_embeddings": True,
    },
}


def random_policy(name: str, dtype: str) -> transformer.Policy:
    """Random weights of a type. The small model's tokens are nearly equally likely, so
    that lengths are geometric with a mean of about the vocabulary."""
    config = qwen2.Config(
        **_SHAPES[name],
        rope=rope.RopeConfig(theta=1e6),
        norm_eps=1e-6,
        stop_ids=(1,),
        dtype=dtype,
    )

    def init(key):
        params = transformer.init_params(config, key)
        if "head" in params:
            params["head"] = 0.3 * params["head"]
        return jax.tree.map(lambda x: x.astype(dtype), params)

    return transformer.Policy(config, jax.jit(init)(jax.random.key(0)))


def summary(values: list[float]) -> dict[str, float]:
    return {f.__name__: float(f(values)) for f in (np.median, min, max)}


def rounded(x):
    """Four digits of every number."""
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    return float(f"{x:.4g}") if isinstance(x, float) else x


def peak_memory_mb() -> float:
    """Of the device, or of the process where the device does not say."""
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if peak is None:  # in KiB on Linux
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return peak / 1e6


def machine() -> dict:
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }

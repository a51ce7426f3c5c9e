"""`config.json` of Hugging Face <-> `ModelConfig`.

A field that is neither read here nor known to be without effect is an error that names
it: a wrong rope base or an ignored scaling gives fluent and wrong text.
"""

import json
import math
import pathlib
from typing import Any

from pfjax.model import rope
from pfjax.model.transformer import ModelConfig

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_READ = {
    "architectures", "attention_bias", "auto_map", "dtype", "eos_token_id", "head_dim",
    "hidden_act", "hidden_size", "intermediate_size", "layer_types",
    "max_position_embeddings", "max_window_layers", "mlp_bias", "model_type",
    "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "original_max_position_embeddings", "rms_norm_eps", "rope_parameters",
    "rope_scaling", "rope_theta", "sliding_window", "tie_word_embeddings",
    "torch_dtype", "use_sliding_window", "vocab_size",
}  # fmt: skip
# Without effect on the function that is computed.
_INERT = {
    "_attn_implementation_autoset", "_name_or_path", "attention_dropout",
    "attn_implementation", "bos_token_id", "chunk_size_feed_forward", "id2label",
    "initializer_range", "label2id", "output_attentions", "output_hidden_states",
    "pad_token_id", "pretraining_tp", "problem_type", "return_dict",
    "transformers_version", "use_cache",
}  # fmt: skip
_ROPE_READ = {
    "attention_factor", "beta_fast", "beta_slow", "factor", "high_freq_factor",
    "low_freq_factor", "mscale", "mscale_all_dim", "original_max_position_embeddings",
    "partial_rotary_factor", "rope_theta", "rope_type", "truncate", "type",
}  # fmt: skip


def read(folder: pathlib.Path) -> ModelConfig:
    """The architecture from `config.json`, stop ids from `generation_config.json`.

    Raises:
      ValueError: for a field whose effect is not implemented, or not known.
    """
    path = folder / "config.json"
    try:
        c = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    _refuse_unsupported(path, c)
    family = c["model_type"]
    heads = c["num_attention_heads"]
    has_bias = bool(c.get("attention_bias", False))
    return ModelConfig(
        vocab_size=c["vocab_size"],
        embed_dim=c["hidden_size"],
        num_layers=c["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=c.get("num_key_value_heads") or heads,
        head_dim=c.get("head_dim") or c["hidden_size"] // heads,
        mlp_dim=c["intermediate_size"],
        rope=_rope(path, c),
        norm_eps=float(c["rms_norm_eps"]),
        tied_embeddings=bool(c.get("tie_word_embeddings", False)),
        max_positions=int(c["max_position_embeddings"]),
        stop_ids=_stop_ids(folder, c),
        family=family,
        # Qwen2 has these biases always, and no field for them.
        qkv_bias=family == "qwen2" or has_bias,
        output_bias=family in ("llama", "qwen3") and has_bias,
        mlp_bias=family == "llama" and bool(c.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
    )


def _refuse_unsupported(path: pathlib.Path, c: dict[str, Any]) -> None:
    family = c.get("model_type")
    if family not in _ARCHITECTURES:
        raise ValueError(
            f"{path} has model_type {family!r}; supported: {sorted(_ARCHITECTURES)}"
        )
    architectures = c.get("architectures") or [_ARCHITECTURES[family]]
    # Defaults of transformers; a window as wide as the positions hides nothing.
    is_windowed = c.get("use_sliding_window", family == "mistral")
    window = c.get("sliding_window", 4096) if is_windowed else None
    has_window = window is not None and window < c["max_position_embeddings"]
    unsupported = {
        "architectures": architectures != [_ARCHITECTURES[family]],
        "auto_map": "auto_map" in c,  # remote code is never run
        "hidden_act": c.get("hidden_act", "silu") != "silu",
        "layer_types": set(c.get("layer_types") or ()) - {"full_attention"},
        "mlp_bias": c.get("mlp_bias") and family != "llama",
        "attention_bias": c.get("attention_bias") and family == "mistral",
        "use_sliding_window": has_window and family != "mistral",
        "sliding_window": has_window,
    }
    for field, is_set in unsupported.items():
        if is_set:
            raise ValueError(f"{path} sets {field}={c.get(field)!r}: not supported")
    unknown = {k: v for k, v in c.items() if k not in _READ | _INERT}
    unknown = {k: v for k, v in unknown.items() if v is not None and v is not False}
    if unknown:
        raise ValueError(
            f"{path} has fields that pfjax does not know, and that might change what "
            f"the model computes: {unknown}; remove them if they do not"
        )


def _rope(path: pathlib.Path, c: dict[str, Any]) -> rope.RopeConfig:
    """Both spellings: transformers 4 (`rope_scaling`) and 5 (`rope_parameters`)."""
    p = c.get("rope_parameters") or c.get("rope_scaling") or {}
    unknown = sorted(set(p) - _ROPE_READ)
    kind = p.get("rope_type") or p.get("type") or "default"
    if unknown or kind not in rope.KINDS or p.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"{path} sets rope_scaling (rope_parameters) {p}: not supported"
        )
    if kind != "default" and "factor" not in p:
        raise ValueError(
            f"{path} sets rope_scaling (rope_parameters) {p} but no factor"
        )
    both = "rope_parameters" in c and c["rope_parameters"]
    for field, same in (("rope_theta", p.get("rope_theta")), ("rope_scaling", p)):
        if both and c.get(field) not in (None, same):
            raise ValueError(
                f"{path} sets {field}={c[field]} beside rope_parameters={p}, and they "
                "differ; keep one"
            )
    original = p.get("original_max_position_embeddings") or c.get(
        "original_max_position_embeddings", c["max_position_embeddings"]
    )
    factor = float(p.get("factor") or 1.0)
    scale = _yarn_attention_factor(factor, p) if kind == "yarn" else 1.0
    return rope.RopeConfig(
        theta=float(p.get("rope_theta") or c.get("rope_theta") or 10_000.0),
        kind=kind,
        factor=factor,
        original_positions=int(original) if kind in ("yarn", "llama3") else 0,
        low_freq_factor=float(p.get("low_freq_factor") or 1.0),
        high_freq_factor=float(p.get("high_freq_factor") or 4.0),
        beta_fast=float(p.get("beta_fast") or 32.0),
        beta_slow=float(p.get("beta_slow") or 1.0),
        truncate=bool(p.get("truncate", True)),
        attention_factor=scale,
    )


def _yarn_attention_factor(factor: float, p: dict[str, Any]) -> float:
    """YaRN's temperature, as a factor of cosine and sine: 0.1 m ln(factor) + 1."""

    def of(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    if p.get("attention_factor") is not None:
        return float(p["attention_factor"])
    if p.get("mscale") and p.get("mscale_all_dim"):
        return of(p["mscale"]) / of(p["mscale_all_dim"])
    return of(1.0)


def _stop_ids(folder: pathlib.Path, config: dict[str, Any]) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    generation = json.loads(path.read_text()) if path.is_file() else {}
    ids: set[int] = set()
    for source in (config, generation):
        value = source.get("eos_token_id")
        ids.update(
            value if isinstance(value, list) else [] if value is None else [value]
        )
    return tuple(sorted(ids))


def to_json(c: ModelConfig, dtype: str) -> dict[str, Any]:
    """A minimal `config.json` that `read` reads back as `c`, without its `dtype`."""
    parameters: dict[str, Any] = {"rope_theta": c.rope.theta, "rope_type": c.rope.kind}
    if c.rope.kind != "default":
        parameters["factor"] = c.rope.factor
    if c.rope.kind in ("yarn", "llama3"):
        parameters["original_max_position_embeddings"] = c.rope.original_positions
    if c.rope.kind == "llama3":
        parameters["low_freq_factor"] = c.rope.low_freq_factor
        parameters["high_freq_factor"] = c.rope.high_freq_factor
    if c.rope.kind == "yarn":
        parameters["beta_fast"] = c.rope.beta_fast
        parameters["beta_slow"] = c.rope.beta_slow
        parameters["truncate"] = c.rope.truncate
        parameters["attention_factor"] = c.rope.attention_factor
    out = {
        "architectures": [_ARCHITECTURES[c.family]],
        "model_type": c.family,
        "vocab_size": c.vocab_size,
        "hidden_size": c.embed_dim,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.mlp_dim,
        "hidden_act": "silu",
        "rope_parameters": parameters,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied_embeddings,
        "max_position_embeddings": c.max_positions,
        "eos_token_id": list(c.stop_ids),
        "dtype": dtype,
    }
    if c.family in ("llama", "qwen3"):
        out["attention_bias"] = c.output_bias
    if c.family == "llama":
        out["mlp_bias"] = c.mlp_bias
    if c.family == "mistral":
        out["sliding_window"] = None
    return out

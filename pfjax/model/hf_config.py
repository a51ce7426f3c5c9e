"""`config.json` of Hugging Face <-> `ModelConfig`.

A field that is neither read here nor known to be without effect is an error that names
it: a wrong rope base or an ignored scaling gives fluent and wrong text.
"""

import json
import math
import pathlib
import re
from typing import Any

from pfjax.model import rope, weights
from pfjax.model.transformer import ModelConfig

_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
_ARCHITECTURES = {name.lower(): f"{name}ForCausalLM" for name in _FAMILIES}
_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "embed_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "mlp_dim",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied_embeddings",
    "max_position_embeddings": "max_positions",
}
_KNOWN = set(_FIELDS) | {
    "architectures", "attention_bias", "auto_map", "dtype", "eos_token_id",
    "hidden_act", "layer_types", "max_window_layers", "mlp_bias", "model_type",
    "original_max_position_embeddings", "rope_parameters", "rope_scaling",
    "rope_theta", "sliding_window", "torch_dtype", "use_sliding_window",
}  # fmt: skip
# Without effect on the function that is computed: names, other tokens, what is recorded of
# where a folder comes from, settings of training and of `generate`.
_INERT = re.compile(
    r"_.*|.*_token_id|unsloth_.*|transformers\.js.*|output_.*|.*_dropout|.*_pdrop"
    r"|(num_)?(beams?|beam_groups|return_sequences)|(max|min)_length|(top|typical)_[kp]"
    r"|attn_implementation|bad_words_ids|(begin_)?suppress_tokens|chunk_size_feed_forward"
    r"|diversity_penalty|do_sample|early_stopping|exponential_decay_length_penalty"
    r"|finetuning_task|id2label|initializer_range|is_llama_config|label2id"
    r"|length_penalty|(encoder_)?no_repeat_ngram_size|prefix|pretraining_tp|problem_type"
    r"|remove_invalid_values|repetition_penalty|return_dict(_in_generate)?"
    r"|task_specific_params|temperature|tokenizer_class|torchscript"
    r"|transformers_version|use_cache"
)
_ROPE_FIELDS = set().union(*rope.KINDS.values())
_ROPE_READ = _ROPE_FIELDS | {
    "mscale", "mscale_all_dim", "original_max_position_embeddings",
    "partial_rotary_factor", "rope_theta", "rope_type", "type",
}  # fmt: skip


def read(folder: pathlib.Path) -> ModelConfig:
    """The architecture from `config.json`, stop ids from `generation_config.json`.

    Raises:
      ValueError: for a field whose effect is not implemented, or not known.
    """
    path = folder / "config.json"
    c = _read_object(path)
    _refuse_unsupported(path, c)
    _check_values(path, c)
    family, heads = c["model_type"], c["num_attention_heads"]
    has_bias = bool(c.get("attention_bias"))
    sizes = {
        "num_key_value_heads": heads,
        "head_dim": c["hidden_size"] // heads,
        "tie_word_embeddings": False,
    } | {name: value for name, value in c.items() if value}
    if sizes["tie_word_embeddings"] and any(folder.glob("*.safetensors")):
        sizes["tie_word_embeddings"] = not weights.has_own_head(folder)
    return ModelConfig(
        **{ours: sizes[name] for name, ours in _FIELDS.items()},
        rope=_rope(path, c),
        stop_ids=_stop_ids(folder, c),
        family=family,
        # Qwen2 has these biases always, and no field for them.
        qkv_bias=family == "qwen2" or has_bias,
        output_bias=family in ("llama", "qwen3") and has_bias,
        mlp_bias=family == "llama" and bool(c.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
    )


def _read_object(path: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:  # JSON, or UTF-8
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not an object")  # noqa: TRY004
    return found


_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
# Of these transformers has a default that is another field, or a constant of the family.
_OPTIONAL = ("num_key_value_heads", "head_dim")


def _check_values(path: pathlib.Path, c: dict[str, Any]) -> None:
    """Raises ValueError for a value that is missing, or that no model can have."""

    def check(name: str, kinds: Any, what: str, is_needed: bool) -> None:
        value = c.get(name)
        if value is None and not is_needed:
            return
        if value is None:
            raise ValueError(f"{path} has no {name}: is it the config of a model?")
        is_kind = isinstance(value, kinds) and not isinstance(value, bool)
        if not is_kind or not value > 0:
            raise ValueError(f"{path} sets {name}={value!r}: must be {what}")

    for name in _FIELDS.keys() - {"tie_word_embeddings", "rms_norm_eps"}:
        check(name, int, "a positive whole number", name not in _OPTIONAL)
    check("rms_norm_eps", (int, float), "a positive number", True)
    check("rope_theta", (int, float), "a positive number", False)
    for name in _FLAGS:
        if not isinstance(c.get(name), bool | None):
            shown = f"{path} sets {name}={c[name]!r}"
            raise ValueError(f"{shown}: must be true or false")  # noqa: TRY004
    size, heads = c["hidden_size"], c["num_attention_heads"]
    kv_heads = c.get("num_key_value_heads") or heads
    if heads % kv_heads or (size % heads and not c.get("head_dim")):
        raise ValueError(
            f"{path}: num_key_value_heads {kv_heads} must divide num_attention_heads "
            f"{heads}, and that hidden_size {size} unless head_dim is set"
        )


def _refuse_unsupported(path: pathlib.Path, c: dict[str, Any]) -> None:
    family = c.get("model_type")
    if not isinstance(family, str) or family not in _ARCHITECTURES:
        raise ValueError(
            f"{path} has model_type {family!r}; supported: {sorted(_ARCHITECTURES)}"
        )
    if quantization := c.get("quantization_config"):
        raise ValueError(
            f"{path}: the weights are quantised ({_kind_of(quantization)}); pfjax trains "
            "and computes in bfloat16 or float32: take the checkpoint that they were made "
            "from, or dequantise them (in transformers, model.dequantize() and "
            "save_pretrained)"
        )
    architectures = c.get("architectures") or [_ARCHITECTURES[family]]
    # Defaults of transformers; a window as wide as the positions hides nothing.
    is_windowed = c.get("use_sliding_window", family == "mistral")
    window = c.get("sliding_window", 4096) if is_windowed else None
    positions = c.get("max_position_embeddings") or 0
    has_window = window is not None and window < positions
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
    # Off, or nothing: `pruned_heads` is {} in folders of transformers 4.
    is_off = lambda value: value is None or value is False or value in ([], {})
    is_known = lambda name: name in _KNOWN or _INERT.fullmatch(name)
    unknown = {k: v for k, v in c.items() if not (is_known(k) or is_off(v))}
    if unknown:
        raise ValueError(
            f"{path} has fields that pfjax does not know, and that might change what "
            f"the model computes: {unknown}; remove them if they do not"
        )


def _kind_of(quantization: dict[str, Any]) -> str:
    """Names the format of quantised weights: "bitsandbytes, 4 bits"."""
    q = quantization
    bits = next((n for n in (4, 8) if q.get(f"load_in_{n}bit")), q.get("bits"))
    method = q.get("quant_method") or ("bitsandbytes" if bits else "unknown format")
    return f"{method}, {bits} bits" if bits else method


def _rope(path: pathlib.Path, c: dict[str, Any]) -> rope.RopeConfig:
    """Both spellings: transformers 4 (`rope_scaling`) and 5 (`rope_parameters`)."""
    p = c.get("rope_parameters") or c.get("rope_scaling") or {}
    are_numbers = isinstance(p, dict) and not any(
        isinstance(v, list | dict) or (isinstance(v, str) and "type" not in k)
        for k, v in p.items()
    )
    if not are_numbers:
        raise ValueError(
            f"{path} sets rope_scaling (rope_parameters) {p}: must be an object of numbers"
        )
    kind = p.get("rope_type") or p.get("type") or "default"
    is_partial = p.get("partial_rotary_factor", 1.0) != 1.0
    said = f"{path} sets rope_scaling (rope_parameters) {p}"
    if set(p) - _ROPE_READ or kind not in rope.KINDS or is_partial:
        raise ValueError(f"{said}: not supported")
    if kind != "default" and not p.get("factor"):
        raise ValueError(f"{said} but no factor")
    for field, same in (("rope_theta", p.get("rope_theta")), ("rope_scaling", p)):
        if c.get("rope_parameters") and c.get(field) not in (None, same):
            raise ValueError(
                f"{path} sets {field}={c[field]} beside rope_parameters={p}, and they "
                "differ; keep one"
            )
    name = "original_max_position_embeddings"
    original = p.get(name) or c.get(name, c["max_position_embeddings"])
    fields = {k: float(p[k]) for k in _ROPE_FIELDS if p.get(k) and k != "truncate"}
    fields["attention_factor"] = _yarn_attention_factor(p) if kind == "yarn" else 1.0
    return rope.RopeConfig(
        theta=float(p.get("rope_theta") or c.get("rope_theta") or 10_000.0),
        kind=kind,
        original_positions=int(original) if kind in ("yarn", "llama3") else 0,
        truncate=bool(p.get("truncate", True)),
        **fields,
    )


def _yarn_attention_factor(p: dict[str, Any]) -> float:
    """YaRN's temperature, as a factor of cosine and sine: 0.1 m ln(factor) + 1."""
    if p.get("attention_factor") is not None:
        return float(p["attention_factor"])
    of = lambda m: 0.1 * m * math.log(max(p["factor"] or 1.0, 1.0)) + 1.0
    has_both = p.get("mscale") and p.get("mscale_all_dim")
    return of(p["mscale"]) / of(p["mscale_all_dim"]) if has_both else of(1.0)


def _stop_ids(folder: pathlib.Path, config: dict[str, Any]) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    generation = _read_object(path) if path.is_file() else {}
    found = [x.get("eos_token_id") for x in (config, generation)]
    lists = [x if isinstance(x, list) else [x] for x in found if x is not None]
    ids = [x for some in lists for x in some]
    for x in ids:
        if not isinstance(x, int) or isinstance(x, bool) or x < 0:
            raise ValueError(f"{folder} sets eos_token_id={x!r}: must be token ids")
    return tuple(sorted(set(ids)))


def to_json(c: ModelConfig, dtype: str) -> dict[str, Any]:
    """A minimal `config.json` that `read` reads back as `c`, without its `dtype`."""
    kind = c.rope.kind
    parameters: dict[str, Any] = {"rope_theta": c.rope.theta, "rope_type": kind}
    if kind in ("yarn", "llama3"):
        parameters["original_max_position_embeddings"] = c.rope.original_positions
    parameters |= {name: getattr(c.rope, name) for name in rope.KINDS[kind]}
    out = {
        "architectures": [_ARCHITECTURES[c.family]],
        "model_type": c.family,
        **{name: getattr(c, ours) for name, ours in _FIELDS.items()},
        "hidden_act": "silu",
        "rope_parameters": parameters,
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

"""`config.json` of Hugging Face <-> `ModelConfig`.

A field that is neither read here nor known to be without effect is an error that names
it: a wrong rope base or an ignored scaling gives fluent and wrong text.
"""

import math
import pathlib
import re
from typing import Any

from pfjax.infra import storage
from pfjax.model import rope, weights
from pfjax.model.config import FULL, SLIDING, ModelConfig
from pfjax.model.families import FAMILIES

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
    "architectures", "auto_map", "dtype", "eos_token_id", "layer_types", "model_type",
    "original_max_position_embeddings", "rope_parameters", "rope_scaling", "rope_theta",
    "sliding_window", "torch_dtype",
}  # fmt: skip
# Without effect on the function that is computed: names, other tokens, what is recorded of
# where a folder comes from, settings of training and of `generate`.
_INERT = re.compile(
    r"_.*|.*_token_id|unsloth_.*|transformers\.js.*|output_.*|.*_dropout|.*_pdrop"
    r"|(num_)?(beams?|beam_groups|return_sequences)|(max|min)_length|(top|typical)_[kp]"
    r"|attn_implementation|bad_words_ids|(begin_)?suppress_tokens|cache_implementation"
    r"|chunk_size_feed_forward"
    r"|diversity_penalty|do_sample|early_stopping|exponential_decay_length_penalty"
    r"|finetuning_task|gradient_checkpointing|id2label|initializer_range|is_decoder"
    r"|is_llama_config|label2id|length_penalty|loss_type|mamba_ssm_dtype"
    r"|max_sequence_length|mtp_.*|(encoder_)?no_repeat_ngram_size|prefix"
    r"|pretraining_tp|problem_type"
    r"|remove_invalid_values|repetition_penalty|return_dict(_in_generate)?"
    r"|task_specific_params|temperature|tokenizer_class|torchscript"
    r"|transformers_version|use_bfloat16|use_cache"
)


def read(folder: pathlib.Path) -> ModelConfig:
    """The architecture from `config.json`, stop ids from `generation_config.json`.

    Raises:
      ValueError: for a field whose effect is not implemented, or not known.
    """
    path = folder / "config.json"
    found = read_object(path)
    try:
        given = language_part(found)
        family = _family(given)
        c = _with_defaults(family, given)
        _refuse_unsupported(family, c)
        _check_values(family, c)
        shared = family.read_ropes(c) | _windows(family, c)
        own = _own_fields(family, c)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    heads = c["num_attention_heads"]
    sizes = {
        "num_key_value_heads": heads,
        "head_dim": c["hidden_size"] // heads,
        "tie_word_embeddings": False,
    } | {name: value for name, value in c.items() if value}
    if sizes["tie_word_embeddings"] and any(folder.glob("*.safetensors")):
        sizes["tie_word_embeddings"] = not weights.has_own_head(folder)
    shared |= {ours: sizes[name] for name, ours in _FIELDS.items()}
    stop_ids = _stop_ids(folder, c)
    try:
        return family(stop_ids=stop_ids, **shared, **own)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error


def language_part(c: dict[str, Any]) -> dict[str, Any]:
    """Of a config of a model that reads images too, that of its language model by itself;
    any other config as it is.

    Raises:
      ValueError: if the language model is not that of the family.
    """
    wrappers = {x.wrapper.model_type: x for x in FAMILIES.values() if x.wrapper}
    name = c.get("model_type")
    family = wrappers.get(name) if isinstance(name, str) else None
    if family is None:
        return c
    text, wrapper = c.get("text_config"), family.wrapper
    if not isinstance(text, dict):
        raise ValueError(f"sets text_config={text!r}: must be an object")  # noqa: TRY004
    if (inner := text.get("model_type", family.model_type)) != family.model_type:
        raise ValueError(f"sets text_config.model_type={inner!r}: not supported")
    if c.get("architectures", [wrapper.architecture]) != [wrapper.architecture]:
        raise ValueError(f"sets architectures={c['architectures']!r}: not supported")
    around = {"text_config", "model_type", "architectures", *wrapper.fields}
    outer = {k: v for k, v in c.items() if k not in around and v is not None}
    names = {"model_type": family.model_type, "architectures": [family.architecture]}
    return text | outer | names


# Of these null says something else than what is taken where they are not there.
_NULLABLE = ("head_dim", "sliding_window")


def _with_defaults(family: type[ModelConfig], c: dict[str, Any]) -> dict[str, Any]:
    for name, ours in family.json_aliases.items():
        if name in c and c.get(ours) in (None, c[name]):
            c = {k: v for k, v in c.items() if k != name} | {ours: c[name]}
    if c.get("hidden_act") == "swish":  # as transformers calls silu too
        c = c | {"hidden_act": "silu"}
    is_left_out = lambda x: x not in c or (c[x] is None and x not in _NULLABLE)
    return c | {k: v for k, v in family.json_defaults.items() if is_left_out(k)}


def _own_fields(family: type[ModelConfig], c: dict[str, Any]) -> dict[str, Any]:
    """The fields that only a family has, where they are set."""
    found = {}
    for name in family.own_fields():
        value, default = c.get(name), getattr(family, name)
        if value is None:
            continue
        value = tuple(value) if isinstance(value, list) else value
        if type(value) is not type(default):
            raise ValueError(f"sets {name}={c[name]!r}: not a {type(default).__name__}")
        if type(value) is int and value < 1:
            raise ValueError(f"sets {name}={value}: must be positive")
        found[name] = value
    return found


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """What a JSON file says; ValueError, with its name, if that is no object."""
    found = storage.read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not an object")  # noqa: TRY004
    return found


_FLAGS = ("tie_word_embeddings", "use_sliding_window")
_NUMBERS = ("original_max_position_embeddings", "sliding_window")
# Left out, they are another field or a constant of the family.
_OPTIONAL = ("num_key_value_heads", "head_dim")


def _check_values(family: type[ModelConfig], c: dict[str, Any]) -> None:
    """Raises ValueError for a value that is missing, or that no model can have."""

    def check(name: str, kinds: Any, what: str, is_needed: bool) -> None:
        value = c.get(name)
        if value is None and not is_needed:
            return
        if value is None:
            raise ValueError(f"has no {name}: is it the config of a model?")
        is_kind = isinstance(value, kinds) and not isinstance(value, bool)
        if not is_kind or not 0 < value < math.inf:
            raise ValueError(f"sets {name}={value!r}: must be {what}")

    for name in _FIELDS.keys() - {"tie_word_embeddings", "rms_norm_eps"}:
        check(name, int, "a positive whole number", name not in _OPTIONAL)
    counts = {name for name, x in family.json_defaults.items() if type(x) is int}
    for name in (counts - _FIELDS.keys() - {"max_window_layers"}).union(_NUMBERS):
        check(name, int, "a positive whole number", False)
    check("rms_norm_eps", (int, float), "a positive number", True)
    for name in ("rope_theta", "rope_local_base_freq"):
        check(name, (int, float), "a positive number", False)
    if c.get("max_window_layers") != 0:
        check("max_window_layers", int, "a whole number", False)
    for name in _FLAGS:
        if not isinstance(c.get(name), bool | None):
            raise ValueError(f"sets {name}={c[name]!r}: must be true or false")  # noqa: TRY004
    size, heads = c["hidden_size"], c["num_attention_heads"]
    kv_heads = c.get("num_key_value_heads") or heads
    if heads % kv_heads or (size % heads and not c.get("head_dim")):
        raise ValueError(
            f"sets num_key_value_heads {kv_heads}, which must divide num_attention_heads "
            f"{heads}, and that hidden_size {size} unless head_dim is set"
        )
    if (c.get("head_dim") or size // heads) % 2:
        raise ValueError(
            f"has heads of an odd width, by head_dim or hidden_size {size}"
        )


def _family(c: dict[str, Any]) -> type[ModelConfig]:
    name = c.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"has model_type {name!r}; supported: {sorted(FAMILIES)}")
    return FAMILIES[name]


def _refuse_unsupported(family: type[ModelConfig], c: dict[str, Any]) -> None:
    if quantization := c.get("quantization_config"):
        raise ValueError(
            f"says that the weights are quantised ({_kind_of(quantization)}); pfjax trains "
            "and computes in bfloat16 or float32: take the checkpoint that they were made "
            "from, or dequantise them (in transformers, model.dequantize() and "
            "save_pretrained)"
        )
    unsupported = {
        "architectures": (c.get("architectures") or [family.architecture])
        != [family.architecture],
        "auto_map": "auto_map" in c,  # remote code is never run
        **{k: c.get(k, x) != x for k, x in family.json_constants.items()},
        **{k: c.get(k, x) not in (x, None) for k, x in family.json_implied.items()},
    }
    for field, is_set in unsupported.items():
        if is_set:
            raise ValueError(f"sets {field}={c.get(field)!r}: not supported")
    # Off, or nothing: `pruned_heads` is {} in folders of transformers 4.
    is_off = lambda value: value is None or value in (False, 0, [], {})
    known = _KNOWN | {
        *family.json_constants, *family.json_implied, *family.own_fields(),
        *family.json_fields,
    }  # fmt: skip
    is_known = lambda name: name in known or _INERT.fullmatch(name)
    unknown = {k: v for k, v in c.items() if not (is_known(k) or is_off(v))}
    if unknown:
        raise ValueError(
            f"has fields that pfjax does not know, and that might change what the model "
            f"computes: {unknown}; remove them if they do not"
        )


def _windows(family: type[ModelConfig], c: dict[str, Any]) -> dict[str, Any]:
    """Which layers attend to a window, if some do, and its width."""
    pattern, window = _pattern(family, c), c.get("sliding_window")
    types = c.get("layer_types") or pattern
    is_list = isinstance(types, list) and len(types) == len(pattern)
    is_known = is_list and all(x in (FULL, family.other_type) for x in types)
    # Families without this field do as their pattern says.
    if not is_known or ("layer_types" not in family.json_fields and types != pattern):
        raise ValueError(f"sets layer_types={types!r}: not supported")
    if family.other_type not in types:
        return {}
    if family.other_type != SLIDING:
        return {"layer_types": tuple(types)}
    if window is None:
        raise ValueError(f"sets layer_types={types!r}, but no sliding_window")
    # One as wide as the positions hides nothing.
    width = window if window < c["max_position_embeddings"] else 0
    return {"layer_types": tuple(types), "sliding_window": width}


def _kind_of(quantization: Any) -> str:
    """Names the format of quantised weights: "bitsandbytes, 4 bits"."""
    if not isinstance(q := quantization, dict):
        return str(q)
    bits = next((n for n in (4, 8) if q.get(f"load_in_{n}bit")), q.get("bits"))
    method = q.get("quant_method") or ("bitsandbytes" if bits else "unknown format")
    return f"{method}, {bits} bits" if bits else method


def _stop_ids(folder: pathlib.Path, config: dict[str, Any]) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    generation = read_object(path) if path.is_file() else {}
    found = [x.get("eos_token_id") for x in (config, generation)]
    lists = [x if isinstance(x, list) else [x] for x in found if x is not None]
    ids = [x for some in lists for x in some]
    for x in ids:
        if not isinstance(x, int) or isinstance(x, bool) or x < 0:
            raise ValueError(f"{folder} sets eos_token_id={x!r}: must be token ids")
    return tuple(sorted(set(ids)))


def _pattern(family: type[ModelConfig], c: dict[str, Any]) -> list[str]:
    """The `layer_types` of a config that has none."""
    layers = range(c["num_hidden_layers"])
    return [family.other_type if family.is_other(c, i) else FULL for i in layers]


def to_json(c: ModelConfig, dtype: str) -> dict[str, Any]:
    """A minimal `config.json` that `read` reads back as `c`, without its `dtype`."""
    out = {
        "architectures": [c.architecture],
        "model_type": c.model_type,
        **{name: getattr(c, ours) for name, ours in _FIELDS.items()},
        **c.json_constants,
        "rope_parameters": rope.to_json(c.rope),
        "eos_token_id": list(c.stop_ids) or None,
        "pad_token_id": None,  # some families have one beyond a small vocabulary
        "dtype": dtype,
    }
    if SLIDING in c.layer_types:
        out["sliding_window"] = c.sliding_window or c.max_positions
    if c.local_rope:
        out["rope_parameters"] = rope.to_json_by_type(c.rope, c.local_rope)
    out |= c.to_json()
    types = list(c.layer_types) or [FULL] * c.num_layers
    if types != _pattern(type(c), c.json_defaults | out):
        out["layer_types"] = types
    return out

"""GGUF files (llama.cpp) -> Hugging Face folders, each once, in a cache: all else sees
only the folder."""

import functools
import hashlib
import json
import pathlib
import re
import sys
import tempfile
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from pfjax.infra import storage
from pfjax.model import gguf_tokenizer, rope, weights

# Part of the cache's names: raised whenever the same file is converted differently.
_VERSION = 2
_FAMILIES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
_FIELDS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_INERT = ("vocab_size", "rope.scaling.finetuned")
_CAUSAL = "attention.causal"  # alone in that its absence means what is on
_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"


def find(path: epath.Path) -> epath.Path | None:
    """The GGUF file that a path means: itself, or the only one of a folder that is no
    Hugging Face folder; None if it means something else.

    Raises:
      ValueError: if the folder holds several.
    """
    if not path.is_dir():
        return path if path.suffix == ".gguf" else None
    files = sorted(path.glob("*.gguf"))
    has_other = lambda: any(path.glob("*.safetensors"))
    if not files or (path / "config.json").is_file() or has_other():
        return None
    if len(files) > 1:
        names = [file.name for file in files]
        raise ValueError(f"model folder {path} holds {names}: name one of them")
    return files[0]


def convert(path: pathlib.Path) -> pathlib.Path:
    """The folder of a GGUF file, written when it is asked for first.

    Tensors keep their type if all are of one (bfloat16 or float16), else they become
    float32, which holds whatever was quantised exactly.

    Raises:
      ValueError: if there is no such file, or it holds what pfjax does not read.
    """
    if not path.is_file():
        raise ValueError(f"model file {path} does not exist")
    stat = path.stat()
    seen = (_VERSION, str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    digest = hashlib.sha256(repr(seen).encode()).hexdigest()[:16]
    folder = storage.user_cache("gguf") / f"{path.stem}-{digest}"
    if folder.is_dir():
        return folder
    values, tensors = _read(path)
    config = _config(path, values, tensors)
    with (
        storage.named(folder),
        tempfile.TemporaryDirectory(prefix=".new-", dir=folder.parent) as beside,
    ):
        new = pathlib.Path(beside) / folder.name
        new.mkdir()
        gguf_tokenizer.write(path, values, new)
        print(f"{path} is converted, once, to {folder}", file=sys.stderr)
        lazy = _lazy_tensors(path, tensors, config)
        weights.write_lazy(lazy, new, np.dtype(config["dtype"]))
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        try:
            new.rename(folder)
        except OSError:  # another process was first
            if not folder.is_dir():
                raise
    return folder


def _read(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and tensors, by the names that GGUF has for them."""
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            f"{path}: the package that reads GGUF is not here: pip install pfjax[gguf]"
        ) from error
    try:
        reader = gguf.GGUFReader(path)
        values = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:
        raise ValueError(f"{path} cannot be read as GGUF: {error}") from error
    if values.get("split.count", 1) > 1:
        raise ValueError(
            f"{path} is one of {values['split.count']} parts: make them one with "
            "llama-gguf-split --merge"
        )
    for tensor in reader.tensors:
        try:
            gguf.dequantize(tensor.data[:1], tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"{path} holds {tensor.name} as {tensor.tensor_type.name}, which is not "
                "read: take the file in another type (Q8_0), or the model's folder"
            ) from error
    return values, {tensor.name: tensor for tensor in reader.tensors}


def _config(path: pathlib.Path, values: dict, tensors: dict) -> dict[str, Any]:
    """`config.json`. What is neither read nor known to be without effect is refused."""
    family = values.get("general.architecture")
    said = f"{path} is of architecture {family!r}"
    if family not in _FAMILIES:
        raise ValueError(f"{said}: not supported; supported: {sorted(_FAMILIES)}")
    own = {
        name.removeprefix(f"{family}."): _shortest(value)
        for name, value in values.items()
        if name.startswith(f"{family}.") and (value or name.endswith(_CAUSAL))
    }
    if own.get(_CAUSAL):
        del own[_CAUSAL]
    own = {name: value for name, value in own.items() if name not in _INERT}
    optional = ("attention.head_count_kv", "attention.key_length")
    if missing := [x for x in _FIELDS if x not in own and x not in optional]:
        raise ValueError(f"{said} and lacks {missing}")
    heads = own["attention.head_count"]
    own.setdefault("attention.head_count_kv", heads)
    own.setdefault("attention.key_length", own["embedding_length"] // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if own.get(name) == own["attention.key_length"]:
            del own[name]
    parameters = _rope(path, own, tensors)
    config = {name: own.pop(ours) for ours, name in _FIELDS.items()}
    if own:
        raise ValueError(f"{said} and sets {own}: not supported")
    token_id = lambda of: values.get(f"tokenizer.ggml.{of}_token_id")
    stops = {token_id("eos"), token_id("eot")} - {None}
    config |= {
        "architectures": [f"{_FAMILIES[family]}ForCausalLM"],
        "model_type": family,
        "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
        "hidden_act": "silu",
        "rope_parameters": parameters,
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": token_id("bos"),
        "eos_token_id": sorted(stops),
        "pad_token_id": token_id("padding"),
        "dtype": _dtype(tensors),
    }
    if family != "qwen2":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if family == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    return config


def _shortest(value: Any) -> Any:
    """GGUF has float32 where `config.json` has what a person wrote: 1e-05."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _rope(path: pathlib.Path, own: dict, tensors: dict) -> dict[str, Any]:
    """Takes what is about rope out of `own`."""
    theta = own.pop("rope.freq_base", 10_000.0)
    kind = own.pop("rope.scaling.type", "none")
    out = {"rope_theta": theta, "rope_type": "default" if kind == "none" else kind}
    factor = own.pop("rope.scaling.factor", None)
    original = own.pop("rope.scaling.original_context_length", None)
    if kind != "none":
        out["factor"] = factor
    if kind == "yarn" and original:
        out["original_max_position_embeddings"] = original
    if _ROPE_FACTORS not in tensors:
        return out
    # Of Llama 3's scaling GGUF has the result only; all models have the same three values.
    stretch, width = tensors[_ROPE_FACTORS].data, own["attention.key_length"]
    if np.all(stretch == 1.0):
        return out
    scaling = {"factor": float(np.max(stretch)), "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0}
    c = rope.RopeConfig(theta, "llama3", original_positions=8192, **scaling)
    plain = rope.frequencies(rope.RopeConfig(theta), width)
    wanted = plain / rope.frequencies(c, width)
    if kind != "none" or not np.allclose(stretch, wanted, rtol=1e-3):
        raise ValueError(
            f"{path} holds {_ROPE_FACTORS}, which are not those of Llama 3: not "
            "supported; take the model's Hugging Face folder"
        )
    scaling |= {"rope_type": "llama3", "original_max_position_embeddings": 8192}
    return out | scaling


def _dtype(tensors: dict) -> str:
    """That of the matrices, if vectors (float32 in every file) lose nothing by it."""
    types = {t.tensor_type.name for t in tensors.values() if len(t.shape) > 1}
    name = {"BF16": "bfloat16", "F16": "float16"}.get(min(types))
    if len(types) > 1 or name is None:
        return "float32"
    dtype = np.dtype({"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[name])
    vectors = [t.data for t in tensors.values() if len(t.shape) == 1]
    fits = all(np.array_equal(x, x.astype(dtype).astype(x.dtype)) for x in vectors)
    return name if fits else "float32"


def _lazy_tensors(path: pathlib.Path, tensors: dict, config: dict) -> dict[str, Any]:
    """By the names of Hugging Face: shapes, and functions that fetch the values."""
    import gguf

    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }

    def fetch(tensor: Any, num_heads: int) -> np.ndarray:
        x = gguf.dequantize(tensor.data, tensor.tensor_type)
        if num_heads:
            # llama.cpp rotates neighbours, so its Llamas have their rows permuted.
            pairs = x.reshape(num_heads, -1, 2, *x.shape[1:])
            x = pairs.swapaxes(1, 2).reshape(x.shape)
        return x.astype(np.dtype(config["dtype"]))

    out = {}
    for name, tensor in tensors.items():
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        part, is_llama = layer and layer[2], config["model_type"] == "llama"
        if part in _LAYER:
            of_hf = f"model.layers.{layer[1]}.{_LAYER[part]}.{layer[3]}"
        elif (module := name.removesuffix(".weight")) in _TOP:
            of_hf = f"{_TOP[module]}.weight"
        elif name == _ROPE_FACTORS:
            continue
        else:
            raise ValueError(
                f"{path} holds {name}: no tensor of a model that pfjax has"
            )
        shape = [int(n) for n in reversed(tensor.shape)]
        num_heads = heads.get(part, 0) if is_llama else 0
        out[of_hf] = shape, functools.partial(fetch, tensor, num_heads)
    return out

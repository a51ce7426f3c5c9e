"""The tokenizer in a GGUF file's metadata -> files of Hugging Face, without torch."""

import json
import pathlib
from typing import Any

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA_3 = ("llama-bpe", "llama3", "llama-v3")
# How text is cut before its bytes are merged, by the name of `tokenizer.ggml.pre`; None is
# GPT-2's way.
_SPLITS = {name: _SPLIT % "{1,3}" for name in _LLAMA_3} | {
    "qwen2": _SPLIT % "",
    "deepseek-r1-qwen": _SPLIT % "",
    "smollm": None,
    "gpt-2": None,
}
_CONTROL, _USER_DEFINED = 3, 4


def write(path: pathlib.Path, values: dict[str, Any], folder: pathlib.Path) -> None:
    """Writes the tokenizer of the metadata `values`, chat template included.

    Raises:
      ValueError: if it is none of bytes (GPT-2's kind), or cuts text in a way not known
        here, which would give other tokens than the model was trained with.
    """
    from transformers import PreTrainedTokenizerFast

    get = lambda name, default=None: values.get(f"tokenizer.ggml.{name}", default)
    kind, pre = get("model"), get("pre")
    # transformers makes a tokenizer of Qwen2's own of whatever stands beside a Qwen2: an
    # export would be read with other tokens.
    is_qwen2 = values["general.architecture"] == "qwen2"
    if kind != "gpt2" or pre not in _SPLITS or (is_qwen2 and "qwen" not in pre):
        raise ValueError(
            f"{path} has a tokenizer of model {kind!r}, pre {pre!r}; only gpt2 with "
            f"{sorted(_SPLITS)} are read: take the model's Hugging Face folder"
        )
    tokens = get("tokens")
    types = get("token_type", [1] * len(tokens))
    ids = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {f"{name}_token": get(f"{of}_token_id") for name, of in ids.items()}
    named = {name: tokens[i] for name, i in ids.items() if i is not None}
    special = [t for t, x in zip(tokens, types, strict=True) if x == _CONTROL]
    plain = [t for t, x in zip(tokens, types, strict=True) if x == _USER_DEFINED]
    try:
        merges = [tuple(pair.split(" ", 1)) for pair in get("merges")]
        backend = _backend(tokens, merges, pre, plain)
    except Exception as error:  # of kinds that only the library has
        raise ValueError(f"{path} has a damaged tokenizer: {error}") from error
    if get("add_bos_token", pre in _LLAMA_3):
        _prepend(backend, named["bos_token"], ids["bos_token"])
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=values.get("tokenizer.chat_template"),
        additional_special_tokens=[t for t in special if t not in named.values()],
        **named,
    ).save_pretrained(folder)
    # By the names of transformers 4, which 5 reads too.
    file = folder / "tokenizer_config.json"
    said = json.loads(file.read_text("utf-8")) | {
        "tokenizer_class": "PreTrainedTokenizerFast"
    }
    said["additional_special_tokens"] = said.pop("extra_special_tokens", [])
    file.write_text(json.dumps(said, indent=2) + "\n", "utf-8")


def _backend(
    tokens: list[str],
    merges: list[tuple[str, ...]],
    pre: str,
    plain: list[str],
) -> Any:
    import tokenizers
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(tokens)}
    # Llama 3 takes a piece that is a token whole, whatever its merges.
    backend = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, ignore_merges=pre in _LLAMA_3)
    )
    split, steps = _SPLITS[pre], []
    if pre == "smollm":
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if split is not None:
        steps.append(pre_tokenizers.Split(tokenizers.Regex(split), "isolated"))
    how = {"add_prefix_space": False, "use_regex": split is None}
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(**how)]
    )
    if "qwen" in pre:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(t, normalized=False) for t in plain])
    return backend


def _prepend(backend: Any, token: str, token_id: int) -> None:
    """Makes `token` the first of every text that is encoded."""
    from tokenizers import processors

    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                f"{token} $A", special_tokens=[(token, token_id)]
            ),
        ]
    )

"""Reward functions that come with pfjax; they run in processes as those of one's own do."""

import importlib.util
import re
import warnings
from collections.abc import Callable
from typing import Any

from pfjax.infra import storage
from pfjax.tasks import processes

_BLOCK = re.compile(r"```(?:python|py)?\s*\n(.*?)(?:```|\Z)", re.DOTALL)
_MEMORY_BYTES = 2 * 2**30
_BATCH = 8  # responses that a reward model scores at once


def compiles_python(completions: list, **unused) -> list[float]:
    """1 for a response whose last code block (all of it, without one) is valid Python.

    Nothing of it is run. What takes too much time or memory to compile fails.
    """
    processes.limit_memory(_MEMORY_BYTES)
    return [float(_compiles(_text(completion))) for completion in completions]


def regex(pattern: str) -> Callable:
    """1 for a response in which the pattern is found, by Python's `re.search`.

    Raises:
      ValueError: if it is none.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    found = lambda x: compiled.search(_text(x)) is not None
    return lambda completions, **unused: [float(found(x)) for x in completions]


def check_reward_model(folder: str) -> None:
    """Raises ValueError if there is no reward model that could be loaded."""
    config = storage.place(folder) / "config.json"
    if not storage.exists(config):
        raise ValueError(f"reward_model:{folder}: there is no {config}")
    kinds = storage.read_json(config).get("architectures") or []
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        found = ", ".join(kinds) or "nothing"
        raise ValueError(
            f"reward_model:{folder}: needs a model ForSequenceClassification, {config} "
            f"names {found}"
        )
    if importlib.util.find_spec("torch") is None:
        raise ValueError(f"reward_model:{folder}: needs PyTorch: pip install torch")


def reward_model(folder: str) -> Callable:
    """The score that a sequence classifier of one label gives prompt and completion, put
    in its chat template where it has one.

    Args:
      folder: in Hugging Face format.

    Raises:
      ValueError: if it has several labels, or no tokenizer that pads.
    """
    import torch
    import transformers

    folder = storage.local_copy(folder)
    tok = transformers.AutoTokenizer.from_pretrained(folder)
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load(folder, dtype="auto").to(device).eval()
    if model.config.num_labels != 1:
        found = f"{folder} has {model.config.num_labels} labels"
        raise ValueError(f"{found}: a reward model has one")
    if tok.pad_token is None:
        if tok.eos_token is None:
            raise ValueError(
                f"{folder}: its tokenizer has neither pad_token nor eos_token"
            )
        tok.pad_token = tok.eos_token
    # By which a decoder finds the last token.
    model.config.get_text_config().pad_token_id = tok.pad_token_id

    @torch.inference_mode()
    def scores(prompts: list, completions: list, **unused) -> list[float]:
        pairs = zip(prompts, completions, strict=True)
        rows, out = [_as_ids(tok, *pair) for pair in pairs], []
        for i in range(0, len(rows), _BATCH):
            some = tok.pad({"input_ids": rows[i : i + _BATCH]}, return_tensors="pt")
            out += model(**some.to(device)).logits[:, 0].float().tolist()
        return out

    return scores


def _as_ids(tok: Any, prompt: str | list[dict], completion: str | list[dict]) -> list:
    """Prompt and completion as tokens of a reward model."""
    if tok.chat_template is None:
        asked = (
            prompt
            if isinstance(prompt, str)
            else "\n".join(m["content"] for m in prompt)
        )
        return tok(asked + _text(completion))["input_ids"]
    is_text = isinstance(prompt, str)
    chat = [{"role": "user", "content": prompt}] if is_text else prompt
    chat = [*chat, {"role": "assistant", "content": _text(completion)}]
    text = tok.apply_chat_template(chat, tokenize=False)
    return tok(text, add_special_tokens=False)["input_ids"]


def _text(completion: str | list[dict]) -> str:
    """Of a completion as text or as messages."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _compiles(text: str) -> bool:
    blocks = _BLOCK.findall(text)
    code = blocks[-1] if blocks else text
    try:
        with warnings.catch_warnings(action="ignore"):
            compile(code, "response", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        return False
    return bool(code.strip())

"""Text <-> token ids: chat template, stop ids."""

import dataclasses
import datetime
import functools
import json
import os
import pathlib
import string
from typing import Any

from pfjax.model import hub
from pfjax.model.config import ModelConfig
from pfjax.model.transformer import Policy

# What a template is given in the place of transformers' function of this name, which knows no
# time but now, and is the only one that transformers hands on to it. The line break at the
# end is none of what is rendered.
_STRFTIME = (
    "{%% macro strftime_now(format) %%}{%% set out = namespace(text=format) %%}"
    "{%% for code, value in %s %%}{%% set out.text = out.text.replace(code, value) %%}"
    "{%% endfor %%}{{ out.text }}{%% endmacro %%}\n"
)
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load(
    path_or_hub_id: str | os.PathLike, template_kwargs: str = "", clock: str = ""
) -> Any:
    """The tokenizer of a model folder (a `transformers` tokenizer).

    Args:
      template_kwargs: arguments of its chat template whenever it is used, such as
        `{"enable_thinking": false}`; "" for none.
      clock: the time that a chat template is told if it asks, ISO 8601; "" for now. It is
        the same in all prompts.

    Raises:
      ValueError: if the folder holds none that loads without remote code, or the
        arguments are no JSON object.
    """
    folder = hub.resolve(path_or_hub_id)
    said = f"no tokenizer could be read from {folder}"
    # Without any, transformers 5 makes an empty tokenizer of the model's type.
    if not is_in(folder):
        raise ValueError(f"{said}: none of {_VOCABULARIES} is there")
    try:
        tokenizer = _read(folder)
    except Exception as error:
        raise ValueError(f"{said}: {error}") from error
    if asks_for_time(folder):
        told = _told(_time(clock or now()))
        template = tokenizer.chat_template
        if isinstance(template, dict):
            named = {name: told + text for name, text in template.items()}
            tokenizer.chat_template = named
        elif template is not None:
            tokenizer.chat_template = told + template
    if template_kwargs:
        bound = functools.partial(
            tokenizer.apply_chat_template, **_parse(template_kwargs)
        )
        tokenizer.apply_chat_template = bound
    return tokenizer


def _read(folder: pathlib.Path) -> Any:
    """As `AutoTokenizer`, with the tokens that the folder's own file gives."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    model = folder / "tokenizer.model"
    if not (folder / "tokenizer.json").is_file():
        # Otherwise it is none of sentencepiece.
        if model.is_file() and model.read_bytes().startswith(b"\n"):
            return _read_sentencepiece(folder)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if type(found) is PreTrainedTokenizerFast:
        return found
    # Other classes of transformers 5 take no more than the vocabulary from the file, and cut
    # text as the first model of their name did.
    plain = PreTrainedTokenizerFast.from_pretrained(folder)
    known, given = plain.get_vocab(), plain.special_tokens_map
    of_class = found.special_tokens_map.items()
    missing = {k: x for k, x in of_class if k not in given and str(x) in known}
    if missing:
        plain = PreTrainedTokenizerFast.from_pretrained(folder, **missing)
    return plain


def _read_sentencepiece(folder: pathlib.Path) -> Any:
    """The tokenizer of a `tokenizer.model` alone, as transformers 4 made it: with a BOS unless
    the folder says otherwise, and spaces as sentencepiece itself has them."""
    from tokenizers import decoders, normalizers
    from transformers import GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

    said = {}
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        said |= json.loads(path.read_text("utf-8")) if path.is_file() else {}
    of = str(said.get("tokenizer_class") or said.get("model_type")).lower()
    adds = {"add_bos_token": said.get("add_bos_token", True)}
    adds |= {"add_eos_token": said.get("add_eos_token", False)}
    if of.startswith("gemma"):
        return GemmaTokenizer.from_pretrained(folder, **adds)
    if said.get("legacy") is False:
        return LlamaTokenizer.from_pretrained(folder, **adds)
    made = PreTrainedTokenizerFast.from_pretrained(folder, **adds)
    backend, has_prefix = made.backend_tokenizer, said.get("add_prefix_space", True)
    spaces = normalizers.Replace(" ", "▁")
    first = [normalizers.Prepend("▁")] if has_prefix is not False else []
    backend.normalizer = normalizers.Sequence([*first, spaces])
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    back += [decoders.Strip(" ", 1, 0)] if first else []
    backend.decoder = decoders.Sequence(back)
    return made


def is_in(folder: pathlib.Path) -> bool:
    """Whether a model folder has a tokenizer."""
    return any((folder / name).is_file() for name in _VOCABULARIES)


def now() -> str:
    """The local time, ISO 8601, to the second."""
    return datetime.datetime.now().isoformat(timespec="seconds")


def _time(clock: str) -> datetime.datetime:
    try:
        return datetime.datetime.fromisoformat(clock)
    except ValueError:
        raise ValueError(f"clock must be a time in ISO 8601, got {clock!r}") from None


def _told(time: datetime.datetime) -> str:
    """What comes before a chat template so that it is told a time."""
    codes = [f"%{flag}{c}" for c in string.ascii_letters for flag in ("", "-")]
    values = [(code, time.strftime(code)) for code in codes]
    return _STRFTIME % [x for x in values if x[0] != x[1]]


def asks_for_time(path_or_hub_id: str | os.PathLike) -> bool:
    """Whether the chat template of a model folder writes today's date into prompts."""
    folder = hub.resolve(path_or_hub_id)
    files = [folder / "tokenizer_config.json", *folder.glob("*.jinja")]
    files += folder.glob("additional_chat_templates/*.jinja")
    return any(f.is_file() and "strftime_now" in f.read_text("utf-8") for f in files)


def _parse(template_kwargs: str) -> dict[str, Any]:
    try:
        found = json.loads(template_kwargs)
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(  # noqa: TRY004
            f"chat_template_kwargs must be a JSON object, got {template_kwargs!r}"
        )
    return found


def encode_prompt(
    tokenizer: Any, prompt: str | list[dict[str, str]], *, is_raw: bool = False
) -> list[int]:
    """Token ids of a prompt, up to where the response begins.

    Messages, and a string when the tokenizer has a chat template, go through the
    template (a string as one user message); else, or if it `is_raw`, the string is
    encoded as it is.

    Raises:
      ValueError: for messages when the tokenizer has no chat template, or when it renders
        nothing of the question.
    """
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if isinstance(prompt, str):
        if is_raw or not has_template:
            return tokenizer.encode(prompt)
        prompt = [{"role": "user", "content": prompt}]
    if not has_template:
        raise ValueError(
            "the prompts are messages but the tokenizer has no chat template; "
            "give prompts as plain strings"
        )
    how = {"tokenize": False, "add_generation_prompt": True}
    render = lambda messages: tokenizer.apply_chat_template(messages, **how)
    text = render(prompt)
    asked = prompt[-1].get("content") if prompt else None
    if isinstance(asked, str) and asked.strip() not in text:
        # It may have been trimmed or changed, or left out whatever it is.
        other = [*prompt[:-1], {**prompt[-1], "content": f"pfjax {asked} pfjax"}]
        if text == render(other):
            raise ValueError(
                f"the chat template leaves out the text of the prompt ({asked!r:.60}): it may "
                "be for content in parts; give the model another chat_template.jinja, or "
                "prompts as plain text"
            )
    # The template writes a BOS itself where the model wants one.
    return tokenizer.encode(text, add_special_tokens=False)


def oddities(
    tokenizer: Any,
    prompt: str | list[dict[str, str]],
    ids: list[int],
    stop_ids: tuple[int, ...],
) -> list[str]:
    """What is strange about a prompt and its token ids, as ends of "prompts ...".

    Most often it has been rendered before, or its tokenizer adds what the chat template
    has already written.
    """
    texts = [prompt] if isinstance(prompt, str) else [m["content"] for m in prompt]
    found = [
        x for x in tokenizer.all_special_tokens if any(x in text for text in texts)
    ]
    bos = tokenizer.bos_token
    is_odd = {
        f"hold special tokens, which the model reads as such ({found})": bool(found),
        f"begin with {bos} twice": bos and ids[:2] == [tokenizer.bos_token_id] * 2,
        "end with a token that ends a response": bool(ids) and ids[-1] in stop_ids,
    }
    return [what for what, is_so in is_odd.items() if is_so]


def stop_ids(tokenizer: Any, config: ModelConfig) -> tuple[int, ...]:
    """Every token that ends a response: the config's, the tokenizer's own, and what its
    chat template ends a turn with (base models of Qwen name that in neither).

    Raises:
      ValueError: if there is none, or one that the model cannot draw.
    """
    ids = _stop_ids(tokenizer, config)
    if not ids:
        raise ValueError(
            "neither the model's config nor its tokenizer names an end-of-sequence "
            "token: responses would never stop"
        )
    if beyond := [i for i in ids if i >= config.vocab_size]:
        raise ValueError(
            f"responses end with {tokenizer.convert_ids_to_tokens(beyond)} (ids {beyond}), "
            f"which a model with a vocabulary of {config.vocab_size} cannot draw: is this "
            "its tokenizer?"
        )
    return tuple(sorted(ids))


def with_stop_ids(policy: Policy) -> Policy:
    """The policy with all tokens that end its responses, if it brings its tokenizer."""
    config = policy.config
    if (found := policy.tokenizer) is None:
        return policy
    ids = {i for i in _stop_ids(found, config) if i < config.vocab_size}
    config = dataclasses.replace(config, stop_ids=tuple(sorted(ids)))
    return policy._replace(config=config)


def _stop_ids(tokenizer: Any, config: ModelConfig) -> set[int]:
    ids = {*config.stop_ids, tokenizer.eos_token_id, *_ends_of_turn(tokenizer)}
    return ids - {None}


def split_stops(
    tokenizer: Any, strings: tuple[str, ...]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Of stop strings, the ids of those that are one special token, which `decode` leaves
    out, so that they would never be seen in the text; and the others."""
    tokens = tokenizer.added_tokens_decoder.items()
    special = {token.content: i for i, token in tokens if token.special}
    ids = tuple(special[x] for x in strings if x in special)
    return ids, tuple(x for x in strings if x not in special)


def _ends_of_turn(tokenizer: Any) -> list[int]:
    """The special token that a chat template puts behind an assistant's message."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    turns = [("user", "?"), ("assistant", "pfjax")]
    messages = [{"role": role, "content": text} for role, text in turns]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # noqa: BLE001, a template without turns of an assistant
        return []
    _, marker, behind = text.rpartition("pfjax")
    if not marker:  # it changes what messages say, or leaves them out
        return []
    behind = behind.lstrip()
    specials = tokenizer.get_added_vocab()
    return [specials[t] for t in specials if t and behind.startswith(t)]


def decode(tokenizer: Any, ids: list[int]) -> str:
    """The text of a response without special tokens."""
    return tokenizer.decode(ids, skip_special_tokens=True)

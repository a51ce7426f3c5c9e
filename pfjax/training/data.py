"""Prompts from files or the hub, and an order of them that a checkpoint can hold."""

import collections
import json
import logging
import pathlib
from typing import Any, NamedTuple

import numpy as np

from pfjax.policy import hf, tokenizer

_LOG = logging.getLogger(__name__)
_PROMPT_FIELDS = ("prompt", "problem", "question")


class PromptSet(NamedTuple):
    """Prompts that fit the limit, tokenized."""

    texts: list[str]  # for people: the last message of each
    tokens: list[list[int]]
    answers: list[str | None]


def load_prompts(
    source: str, tok: Any, max_prompt_tokens: int, suffix: str = ""
) -> PromptSet:
    """Reads prompts from JSONL, Parquet, or a hub data set (its "train" split).

    A row has `prompt` (or `problem`, or `question`): a string, or messages; and
    perhaps `answer`, or `reward_model.ground_truth` as in verl's files. Answers
    serve evaluation only.

    Args:
      source: a `.jsonl`/`.json`/`.parquet` file, a hub name with an optional
        `:split`, or `pfjax/toy/<file>` for the files that ship with pfjax.
      tok: a tokenizer.
      max_prompt_tokens: longer prompts are skipped, with one warning.
      suffix: added to each prompt, to its last message; no braces are interpreted.

    Raises:
      ValueError: if there is no such source, a row has no prompt (naming file and
        line), or no prompt is left.
    """
    rows = _read_rows(source)
    texts, tokens, answers, too_long = [], [], [], 0
    for where, row in rows:
        prompt = _prompt_of(where, row)
        if isinstance(prompt, str):
            prompt += suffix
        else:
            *before, last = prompt
            prompt = [*before, {**last, "content": last["content"] + suffix}]
        ids = tokenizer.encode_prompt(tok, prompt)
        if len(ids) > max_prompt_tokens:
            too_long += 1
            continue
        texts.append(prompt if isinstance(prompt, str) else prompt[-1]["content"])
        tokens.append(ids)
        answers.append(_answer_of(row))
    if too_long:
        _LOG.warning(
            "%s: skipped %d of %d prompts longer than %d tokens",
            source, too_long, too_long + len(texts), max_prompt_tokens,
        )  # fmt: skip
    if not texts:
        reason = "all are too long" if too_long else "it is empty"
        raise ValueError(f"no prompts left in {source}: {reason}")
    repeated = sum(n - 1 for n in collections.Counter(map(tuple, tokens)).values())
    if repeated:
        _LOG.warning("%s: %d prompts are duplicates", source, repeated)
    return PromptSet(texts, tokens, answers)


def _read_rows(source: str) -> list[tuple[str, dict[str, Any]]]:
    """(where it stands, row) of each row."""
    if source.startswith(f"{hf.EMBEDDED}/"):
        path = hf.resolve(hf.EMBEDDED) / source.removeprefix(f"{hf.EMBEDDED}/")
    else:
        path = pathlib.Path(source).expanduser()
    if path.suffix in (".jsonl", ".json") and path.is_file():
        return _read_jsonl(path)
    import datasets

    datasets.disable_progress_bars()
    if path.suffix == ".parquet" and path.is_file():
        try:
            table = datasets.Dataset.from_parquet(str(path))
        except Exception as error:
            raise ValueError(f"{path} cannot be read as Parquet: {error}") from error
    elif path.suffix in (".jsonl", ".json", ".parquet"):
        raise ValueError(f"prompt file {path} does not exist")
    else:
        name, _, split = source.partition(":")
        try:
            table = datasets.load_dataset(name, split=split or "train")
        except Exception as error:
            raise ValueError(
                f"prompts {source!r} are no .jsonl or .parquet file and could not be "
                f"loaded from the Hugging Face hub: {error}"
            ) from error
    return [(f"{source} row {i}", row) for i, row in enumerate(table)]


def _read_jsonl(path: pathlib.Path) -> list[tuple[str, dict[str, Any]]]:
    # Line by line rather than through `datasets`, whose errors name no line.
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{where}: a row must be a JSON object, got {line!r}")  # noqa: TRY004
            rows.append((where, row))
    return rows


def _prompt_of(where: str, row: dict[str, Any]) -> str | list[dict[str, str]]:
    field = next((f for f in _PROMPT_FIELDS if row.get(f)), None)
    if field is None:
        raise ValueError(
            f"{where}: no prompt; expected one of {_PROMPT_FIELDS}, got {sorted(row)}"
        )
    prompt = row[field]
    if isinstance(prompt, str):
        return prompt
    is_messages = isinstance(prompt, list) and all(
        isinstance(m, dict) and {"role", "content"} <= set(m) for m in prompt
    )
    if not is_messages:
        raise ValueError(
            f"{where}: {field} must be a string or a list of messages with 'role' and "
            f"'content', got {prompt!r}"
        )
    return prompt


def _answer_of(row: dict[str, Any]) -> str | None:
    answer = row.get("answer")
    if answer is None:
        answer = (row.get("reward_model") or {}).get("ground_truth")
    if isinstance(answer, list):  # EMPO's files
        answer = answer[0] if answer else None
    return None if answer is None else str(answer)


def next_prompts(
    prompts: PromptSet, cursor: int, num: int, seed: int
) -> tuple[list[int], list[int], int]:
    """The next `num` prompts of an endless shuffled order.

    Args:
      prompts: the set; each epoch is a permutation of it made from (seed, epoch).
      cursor: prompts handed out so far; all the state there is.
      num: how many.
      seed: of the run.

    Returns:
      Indices into the set; ids that stand for them in the random numbers (their
      place in the order, so that a prompt met twice in one step draws twice); and
      the new cursor.
    """
    size = len(prompts.tokens)
    ids = list(range(cursor, cursor + num))
    orders = {
        epoch: np.random.default_rng((seed, epoch)).permutation(size)
        for epoch in {i // size for i in ids}
    }
    return [int(orders[i // size][i % size]) for i in ids], ids, cursor + num

"""Prompts from files or the hub, and an order of them that a checkpoint can hold."""

import collections
import functools
import logging
from typing import Any, NamedTuple

import numpy as np

from pfjax.infra import dataset_io
from pfjax.model import tokenizer
from pfjax.model.config import ModelConfig
from pfjax.tasks import benchmarks
from pfjax.tasks.problems import BY_THEMSELVES, Fields, Problem

_LOG = logging.getLogger(__name__)


class PromptSet(NamedTuple):
    """Prompts that fit the limit, tokenized."""

    problems: list[Problem]  # the question as it is asked
    tokens: list[list[int]]
    source: str = ""

    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.tokens))


def load_prompts(
    source: str,
    tok: Any,
    max_prompt_tokens: int,
    suffix: str = "",
    model: ModelConfig | None = None,
    fields: Fields = BY_THEMSELVES,
) -> PromptSet:
    """Reads prompts and perhaps answers, see `dataset_io.read` and `problems.from_row`.

    Args:
      source: a benchmark, a file or a data set (its "train" split).
      tok: a tokenizer.
      max_prompt_tokens: longer prompts are skipped, with one warning.
      suffix: added to each prompt, to its last message; no braces are interpreted.
      model: that the prompts are for, whose tokens they are then known to be.
      fields: columns of prompts and answers, in rows that have them.

    Raises:
      ValueError: if there is no such source, a row has no prompt, one that the chat
        template refuses or tokens that the model lacks (naming file and line), or no
        prompt is left.
    """
    kept, tokens = [], []
    odd, stop_ids = collections.defaultdict(list), ()
    if model:
        stop_ids = tokenizer.stop_ids(tok, model)
    rows = benchmarks.read_rows(source, fields=fields)
    for where, problem in rows:
        prompt = problem.question
        if isinstance(prompt, str):
            prompt += suffix
        else:
            *before, last = prompt
            prompt = [*before, {**last, "content": last["content"] + suffix}]
        ids = encode(tok, prompt, where, model)
        for what in tokenizer.oddities(tok, problem.question, ids, stop_ids):
            odd[what].append(where)
        if len(ids) <= max_prompt_tokens:
            kept.append(problem._replace(question=prompt))
            tokens.append(ids)
    if too_long := len(rows) - len(tokens):
        skipped = f"{source}: skipped {too_long} of {len(rows)} prompts"
        _LOG.warning(f"{skipped} longer than {max_prompt_tokens} tokens")
    if not tokens:
        raise ValueError(f"no prompts left in {source}: all are too long")
    for what, places in odd.items():
        _LOG.warning(f"{len(places)} of {len(rows)} prompts {what}: {places[0]}")
    if repeated := len(tokens) - len({tuple(x) for x in tokens}):
        _LOG.warning(f"{source}: {repeated} prompts are duplicates")
    return PromptSet(kept, tokens, source)


def describe(prompts: PromptSet, tok: Any) -> str:
    """Which column became what, and the first prompt as the model sees it."""
    problems = prompts.problems
    asked = collections.Counter(p.fields.prompt for p in problems)
    graded = collections.Counter(
        p.fields.answer for p in problems if p.gold is not None
    )
    used = {x.partition(".")[0] for x in (*asked, *graded)}
    others = list(
        dict.fromkeys(k for p in problems for k in p.columns if k not in used)
    )
    said = f"{prompts.source}: {len(problems)} prompts from column {_counts(asked, problems)}"
    said += (
        f", answers from column {_counts(graded, problems)}"
        if graded
        else ", no answers"
    )
    said += f"; other columns: {', '.join(others)}" if others else ""
    first = dataset_io.brief(tok.decode(prompts.tokens[0]), 400)
    gold = problems[0].gold
    answer = "" if gold is None else f"; its answer: {dataset_io.brief(gold)}"
    return f"{said}\n  first prompt, as the model sees it: {first}{answer}"


def _counts(columns: collections.Counter, problems: list[Problem]) -> str:
    """Columns, with how many rows where not all have the same one."""
    if columns.total() == len(problems) and len(columns) == 1:
        return next(iter(columns))
    return ", ".join(f"{name} ({n})" for name, n in columns.most_common())


def encode(
    tok: Any,
    prompt: str | list[dict[str, str]],
    where: str,
    model: ModelConfig | None = None,
    *,
    is_raw: bool = False,
) -> list[int]:
    """`tokenizer.encode_prompt` of a row, whose mistakes name it by `where`.

    Raises:
      ValueError: if the chat template refuses it, or the model lacks one of its tokens.
    """
    try:
        ids = tokenizer.encode_prompt(tok, prompt, is_raw=is_raw)
    except Exception as error:  # templates raise what they like
        raise ValueError(f"{where}: no prompt can be made of it: {error}") from error
    if model and (beyond := [i for i in ids if i >= model.vocab_size]):
        raise ValueError(
            f"{where}: token {tok.convert_ids_to_tokens(beyond[0])!r} has id "
            f"{beyond[0]}, but the model has a vocabulary of {model.vocab_size}: is "
            "this its tokenizer?"
        )
    return ids


def warn_of_overlap(train: PromptSet, held_out: PromptSet) -> None:
    """Says if prompts of the evaluation are trained on."""
    seen = {tuple(x) for x in train.tokens}
    if shared := sum(tuple(x) in seen for x in held_out.tokens):
        _LOG.warning(
            f"{shared} of {len(held_out.tokens)} prompts for evaluation are trained on: "
            "scores are not of unseen problems"
        )


def next_prompts(
    prompts: PromptSet, cursor: int, num: int, seed: int
) -> tuple[list[int], list[int], int]:
    """The next `num` prompts of an endless shuffled order.

    Args:
      prompts: the set; each epoch is a permutation of it made from (seed, epoch).
      cursor: prompts handed out so far; all the state there is.

    Returns:
      Indices into the set; their places in the order, which stand for them in the
      random numbers, so that a prompt met twice in one step draws twice; and the new
      cursor.
    """
    ids = list(range(cursor, cursor + num))
    return indices_of(prompts, ids, seed), ids, cursor + num


def indices_of(prompts: PromptSet, ids: list[int], seed: int) -> list[int]:
    """Indices into the set of the prompts at places of that order."""
    n = len(prompts.tokens)
    order = functools.cache(lambda x: np.random.default_rng((seed, x)).permutation(n))
    return [int(order(i // n)[i % n]) for i in ids]

"""Prompts -> responses -> scores: sample, grade, summarise."""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from pfjax.evaluation import estimators
from pfjax.model import tokenizer
from pfjax.model.transformer import Policy
from pfjax.sampler import engine
from pfjax.sampler.options import NO_FILTERS, Capacity, StopConditions, TokenFilters
from pfjax.tasks.grading import Grader, boxed
from pfjax.tasks.problems import Problem, text_of

Row = dict[str, Any]
in_order = operator.itemgetter("prompt_id", "sample")  # what rows are sorted by


class Settings(NamedTuple):
    """How a set is sampled; everything that moves a score."""

    samples_per_prompt: int
    max_new_tokens: int
    temperature: float
    stop_ids: tuple[int, ...]
    seed: int
    prompt_width: int
    token_filters: TokenFilters = NO_FILTERS
    stop_strings: tuple[str, ...] = ()  # the text is cut before one


def evaluate(
    policy: Policy,
    tok: Any,
    grader: Grader,
    problems: list[Problem],
    prompts: list[list[int]],
    settings: Settings,
) -> tuple[dict[str, float], list[Row]]:
    """Samples every prompt k times and grades the samples.

    The same random numbers are used at every evaluation, so that two of them
    differ by the policy alone.

    Returns:
      Scores, see `summarise`; and one row per response.
    """
    rows: list[Row] = []

    def keep(new: list[Row]) -> None:  # while the devices draw the others
        grade(new, problems, grader, "last")
        rows.extend(new)

    sample(policy, tok, problems, prompts, settings, keep)
    rows.sort(key=in_order)
    return summarise(rows, settings.samples_per_prompt, grader), rows


def sample(
    policy: Policy,
    tok: Any,
    problems: list[Problem],
    prompts: list[list[int]],
    settings: Settings,
    on_rows: Callable[[list[Row]], None],
    *,
    done: frozenset[int] = frozenset(),
) -> None:
    """Draws k responses to each prompt whose number is not in `done`, and hands over
    rows as they end."""
    todo = [i for i in range(len(prompts)) if i not in done]
    decode = functools.partial(tokenizer.decode, tok)
    ids, strings = tokenizer.split_stops(tok, settings.stop_strings)

    def row(response: engine.Finished) -> Row:
        text = decode(response.tokens.tolist())
        for stop in settings.stop_strings:
            text = text.split(stop)[0]
        i = todo[response.prompt]
        return {
            "prompt_id": i,
            "id": problems[i].id,
            "sample": response.sample,
            "prompt": text_of(problems[i]),
            "completion": text,
            "tokens": len(response.tokens),
            "terminated": response.is_stopped,
        }

    if todo:
        engine.rollout(
            policy,
            [prompts[i] for i in todo],
            settings.samples_per_prompt,
            settings.max_new_tokens,
            settings.temperature,
            settings.seed,
            prompt_ids=todo,
            token_filters=settings.token_filters,
            stop=StopConditions(settings.stop_ids + ids, strings, decode),
            capacity=Capacity(prompt_width=settings.prompt_width),
            on_finish=lambda finished: on_rows([row(x) for x in finished]),
        )


def grade(new: list[Row], problems: list[Problem], grader: Grader, box: str) -> None:
    """Puts `answer`, `gold` and `correct` into rows, anew where they are."""
    for row in new:
        problem, answer = problems[row["prompt_id"]], boxed(row["completion"], box)
        gold = problem.gold
        row |= {"answer": answer, "gold": gold, "correct": None}
        if gold is not None:
            tolerance = problem.tolerance
            same = answer is not None and grader.is_equal(gold, answer, tolerance)
            row["correct"] = same


def summarise(
    rows: list[Row], k: int, grader: Grader, fewer: tuple[int, ...] = ()
) -> dict[str, float]:
    """Scores of rows.

    Args:
      rows: graded, the k samples of a prompt side by side.
      k: samples per prompt.
      grader: tells which answers are the same.
      fewer: numbers of samples below k to give pass@n and maj@n for as well.

    Returns:
      `length_mean`, `truncated`, `boxed_frac`, `distinct` (fraction of a prompt's
      responses that differ); where answers are known `avg@k`, its standard error over
      problems `avg@k_se` (of two and more), `maj@k`, `pass@k`, `answer_classes` and
      `answer_entropy` of a problem (nats), `grader_timeouts`.
    """
    problems = [rows[i : i + k] for i in range(0, len(rows), k)]
    scores = {
        "length_mean": np.mean([r["tokens"] for r in rows]),
        "truncated": np.mean([not r["terminated"] for r in rows]),
        "boxed_frac": np.mean([r["answer"] is not None for r in rows]),
        "distinct": np.mean([len({r["completion"] for r in p}) / k for p in problems]),
    }
    if graded := [p for p in problems if p[0]["gold"] is not None]:
        correct = np.array([[r["correct"] for r in p] for p in graded])
        classes = [np.array(grader.classes([r["answer"] for r in p])) for p in graded]
        votes = [*zip(classes, correct, strict=True)]
        maj = lambda n: np.mean([estimators.maj_at_k(*v, n) for v in votes])
        passed = lambda n: estimators.pass_at_k(correct.sum(axis=1), k, n).mean()
        scores |= {
            f"avg@{k}": correct.mean(),
            f"avg@{k}_se": estimators.standard_error(correct.mean(axis=1)),
            **{f"maj@{n}": maj(n) for n in (*fewer, k)},
            **{f"pass@{n}": passed(n) for n in (*fewer, k)},
            "answer_classes": np.mean([c.max() + 1 for c in classes]),
            "answer_entropy": np.mean([estimators.answer_entropy(c) for c in classes]),
            "grader_timeouts": grader.timeouts,
        }
    return {name: float(x) for name, x in scores.items() if x is not None}

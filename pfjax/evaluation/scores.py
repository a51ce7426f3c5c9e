"""Prompts -> responses -> scores: sample, grade, summarise."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from pfjax.evaluation import estimators
from pfjax.model import tokenizer
from pfjax.model.transformer import Policy
from pfjax.sampler import engine
from pfjax.sampler.options import NO_FILTERS, Capacity, StopConditions, TokenFilters
from pfjax.tasks import grading
from pfjax.tasks.benchmarks import Problem, text_of

Row = dict[str, Any]


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
    box: str = "last"  # which box of a response is its answer; or "first"


def evaluate(
    policy: Policy,
    tok: Any,
    grader: grading.Grader,
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
    found: dict[tuple[int, int], Row] = {}

    def keep(new: list[Row]) -> None:  # while the devices draw the others
        grade(new, problems, grader, settings.box)
        found.update(((r["prompt_id"], r["sample"]), r) for r in new)

    sample(policy, tok, problems, prompts, settings, keep)
    in_order = [found[at] for at in sorted(found)]
    return summarise(in_order, settings.samples_per_prompt, grader), in_order


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

    def hand_over(finished: list[engine.Finished]) -> None:
        out = []
        for response in finished:
            text = tokenizer.decode(tok, response.tokens.tolist())
            for stop in settings.stop_strings:
                text = text.split(stop)[0]
            problem = problems[todo[response.prompt]]
            out.append(
                {
                    "prompt_id": todo[response.prompt],
                    "id": problem.id,
                    "sample": response.sample,
                    "prompt": text_of(problem),
                    "completion": text,
                    "tokens": len(response.tokens),
                    "terminated": response.is_stopped,
                }
            )
        on_rows(out)

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
            stop=StopConditions(
                settings.stop_ids,
                settings.stop_strings,
                decode_text=functools.partial(tokenizer.decode, tok),
            ),
            capacity=Capacity(prompt_width=settings.prompt_width),
            on_finish=hand_over,
        )


def grade(
    new: list[Row], problems: list[Problem], grader: grading.Grader, box: str
) -> None:
    """Puts `answer`, `gold` and `correct` into rows, anew where they are."""
    for row in new:
        problem = problems[row["prompt_id"]]
        answer, gold = grading.boxed(row["completion"], box), problem.gold
        row["answer"], row["gold"], row["correct"] = answer, gold, None
        if gold is not None:
            row["correct"] = answer is not None and grader.is_equal(
                gold, answer, problem.tolerance
            )


def summarise(
    in_order: list[Row],
    k: int,
    grader: grading.Grader,
    pass_at: tuple[int, ...] = (),
    maj_at: tuple[int, ...] = (),
) -> dict[str, float]:
    """Scores of graded rows that stand in order, k per prompt.

    Args:
      in_order: rows, the k samples of a prompt side by side.
      k: samples per prompt.
      grader: tells which answers are the same.
      pass_at, maj_at: numbers of samples below k to give pass@n and maj@n for as well.

    Returns:
      `length_mean`, `truncated`, `boxed_frac`, `distinct` (fraction of a prompt's
      responses that differ); where answers are known `avg@k`, its standard error over
      problems `avg@k_se`, `maj@k`, `pass@k`, `answer_classes` and `answer_entropy` of a
      problem (nats), `grader_timeouts`.
    """
    problems = [in_order[i : i + k] for i in range(0, len(in_order), k)]
    scores = {
        "length_mean": np.mean([r["tokens"] for r in in_order]),
        "truncated": np.mean([not r["terminated"] for r in in_order]),
        "boxed_frac": np.mean([r["answer"] is not None for r in in_order]),
        "distinct": np.mean([len({r["completion"] for r in p}) / k for p in problems]),
    }
    graded = [p for p in problems if p[0]["gold"] is not None]
    if graded:
        correct = np.array([[r["correct"] for r in p] for p in graded])
        classes = [np.array(grader.classes([r["answer"] for r in p])) for p in graded]
        scores |= {
            f"avg@{k}": correct.mean(),
            f"avg@{k}_se": estimators.standard_error(correct.mean(axis=1)),
        }
        for n in (*maj_at, k):
            votes = [
                estimators.maj_at_k(c, x, n)
                for c, x in zip(classes, correct, strict=True)
            ]
            scores[f"maj@{n}"] = np.mean(votes)
        for n in (*pass_at, k):
            passed = estimators.pass_at_k(correct.sum(axis=1), k, n)
            scores[f"pass@{n}"] = passed.mean()
        scores |= {
            "answer_classes": np.mean([c.max() + 1 for c in classes]),
            "answer_entropy": np.mean([estimators.answer_entropy(c) for c in classes]),
            "grader_timeouts": grader.timeouts,
        }
    return {name: float(value) for name, value in scores.items()}

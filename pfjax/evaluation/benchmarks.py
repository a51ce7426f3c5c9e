"""One set of prompts with answers -> scores: sample, grade, summarise."""

import functools
from typing import Any, NamedTuple

import numpy as np

from pfjax.evaluation import estimators, grading
from pfjax.policy import tokenizer
from pfjax.policy.model import Policy
from pfjax.sampling import engine
from pfjax.sampling.truncation import ALL_TOKENS, Truncation


class Settings(NamedTuple):
    """How a set is sampled; everything that moves a score."""

    samples_per_prompt: int
    max_new_tokens: int
    temperature: float
    stop_ids: tuple[int, ...]
    seed: int
    prompt_width: int
    truncation: Truncation = ALL_TOKENS
    stop_strings: tuple[str, ...] = ()  # the text is cut before one


def evaluate(
    policy: Policy,
    tok: Any,
    grader: grading.Grader,
    texts: list[str],
    prompts: list[list[int]],
    answers: list[str | None],
    settings: Settings,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Samples every prompt k times and grades the samples.

    The same random numbers are used at every evaluation, so that two of them
    differ by the policy alone.

    Returns:
      Scores: `avg@k`, its standard error over problems `avg@k_se`, `maj@k`,
      `pass@k` (these where answers are known), `length_mean`, `truncated`,
      `distinct` (share of a prompt's responses that differ), `boxed_frac`,
      `grader_timeouts`; and one row a response.
    """
    k = settings.samples_per_prompt
    rows: dict[tuple[int, int], dict[str, Any]] = {}

    def grade(finished: list[engine.Finished]) -> None:
        for response in finished:
            i, sample = response.prompt, response.sample
            text = tokenizer.decode(tok, response.tokens.tolist())
            for stop in settings.stop_strings:
                text = text.split(stop)[0]
            answer = grading.last_boxed(text)
            gold = answers[i]
            rows[i, sample] = {
                "prompt_id": i,
                "sample": sample,
                "prompt": texts[i],
                "completion": text,
                "tokens": len(response.tokens),
                "terminated": response.is_stopped,
                "answer": answer,
                "gold": gold,
                "correct": None
                if gold is None
                else answer is not None and grader.is_equal(gold, answer),
            }

    engine.rollout(
        policy,
        prompts,
        k,
        settings.max_new_tokens,
        settings.temperature,
        settings.seed,
        stop_ids=settings.stop_ids,
        prompt_width=settings.prompt_width,
        truncation=settings.truncation,
        stop_strings=settings.stop_strings,
        decode_text=functools.partial(tokenizer.decode, tok),
        on_finish=grade,  # while the devices draw the others
    )
    in_order = [rows[at] for at in sorted(rows)]
    return summarise(in_order, k, grader), in_order


def summarise(
    rows: list[dict[str, Any]], k: int, grader: grading.Grader
) -> dict[str, float]:
    """Scores of graded rows that stand in order, k to a prompt."""
    problems = [rows[i : i + k] for i in range(0, len(rows), k)]
    scores = {
        "length_mean": np.mean([r["tokens"] for r in rows]),
        "truncated": np.mean([not r["terminated"] for r in rows]),
        "boxed_frac": np.mean([r["answer"] is not None for r in rows]),
        "distinct": np.mean([len({r["completion"] for r in p}) / k for p in problems]),
    }
    graded = [p for p in problems if p[0]["gold"] is not None]
    if graded:
        correct = np.array([[r["correct"] for r in p] for p in graded])
        classes = [np.array(grader.classes([r["answer"] for r in p])) for p in graded]
        votes = [
            estimators.maj_at_n(c, x) for c, x in zip(classes, correct, strict=True)
        ]
        passed = estimators.pass_at_k(correct.sum(axis=1), k, k)
        scores |= {
            f"avg@{k}": correct.mean(),
            f"avg@{k}_se": estimators.standard_error(correct.mean(axis=1)),
            f"maj@{k}": np.mean(votes),
            f"pass@{k}": passed.mean(),
            "grader_timeouts": grader.timeouts,
        }
    return {name: float(value) for name, value in scores.items()}

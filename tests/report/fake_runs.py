"""Folders as training leaves them, with numbers that can be worked by hand."""

import json
import pathlib
from typing import Any

GOLDS = ("7", "9")
# Answers of 2 samples to each of 2 problems, by step. Seed 0: a share of 1/4 right, then
# 3/4. Seed 1: 1/2, then all.
SEED_0 = {0: (("3", "7"), ("4", None)), 4: (("7", "7"), ("9", "4"))}
SEED_1 = {0: (("7", "7"), (None, None)), 4: (("7", "7"), ("9", "9"))}


def make(
    folder: pathlib.Path,
    seed: int = 0,
    answers: dict[int, Any] | None = None,
    texts: dict[str | None, str] | None = None,
    is_graded: bool = True,
    **settings: Any,
) -> pathlib.Path:
    """Writes a run of 4 steps, evaluated where there are answers.

    Args:
      folder: of the run.
      seed: in the config.
      answers: see `SEED_0`, which is the default.
      texts: completions by their answers; else `\\boxed{answer}`.
      is_graded: whether the right answers are known.
      settings: of the config.
    """
    answers = SEED_0 if answers is None else answers
    (folder / "completions").mkdir(parents=True)
    config = {
        "model": "pfjax/toy",
        "objective": "powerflow",
        "alpha": 4.0,
        "seed": seed,
        "log_every": 1,
        "optim": {"learning_rate": 0.001},
    } | settings
    about = {"config": config, "versions": {"pfjax": "0.1.0", "jax": "0.10.2"}}
    (folder / "config.json").write_text(json.dumps(about))
    (folder / "events.out.tfevents.1795549164.host").touch()
    metrics = []
    for step in range(5):
        row: dict[str, Any] = {"step": step}
        if step:
            row |= {
                "entropy": step / 10 + seed,
                "tb/residual_std_within_prompt": 1 / step,
            }
        if step in answers:
            rows = _rows(answers[step], texts or {}, is_graded)
            path = folder / f"completions/step_{step:06d}.jsonl"
            path.write_text("".join(json.dumps(r) + "\n" for r in rows))
            row |= {"eval/length_mean": 10.0 + step, "eval/distinct": 1.0 - step / 8}
            if is_graded:
                row["eval/avg@2"] = sum(r["correct"] for r in rows) / 4
        metrics.append(row)
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in metrics)
    )
    return folder


def _rows(problems, texts, is_graded) -> list[dict[str, Any]]:
    return [
        {
            "prompt_id": i,
            "sample": sample,
            "prompt": f"problem {i}",
            "completion": texts.get(answer, f"\\boxed{{{answer}}}"),
            "tokens": 5 + sample,
            "terminated": answer is not None,
            "answer": answer,
            "gold": GOLDS[i] if is_graded else None,
            "correct": answer == GOLDS[i] if is_graded else None,
        }
        for i, mine in enumerate(problems)
        for sample, answer in enumerate(mine)
    ]

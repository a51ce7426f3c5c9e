"""The search that configs/study.py has its settings from: eight trials per objective."""

import itertools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from examples.study import jobs, tables

_TRAIN = jobs.ROOT / "pfjax/assets/toy/train_answered.jsonl"
_SEED = 100
NUM_VALIDATION = 128  # prompts of the training set that a search does not train on

# Every objective is tried at these six, then at two more from where it was best: of a
# setting that it alone has, or of a finer learning rate.
RATES, CLIPS = (1e-4, 3e-4, 1e-3), (0.05, 1.0)
_FINER = (3**-0.5, 3**0.5)
_BALANCE = ({"log_z": "group"}, {"optim.log_z_learning_rate": 3e-2})
_REWARD = ({"reward_kl": 0.01}, {"reward_kl": 0.1})
_SECOND: dict[str, tuple[dict[str, Any], ...]] = {
    "powerflow": _BALANCE,
    "tb_traj": _BALANCE,
    "tb_token": _BALANCE,
    "flowrl": ({"beta": 1.0}, {"beta": 4.0}),
    "grpo": _REWARD,
    "ttrl": _REWARD,
    "empo": _REWARD,
    "intuitor": _REWARD,
}


def search(
    out: pathlib.Path,
    objectives: Sequence[str],
    more: dict[str, Any],
    run: Callable[[jobs.Job], None] = jobs.run,
) -> None:
    """Tries eight settings for each objective on prompts held out of training, prints the
    best, and writes all to search.json.

    Args:
      out: folder of the trials.
      objectives: their names.
      more: values of the config for every trial.
      run: carries out one training.
    """
    rows = _TRAIN.read_text().splitlines(keepends=True)
    parts = {"train": rows[:-NUM_VALIDATION], "valid": rows[-NUM_VALIDATION:]}
    for name, part in parts.items():
        (out / f"{name}.jsonl").write_text("".join(part))
    shared = {
        "data.train": out / "train.jsonl",
        "data.eval": out / "valid.jsonl",
        "seed": _SEED,
        "eval_every": 50,
        "eval_samples": 8,
        **more,
    }

    def trial(name: str, values: dict[str, Any]) -> dict[str, Any]:
        folder = out / name / "_".join(f"{k}={v}" for k, v in values.items())
        job = jobs.training(folder, name, {**shared, **values})
        if not job.result.exists():
            run(job)
        last = tables.evaluations(folder)[-1]
        return {
            "values": values,
            "accuracy": last["eval/avg"],
            "length": last["eval/length_mean"],
        }

    def tries(name: str) -> tuple[str, list[dict[str, Any]]]:
        found = [
            trial(name, {"optim.learning_rate": rate, "optim.clip_norm": clip})
            for rate, clip in itertools.product(RATES, CLIPS)
        ]
        best = max(found, key=lambda t: t["accuracy"])["values"]
        rate = best["optim.learning_rate"]
        finer = tuple({"optim.learning_rate": rate * x} for x in _FINER)
        found += [trial(name, {**best, **x}) for x in _SECOND.get(name, finer)]
        best = max(found, key=lambda t: t["accuracy"])
        print(f"{name:10} {best['accuracy']:.4f}  {best['values']}", flush=True)
        return name, found

    with jobs.pool() as threads:
        found = dict(threads.map(tries, objectives))
    (out / "search.json").write_text(json.dumps(found, indent=1) + "\n")

"""The search that configs/study.py has its settings from: twenty for every method."""

import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from examples.study import cells
from examples.study.methods import TRAINED

NUM_VALIDATION = 128  # prompts of the training set that a search does not train on
_SEED = 100
_RATES, _SCHEDULES = (1e-4, 3e-4, 1e-3, 3e-3), ("constant", "cosine")
SETTINGS = tuple(
    {
        "optim.learning_rate": rate,
        "optim.clip_norm": clip,
        "optim.schedule": schedule,
        "updates_per_rollout": updates,
    }
    for rate, clip, schedule, updates in [
        *itertools.product(_RATES, (0.05, 0.5), _SCHEDULES, (1,)),
        *itertools.product(_RATES[:2], (0.5,), _SCHEDULES, (4,)),
    ]
)


def search(
    out: pathlib.Path,
    world: str,
    methods: Sequence[str],
    shared: dict[str, Any],
    base_steps: int | None,
) -> None:
    """Tries all settings for each method on a world, writes what each came to on
    validation prompts, and prints which is best: by accuracy; by the distance from its target
    that the run itself estimates from samples (`match.json`), which reads no answers; and by
    the exact distance from what it should end at.

    Args:
      out: folder of the trials.
      world: whose base 0 is trained.
      methods: their names.
      shared: values of the config for every trial.
      base_steps: of fitting the base; None for the world's own.
    """
    cells.prepare(out, [world], [0], methods, base_steps)
    prompts = _hold_out(cells.folder_of_base(out, world, 0), out / "prompts")
    trials, found = [], {method: [] for method in methods}
    for method, (i, values) in itertools.product(methods, enumerate(SETTINGS)):
        cell = cells.Cell(world, 0, method, i)
        more = {"seed": _SEED, "match_prompts": NUM_VALIDATION, **values, **shared}
        trials.append((cell, more))
        found[method].append((cell.folder(out), values))
    cells.train(out, trials, prompts)
    found = {k: [_trial(*trial) for trial in mine] for k, mine in found.items()}
    (out / "search.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(_table(found))


def _table(found: dict[str, list[dict[str, Any]]]) -> str:
    """The best of each method by answers, and by what needs none, in Markdown."""
    lines = [
        "| method | best by | rate | clipping | schedule | updates per rollout | accuracy | total variation |",
        "|---|---|---:|---:|---|---:|---:|---:|",
    ]
    for method, trials in found.items():
        best = {"answers": max(trials, key=lambda t: t["accuracy"])}
        for name, key in (
            ("certificate", "certificate"),
            ("exact distance", "total_variation"),
        ):
            if all(t[key] is not None for t in trials):
                best[name] = min(trials, key=lambda t, key=key: t[key])
        for name, trial in best.items():
            distance = trial["total_variation"]
            cells = [
                *map(str, trial["values"].values()),
                f"{trial['accuracy']:.3f}",
                "" if distance is None else f"{distance:.3f}",
            ]
            title = TRAINED[method].title
            lines.append(f"| {title} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _hold_out(base: pathlib.Path, folder: pathlib.Path) -> cells.Prompts:
    """Writes a base's training prompts, less the last of them, which are evaluated."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "train_answered"):
        rows = (base / f"{name}.jsonl").read_text("utf-8").splitlines(keepends=True)
        rest, last = rows[:-NUM_VALIDATION], rows[-NUM_VALIDATION:]
        (folder / f"{name}.jsonl").write_text("".join(rest), "utf-8")
    (folder / "eval.jsonl").write_text("".join(last), "utf-8")
    return cells.Prompts(folder, NUM_VALIDATION)


def _trial(folder: pathlib.Path, values: dict[str, Any]) -> dict[str, Any]:
    result = json.loads((folder / "result.json").read_text("utf-8"))
    match = folder / "match.json"
    certificate = None
    if match.exists():
        certificate = json.loads(match.read_text("utf-8"))["total_variation"]
    kept = {k: result.get(k) for k in ("accuracy", "length", "total_variation")}
    return {"values": values, **kept, "certificate": certificate}

"""Folders of runs read back: what was set, what was measured, what was said.

Runs that differ in their seed alone, or in what only speed or records depend on, are one
group. Every number of a group is a mean over its runs, at a step that all of them share.
"""

import collections
import datetime
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from pfjax.infra import dataset_io, storage

# Settings that do not make another experiment: the seed, and what touches speed, memory
# or records only. Whole sections by their name.
SAME_EXPERIMENT = (
    "seed",
    "attention",
    "base_memory",
    "best_metric",
    "checkpoint_every",
    "guards",
    "keep_best",
    "log_every",
    "mesh",
    "profile_steps",
    "remat",
    "rollout_slots",
    "row_length",
    "rows",
    "wandb_project",
)
_NOT_SET = "not set"
_FIRST = ("objective", "alpha")  # of what makes a name


class Problem(NamedTuple):
    """A prompt of an evaluation, and the rows of its samples in order."""

    key: tuple[int, str]  # prompt_id and prompt
    samples: list[dict[str, Any]]

    @property
    def share_right(self) -> float | None:
        """None where the answer is not known."""
        if self.samples[0]["correct"] is None:
            return None
        return float(np.mean([r["correct"] for r in self.samples]))


class Run(NamedTuple):
    folder: epath.Path
    config: dict[str, Any]  # flat: "optim.learning_rate"
    versions: dict[str, str]
    begun: str  # 2026-11-24 (UTC), "" when not known
    label: str
    rows: list[dict[str, Any]]  # of metrics.jsonl
    completions: dict[int, epath.Path]  # by step


class Group(NamedTuple):
    name: str
    runs: list[Run]
    evaluated: list[int]  # steps at which all runs were
    first: list[list[Problem]]  # of each run, at the first of them
    last: list[list[Problem]]  # and at the last; [] without completions


def load(paths: Sequence[str]) -> tuple[list[Run], list[str]]:
    """Runs in and below folders, in the order given and then by name.

    Returns:
      Runs that were evaluated, each once; and the folders of those that were not (yet).

    Raises:
      ValueError: for a path without runs or without any evaluation.
    """
    found: dict[str, Run] = {}
    skipped: dict[str, str] = {}
    for path in paths:
        root = storage.place(path)
        here = list(_find(root)) if root.is_dir() else []
        if not here:
            raise ValueError(
                f"{path} holds no run: no folder there has config.json and metrics.jsonl"
            )
        evaluated = 0
        for folder in here:
            run = _read(folder)
            where = str(folder) if storage.is_remote(folder) else str(folder.resolve())
            if any(is_evaluation(r) for r in run.rows):
                found.setdefault(where, run)
                evaluated += 1
            else:
                skipped[where] = folder.name
        if not evaluated:
            raise ValueError(
                f"{path} holds {len(here)} run{'s' * (len(here) > 1)} but no evaluation: "
                "train with --config.data.eval=PROMPTS, or wait for step 0"
            )
    return list(found.values()), list(skipped.values())


def is_evaluation(row: dict[str, Any]) -> bool:
    return any(k.startswith("eval/") for k in row)


def _find(folder: epath.Path) -> Iterator[epath.Path]:
    names = {p.name: p for p in folder.iterdir()}
    if {"metrics.jsonl", "config.json"} <= names.keys():
        yield folder
        return
    for _, child in sorted(names.items()):
        if child.is_dir():
            yield from _find(child)


def _read(folder: epath.Path) -> Run:
    path = folder / "config.json"
    try:
        about = json.loads(path.read_text())
        config, versions = flatten(about["config"]), about["versions"]
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no config of a run: {error!r}") from error
    label = folder / "label.txt"
    lines = label.read_text().strip().splitlines() if label.exists() else []
    completions = folder / "completions"
    files = completions.glob("step_*.jsonl") if completions.exists() else ()
    # The start is written nowhere else: events.out.tfevents.<seconds>.<host>
    events = sorted(p.name.split(".")[3] for p in folder.glob("events.out.tfevents.*"))
    begun = ""
    if events and events[0].isdigit():
        begun = str(
            datetime.datetime.fromtimestamp(int(events[0]), datetime.UTC).date()
        )
    return Run(
        folder=folder,
        config=config,
        versions=versions,
        begun=begun,
        label=lines[0].strip() if lines else "",
        rows=dataset_io.read_jsonl(folder / "metrics.jsonl"),
        completions={int(p.name[5:-6]): p for p in files},
    )


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            out |= flatten(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = value
    return out


def group(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order of their first runs; seeds in order within one."""
    members: dict[str, list[Run]] = {}
    for run in runs:
        members.setdefault(run.label or _identity(run), []).append(run)
    unnamed = [m[0].config for m in members.values() if not m[0].label]
    found = iter(_names(unnamed) if unnamed else ())
    names: list[str] = []
    for mine in members.values():
        name = mine[0].label or next(found)
        # A label may be a name too, and files in two folders may bear one name.
        names.append(name if name not in names else f"{name} ({len(names) + 1})")
    return [_make_group(n, m) for n, m in zip(names, members.values(), strict=True)]


def _make_group(name: str, mine: list[Run]) -> Group:
    mine = sorted(mine, key=lambda r: (r.config.get("seed", 0), str(r.folder)))
    steps = [{r["step"] for r in run.rows if is_evaluation(r)} for run in mine]
    shared = sorted(set.intersection(*steps))
    if not shared:
        raise ValueError(
            f"runs of the group {name!r} were evaluated at no step that all share: "
            + ", ".join(str(r.folder) for r in mine)
        )
    first, last = (
        [read_problems(run, step) for run in mine] for step in (shared[0], shared[-1])
    )
    return Group(name, mine, shared, first, last)


def read_problems(run: Run, step: int) -> list[Problem]:
    """Problems of an evaluation with all of their samples; [] if none were kept."""
    if step not in run.completions:
        return []
    by_key: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in dataset_io.read_jsonl(run.completions[step]):
        by_key.setdefault((row["prompt_id"], row["prompt"]), []).append(row)
    most = max((len(x) for x in by_key.values()), default=0)
    return [Problem(k, x) for k, x in by_key.items() if len(x) == most]


def _identity(run: Run) -> str:
    return json.dumps(experiment(run.config), sort_keys=True)


def experiment(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a flat config that make it another experiment."""
    return {k: v for k, v in config.items() if k.split(".")[0] not in SAME_EXPERIMENT}


def _names(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Names by objective, alpha and the fewest other settings, found greedily, that
    tell all configs apart."""
    configs = [experiment(c) for c in configs]

    def told_apart(keys: Sequence[str]) -> int:
        return len({tuple(show(c.get(k, _NOT_SET)) for k in keys) for c in configs})

    first = list(_FIRST)
    keys = dict.fromkeys([*first, *(k for c in configs for k in c)])
    keys = [k for k in keys if told_apart([k]) > 1]
    chosen = [k for k in first if k in keys]
    while told_apart(chosen) < told_apart(keys):
        chosen.append(max(keys, key=lambda k: told_apart([*chosen, k])))
    chosen = chosen or first
    # What nearly all have is left to be said by the few that do not: still unique.
    usual = {k: _usual([show(c.get(k, _NOT_SET)) for c in configs]) for k in chosen}
    return [
        ", ".join(
            _part(k, show(c.get(k, _NOT_SET)))
            for k in chosen
            if k in first or show(c.get(k, _NOT_SET)) != usual[k]
        )
        or "common settings"
        for c in configs
    ]


def _usual(values: Sequence[str]) -> str | None:
    """The value that more than three quarters have."""
    value, count = collections.Counter(values).most_common(1)[0]
    return value if count > 0.75 * len(values) else None


def _part(key: str, text: str) -> str:
    if key == "objective":
        return text
    if key.startswith("data.") and "/" in text:
        text = pathlib.PurePath(text).name
    return f"{key.rpartition('.')[2].replace('_', ' ')} {text}"


def show(value: Any) -> str:
    """A setting's value for people."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(show, value)) or "none"
    return str(value) if str(value) else "none"


def settings(groups: Sequence[Group]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Settings that all groups share; and those that differ, with a value a group."""
    configs = [[experiment(r.config) for r in g.runs] for g in groups]
    keys = dict.fromkeys([*_FIRST, *(k for mine in configs for c in mine for k in c)])
    table = {
        k: [
            " / ".join(dict.fromkeys(show(c.get(k, _NOT_SET)) for c in mine))
            for mine in configs
        ]
        for k in keys
    }
    shared = {k: v[0] for k, v in table.items() if len(set(v)) == 1}
    return shared, {k: v for k, v in table.items() if k not in shared}

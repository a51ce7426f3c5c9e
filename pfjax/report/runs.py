"""Folders of runs read back: what was set, what was measured, what was said.

Runs that differ in their seed alone, or in what only speed or records depend on, are one
group. Every number of a group is a mean over its runs, at a step that all of them share.
"""

import collections
import contextlib
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from pfjax.infra import dataset_io, storage
from pfjax.trainer import evaluations, history
from pfjax.trainer import settings as settings_of_runs

# Settings that do not make another experiment: the seed, and what touches speed, memory or
# records only, which is nearly all that a continued run may change.
_EXPERIMENT = {"num_steps", "eval_every", "eval_samples", "eval_sampling", "data"}
_SAME_EXPERIMENT = {"seed", "attention", "offload_ref", "pack_length", "remat"} | {
    name
    for name, setting in settings_of_runs.SETTINGS.items()
    if setting.may_change and name.partition(".")[0] not in _EXPERIMENT
}
_FIRST = ("objective", "alpha")  # of what makes a name


# What rows of samples hold beside the text.
_OF_SAMPLE = ("tokens", "terminated", "answer", "gold", "correct")
Key = tuple[int, str, str]  # prompt_id, prompt, and set of prompts


class Problem(NamedTuple):
    """A prompt of an evaluation, and the rows of its samples in order."""

    key: Key
    samples: list[dict[str, Any]]

    @property
    def num_correct(self) -> int | None:
        """None where the answer is not known."""
        if self.samples[0]["correct"] is None:
            return None
        return sum(bool(r["correct"]) for r in self.samples)


_NONE: Mapping[Any, Any] = types.MappingProxyType({})


class Run(NamedTuple):
    folder: epath.Path
    config: dict[str, Any]  # flat: "optim.learning_rate"
    versions: dict[str, str]
    label: str
    rows: list[dict[str, Any]]  # of metrics.jsonl
    completions: dict[int, epath.Path]  # by step
    # Set -> alpha -> quality and distinct responses, of a policy for every alpha.
    scores_by_alpha: Mapping[str, dict[float, dict[str, float]]] = _NONE


class Group(NamedTuple):
    name: str
    runs: list[Run]
    evaluated: list[int]  # steps at which all runs were
    first: list[list[Problem]]  # of each run, at the first of them
    last: list[list[Problem]]  # and at the last; [] without completions

    @property
    def last_step(self) -> int:
        return min((run.rows[-1]["step"] for run in self.runs if run.rows), default=0)


def load(paths: Sequence[str]) -> list[Run]:
    """Returns the runs of folders; see `find`."""
    return [_read(folder) for folder in find(paths)]


def find(paths: Sequence[str]) -> list[epath.Path]:
    """Returns folders of runs in and below others, each once, in the order given and then
    by name."""
    found: dict[str, epath.Path] = {}
    for path in paths:
        root = storage.place(path)
        here = [*_find(root)] if storage.exists(root) and root.is_dir() else []
        if not here:
            raise ValueError(
                f"{path} holds no run: no folder there has config.json and metrics.jsonl"
            )
        for folder in here:
            found.setdefault(str(folder.resolve()), folder)
    return list(found.values())


def files(folder: epath.Path) -> list[epath.Path]:
    """What a report reads of a run."""
    names = ("config.json", "metrics.jsonl", "match.json", "label.txt")
    found = [p for n in names if (p := folder / n).exists()]
    return [*found, *_completions(folder), *_scores_by_alpha(folder)]


def _scores_by_alpha(folder: epath.Path) -> list[epath.Path]:
    """What `pfjax evaluate --alpha` left in `scores` of a run's folder."""
    scores = folder / "scores"
    return sorted(scores.glob("alpha-*/*.json")) if scores.exists() else []


def _read_scores(folder: epath.Path) -> dict[str, dict[float, dict[str, float]]]:
    out = collections.defaultdict(dict)
    for path in _scores_by_alpha(folder):
        with _as_written(path):
            about = storage.read_json(path)
            values = about.get("scores", {})
            accuracy = next((k for k in values if re.fullmatch(r"avg@\d+", k)), None)
            if accuracy is not None:  # there are answers, and they are graded
                found = {"quality": values[accuracy], "distinct": values["distinct"]}
                out[path.stem][about["settings"]["alpha"]] = found
    return dict(out)


def _completions(folder: epath.Path) -> Iterator[epath.Path]:
    completions = folder / "completions"
    found = completions.glob("step_*.jsonl") if completions.exists() else iter(())
    return (p for p in found if p.stem.removeprefix("step_").isdecimal())


def _evaluated(run: Run) -> set[int]:
    return {r["step"] for r in run.rows if any(k.startswith("eval/") for k in r)}


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
    with _as_written(path):
        about = storage.read_json(path)
        config, versions = _flatten(about["config"]), {**about["versions"]}
    label, match = folder / "label.txt", folder / "match.json"
    rows = evaluations.comparable(history.read(folder / "metrics.jsonl"))
    if rows and match.exists():
        with _as_written(match):
            found = {**storage.read_json(match)}
        # An older pfjax did not say of which weights it is: of the last, then.
        if found.pop("step", rows[-1]["step"]) == rows[-1]["step"]:
            known = {k: v for k, v in found.items() if v is not None}
            rows[-1] |= {f"match/{name}": value for name, value in known.items()}
    return Run(
        folder=folder,
        config=config,
        versions=versions,
        label=storage.read_text(label).partition("\n")[0].strip()
        if label.exists()
        else "",
        rows=rows,
        completions={int(p.name[5:-6]): p for p in _completions(folder)},
        scores_by_alpha=_read_scores(folder),
    )


@contextlib.contextmanager
def _as_written(path: epath.Path) -> Iterator[None]:
    """Names the file in what goes wrong because it is not as pfjax writes it."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not as a run or an evaluation of pfjax writes it ({error!r}): bring it "
            "back or remove it"
        ) from error


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for k, v in tree.items():
        flat |= _flatten(v, f"{prefix}{k}.") if isinstance(v, dict) else {prefix + k: v}
    return flat


def group(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order of their first runs; seeds in order within one."""
    members = collections.defaultdict(list)
    for run in runs:
        members[run.label or str(sorted(_experiment(run).items()))].append(run)
    of_configs = iter(_names([m[0] for m in members.values() if not m[0].label]))
    groups: list[Group] = []
    for mine in members.values():
        name = mine[0].label or next(of_configs)
        if name in [g.name for g in groups]:  # a label may be another group's name too
            name += f" ({len(groups) + 1})"
        mine.sort(key=lambda r: (r.config.get("seed", 0), str(r.folder)))
        shared = sorted(set.intersection(*map(_evaluated, mine)))
        at = [shared[0], shared[-1]] if shared else []
        first, last = [[read_problems(r, s) for r in mine] for s in at] or [[], []]
        groups.append(Group(name, mine, shared, first, last))
    return groups


def read_problems(run: Run, step: int) -> list[Problem]:
    """Problems of an evaluation with all of their samples; [] if none were kept."""
    if step not in run.completions:
        return []
    by_key = collections.defaultdict(list)
    with _as_written(run.completions[step]):
        for row in dataset_io.read_jsonl(run.completions[step]):
            # An older run had one set and did not name it.
            by_key[row["prompt_id"], row["prompt"], row.get("set", "")].append(row)
            if lacking := [k for k in _OF_SAMPLE if k not in row]:
                raise KeyError(*lacking)
            if not isinstance(row["completion"], str):
                raise TypeError("completion is not text")
    most = max(map(len, by_key.values()), default=0)
    return [Problem(k, x) for k, x in by_key.items() if len(x) == most]


def _experiment(run: Run) -> dict[str, str]:
    """The settings that make it another experiment, as text; any other is "not set"."""
    found = {k: _show(v) for k, v in run.config.items() if k not in _SAME_EXPERIMENT}
    return collections.defaultdict(lambda: "not set", found)


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        value = ", ".join(map(_show, value))
    return str(value) or "none"


def _names(runs: Sequence[Run]) -> list[str]:
    """Names by objective, alpha and the fewest other settings, found greedily, that
    tell all runs apart."""
    table = [_experiment(run) for run in runs]
    told_apart = lambda keys: len({tuple(row[k] for k in keys) for row in table})
    keys = [k for k in _keys(table) if told_apart([k]) > 1]
    chosen = [k for k in _FIRST if k in keys]
    while told_apart(chosen) < told_apart(keys):
        chosen.append(max(keys, key=lambda k: told_apart([*chosen, k])))
    chosen = chosen or list(_FIRST)
    # What more than three quarters have is left to be said by the few that do not.
    usual = {}
    for key in set(chosen) - set(_FIRST):
        value, count = collections.Counter(row[key] for row in table).most_common(1)[0]
        usual[key] = value if count > 0.75 * len(table) else None
    words = {k: k.rpartition(".")[2].replace("_", " ") + " " for k in chosen}
    words["objective"] = ""  # its values say what they are
    said = lambda row: (words[k] + row[k] for k in chosen if row[k] != usual.get(k))
    return [", ".join(said(row)) or "common settings" for row in table]


def _keys(table: Sequence[dict[str, str]]) -> list[str]:
    return list(dict.fromkeys([*_FIRST, *(k for row in table for k in row)]))


def settings(groups: Sequence[Group]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Returns settings that all groups share; and those that differ, a value per group."""
    tables = [[_experiment(run) for run in g.runs] for g in groups]
    shown = lambda key, rows: " / ".join(dict.fromkeys(row[key] for row in rows))
    keys = _keys([row for table in tables for row in table])
    found = {key: [shown(key, table) for table in tables] for key in keys}
    shared = {k: v[0] for k, v in found.items() if len(set(v)) == 1}
    return shared, {k: v for k, v in found.items() if k not in shared}

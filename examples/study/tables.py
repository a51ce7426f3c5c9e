"""Tables that compare runs on several seeds, in Markdown: means, standard deviations."""

import pathlib
from typing import Any

import numpy as np

from pfjax.evaluation import scores
from pfjax.infra import dataset_io
from pfjax.model import hf, log_probs, tokenizer
from pfjax.sampler import engine
from pfjax.tasks import benchmarks, grading

_BEST = "best avg"
# Metrics of a run, named up to the "@"; and what heads their columns.
_COLUMNS = {
    "eval/avg": "accuracy",
    _BEST: "best on the way",
    "eval/maj": "majority",
    "eval/pass": "any of k",
    "eval/length_mean": "length",
    "eval/distinct": "distinct",
    "entropy": "entropy per token",
    "kl/policy_base_per_token": "KL to base per token",
}


def evaluations(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Rows of a run's metrics that have an evaluation, without its number of samples."""
    found = dataset_io.read_jsonl(folder / "metrics.jsonl")
    return [
        {k.partition("@")[0]: v for k, v in row.items() if not k.endswith("_se")}
        for row in found
        if "eval/length_mean" in row
    ]


def table_of_runs(runs: list[tuple[str, pathlib.Path]]) -> str:
    """Last values of the runs of each label, below those of their base at step 0.

    Args:
      runs: label and folder; runs of one label differ in their seed.
    """
    groups: dict[str, dict[str, list[float]]] = {}
    for label, folder in runs:
        found = evaluations(folder)
        best = {_BEST: max(row.get("eval/avg", 0.0) for row in found[1:])}
        for name, row in (("base", found[0]), (label, {**found[-1], **best})):
            if name == "base" and label != runs[0][0]:
                continue  # the seeds of every label begin with the same evaluations
            group = groups.setdefault(name, {})
            for key in _COLUMNS.keys() & row.keys():
                group.setdefault(key, []).append(row[key])
    return _table("run", _COLUMNS, groups)


def table_of_samples(files: dict[str, list[pathlib.Path]], prompts: str) -> str:
    """Scores of what `pfjax.sample` wrote, a file per seed.

    Args:
      files: by method.
      prompts: the file of prompts with answers that were sampled.
    """
    problems = benchmarks.read(prompts)
    columns = {k: v for k, v in _COLUMNS.items() if k.startswith("eval/")}
    groups: dict[str, dict[str, list[float]]] = {}
    with grading.Grader() as grader:
        for method, paths in files.items():
            group = groups.setdefault(method, {})
            for path in paths:
                rows = dataset_io.read_jsonl(path)
                rows.sort(key=lambda r: (r["prompt_id"], r["sample"]))
                for row in rows:
                    row["terminated"] = row["finished"]
                scores.grade(rows, problems, grader, "last")
                k = len(rows) // len(problems)
                for name, value in scores.summarise(rows, k, grader).items():
                    key = f"eval/{name.partition('@')[0]}"
                    if key in columns and not name.endswith("_se"):
                        group.setdefault(key, []).append(value)
    return _table("method", columns, groups)


def table_of_distances(
    policies: dict[str, list[pathlib.Path]], base: str, prompts: str
) -> str:
    """How far policies are from their base, in nats per response, from 32 samples of
    either side to each prompt.

    Args:
      policies: folders by label, one per seed.
      base: folder or name of the base.
      prompts: file of prompts.
    """
    tok, origin = tokenizer.load(base), hf.load(base)
    ids = [tokenizer.encode_prompt(tok, p.question) for p in benchmarks.read(prompts)]
    longest = origin.config.max_positions - max(len(x) for x in ids)
    samples, new = 32, min(longest, 64)

    def divergence(p, q) -> float:
        """KL(p || q)."""
        sampled = engine.rollout(p, ids, samples, new, seed=1)
        starts = np.repeat([len(x) for x in ids], samples)
        sequences = [
            ids[i] + sampled.tokens[i, j, : sampled.lengths[i, j]].tolist()
            for i, j in np.ndindex(sampled.lengths.shape)
        ]
        own, other = (log_probs.score(x, sequences, starts) for x in (p, q))
        gaps = [a.sum() - b.sum() for a, b in zip(own, other, strict=True)]
        return float(np.mean(gaps))

    groups: dict[str, dict[str, list[float]]] = {}
    for label, folders in policies.items():
        for policy in map(hf.load, folders):
            group = groups.setdefault(label, {})
            group.setdefault("to", []).append(divergence(origin, policy))
            group.setdefault("from", []).append(divergence(policy, origin))
    columns = {"to": "KL(base, policy)", "from": "KL(policy, base)"}
    return _table("nats per response", columns, groups)


def _table(
    title: str, columns: dict[str, str], groups: dict[str, dict[str, list[float]]]
) -> str:
    lines = [
        f"| {title} | {' | '.join(columns.values())} |",
        f"|---|{'---:|' * len(columns)}",
    ]
    for name, values in groups.items():
        cells = [_cell(values.get(key, [])) for key in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"

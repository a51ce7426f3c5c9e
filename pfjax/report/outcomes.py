"""What groups of runs came to: values, curves, and the problems that moved."""

import collections
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pfjax.evaluation import estimators
from pfjax.report import runs


class Value(NamedTuple):
    mean: float
    spread: float | None  # standard deviation over runs; None for one run


class Curve(NamedTuple):
    """A mean over runs, and the least and the greatest of them."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Moved(NamedTuple):
    """How many problems; means over runs."""

    gained: float  # wrong -> right by majority
    lost: float
    kept: float  # right at both
    missed: float  # wrong at both
    rose: float  # the share of right samples did
    fell: float
    stayed: float


def keys_of(groups: Sequence[runs.Group], name: str) -> list[str]:
    """Evaluation metrics of this name in any run: `eval/avg@8`, `eval/math500/avg@8`."""
    pattern = re.compile(rf"eval/(.+/)?{re.escape(name)}(@\d+)?")
    found = {k for g in groups for run in g.runs for row in run.rows for k in row}
    return sorted(k for k in found if pattern.fullmatch(k))


def _table(group: runs.Group, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps at which all runs know a metric, and its values `[run, step]`."""
    known = [
        {r["step"]: r[key] for r in run.rows if key in r and np.isfinite(r[key])}
        for run in group.runs
    ]
    steps = sorted(set.intersection(*(set(k) for k in known)))
    return np.array(steps), np.array([[k[s] for s in steps] for k in known])


def first_and_last(group: runs.Group, key: str) -> tuple[Value, Value] | None:
    """A metric at the first and the last step at which all runs know it."""
    steps, values = _table(group, key)
    if not len(steps):
        return None

    def value(x: np.ndarray) -> Value:
        return Value(float(x.mean()), float(x.std(ddof=1)) if len(x) > 1 else None)

    return value(values[:, 0]), value(values[:, -1])


def window(group: runs.Group, key: str, most: int) -> int:
    """Steps that one point of a curve is the mean of."""
    return max(1, -(-len(_table(group, key)[0]) // most))


def curve(group: runs.Group, key: str, most: int = 10**9) -> Curve | None:
    """A metric over steps; more than `most` of them are averaged in equal windows."""
    steps, values = _table(group, key)
    if not len(steps):
        return None
    starts = np.arange(0, len(steps), window(group, key, most))
    sizes = np.diff([*starts, len(steps)])
    values = np.add.reduceat(values, starts, axis=1) / sizes
    return _over_runs(np.add.reduceat(steps, starts) / sizes, values)


def _over_runs(x: np.ndarray, values: np.ndarray) -> Curve:
    return Curve(x, values.mean(axis=0), values.min(axis=0), values.max(axis=0))


def pass_curve(problems: Sequence[Sequence[runs.Problem]]) -> Curve | None:
    """pass@n over n = 1, 2, 4, ... k; None where answers are not known.

    Args:
      problems: those of each run.
    """
    graded = [[p for p in mine if p.share_right is not None] for mine in problems]
    if not all(graded):
        return None
    k = min(len(mine[0].samples) for mine in graded)
    sizes = sorted({2**i for i in range(k.bit_length())} | {k})
    right = [
        np.array([sum(r["correct"] for r in p.samples) for p in m]) for m in graded
    ]
    values = np.array(
        [
            [estimators.pass_at_k(c, len(m[0].samples), n).mean() for n in sizes]
            for c, m in zip(right, graded, strict=True)
        ]
    )
    return _over_runs(np.array(sizes), values)


def is_right_by_majority(problem: runs.Problem) -> bool:
    """Whether the commonest answer is right, or as common as the commonest.

    Right answers are one class. Wrong ones are told apart as text, without the grader:
    two spellings of one wrong answer do not add up.
    """
    votes = collections.Counter(
        True if r["correct"] else r["answer"]
        for r in problem.samples
        if r["answer"] is not None
    )
    return votes[True] > 0 and votes[True] == max(votes.values())


def pairs(before: Sequence[runs.Problem], after: Sequence[runs.Problem]):
    """The problems of both evaluations, each as (before, after)."""
    then = {p.key: p for p in before}
    return [(then[p.key], p) for p in after if p.key in then]


def moved(group: runs.Group) -> Moved | None:
    """Which problems changed from the first evaluation to the last; None where answers
    are not known."""
    counts = []
    for before, after in zip(group.first, group.last, strict=True):
        both = [x for x in pairs(before, after) if x[0].share_right is not None]
        if not both:
            return None
        votes = [tuple(map(is_right_by_majority, x)) for x in both]
        change = np.array([y.share_right - x.share_right for x, y in both])
        counts.append(
            [votes.count(v) for v in ((False, True), (True, False), (True, True), (False, False))]
            + [(change > 0).sum(), (change < 0).sum(), (change == 0).sum()]
        )  # fmt: skip
    return Moved(*np.mean(counts, axis=0).tolist())


def telling(
    group: runs.Group, changed: int, unchanged: int
) -> list[tuple[runs.Problem, runs.Problem]]:
    """runs.Problems of the group's first run to show: those whose share of right samples
    changed the most, then some where it did not; the first ones without answers."""
    both = pairs(group.first[0], group.last[0])
    if any(x.share_right is None for x, _ in both):
        return both[: changed + unchanged]
    size = [abs(y.share_right - x.share_right) for x, y in both]
    order = sorted(range(len(both)), key=lambda i: (-size[i], i))
    most = [i for i in order if size[i] > 0][:changed]
    return [both[i] for i in most + [i for i in order if size[i] == 0][:unchanged]]

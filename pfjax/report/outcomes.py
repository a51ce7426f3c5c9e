"""What groups of runs came to: values and curves."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pfjax.evaluation import estimators
from pfjax.report.runs import Group, Problem
from pfjax.trainer import metrics


class Metric(NamedTuple):
    """A column of the table of numbers and, with a title, a chart over steps."""

    key: str  # of evaluations up to the "@" and without a set; or of training steps
    column: str
    best: str = ""  # "greatest" or "least", where one of them is
    places: int = 3  # decimals in the table
    title: str = ""
    about: str = ""  # where `trainer.metrics` has nothing to say

    def description(self, key: str) -> metrics.Metric:
        """What a key of it means, and what a good value looks like."""
        known = metrics.METRICS.get(metrics.described(key))
        return known or metrics.Metric(self.about)


METRICS = (
    Metric("eval/avg", "avg", "greatest", title="Accuracy"),
    Metric("eval/maj", "maj", "greatest"),
    Metric("eval/pass", "pass", "greatest"),
    Metric("eval/quality", "quality", "greatest", about="mean judgement of responses"),
    Metric(
        "eval/semantic_diversity",
        "semantic diversity",
        "greatest",
        about="mean distance between the responses to a prompt",
    ),
    Metric("eval/length_mean", "length", "", 1, "Length of responses"),
    Metric("eval/truncated", "truncated", "least"),
    Metric("eval/boxed_frac", "boxed", "greatest"),
    Metric("eval/distinct", "distinct", "", 3, "Distinct responses"),
    Metric("entropy", "entropy", "", 3, "Entropy per token"),
    Metric("kl/policy_base_per_token", "KL to base", "", 3, "KL to the base"),
    Metric("tb/residual_std_within_prompt", "residual", "least", 3, "Residual"),
    Metric(
        "match/exponent",
        "exponent",
        places=2,
        about="power of the base that the policy is, over the base's mass; alpha at the "
        "optimum",
    ),
    Metric(
        "match/total_variation",
        "distance",
        "least",
        about="total variation to the target, estimated from samples",
    ),
)


class Curve(NamedTuple):
    """A metric of several runs; its mean, least, greatest and standard deviation."""

    x: np.ndarray
    values: np.ndarray  # [runs, x]

    mean = property(lambda self: self.values.mean(axis=0))
    low = property(lambda self: self.values.min(axis=0))
    high = property(lambda self: self.values.max(axis=0))

    @property
    def spread(self) -> np.ndarray | None:
        return self.values.std(axis=0, ddof=1) if len(self.values) > 1 else None


def keys_of(groups: Sequence[Group], name: str) -> list[str]:
    """Metrics of any run: for `eval/avg` `eval/avg@8` and `eval/math500/avg@8`."""
    of_any_set = re.escape(name).replace("eval/", "eval/(.+/)?")
    pattern = re.compile(of_any_set + r"(@\d+)?")
    found = {k for g in groups for run in g.runs for row in run.rows for k in row}
    return sorted(k for k in found if pattern.fullmatch(k))


def curve(group: Group, key: str) -> Curve | None:
    """A metric over the steps at which all runs know it."""
    known = [
        {r["step"]: r[key] for r in run.rows if key in r and np.isfinite(r[key])}
        for run in group.runs
    ]
    steps = sorted(set.intersection(*(set(k) for k in known)))
    if not steps:
        return None
    return Curve(np.array(steps), np.array([[k[s] for s in steps] for k in known]))


def window(steps: int) -> int:
    """How many steps a running median is of: an eighth of all, and an odd number."""
    return max(steps // 8, 1) | 1 if steps >= 8 else 1


def smooth(noisy: Curve, width: int) -> Curve:
    """The running median of each run; at the ends, of the part that is there.

    A single step with a response far from the target, of which there are some at any
    time, moves a mean and not a median.
    """
    half, n = width // 2, len(noisy.x)
    parts = (noisy.values[:, max(i - half, 0) : i + half + 1] for i in range(n))
    return Curve(noisy.x, np.stack([np.median(p, axis=1) for p in parts], axis=1))


def pass_curve(problems: Sequence[Sequence[Problem]]) -> Curve | None:
    """pass@n over n = 1, 2, 4, ... k of each run; None where answers are not known."""
    graded = [[p for p in mine if p.num_correct is not None] for mine in problems]
    if not graded or not all(graded):
        return None
    k = min(len(mine[0].samples) for mine in graded)
    sizes = sorted({2**i for i in range(k.bit_length())} | {k})
    values = []
    for mine in graded:
        correct, n = np.array([p.num_correct for p in mine]), len(mine[0].samples)
        values.append([estimators.pass_at_k(correct, n, x).mean() for x in sizes])
    return Curve(np.array(sizes), np.array(values))

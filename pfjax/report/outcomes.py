"""What groups of runs came to: values, curves, and the problems that changed."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pfjax.evaluation import estimators
from pfjax.report.runs import Group, Problem

Pair = tuple[Problem, Problem]  # before, after


class Metric(NamedTuple):
    """A column of the table of numbers and, with a title, a picture over steps."""

    key: str  # of evaluations up to the "@" and without a set; or of training steps
    column: str
    explained: str
    places: int = 3  # decimals in the table
    title: str = ""
    label: str = ""  # of the axis
    may_be_log: bool = False  # over a wide positive range


_TRAINING = "of training samples"
METRICS = (
    Metric("eval/avg", "avg", "Fraction of samples that are correct, mean over problems.",
           title="Accuracy", label="correct samples (fraction)"),
    Metric("eval/maj", "maj", "Fraction of problems whose most common answer is correct."),
    Metric("eval/pass", "pass", "Fraction of problems with a correct one among the samples."),
    Metric("eval/quality", "quality", "Mean judgement of the responses."),
    Metric("eval/semantic_diversity", "semantic diversity",
           "Mean distance between the responses to a prompt."),
    Metric("eval/length_mean", "length", "Mean tokens per response to held-out prompts.", 1,
           "Length of responses", "tokens per response", True),
    Metric("eval/truncated", "truncated", "Fraction of responses cut at max_new_tokens."),
    Metric("eval/boxed_frac", "boxed", "Fraction of responses with a boxed answer."),
    Metric("eval/distinct", "distinct", "Fraction of a held-out prompt's responses that differ "
           "from each other.", 3, "Distinct responses", "distinct responses (fraction)"),
    Metric("entropy", "entropy", f"Nats per token {_TRAINING}.",
           3, "Entropy per token", "nats per token", True),
    Metric("kl/policy_base_per_token", "KL to base", f"Nats per token {_TRAINING}."),
    Metric("tb/residual_std_within_prompt", "residual std", "Standard deviation of the "
           f"residual among a prompt's responses, {_TRAINING}: 0 at the optimum. Nats per "
           "token; of tb_traj, rl_traj and subtb, nats per response.",
           3, "Residual: distance from the target", "std of the residual (nats)", True),
)  # fmt: skip
PASS_AT_N = Metric(
    "", "pass@n", "Probability that n samples hold a correct one, mean over problems, at the "
    "last evaluation; dashed grey: at the first.",
    title="A correct answer in n samples", label="pass@n",
)  # fmt: skip


class Curve(NamedTuple):
    """A metric of several runs; its mean, least, greatest and standard deviation."""

    x: np.ndarray
    values: np.ndarray  # [runs, x]
    window: int = 1  # steps that one point is the mean of

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


def curve(group: Group, key: str, most: int = 10**9) -> Curve | None:
    """A metric over the steps at which all runs know it; more than `most` of them are
    averaged in equal windows."""
    known = [
        {r["step"]: r[key] for r in run.rows if key in r and np.isfinite(r[key])}
        for run in group.runs
    ]
    steps = sorted(set.intersection(*(set(k) for k in known)))
    if not steps:
        return None
    window = max(1, -(-len(steps) // most))
    starts = np.arange(0, len(steps), window)
    sizes = np.diff([*starts, len(steps)])
    values = np.array([[k[s] for s in steps] for k in known])
    values = np.add.reduceat(values, starts, axis=1) / sizes
    return Curve(np.add.reduceat(steps, starts) / sizes, values, window)


def pass_curve(problems: Sequence[Sequence[Problem]]) -> Curve | None:
    """pass@n over n = 1, 2, 4, ... k of each run; None where answers are not known."""
    graded = [[p for p in mine if p.fraction_correct is not None] for mine in problems]
    if not all(graded):
        return None
    k = min(len(mine[0].samples) for mine in graded)
    sizes = sorted({2**i for i in range(k.bit_length())} | {k})
    values = []
    for mine in graded:
        correct, n = np.array([p.num_correct for p in mine]), len(mine[0].samples)
        values.append([estimators.pass_at_k(correct, n, x).mean() for x in sizes])
    return Curve(np.array(sizes), np.array(values))


def _pairs(before: list[Problem], after: list[Problem]) -> list[Pair]:
    """The problems of both evaluations."""
    then = {p.key: p for p in before}
    return [(then[p.key], p) for p in after if p.key in then]


def changes(group: Group) -> tuple[float, float] | None:
    """How many problems became correct and incorrect by majority from the first
    evaluation to the last, means over runs; None where answers are not known."""
    counts = []
    for first, last in zip(group.first, group.last, strict=True):
        graded = [p for p in _pairs(first, last) if p[0].fraction_correct is not None]
        if not graded:
            return None
        votes = [(x.is_majority_correct, y.is_majority_correct) for x, y in graded]
        counts.append([votes.count((False, True)), votes.count((True, False))])
    return tuple(np.mean(counts, axis=0).tolist())


def telling(group: Group, changed: int, unchanged: int) -> list[Pair]:
    """Problems of the group's first run to show: those whose fraction of correct samples
    changed the most, then some where it did not; the first ones without answers."""
    both = _pairs(group.first[0], group.last[0])
    if any(x.fraction_correct is None for x, _ in both):
        return both[: changed + unchanged]
    by = lambda pair: abs(pair[1].fraction_correct - pair[0].fraction_correct)
    most = sorted(filter(by, both), key=by, reverse=True)
    return most[:changed] + [x for x in both if not by(x)][:unchanged]

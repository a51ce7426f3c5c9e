"""Which pictures a report has of its groups, what is said of them, and why others are
left out."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pfjax.report import charts, outcomes
from pfjax.report.runs import Group

RESIDUAL = "tb/residual_std_within_prompt"


class Drawing(NamedTuple):
    name: str
    title: str
    caption: str
    draw: Callable[[float], Any]  # inches wide -> Figure


class _Line(NamedTuple):
    """A metric over steps."""

    name: str
    title: str
    metric: str  # of evaluations, up to the "@"; or a key of training steps
    label: str
    caption: str
    scale: str = "linear"


_LINES = (
    _Line("accuracy", "Accuracy", "avg", "right samples (share)",
          "Share of samples that are right, on held-out prompts."),
    _Line("length", "Length of responses", "length_mean", "tokens a response",
          "Mean over responses to held-out prompts.", "auto"),
    _Line("distinct", "Distinct responses", "distinct", "distinct responses (share)",
          "Share of a held-out prompt's responses that differ from each other."),
    _Line("entropy", "Entropy of a token", "entropy", "nats a token",
          "Mean over the tokens of training samples.", "auto"),
    _Line("residual", "Distance from the target", RESIDUAL, "std of the residual (nats)",
          "How far the residual spreads among a prompt's training samples: 0 at the "
          "optimum. Nats a token; of tb_traj, rl_traj and subtb, nats a response.",
          "auto"),
)  # fmt: skip
_WHY_NOT = {
    "accuracy": "no evaluation graded answers, as its prompts have none",
    "entropy": "there was no step of training",
    "residual": "there was no step of training",
}


def is_large(groups: Sequence[Group]) -> bool:
    """Whether groups get a panel each, and pictures the width of the page."""
    return len(groups) > charts.MOST_IN_ONE


def over_steps(groups: Sequence[Group]) -> tuple[list[Drawing], list[str]]:
    """Curves over steps of training; and of each that there is not, why."""
    drawings: list[Drawing] = []
    missing: list[str] = []
    most = 25 if is_large(groups) else 50  # points; panels are small
    for line in _LINES:
        known = []
        for key in outcomes.keys_of(groups, line.metric) or [line.metric]:
            curves = [outcomes.curve(g, key, most) for g in groups]
            if any(c is not None and len(c.x) > 1 for c in curves):
                known.append((key, curves))
        for key, curves in known:
            steps = max(outcomes.window(g, key, most) for g in groups)
            drawings.append(_line(line, key, curves, steps, groups, len(known) > 1))
        if not known:
            why = _WHY_NOT.get(line.name, "no evaluation has it")
            if outcomes.keys_of(groups, line.metric):
                why = "there is one evaluation so far"
            missing.append(f"No picture of the {line.title.lower()}: {why}.")
    return drawings, missing


def _line(line, key, curves, steps, groups, is_one_of_several: bool) -> Drawing:
    name, title = line.name, line.title
    if is_one_of_several:  # sets, or numbers of samples
        which = key.removeprefix("eval/")
        name = f"{name}-{which.replace('/', '-').replace('@', '')}"
        title = f"{title}, {which}"
    caption = line.caption + (f" Means over {steps} steps." if steps > 1 else "")
    draw = functools.partial(
        charts.lines, [g.name for g in groups], curves, charts.Axis("step"),
        charts.Axis(line.label, line.scale),
    )  # fmt: skip
    return Drawing(name, title, caption + _band(groups), draw)


def _band(groups: Sequence[Group]) -> str:
    band = ""
    if any(len(g.runs) > 1 for g in groups):
        band = " Band: least to greatest of the seeds."
    return band + " Grey: the other groups." * is_large(groups)


def of_samples(groups: Sequence[Group]) -> tuple[list[Drawing], list[str]]:
    """pass@n, and quality against diversity where that is what groups differ in."""
    drawings: list[Drawing] = []
    missing: list[str] = []
    last = [outcomes.pass_curve(g.last) for g in groups]
    first = [outcomes.pass_curve(g.first) for g in groups]
    if any(c is not None and len(c.x) > 1 for c in last):
        is_base = all(g.evaluated[0] == 0 for g in groups)
        before = "before training" if is_base else "at the first evaluation"
        caption = (
            "Probability that n samples hold a right one, mean over problems, at the "
            f"last evaluation; dashed: {before}."
        )
        draw = functools.partial(
            charts.lines, [g.name for g in groups], last,
            charts.Axis("n, samples a problem", "log2"), charts.Axis("pass@n (share)"),
            reference=(before, first),
        )  # fmt: skip
        drawings.append(
            Drawing(
                "pass", "A right answer in n samples", caption + _band(groups), draw
            )
        )
    else:
        missing.append(
            "No picture of pass@n: no completions with several graded samples."
        )
    alphas = {run.config.get("alpha") for g in groups for run in g.runs}
    if (len(groups) > 1 and len(alphas) > 1) or any(
        a is not None and a < 1 for a in alphas
    ):
        drawing = _quality(groups)
        if drawing is None:
            missing.append(
                "No picture of quality against diversity: no evaluation graded answers "
                "or has eval/quality."
            )
        else:
            drawings.append(drawing)
    return drawings, missing


def _quality(groups: Sequence[Group]) -> Drawing | None:
    semantic = outcomes.keys_of(groups, "semantic_diversity")
    quality = outcomes.keys_of(groups, "quality")
    x_keys = semantic or outcomes.keys_of(groups, "distinct")
    y_keys = quality or outcomes.keys_of(groups, "avg")
    if not x_keys or not y_keys:
        return None
    x, y = x_keys[0], y_keys[0]
    points: list[charts.Point | None] = []
    starts: dict[str, list[tuple[str, float, float]]] = {}
    for g in groups:
        ends = [outcomes.curve(g, key) for key in (x, y)]
        if any(c is None for c in ends):
            points.append(None)
            continue
        points.append(
            charts.Point(*((c.mean[-1], c.low[-1], c.high[-1]) for c in ends))
        )
        if g.evaluated[0] == 0:
            at = (g.name, float(ends[0].mean[0]), float(ends[1].mean[0]))
            starts.setdefault(_base_of(g), []).append(at)
    # That of most groups first; another is named by the first group that began there.
    bases = [
        (f"before {found[0][0]}" if i else "before training",
         sum(x for _, x, _ in found) / len(found), sum(y for _, _, y in found) / len(found))
        for i, found in enumerate(sorted(starts.values(), key=len, reverse=True))
    ]  # fmt: skip
    labels = (
        "semantic diversity" if semantic else "distinct responses (share)",
        "quality" if quality else f"right samples ({y.removeprefix('eval/')})",
    )
    caption = "A group's last evaluation each; hollow: where they began."
    if any(len(g.runs) > 1 for g in groups):
        caption += " Bars: least to greatest of the seeds."
    draw = functools.partial(
        charts.scatter, [g.name for g in groups], points, bases,
        charts.Axis(labels[0]), charts.Axis(labels[1]),
    )  # fmt: skip
    title = "Quality against diversity" if quality else "Accuracy against diversity"
    return Drawing("quality", title, caption, draw)


def _base_of(group: Group) -> str:
    """Tells what was evaluated at step 0, and on what."""
    config = group.runs[0].config
    return f"{config['model']} on {config.get('data.eval')}"

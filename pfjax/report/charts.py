"""What the charts of a page show, as JSON for `charts.js`."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pfjax.report import outcomes
from pfjax.report.outcomes import Curve
from pfjax.report.runs import Group

_MOST_POINTS = 300  # of a curve: more than can be told apart, and the page stays small
_MOST_WITH_DOTS = 3  # groups whose single steps are shown behind their curves
Chart = dict[str, Any]


def draw(groups: Sequence[Group]) -> tuple[list[Chart], list[str]]:
    """Returns curves over steps, pass@n, and quality against diversity where that is
    what groups differ in; and the titles of those for which there are too few values."""
    found = {m.title: [*_over_steps(m, groups)] for m in outcomes.METRICS if m.title}
    found["pass@n"] = [*_pass_at_n(groups)]
    alphas = {run.config.get("alpha") for g in groups for run in g.runs}
    if (len(groups) > 1 and len(alphas) > 1) or any(a and a < 1 for a in alphas):
        found["Quality against diversity"] = [*_paths(groups)]
    if any(run.scores_by_alpha for g in groups for run in g.runs):
        found["Quality against diversity, by alpha"] = [*_dials(groups)]
    drawn = [chart for made in found.values() for chart in made]
    return drawn, [title for title, made in found.items() if not made]


def _over_steps(metric: outcomes.Metric, groups: Sequence[Group]) -> Iterator[Chart]:
    known = {}
    for key in outcomes.keys_of(groups, metric.key):
        curves = [outcomes.curve(g, key) for g in groups]
        if any(c and len(c.x) > 1 for c in curves):
            known[key] = curves
    for key, curves in known.items():
        name, title = re.match(r"\w+", metric.title)[0].lower(), metric.title
        if len(known) > 1:  # sets, or numbers of samples
            which = key.removeprefix("eval/")
            name += "-" + re.sub(r"\W+", "-", which)
            title += f", {which}"
        about, _, good, _ = metric.description(key)
        caption = _sentence(about) + _sentence(good and f"good: {good}")
        reference = None
        if metric.key.startswith("eval/"):
            made = [_curve(i, c) for i, c in enumerate(curves) if c]
        else:
            made, said = _smoothed(curves)
            caption += said
            if metric.best == "least":
                reference = next(float(c.mean[0]) for c in curves if c)
                caption += " Dashed: the first run's first step, where it is the base."
        yield _chart(name, title, caption, made, reference=reference)


def _smoothed(curves: Sequence[Curve | None]) -> tuple[list[Chart], str]:
    """Running medians, with the single steps behind them where there is room."""
    has_dots = sum(c is not None for c in curves) <= _MOST_WITH_DOTS
    made, widths = [], set()
    for i, noisy in enumerate(curves):
        if noisy:
            width = outcomes.window(len(noisy.x))
            widths.add(width)
            made.append(_curve(i, outcomes.smooth(noisy, width)))
            if has_dots and width > 1:
                made[-1]["raw"] = _curve(i, noisy)["y"]
    if widths == {1}:
        return made, ""
    said = f" Running median of {'/'.join(map(str, sorted(widths)))} steps"
    return made, said + ("; dots: single steps." if has_dots else ".")


def _pass_at_n(groups: Sequence[Group]) -> Iterator[Chart]:
    first = outcomes.pass_curve(groups[0].first)
    last = [outcomes.pass_curve(g.last) for g in groups]
    if any(c and len(c.x) > 1 for c in last):
        caption = (
            "Probability that n samples hold a correct one, mean over problems, at the "
            "last evaluation. Good: higher at n = 1 without a loss at large n."
        )
        made = [_curve(i, c) for i, c in enumerate(last) if c]
        chart = _chart("pass", "A correct answer in n samples", caption, made, "n")
        chart["doubles"] = True
        if first:
            on_axis = dict(zip(first.x.tolist(), _numbers(first.mean), strict=True))
            chart["before"] = [on_axis.get(n) for n in chart["x"]]
            chart["before_name"] = f"step {groups[0].evaluated[0]}"
            chart["caption"] += " Dashed: the first run at its first evaluation."
        yield chart


def _paths(groups: Sequence[Group]) -> Iterator[Chart]:
    """Quality by a judge and semantic diversity if they were logged, else stand-ins."""
    keys = [
        next((k for x in names for k in outcomes.keys_of(groups, f"eval/{x}")), None)
        for names in (("semantic_diversity", "distinct"), ("quality", "avg"))
    ]
    if not all(keys):
        return
    made = []
    for i, group in enumerate(groups):
        curves = [outcomes.curve(group, key) for key in keys]
        if None not in curves:
            at = [{*c.x.tolist()} for c in curves]
            steps = sorted(set.intersection(*at))
            x, y = (_numbers(c.mean[np.isin(c.x, steps)]) for c in curves)
            made.append({"group": i, "points": steps, "x": x, "y": y})
    names = [_words(key) for key in keys]
    caption = (
        f"{names[1].capitalize()} against {names[0]}, over a group's evaluations: hollow "
        "where it began. Good: up, and no further to the left than needed."
    )
    if made:
        yield {
            "id": "quality", "title": "Quality against diversity", "caption": caption,
            "is_paths": True, "point": "step", "curves": made, "x_name": names[0],
            "y_name": names[1],
        }  # fmt: skip


def _dials(groups: Sequence[Group]) -> Iterator[Chart]:
    """What policies for every alpha score at several, where that was evaluated, set by
    set."""
    known = dict.fromkeys(
        key for g in groups for run in g.runs for key in run.scores_by_alpha
    )
    for number, name in enumerate(known):
        made = []
        for i, group in enumerate(groups):
            # Of the first of a group that was evaluated.
            found = (r.scores_by_alpha.get(name) for r in group.runs)
            scores = next(filter(None, found), {})
            if len(scores) > 1:
                alphas = sorted(scores)
                x, y = ([scores[a][k] for a in alphas] for k in ("distinct", "quality"))
                made.append({"group": i, "points": alphas, "x": x, "y": y})
        caption = (
            f"Accuracy on {name} against distinct responses, one policy at every alpha that "
            "was evaluated: hollow at the least. Good: up and to the right."
        )
        if made:
            yield {
                "id": f"dial-{number}", "title": "Quality against diversity, by alpha",
                "caption": caption, "is_paths": True, "point": "alpha", "curves": made,
                "x_name": "distinct responses", "y_name": "accuracy",
            }  # fmt: skip


def _words(key: str) -> str:
    words = {"distinct": "distinct responses", "avg": "accuracy, avg"}
    name = re.sub(r"\w+", lambda m: words.get(m[0], m[0]), key.removeprefix("eval/"))
    return name.replace("_", " ")


def _sentence(text: str) -> str:
    """With a capital and a full stop, after a space."""
    return f" {text[0].upper()}{text[1:]}." if text else ""


def _curve(group: int, c: Curve) -> Chart:
    every = -(-len(c.x) // _MOST_POINTS)
    at = [*range(0, len(c.x) - 1, every), len(c.x) - 1]  # the last one always
    thin = {"group": group, "x": c.x[at].tolist(), "y": _numbers(c.mean[at])}
    if len(c.values) > 1:
        thin |= {"low": _numbers(c.low[at]), "high": _numbers(c.high[at])}
    return thin


def _chart(
    name: str,
    title: str,
    caption: str,
    curves: list[Chart],
    x_name: str = "step",
    reference: float | None = None,
) -> Chart:
    """Curves on one axis: each has null where it knows nothing."""
    x = sorted({v for c in curves for v in c["x"]})
    aligned = []
    for c in curves:
        place = {v: i for i, v in enumerate(c["x"])}
        spread = lambda values, place=place: [
            values[place[v]] if v in place else None for v in x
        ]
        columns = {k: spread(v) for k, v in c.items() if k not in ("group", "x")}
        aligned.append({"group": c["group"], **columns})
    return {
        "id": name, "title": title, "caption": caption.strip(), "x": x, "x_name": x_name,
        "curves": aligned, "reference": reference,
    }  # fmt: skip


def _numbers(values: np.ndarray) -> list[float]:
    return [float(f"{v:.5g}") for v in values]

"""The pictures of a report, each drawn once: SVG for the page, PNG beside it.

The same data give the same bytes. Colours are six that the usual forms of colour blindness
tell apart, each with a dash and a marker of its own. More groups get a panel each.
"""

import io
import math
import pathlib
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from pfjax.report import outcomes
from pfjax.report.outcomes import Curve
from pfjax.report.runs import Group

WIDTH = 4.6  # inches: letters can be read on a phone, and lines told apart
MOST_IN_ONE = 6  # groups; more get a panel each
_COLUMNS = 3  # of panels
_COLOURS = ("#1141ad", "#c76a00", "#429882", "#63123b", "#a473ee", "#72510d")
_MARKERS, _DASHES = "osD^vP", ("-", "--", "-.", ":")
_GREY, _PALE, _INK = "#5b6570", "#b9c0c8", "#24292f"
_STYLE = pathlib.Path(__file__).with_name("report.mplstyle")


class Picture(NamedTuple):
    name: str  # of its files
    title: str
    caption: str
    figure: Figure


@matplotlib.rc_context(fname=_STYLE)
def draw(groups: Sequence[Group]) -> tuple[list[Picture], list[str]]:
    """Returns curves over steps, pass@n, and quality against diversity where that is
    what groups differ in; and the titles of those for which there are too few values."""
    found = {m.title: [*_over_steps(m, groups)] for m in outcomes.METRICS if m.title}
    found["pass@n"] = [*_pass_at_n(groups)]
    alphas = {run.config.get("alpha") for g in groups for run in g.runs}
    if (len(groups) > 1 and len(alphas) > 1) or any(a and a < 1 for a in alphas):
        found["Quality against diversity"] = [*_quality(groups)]
    drawn = [picture for made in found.values() for picture in made]
    return drawn, [title for title, made in found.items() if not made]


def _over_steps(metric: outcomes.Metric, groups: Sequence[Group]) -> Iterator[Picture]:
    most = 25 if len(groups) > MOST_IN_ONE else 50  # points; panels are small
    known = {}
    for key in outcomes.keys_of(groups, metric.key):
        curves = [outcomes.curve(g, key, most) for g in groups]
        if _has_line(curves):
            known[key] = curves
    for key, curves in known.items():
        name, title = re.match(r"\w+", metric.title)[0].lower(), metric.title
        if len(known) > 1:  # sets, or numbers of samples
            which = key.removeprefix("eval/")
            name += "-" + which.replace("/", "-").replace("@", "")
            title += f", {which}"
        window = max(c.window for c in curves if c)
        caption = metric.explained + f" Means over {window} steps." * (window > 1)
        yield _lines(name, title, caption, groups, curves, metric)


def _has_line(curves: Sequence[Curve | None]) -> bool:
    return any(c and len(c.x) > 1 for c in curves)


def _seeds(groups: Sequence[Group], mark: str) -> str:
    has_seeds = any(len(g.runs) > 1 for g in groups)
    return f" {mark}: least to greatest of the seeds." * has_seeds


def _pass_at_n(groups: Sequence[Group]) -> Iterator[Picture]:
    first = [outcomes.pass_curve(g.first) for g in groups]
    last = [outcomes.pass_curve(g.last) for g in groups]
    if _has_line(last):
        m = outcomes.PASS_AT_N
        yield _lines("pass", m.title, m.explained, groups, last, m, before=first)


def _quality(groups: Sequence[Group]) -> Iterator[Picture]:
    """Quality by a judge and semantic diversity if they were logged, else stand-ins."""
    keys = [
        next((k for x in names for k in outcomes.keys_of(groups, f"eval/{x}")), None)
        for names in (("semantic_diversity", "distinct"), ("quality", "avg"))
    ]
    if all(keys):
        title = "Quality against diversity"
        caption = "The last evaluation of each group; hollow: the first."
        caption += _seeds(groups, "Bars")
        yield Picture("quality", title, caption, _points(title, groups, keys))


def _lines(
    name: str,
    title: str,
    caption: str,
    groups: Sequence[Group],
    curves: Sequence[Curve | None],
    metric: outcomes.Metric,
    before: Sequence[Curve | None] | None = None,
) -> Picture:
    """Curves of groups, with a band over the runs of each, in one panel or in many."""
    shown = [i for i, c in enumerate(curves) if c]
    has_panels = len(groups) > MOST_IN_ONE
    panels, columns = ([[i] for i in shown], _COLUMNS) if has_panels else ([shown], 1)
    rows = math.ceil(len(panels) / columns)
    names = [textwrap.fill(g.name, 20) for g in groups]
    lines = max(n.count("\n") + 1 for n in names)
    figure = _figure(title, rows * (0.8 + 0.13 * lines) + 0.7 if has_panels else 2.9)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for k, (axes, mine) in enumerate(zip(grid.flat, panels, strict=False)):
        for i in set(shown) - set(mine):
            axes.plot(curves[i].x, curves[i].mean, color=_PALE, lw=0.5, zorder=1.5)
        for i in mine:
            _curve(axes, curves[i], 0 if has_panels else i, groups[i].name)
            if before and (c := before[i]):
                axes.plot(c.x, c.mean, color=_GREY, lw=1.2, linestyle="--", zorder=2)
        if has_panels:
            axes.set_title(names[mine[0]])
            # The lowest panel of each column, also in a last row with gaps.
            axes.tick_params(labelbottom=k + columns >= len(panels), length=0)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    _scale(grid[0, 0], [curves[i] for i in shown], bool(before), metric.may_be_log)
    x_label = "n, samples per problem" if before else "step"
    if has_panels:
        figure.supxlabel(x_label)
        figure.supylabel(metric.label)
    else:
        grid[0, 0].set(xlabel=x_label, ylabel=metric.label)
        _legend(figure)
    caption += _seeds(groups, "Band") + " Grey: the other groups." * has_panels
    return Picture(name, title, caption, figure)


def _scale(axes: Axes, curves: Sequence[Curve], doubles: bool, may_log: bool) -> None:
    """Scales of all panels, which share them; x that doubles is 1, 2, 4, ..."""
    if doubles:
        ticks = sorted({int(v) for c in curves for v in c.x})[::-1]
        ticks = ticks[:: -(-len(ticks) // 6)]
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(v) for v in ticks])
    low, high = min(c.low.min() for c in curves), max(c.high.max() for c in curves)
    if may_log and low > 0 and high / low > 30:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    elif high - low < 1e-9:  # a level line, not a magnified rounding error
        axes.set_ylim(low - 0.1, high + 0.1)


def _curve(axes: Axes, curve: Curve, i: int, name: str) -> None:
    style = _style(i)
    if (curve.low != curve.high).any():
        band = {"color": style["color"], "alpha": 0.16, "linewidth": 0}
        axes.fill_between(curve.x, curve.low, curve.high, **band)
    # Curves of many points carry a few marks, at other places than their neighbours'.
    n = len(curve.x)
    marks = (min(i, n - 1), max(n // 8, 1)) if n > 12 else 1
    dashes = _DASHES[i % len(_DASHES)]
    axes.plot(curve.x, curve.mean, ls=dashes, markevery=marks, label=name, **style)


def _style(i: int) -> dict[str, Any]:
    """Colour and marker of the group at place i: different ones up to 36."""
    marker = _MARKERS[(i + i // len(_COLOURS)) % len(_MARKERS)]
    return {"color": _COLOURS[i % len(_COLOURS)], "marker": marker, "zorder": 3}


def _points(title: str, groups: Sequence[Group], keys: Sequence[str]) -> Figure:
    """A point per group with bars over its runs, and a hollow one where it began."""
    figure = _figure(title, 3.1)
    axes = figure.subplots()
    for i, group in enumerate(groups):
        curves = [outcomes.curve(group, key) for key in keys]
        if None in curves:
            continue
        bars = [
            [[c.mean[-1] - c.low[-1]], [c.high[-1] - c.mean[-1]]] for c in curves
        ] if len(group.runs) > 1 else (None, None)  # fmt: skip
        axes.errorbar(
            *(c.mean[-1] for c in curves), xerr=bars[0], yerr=bars[1], elinewidth=1,
            linestyle="none", markersize=7, label=group.name, **_style(i),
        )  # fmt: skip
        # Groups with the same base began at the same place.
        axes.plot(
            *(c.mean[0] for c in curves), color="none", marker="o", markersize=9,
            markeredgecolor=_INK, markeredgewidth=1.4, zorder=4,
        )  # fmt: skip
    axes.margins(0.1)
    axes.set(xlabel=_words(keys[0]), ylabel=_words(keys[1]))
    _legend(figure)
    return figure


def _words(key: str) -> str:
    words = {"distinct": "distinct responses", "avg": "correct samples, avg"}
    name = re.sub(r"\w+", lambda m: words.get(m[0], m[0]), key.removeprefix("eval/"))
    return name.replace("_", " ")


def _figure(title: str, height: float) -> Figure:
    figure = Figure((WIDTH, height))
    figure.suptitle(title, x=0.02, ha="left")
    return figure


def _legend(figure: Figure) -> None:
    """Below the panel, which keeps its height."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    names = [textwrap.fill(n, 56) for n in names]
    widest = max(len(line) for n in names for line in n.split("\n"))
    columns = max(1, min(3, int(WIDTH / (0.55 + 0.07 * widest)), len(names)))
    rows = math.ceil(sum(n.count("\n") + 1 for n in names) / columns)
    figure.set_figheight(figure.get_figheight() + 0.18 * rows)
    figure.legend(handles, names, ncols=columns, loc="outside lower left")


@matplotlib.rc_context(fname=_STYLE)
def save(figure: Figure, kind: str) -> bytes:
    """The bytes of a "png" or "svg"."""
    out = io.BytesIO()
    no_date = {"png": {"Software": None}, "svg": {"Date": None}}[kind]
    figure.savefig(out, format=kind, metadata=no_date)
    return out.getvalue()

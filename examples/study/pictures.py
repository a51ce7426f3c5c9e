"""PNGs of the study for its page in docs/, where the report's charts cannot go.

The same data give the same bytes. Colours are six that the usual forms of colour blindness
tell apart, each with a dash and a marker of its own. More groups get a panel each.
"""

import math
import pathlib
import textwrap
from collections.abc import Sequence
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
_PALE, _INK = "#b9c0c8", "#24292f"
_STYLE = pathlib.Path(__file__).with_name("pictures.mplstyle")


class _Picture(NamedTuple):
    key: str  # of evaluations, up to the "@"
    title: str
    label: str  # of the axis


_OVER_STEPS = {
    "accuracy": _Picture("eval/avg", "Accuracy", "correct samples (fraction)"),
    "length": _Picture(
        "eval/length_mean", "Length of responses", "tokens per response"
    ),
    "distinct": _Picture(
        "eval/distinct", "Distinct responses", "distinct responses (fraction)"
    ),
}


@matplotlib.rc_context(fname=_STYLE)
def write(groups: Sequence[Group], folder: pathlib.Path) -> None:
    """Writes a PNG for each thing that all groups know."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in draw(groups).items():
        figure.savefig(folder / f"{name}.png", metadata={"Software": None})


@matplotlib.rc_context(fname=_STYLE)
def draw(groups: Sequence[Group]) -> dict[str, Figure]:
    """Figures by name: curves over steps, and accuracy against distinct responses."""
    figures = {}
    for name, picture in _OVER_STEPS.items():
        keys = outcomes.keys_of(groups, picture.key)
        curves = [keys and outcomes.curve(g, keys[0]) for g in groups]
        if all(curves):
            figures[name] = _lines(picture, groups, curves)
    if {"accuracy", "distinct"} <= figures.keys():
        keys = [outcomes.keys_of(groups, f"eval/{x}")[0] for x in ("distinct", "avg")]
        figures["quality"] = _points(groups, keys)
    return figures


def _lines(
    picture: _Picture, groups: Sequence[Group], curves: Sequence[Curve]
) -> Figure:
    """Curves with a band over the runs of each group, in one panel or in many."""
    has_panels = len(groups) > MOST_IN_ONE
    all_of_them = range(len(groups))
    panels, columns = (
        ([[i] for i in all_of_them], _COLUMNS) if has_panels else ([all_of_them], 1)
    )
    rows = math.ceil(len(panels) / columns)
    names = [textwrap.fill(g.name, 20) for g in groups]
    lines = max(n.count("\n") + 1 for n in names)
    height = rows * (0.8 + 0.13 * lines) + 0.7 if has_panels else 2.9
    figure = _figure(picture.title, height)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for k, (axes, mine) in enumerate(zip(grid.flat, panels, strict=False)):
        for i in set(all_of_them) - set(mine):
            axes.plot(curves[i].x, curves[i].mean, color=_PALE, lw=0.5, zorder=1.5)
        for i in mine:
            _curve(axes, curves[i], 0 if has_panels else i, groups[i].name)
        if has_panels:
            axes.set_title(names[mine[0]])
            # The lowest panel of each column, also in a last row with gaps.
            axes.tick_params(labelbottom=k + columns >= len(panels), length=0)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    _scale(grid[0, 0], curves)
    if has_panels:
        figure.supxlabel("step")
        figure.supylabel(picture.label)
    else:
        grid[0, 0].set(xlabel="step", ylabel=picture.label)
        _legend(figure)
    return figure


def _scale(axes: Axes, curves: Sequence[Curve]) -> None:
    """Logarithmic over a wide range, and a level line is no magnified rounding error."""
    low, high = min(c.low.min() for c in curves), max(c.high.max() for c in curves)
    if low > 0 and high / low > 30:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    elif high - low < 1e-9:
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


def _points(groups: Sequence[Group], keys: Sequence[str]) -> Figure:
    """A point per group with bars over its runs, and a hollow one where it began."""
    figure = _figure("Quality against diversity", 3.1)
    axes = figure.subplots()
    for i, group in enumerate(groups):
        curves = [outcomes.curve(group, key) for key in keys]
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
    axes.set(xlabel="distinct responses", ylabel="correct samples (fraction)")
    _legend(figure)
    return figure


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

"""Drawings: data in, a Figure of matplotlib out; and figures as SVG or PNG.

No state is shared with other figures, and the same data give the same bytes. Colours
are six that the usual forms of colour blindness tell apart; each comes with a dash and
a marker of its own. More groups than that get a panel each.
"""

import html
import io
import math
import re
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from pfjax.report.outcomes import Curve

WIDE, FULL, NARROW = 5.6, 11.0, 3.5  # inches: half a page, a page, a phone

# In a page each of these turns to a variable of its style sheet, by what it is for.
COLOURS = {
    "s0": "#1141ad", "s1": "#c76a00", "s2": "#429882",
    "s3": "#63123b", "s4": "#a473ee", "s5": "#72510d",
    "ink": "#24292f", "muted": "#5b6570", "grid": "#e3e6ea", "rest": "#b9c0c8",
    "paper": "#fefefe",
}  # fmt: skip
_DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 1.5, 2)), (0, (10, 2)), "-")
_MARKERS = "osD^vP"
_DIGIT = "\u2007"  # a space as wide as a digit
MOST_IN_ONE = 6  # groups; more get a panel each
_INK, _MUTED, _GRID, _REST, _PAPER = (
    COLOURS[k] for k in ("ink", "muted", "grid", "rest", "paper")
)
_STYLE = {
    "font.size": 9,
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.labelsize": 9,
    "axes.edgecolor": _REST,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": _REST,
    "ytick.color": _REST,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "path.simplify_threshold": 0.3,
    "text.parse_math": False,  # names may hold a dollar
    "svg.fonttype": "none",
    "svg.hashsalt": "pfjax",
}


class Axis(NamedTuple):
    label: str
    scale: str = "linear"  # or "log2"; "auto": logarithmic over wide positive ranges


class Point(NamedTuple):
    """Means of a group, and what its runs reach from and to."""

    x: tuple[float, float, float]  # mean, least, greatest
    y: tuple[float, float, float]


def lines(
    names: Sequence[str],
    curves: Sequence[Curve | None],
    x: Axis,
    y: Axis,
    width: float,
    reference: tuple[str, Sequence[Curve | None]] | None = None,
) -> Figure:
    """Curves of groups, with a band over the runs of each.

    Args:
      names: of all groups of the report, so that each keeps its colour.
      curves: one a group; None where there is nothing to draw.
      x, y: what the axes show.
      width: inches; the height follows.
      reference: a name, and a dashed curve for each group.
    """
    with matplotlib.rc_context(_STYLE):
        if len(names) > MOST_IN_ONE:
            return _panels(names, curves, x, y, width, reference)
        shown = [i for i, c in enumerate(curves) if c is not None]
        keys = [(names[i], _handle(i)) for i in shown]
        if reference is not None:
            keys.append((reference[0], Line2D([], [], **_reference_style())))
        figure, axes = _single(width, keys)
        for i in shown:
            _draw(axes, curves[i], i)
            if reference is not None:
                _draw_reference(axes, reference[1][i])
        _scale(axes, [curves[i] for i in shown], x, y)
        axes.set_xlabel(x.label)
        axes.set_ylabel(y.label)
        return figure


def scatter(
    names: Sequence[str],
    points: Sequence[Point | None],
    base: Sequence[tuple[str, float, float]],
    x: Axis,
    y: Axis,
    width: float,
) -> Figure:
    """A point a group, with bars over its runs, and a hollow one a base.

    More groups than there are colours are numbered, and named below.
    """
    with matplotlib.rc_context(_STYLE):
        numbered = len(names) > MOST_IN_ONE
        shown = [i for i, p in enumerate(points) if p is not None]
        blank = Line2D([], [], linestyle="none")
        keys = [
            (f"{i + 1}".rjust(2, _DIGIT) + _DIGIT + names[i], blank)
            if numbered
            else (names[i], _handle(i, line=False))
            for i in shown
        ]
        hollow = [_base_style(i) for i in range(len(base))]
        keys += [
            (name, Line2D([], [], **style))
            for (name, _, _), style in zip(base, hollow, strict=True)
        ]
        figure, axes = _single(width, keys, is_beside=numbered and width > WIDE)
        for i in shown:
            mean_x, mean_y = points[i].x[0], points[i].y[0]
            axes.errorbar(
                mean_x, mean_y, xerr=_bars(points[i].x), yerr=_bars(points[i].y),
                color=COLOURS["s0" if numbered else f"s{i}"], elinewidth=1, zorder=3,
                marker="o" if numbered else _MARKERS[i], linestyle="none",
                markersize=6 if numbered else 8, markeredgecolor=_PAPER,
                markeredgewidth=0.8,
            )  # fmt: skip
        for (_, bx, by), style in zip(base, hollow, strict=True):
            axes.plot(bx, by, **style, zorder=4)
        axes.margins(0.12)
        axes.set_xlabel(x.label)
        axes.set_ylabel(y.label)
        if numbered:
            figure.canvas.draw()  # places of points are known only then
            _number(axes, [(str(i + 1), points[i]) for i in shown], base)
        return figure


def _single(width: float, keys, is_beside: bool = False) -> tuple[Figure, Axes]:
    """A figure of one panel, with its legend below or to the right of it."""
    room = 0.42 * width if is_beside else width
    letters = int((room - 0.6) / 0.07)
    names = [
        textwrap.fill(n, letters, subsequent_indent=3 * _DIGIT * (_DIGIT in n))
        for n, _ in keys
    ]
    widest = max(len(line) for n in names for line in n.split("\n"))
    columns = 1 if is_beside else int(room / (0.6 + 0.07 * widest))
    columns = max(1, min(columns, len(keys), 4))
    rows = [
        sum(n.count("\n") + 1 for n in part) for part in np.array_split(names, columns)
    ]
    height = 0.4 * width + 0.95
    if is_beside:
        height = max(height, 0.175 * max(rows) + 0.3)
    else:
        height += 0.21 * max(rows)
    figure = Figure((width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.legend(
        [h for _, h in keys], names, ncols=columns, alignment="left",
        loc="outside right upper" if is_beside else "outside lower left",
        handlelength=2.6, handletextpad=0.6, columnspacing=1.6,
    )  # fmt: skip
    return figure, figure.add_subplot()


def _panels(names, curves, x, y, width, reference) -> Figure:
    shown = [(n, c, i) for i, (n, c) in enumerate(zip(names, curves, strict=True)) if c]
    rows = math.ceil(len(shown) / max(2, int(width / 1.8)))
    columns = math.ceil(len(shown) / rows)
    letters = int((width - 0.5) / columns / 0.078)  # that a title has room for
    titles = [textwrap.fill(n, letters) for n, _, _ in shown]
    tallest = max(t.count("\n") + 1 for t in titles)
    figure = Figure((width, rows * (1.25 + 0.15 * tallest) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for k, axes in enumerate(grid.flat):
        if k >= len(shown):
            axes.set_visible(False)
            continue
        others = [c for other, (_, c, _) in enumerate(shown) if other != k]
        axes.plot(*_joined(others), color=_REST, linewidth=0.6, zorder=1.5)
        if reference is not None:
            _draw_reference(axes, reference[1][shown[k][2]])
        _draw(axes, shown[k][1], 0, marks="end")
        axes.set_title(titles[k], fontsize=8.5, loc="left", color=_INK, pad=4)
        # The lowest panel of each column bears the steps, also in a last row with gaps.
        axes.tick_params(labelbottom=k + columns >= len(shown), length=0)
    _scale(grid[0, 0], [c for _, c, _ in shown], x, y)
    figure.supxlabel(x.label, fontsize=9, color=_INK)
    figure.supylabel(y.label, fontsize=9, color=_INK)
    return figure


def _joined(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Curves as one, with gaps: a path each would make a large page."""
    gap = [math.nan]
    return (
        np.concatenate([gap, *(v for c in curves for v in (c.x, gap))]),
        np.concatenate([gap, *(v for c in curves for v in (c.mean, gap))]),
    )


def _draw(axes: Axes, curve: Curve, i: int, marks: str = "all") -> None:
    colour = COLOURS[f"s{i}"]
    if not np.array_equal(curve.low, curve.high):
        axes.fill_between(
            curve.x, curve.low, curve.high, color=colour, alpha=0.16, linewidth=0
        )
    # Curves of many points carry a few marks, at other places than their neighbours'.
    n = len(curve.x)
    every = range(n) if n <= 12 else range(min(i * n // 48, n - 1), n, max(n // 8, 1))
    axes.plot(
        curve.x, curve.mean, color=colour, linestyle=_DASHES[i], marker=_MARKERS[i],
        markevery=list(every) if marks == "all" else [n - 1], zorder=3,
        markeredgecolor=_PAPER, markeredgewidth=0.6,
    )  # fmt: skip


def _draw_reference(axes: Axes, curve: Curve | None) -> None:
    if curve is not None:
        axes.plot(curve.x, curve.mean, **_reference_style())


def _scale(axes: Axes, curves: Sequence[Curve], x: Axis, y: Axis) -> None:
    low = min(c.low.min() for c in curves)
    high = max(c.high.max() for c in curves)
    if x.scale == "log2":
        ticks = sorted({int(v) for c in curves for v in c.x})
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(_thinned(ticks)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if y.scale == "auto" and low > 0 and high / low > 30:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    elif high - low < 1e-9:  # a level line, not a magnified rounding error
        axes.set_ylim(low - 0.1 * abs(low) - 0.01, high + 0.1 * abs(high) + 0.01)


def _thinned(ticks: list[int]) -> list[int]:
    """At most 7 ticks, the last one among them."""
    step = -(-len(ticks) // 7)
    return ticks[::-1][::step][::-1]


def _bars(v: tuple[float, float, float]) -> list[list[float]] | None:
    mean, low, high = v
    return None if low == high else [[max(mean - low, 0)], [max(high - mean, 0)]]


def _reference_style() -> dict:
    return {"color": _MUTED, "linestyle": (0, (3, 2)), "linewidth": 1.3, "zorder": 2}


def _base_style(i: int) -> dict:
    return {
        "color": _INK, "marker": _MARKERS[i % len(_MARKERS)], "markersize": 9, "linestyle": "none",
        "markerfacecolor": "none", "markeredgewidth": 1.6,
    }  # fmt: skip


def _handle(i: int, line: bool = True) -> Line2D:
    return Line2D(
        [], [], color=COLOURS[f"s{i}"], linestyle=_DASHES[i] if line else "none",
        marker=_MARKERS[i], markersize=4.5 if line else 7,
        markeredgecolor=_PAPER, markeredgewidth=0.6,
    )  # fmt: skip


def _number(axes: Axes, points, base) -> None:
    """Writes numbers beside points where they hide neither points nor each other."""
    to_pixels = axes.transData.transform
    box = axes.get_window_extent()
    scale = axes.figure.dpi / 72
    dots = [to_pixels((p.x[0], p.y[0])) for _, p in points]
    taken = [(d, 4.5) for d in dots] + [(to_pixels(b[1:]), 7.0) for b in base]
    for (text, point), dot in zip(points, dots, strict=True):
        spots = [
            dot + scale * r * np.array([math.cos(a), math.sin(a)])
            for r in (9, 13, 18, 24, 31, 39, 48)
            for a in np.arange(0, 2 * math.pi, math.pi / 8) + math.pi / 8
        ]
        reach = 3.2 + 2.0 * len(text)

        def crowding(spot, reach=reach):
            inside = box.padded(-8 * scale).contains(*spot)
            gaps = [
                max(0.0, reach + r - np.hypot(*(spot - at)) / scale) for at, r in taken
            ]
            return sum(gaps) + (0 if inside else 1000)

        spot = min(spots, key=crowding)  # the nearest of those that are free
        taken.append((spot, reach))
        far = np.hypot(*(spot - dot)) / scale > 12
        note = axes.annotate(
            text, (point.x[0], point.y[0]), (spot - dot) / scale,
            textcoords="offset points", ha="center", va="center", fontsize=8, color=_INK,
            arrowprops={"arrowstyle": "-", "color": _MUTED, "linewidth": 0.6,
                        "shrinkA": 1, "shrinkB": 3} if far else None,
        )  # fmt: skip
        note.set_in_layout(False)  # else the panel moves for it


def to_png(figure: Figure, title: str, caption: str) -> bytes:
    """A picture that stands alone: with its title and caption above it, on white."""
    out = io.BytesIO()
    width, height = figure.get_size_inches()
    text = textwrap.fill(caption, int((width - 0.2) / 0.072))
    head = 0.4 + 0.155 * (text.count("\n") + 1)  # inches
    with matplotlib.rc_context(_STYLE):
        figure.set_size_inches(width, height + head)
        figure.get_layout_engine().set(rect=(0, 0, 1, height / (height + head)))
        top = {"x": 0.1 / width, "va": "top"}
        figure.text(
            y=1 - 0.08 / (height + head), s=title, fontsize=11, weight="bold", **top
        )
        figure.text(
            y=1 - 0.32 / (height + head), s=text, fontsize=8.5, color=_MUTED, **top
        )
        figure.savefig(
            out, format="png", dpi=140, facecolor="white", metadata={"Software": None}
        )
    return out.getvalue()


def to_svg(figure: Figure, name: str, alt: str) -> str:
    """An `<svg>` for a page: ids begin with `name`, colours are variables of the page.

    Fonts are the page's; matplotlib's names of them, sizes in pt and its head are gone.
    """
    out = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(out, format="svg")
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    drop = r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>"
    svg = re.sub(drop, "", svg, flags=re.DOTALL)
    svg = re.sub(r"<[^>]+>", lambda tag: _for_a_page(tag.group(), name), svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups()
    head = (
        f'<svg role="img" aria-label="{html.escape(alt)}" viewBox="0 0 {width} {height}" '
        f'style="max-width: {float(width) * 4 / 3:.0f}px" '
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return head + svg[svg.index(">") + 1 :].strip()


def _for_a_page(tag: str, name: str) -> str:
    for before in ('id="', 'href="#', "url(#"):
        tag = re.sub(rf"(?<![\w-]){re.escape(before)}", f"{before}{name}-", tag)
    for variable, colour in COLOURS.items():
        tag = tag.replace(colour, f"var(--{variable})")
    tag = re.sub(r"(\d+\.\d\d)\d+", r"\1", tag)
    if ' d="' in tag:
        tag = re.sub(r"(\d+\.\d)\d+", r"\1", tag)
    tag = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", tag)
    return re.sub(r"font-family:[^;\"]*;?", "", tag)

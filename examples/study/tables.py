"""Tables of the study, in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from examples.study import statistics
from examples.study.methods import TRAINED, UNTRAINED
from examples.study.statistics import Interval

# What a distribution over responses is worth, see `cells.run`; and what else a run has.
Values = Mapping[str, Any]

_POINT = 0.01  # of accuracy: how near to the exact value is there
# Where target and base differ by less, no fraction of the way is taken.
_LEAST_WAY = 0.05
_COLUMNS = {
    "accuracy": ("accuracy", "{:.3f}"),
    "distinct_correct": ("distinct correct of 16", "{:.2f}"),
    "distinct": ("distinct of 16", "{:.2f}"),
    "length": ("length", "{:.1f}"),
    "total_variation": ("total variation", "{:.3f}"),
    "exponent": ("exponent", "{:.2f}"),
    "tokens": ("tokens", "{:,.0f}"),
    "fell_below_base": ("runs ever below the base", "{:.0%}"),
}
_MEANS_ALONE = ("tokens", "fell_below_base")


class Cell(NamedTuple):
    """A world and a method: what it should end at and where its runs ended."""

    score: str  # which of the values it is about
    predicted: np.ndarray  # `[bases]`
    reached: np.ndarray  # `[bases, seeds]`
    gap: Interval  # of reached - predicted

    @property
    def is_there(self) -> bool:
        """Whether the end is within a point, or within its own interval; a point of
        numbers above 1 is a hundredth of them."""
        scale = max(1.0, abs(self.predicted.mean()))
        return abs(self.gap.value) <= max(_POINT * scale, self.gap.half_width)


class World(NamedTuple):
    """Results of a world, and what was known of it before training."""

    name: str
    alpha: float
    runs: Sequence[Values]
    # By method, one for each base; for those that need no training, too.
    predictions: Mapping[str, Sequence[Values]]

    @property
    def score(self) -> str:
        """What it is about: to be correct where sharpened, variety of it where flattened."""
        return "accuracy" if self.alpha > 1 else "distinct_correct"

    @property
    def methods(self) -> list[str]:
        there = {r["method"] for r in self.runs}
        return [name for name in TRAINED if name in there]

    def grid(self, method: str, key: str) -> np.ndarray:
        """Values of a method's runs, `[bases, seeds]`."""
        mine = [r for r in self.runs if r["method"] == method]
        bases = sorted({r["base"] for r in mine})
        mine.sort(key=lambda r: r["seed"])
        return np.array([[r[key] for r in mine if r["base"] == b] for b in bases])

    def exact(self, method: str, key: str) -> np.ndarray:
        """Of what a method should end at, `[bases]`."""
        return np.array([found[key] for found in self.predictions[method]])

    def cells(self) -> dict[str, Cell]:
        """By method, where its end is known."""
        out = {}
        for method in self.methods:
            if method in self.predictions:
                exact, found = (
                    self.exact(method, self.score),
                    self.grid(method, self.score),
                )
                gap = statistics.intervals({method: found - exact[:, None]})[method]
                out[method] = Cell(self.score, exact, found, gap)
        return out


def of_world(world: World) -> str:
    """What is exact of a world, and where its runs ended: means over bases and seeds, with
    intervals of 95 %."""
    keys = [k for k in _COLUMNS if k != "fell_below_base" or world.alpha > 1]
    lines = _header("", [_COLUMNS[k][0] for k in keys])
    for name, method in UNTRAINED.items():
        if name in world.predictions:
            first = world.predictions[name][0]
            cells = [
                _text(k, world.exact(name, k).mean()) if k in first else ""
                for k in keys
            ]
            lines.append(_row(f"*{method.title}*", cells))
    for name in world.methods:
        lines.append(
            _row(TRAINED[name].title, [_measured(world, name, k) for k in keys])
        )
    return "\n".join(lines) + "\n"


def _measured(world: World, method: str, key: str) -> str:
    if any(key not in r for r in world.runs if r["method"] == method):
        return ""
    found = statistics.intervals({method: world.grid(method, key)})[method]
    return _text(key, *(found[:1] if key in _MEANS_ALONE else found))


def of_ends(worlds: Sequence[World]) -> str:
    """Which runs ended where theory says, for all cells whose end is known."""
    lines = _header("world", ["method", "exact", "reached", "difference", "there"])
    total = there = 0
    for world in worlds:
        for method, cell in world.cells().items():
            total, there = total + 1, there + cell.is_there
            text = lambda x, key=cell.score: _text(key, x)
            values = [
                TRAINED[method].title, text(cell.predicted.mean()), text(cell.reached.mean()),
                _text(cell.score, *cell.gap), "yes" if cell.is_there else "**no**",
            ]  # fmt: skip
            lines.append(_row(world.name, values))
    share = f"{there} of {total} cells end within a point, or their interval, of the exact value.\n"
    return "\n".join(lines) + f"\n\n{share}"


def of_all(worlds: Sequence[World], reference: str = "powerflow") -> str:
    """How much of the way from the base to the length-aware target the methods go: the
    interquartile mean over the runs of all worlds, and its difference from the reference.

    Methods that lack a world are left out, and worlds whose target is hardly better or
    worse than the base.
    """
    ways = [w for w in worlds if np.abs(_way(w)).min() > _LEAST_WAY]
    if not ways:
        return ""
    shared = [m for m in ways[0].methods if all(m in w.methods for w in ways)]
    scores = {}
    for method in shared:
        parts = []
        for w in ways:
            gained = w.grid(method, w.score) - w.exact("base", w.score)[:, None]
            parts.append(gained / _way(w)[:, None])
        scores[method] = np.concatenate(parts)
    iqm = statistics.interquartile_mean
    own = statistics.intervals(scores, iqm)
    lines = _header(
        "method", ["of the way to the target", "difference from PowerFlow", ""]
    )
    # One run of each orders nothing.
    is_comparable = reference in scores and scores[reference].shape[1] > 1
    apart = statistics.intervals(scores, iqm, reference) if is_comparable else {}
    for method, found in sorted(own.items(), key=lambda x: -x[1].value):
        cells = [_text("accuracy", *found), "", ""]
        if method in apart and method != reference:
            difference = apart[method]
            cells[1:] = [_text("accuracy", *difference), _order(difference)]
        lines.append(_row(TRAINED[method].title, cells))
    return f"{', '.join(w.name for w in ways)}:\n\n" + "\n".join(lines) + "\n"


def _order(difference: Interval) -> str:
    if difference.holds_zero:
        return "no order"
    return "above" if difference.value > 0 else "below"


def _way(world: World) -> np.ndarray:
    """From the base to the target, `[bases]`."""
    return world.exact("target", world.score) - world.exact("base", world.score)


def _header(first: str, rest: Sequence[str]) -> list[str]:
    return [_row(first, rest), "|---|" + "---:|" * len(rest)]


def _row(first: str, rest: Sequence[str]) -> str:
    return f"| {first} | {' | '.join(rest)} |"


def _text(key: str, value: float, low: float | None = None, high: float | None = None):
    """A value, with its interval where runs differ."""
    form = _COLUMNS[key][1].format
    if low is None or form(low) == form(high):
        return form(value)
    return f"{form(value)} [{form(low)}, {form(high)}]"

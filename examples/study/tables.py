"""Tables of the study, in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from examples.study import statistics
from examples.study.ends import ALL, TRAIN
from examples.study.methods import TRAINED, UNTRAINED
from examples.study.statistics import Interval

# What a distribution over responses is worth, see `cells.run`; and what else a run has.
Values = Mapping[str, Any]

_POINT = 0.01  # of accuracy: how near to the exact value is there
_TWO_SIDED = 1.96  # standard errors that 95 % are within
# Where target and base differ by less, no fraction of the way is taken.
_LEAST_WAY = 0.05
_COLUMNS = {
    "accuracy": ("accuracy", "{:.3f}"),
    "distinct_correct": ("distinct correct of 16", "{:.2f}"),
    "distinct": ("distinct of 16", "{:.2f}"),
    "length": ("length", "{:.1f}"),
    "listed": ("listed", "{:.3f}"),
    "total_variation": ("total variation", "{:.3f}"),
    "exponent": ("exponent", "{:.2f}"),
    "tokens": ("tokens", "{:,.0f}"),
    "fell_below_base": ("runs ever below the base", "{:.0%}"),
}
_MEANS_ALONE = ("tokens", "fell_below_base")


class Cell(NamedTuple):
    """A world and a method: what it should end at and where its runs ended, on held-out
    prompts or on training prompts."""

    score: str  # which of the values it is about
    predicted: np.ndarray  # `[bases]`
    reached: np.ndarray  # `[bases, seeds]`
    gap: Interval  # of reached - predicted
    error: float  # standard error of the mean prediction, where it is estimated

    @property
    def is_there(self) -> bool:
        """Whether the end is within a point, or within its own interval, which counts the
        prediction's; a point of numbers above 1 is a hundredth of them."""
        scale = max(1.0, abs(self.predicted.mean()))
        own = np.hypot(self.gap.half_width, _TWO_SIDED * self.error)
        return bool(abs(self.gap.value) <= max(_POINT * scale, own))


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

    def error(self, method: str, key: str) -> float:
        """Standard error of a prediction's mean over bases; 0 where it is a sum."""
        found = [x.get(f"{key}_se", 0.0) for x in self.predictions[method]]
        return float(np.linalg.norm(found) / len(found))

    def whole(self, method: str, key: str, on: str = "") -> str:
        """The name of a predicted value that counts what is not listed, if it has one."""
        name = f"{on}{ALL}{key}"
        return name if name in self.predictions[method][0] else f"{on}{key}"

    def has(self, method: str, key: str) -> bool:
        """Whether all runs of a method have a value."""
        return all(key in r for r in self.runs if r["method"] == method)

    def cells(self, on: str = "") -> dict[str, Cell]:
        """By method, where its end is known; on training prompts with `TRAIN`, of those
        that were measured there."""
        out = {}
        for method in self.methods:
            reached = f"{on}{self.score}"
            if method in self.predictions and self.has(method, reached):
                key = self.whole(method, self.score, on)
                exact, found = self.exact(method, key), self.grid(method, reached)
                gap = statistics.intervals({method: found - exact[:, None]})[method]
                error = self.error(method, key)
                out[method] = Cell(self.score, exact, found, gap, error)
        return out


def of_world(world: World) -> str:
    """What is exact of a world, and where its runs ended: means over bases and seeds, with
    intervals of 95 %."""
    keys = [k for k in _COLUMNS if k != "fell_below_base" or world.alpha > 1]
    lines = _header("", [_COLUMNS[k][0] for k in keys])
    for name, method in UNTRAINED.items():
        if name in world.predictions:
            first = world.predictions[name][0]
            # How much of a target is listed; all else is of that.
            of = lambda k, name=name: world.whole(name, k) if k == "listed" else k
            cells = [_exact(world, name, k, of(k)) if k in first else "" for k in keys]
            lines.append(_row(f"*{method.title}*", cells))
    for name in world.methods:
        lines.append(
            _row(TRAINED[name].title, [_measured(world, name, k) for k in keys])
        )
    return "\n".join(lines) + "\n"


def _exact(world: World, method: str, key: str, name: str) -> str:
    """A predicted value, with its standard error where it is estimated."""
    value, error = world.exact(method, name).mean(), world.error(method, name)
    return _text(key, value) + (f" ± {_text(key, error)}" if error else "")


def _measured(world: World, method: str, key: str) -> str:
    if not world.has(method, key):
        return ""
    found = statistics.intervals({method: world.grid(method, key)})[method]
    return _text(key, *(found[:1] if key in _MEANS_ALONE else found))


def of_ends(worlds: Sequence[World]) -> str:
    """Which runs ended where theory says, for all cells whose end is known: on held-out
    prompts, and on such that were trained on."""
    columns = [
        "method", "of the list", "listed", "exact", "reached", "difference", "there",
        "difference, trained on", "there, trained on",
        "total variation", "total variation, trained on",
    ]  # fmt: skip
    lines = _header("world", columns)
    held_out, trained = [], []
    for world in worlds:
        on_train = world.cells(TRAIN)
        for method, cell in world.cells().items():
            held_out.append(cell)
            ends = [_text(cell.score, cell.reached.mean()), *_end(cell), "", ""]
            if method in on_train:
                trained.append(on_train[method])
                ends[-2:] = _end(on_train[method])
            key = "total_variation"
            distances = [_measured(world, method, f"{on}{key}") for on in ("", TRAIN)]
            values = [TRAINED[method].title, *_should(world, method), *ends, *distances]
            lines.append(_row(world.name, values))
    count = lambda cells: f"{sum(c.is_there for c in cells)} of {len(cells)} cells"
    share = (
        f"{count(held_out)} end within a point, or their interval, of the exact value"
    )
    if trained:
        share += f"; on training prompts {count(trained)}"
    return "\n".join(lines) + f"\n\n{share}.\n"


def _end(cell: Cell) -> list[str]:
    return [_text(cell.score, *cell.gap), "yes" if cell.is_there else "**no**"]


def _should(world: World, method: str) -> list[str]:
    """What a method should end at: of the list alone and how much is listed, where that is
    estimated; and of all responses."""
    score = world.score
    exact = _exact(world, method, score, world.whole(method, score))
    listed = world.whole(method, "listed")
    if listed == "listed":
        return ["", "", exact]
    of_list = _exact(world, method, score, score)
    return [of_list, _exact(world, method, "listed", listed), exact]


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
    form = _COLUMNS[key.removeprefix(TRAIN)][1].format
    if low is None or form(low) == form(high):
        return form(value)
    return f"{form(value)} [{form(low)}, {form(high)}]"

"""Pictures of the study: which there are, and that they can be read."""

import itertools
import pathlib

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from examples.study import pictures
from pfjax.report import runs
from tests.report import fake_runs


def _many(number: int, tail: str = "") -> list[runs.Group]:
    """Groups of two runs with 30 steps and an evaluation at every tenth."""
    out = []
    for i in range(number):
        mine = []
        for seed in range(2):
            rows = [
                {"step": s, "entropy": 0.1 * (i + 1) + 0.01 * s * seed}
                for s in range(31)
            ]
            for row in rows[::10]:
                value = 0.2 + 0.02 * i + 0.001 * row["step"] * (seed + 1)
                row |= {
                    "eval/avg@2": value,
                    "eval/length_mean": 20 + value,
                    "eval/distinct": 1 - value,
                }
            config = {"alpha": float(i), "seed": seed, "model": "pfjax/toy"}
            mine.append(runs.Run(pathlib.Path("x"), config, {}, "", rows, {}))
        name = f"group {i}, learning rate 0.000{i + 1}{tail}"
        out.append(runs.Group(name, mine, [0, 10, 20, 30], [[], []], [[], []]))
    return out


def test_points_are_last_values_and_hollow_ones_first_values(tmp_path):
    fake_runs.make(tmp_path / "a")
    fake_runs.make(tmp_path / "b", alpha=0.5, answers=fake_runs.SEED_1)
    figures = pictures.draw(runs.group(runs.load([str(tmp_path)])))
    assert [*figures] == ["accuracy", "length", "distinct", "quality"]
    # tests/report/fake_runs.py: 1/4 -> 3/4 and 1/2 -> 1; distinct 1 -> 1/2.
    at = [tuple(*line.get_xydata()) for line in figures["quality"].axes[0].lines]
    assert at == [(0.5, 0.75), (1.0, 0.25), (0.5, 1.0), (1.0, 0.5)]


def test_what_is_not_known_is_not_drawn_and_the_same_data_give_the_same_bytes(tmp_path):
    fake_runs.make(tmp_path / "runs/a", is_graded=False)
    groups = runs.group(runs.load([str(tmp_path / "runs")]))
    for name in ("once", "again"):
        pictures.write(groups, tmp_path / name)
    names = sorted(p.name for p in (tmp_path / "once").iterdir())
    assert names == ["distinct.png", "length.png"]
    for name in names:
        once, again = ((tmp_path / x / name).read_bytes() for x in ("once", "again"))
        assert once == again and once.startswith(b"\x89PNG")


def test_more_groups_than_colours_get_a_panel_each():
    few, many = (
        pictures.draw(_many(pictures.MOST_IN_ONE + more))["accuracy"] for more in (0, 1)
    )
    assert len(few.axes) == 1 and len(few.legends) == 1
    shown = [a for a in many.axes if a.get_visible()]
    assert len(shown) == pictures.MOST_IN_ONE + 1 and not many.legends
    assert shown[2].get_title(loc="left").startswith("group 2")
    styles = {tuple(pictures._style(i).items()) for i in range(36)}
    assert len(styles) == 36


@pytest.mark.parametrize(
    ("number", "tail"),
    [
        (3, ""),
        (3, ", and a label of many words" * 4),
        pytest.param(20, "", marks=pytest.mark.slow),
    ],
)
def test_no_text_lies_over_another_or_leaves_the_picture(number, tail):
    for figure in pictures.draw(_many(number, tail)).values():
        FigureCanvasAgg(figure).draw()  # places everything
        _check_texts(figure)


def _check_texts(figure) -> None:
    boxes = [
        (t.get_text(), t.get_window_extent().padded(-0.5))
        for t in figure.findobj(Text)
        if t.get_text().strip() and _is_drawn(t, figure)
    ]
    assert len(boxes) > 10
    for (first, a), (other, b) in itertools.combinations(boxes, 2):
        assert not a.overlaps(b), f"{first!r} lies over {other!r}"
    for text, a in boxes:
        assert a.x0 > -1 and a.x1 < figure.bbox.x1 + 1, f"{text!r} is cut"
        assert a.y0 > -1 and a.y1 < figure.bbox.y1 + 1, f"{text!r} is cut"


def _is_drawn(text: Text, figure) -> bool:
    """Whether it is visible: not the label of a tick outside, or of a hidden panel."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks():
                if text in (tick.label1, tick.label2):
                    is_inside = low <= tick.get_loc() <= high
                    return axes.get_visible() and is_inside and text.get_visible()
    return text.get_visible()


def test_wide_ranges_are_logarithmic_and_level_lines_level():
    groups = _many(1)
    for run in groups[0].runs:
        for row, value in zip(run.rows[::10], (0.01, 0.1, 1.0, 10.0), strict=True):
            row["eval/avg@2"] = value
            row["eval/distinct"] = 0.5 + 1e-13 * value
    figures = pictures.draw(groups)
    assert figures["accuracy"].axes[0].get_yscale() == "log"
    low, high = figures["distinct"].axes[0].get_ylim()
    assert figures["distinct"].axes[0].get_yscale() == "linear" and high - low > 0.1

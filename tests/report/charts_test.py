"""Which pictures there are, and that they can be read."""

import itertools
import pathlib
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from pfjax.report import charts, runs
from tests.report import fake_runs


def _groups(tmp_path, *settings):
    for i, some in enumerate(settings):
        fake_runs.make(tmp_path / f"run{i:02d}", **some)
    return runs.group(runs.load([str(tmp_path)])[0])


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
                row |= {"eval/avg@2": value, "eval/distinct": 1 - value}
            config = {"alpha": float(i), "seed": seed, "model": "pfjax/toy"}
            mine.append(runs.Run(pathlib.Path("x"), config, {}, "", rows, {}))
        name = f"group {i}, learning rate 0.000{i + 1}{tail}"
        out.append(runs.Group(name, mine, [0, 10, 20, 30], [[], []], [[], []]))
    return out


def _drawn(groups) -> dict[str, charts.Picture]:
    return {p.name: p for p in charts.draw(groups)[0]}


def test_all_that_is_known_is_drawn(tmp_path):
    groups = _groups(tmp_path, {}, {"alpha": 0.5}, {"alpha": 0.5, "seed": 1})
    pictures, missing = charts.draw(groups)
    assert [p.name for p in pictures] == [
        "accuracy", "length", "distinct", "entropy", "residual", "pass", "quality"
    ]  # fmt: skip
    assert missing == []
    assert all("Band: " in p.caption for p in pictures[:-1])
    for p in pictures:
        assert len(p.figure.axes) == 1 and p.figure.get_suptitle() == p.title


def test_what_is_missing_is_said(tmp_path):
    groups = _groups(tmp_path, {"is_graded": False, "alpha": 0.5})
    pictures, missing = charts.draw(groups)
    assert [p.name for p in pictures] == ["length", "distinct", "entropy", "residual"]
    assert missing == ["Accuracy", "pass@n", "Quality against diversity"]


def test_one_evaluation_makes_no_curve(tmp_path):
    groups = _groups(tmp_path, {"answers": {0: fake_runs.SEED_0[0]}})
    pictures, missing = charts.draw(groups)
    assert [p.name for p in pictures] == ["entropy", "residual", "pass"]
    assert missing == ["Accuracy", "Length of responses", "Distinct responses"]


@pytest.mark.parametrize(
    ("alphas", "is_drawn"),
    [((4.0,), False), ((0.5,), True), ((4.0, 2.0), True), ((4.0, 4.0), False)],
)
def test_quality_against_diversity_is_of_several_alphas_or_flat_ones(
    tmp_path, alphas, is_drawn
):
    settings = [{"alpha": a, "objective": f"o{i}"} for i, a in enumerate(alphas)]
    pictures, missing = charts.draw(_groups(tmp_path, *settings))
    assert ("quality" in [p.name for p in pictures]) == is_drawn and missing == []


def test_several_sets_have_a_picture_each(tmp_path):
    groups = _groups(tmp_path, {})
    for row in groups[0].runs[0].rows:
        if "eval/avg@2" in row:
            row["eval/math500/avg@2"] = row["eval/avg@2"]
    assert [*_drawn(groups)][:2] == ["accuracy-avg2", "accuracy-math500-avg2"]


def test_semantic_diversity_and_quality_are_preferred(tmp_path):
    groups = _groups(tmp_path, {"alpha": 0.5})
    for row in groups[0].runs[0].rows:
        row |= {"eval/semantic_diversity": 0.3, "eval/quality": 0.6}
    axes = _drawn(groups)["quality"].figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("semantic diversity", "quality")
    assert [tuple(*line.get_xydata()) for line in axes.lines] == [(0.3, 0.6)] * 2


def test_points_are_last_values_and_hollow_ones_first_values(tmp_path):
    groups = _groups(tmp_path, {}, {"alpha": 0.5, "answers": fake_runs.SEED_1})
    axes = _drawn(groups)["quality"].figure.axes[0]
    assert axes.get_xlabel() == "distinct responses"
    assert axes.get_ylabel() == "correct samples, avg@2"
    # tests/report/fake_runs.py: 1/4 -> 3/4 and 1/2 -> 1; distinct 1 -> 1/2.
    at = [tuple(*line.get_xydata()) for line in axes.lines]
    assert at == [(0.5, 0.75), (1.0, 0.25), (0.5, 1.0), (1.0, 0.5)]


def test_the_same_data_give_the_same_bytes():
    for kind in ("png", "svg"):
        once, again = (
            charts.save(_drawn(_many(3))["accuracy"].figure, kind) for _ in range(2)
        )
        assert once == again and b"matplotlib.org" not in once[:60]


def test_a_name_may_hold_what_matplotlib_or_html_would_read():
    groups = _many(2)
    groups[0] = groups[0]._replace(name="<script> $x$")
    svg = charts.save(_drawn(groups)["accuracy"].figure, "svg").decode()
    ET.fromstring(svg)
    assert "&lt;script&gt; $x$</text>" in svg and "learning rate 0.0002" in svg


def test_more_groups_than_colours_get_a_panel_each():
    few, many = (
        _drawn(_many(charts.MOST_IN_ONE + more))["accuracy"].figure for more in (0, 1)
    )
    assert len(few.axes) == 1 and len(few.legends) == 1
    shown = [a for a in many.axes if a.get_visible()]
    assert len(shown) == charts.MOST_IN_ONE + 1 and not many.legends
    assert shown[2].get_title(loc="left").startswith("group 2")
    styles = {tuple(charts._style(i).items()) for i in range(36)}
    assert len(styles) == 36


@pytest.mark.parametrize(
    ("number", "tail"), [(3, ""), (3, ", and a label of many words" * 4), (20, "")]
)
def test_no_text_lies_over_another_or_leaves_the_picture(number, tail):
    for picture in _drawn(_many(number, tail)).values():
        FigureCanvasAgg(picture.figure).draw()  # places everything
        _check_texts(picture.figure)


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


def test_wide_positive_ranges_are_logarithmic_and_level_lines_level(tmp_path):
    groups = _groups(tmp_path, {})
    rows = groups[0].runs[0].rows
    for row, value in zip(rows[1:], (0.01, 0.1, 1.0, 10.0), strict=True):
        row["entropy"] = value
        row["tb/residual_std_within_prompt"] = 0.5 + 1e-13 * value
    drawn = _drawn(groups)
    assert drawn["entropy"].figure.axes[0].get_yscale() == "log"
    assert drawn["length"].figure.axes[0].get_yscale() == "linear"
    low, high = drawn["residual"].figure.axes[0].get_ylim()
    assert high - low > 0.1
    axes = drawn["pass"].figure.axes[0]
    assert axes.get_xticks().tolist() == [2, 1]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [0.75, 1.0])
    np.testing.assert_allclose(axes.lines[1].get_ydata(), [0.25, 0.5])

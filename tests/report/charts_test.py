"""Drawings: the same bytes, no clashes in one page, nothing over anything."""

import itertools
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from matplotlib.text import Text

from pfjax.report import charts
from pfjax.report.outcomes import Curve


def _curve(shift: float = 0.0, spread: float = 0.0, n: int = 5) -> Curve:
    x = np.arange(n) * 5.0
    y = 0.2 + 0.01 * x + shift
    return Curve(x, y, y - spread, y + spread)


def _lines(number: int, width: float = charts.NARROW, tail: str = "", **more):
    names = [f"group {i}, learning rate 0.000{i + 1}{tail}" for i in range(number)]
    curves = [_curve(0.1 * i, 0.02) for i in range(number)]
    return charts.lines(
        names, curves, charts.Axis("step"), charts.Axis("share"), width, **more
    )


def test_the_same_data_give_the_same_bytes():
    for render in (
        lambda f: charts.to_png(f, "title", "a caption"),
        lambda f: charts.to_svg(f, "a", ""),
    ):
        assert render(_lines(3)) == render(_lines(3))


def test_pictures_of_one_page_share_no_id_and_find_their_own():
    pictures = [charts.to_svg(_lines(3), name, "") for name in ("a-wide", "a-narrow")]
    found = [re.findall(r'\bid="([^"]+)"', svg) for svg in pictures]
    both = [*found[0], *found[1]]
    assert both and len(set(both)) == len(both)
    for svg, ids in zip(pictures, found, strict=True):
        used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg)
        assert used and {a or b for a, b in used} <= set(ids)
        assert not re.findall(r"https?://(?!www\.w3\.org/)", svg)


def test_colours_are_the_pages_and_names_stay_whole():
    svg = charts.to_svg(_lines(2), "a", 'an "alt" & more')
    ET.fromstring(svg)
    assert "var(--s0)" in svg and "var(--s1)" in svg
    # All that is drawn has a colour that the page can change.
    assert not re.findall(r"#[0-9a-f]{6}", svg)
    assert "learning rate 0.0001" in svg  # numbers in text are not rounded
    assert (
        'aria-label="an &quot;alt&quot; &amp; more"' in svg and "font-family" not in svg
    )


def test_a_name_may_hold_what_matplotlib_or_html_would_read():
    figure = charts.lines(
        ["<script> $x$", "b"],
        [_curve(), None],
        charts.Axis("step"),
        charts.Axis("y"),
        3.5,
    )
    svg = charts.to_svg(figure, "a", "")
    assert "&lt;script&gt; $x$" in svg and ">b</text>" not in svg


def test_more_groups_than_colours_get_a_panel_each():
    few, many = _lines(charts.MOST_IN_ONE), _lines(charts.MOST_IN_ONE + 1)
    assert len(few.axes) == 1 and len(few.legends) == 1
    shown = [a for a in many.axes if a.get_visible()]
    assert len(shown) == charts.MOST_IN_ONE + 1 and not many.legends
    assert shown[2].get_title(loc="left").startswith("group 2")


@pytest.mark.parametrize("width", [charts.NARROW, charts.WIDE, charts.FULL])
@pytest.mark.parametrize(
    ("number", "tail"), [(3, ""), (3, ", and a label of many words" * 4), (20, "")]
)
def test_no_text_lies_over_another_or_leaves_the_picture(width, number, tail):
    figure = _lines(number, width, tail, reference=("before", [_curve()] * number))
    figure.canvas.draw()
    boxes = [
        (t.get_text(), t.get_window_extent().padded(-0.5))
        for t in figure.findobj(Text)
        if t.get_text().strip() and _is_drawn(t, figure)
    ]
    assert len(boxes) > 10
    for (name, a), (other, b) in itertools.combinations(boxes, 2):
        assert not a.overlaps(b), f"{name!r} lies over {other!r}"
    for name, a in boxes:
        assert a.x0 > -1 and a.x1 < figure.bbox.x1 + 1, f"{name!r} is cut"


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


def test_numbers_beside_points_hide_nothing():
    rng = np.random.default_rng(0)
    at = rng.normal(0.5, 0.03, (20, 2))  # close together
    points = [charts.Point((x, x, x), (y, y - 0.01, y + 0.01)) for x, y in at.tolist()]
    names = [f"group {i}" for i in range(20)]
    figure = charts.scatter(
        names, points, [("base", 0.7, 0.5)], charts.Axis("x"), charts.Axis("y"), 11.0
    )
    figure.canvas.draw()
    axes = figure.axes[0]
    notes = [t for t in axes.texts if t.get_text().isdigit()]
    boxes = [t.get_window_extent() for t in notes]
    assert [t.get_text() for t in notes] == [str(i + 1) for i in range(20)]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    dots = axes.transData.transform(at)
    assert not any(box.contains(*dot) for box in boxes for dot in dots)


def test_scales():
    steep = Curve(*[np.array([1.0, 2.0])], *[np.array([0.01, 10.0])] * 3)
    for scale, expected in (("auto", "log"), ("linear", "linear")):
        figure = charts.lines(
            ["a"], [steep], charts.Axis("n", "log2"), charts.Axis("y", scale), 3.5
        )
        assert figure.axes[0].get_yscale() == expected
        assert figure.axes[0].get_xticks().tolist() == [1, 2]


def test_a_png_has_its_title_and_size():
    figure = _lines(2, charts.WIDE)
    png = charts.to_png(figure, "A title", "A caption that is wrapped. " * 9)
    assert png.startswith(b"\x89PNG") and b"matplotlib" not in png
    width = int.from_bytes(png[16:20], "big")
    assert width == round(charts.WIDE * 140)
    figure.canvas.draw()
    title, caption = (t.get_window_extent() for t in figure.texts)
    top = figure.axes[0].get_tightbbox().y1
    assert top < caption.y0 and caption.y1 < title.y0 and title.y1 < figure.bbox.y1
    assert caption.x1 < figure.bbox.x1

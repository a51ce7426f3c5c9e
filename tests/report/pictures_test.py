"""Which pictures there are, and why others are not."""

import pytest

from pfjax.report import charts, pictures, runs
from tests.evaluation import fake_runs


def _groups(tmp_path, *settings):
    for i, some in enumerate(settings):
        fake_runs.make(tmp_path / f"run{i:02d}", **some)
    return runs.group(runs.load([str(tmp_path)])[0])


def _names(found):
    return [d.name for d in found[0]]


def test_all_that_is_known_is_drawn(tmp_path):
    groups = _groups(tmp_path, {}, {"alpha": 0.5}, {"alpha": 0.5, "seed": 1})
    over_steps = pictures.over_steps(groups)
    assert _names(over_steps) == [
        "accuracy",
        "length",
        "distinct",
        "entropy",
        "residual",
    ]
    assert over_steps[1] == []
    assert all("Band: " in d.caption for d in over_steps[0])
    drawings, missing = pictures.of_samples(groups)
    assert [d.name for d in drawings] == ["pass", "quality"] and missing == []
    for d in (*over_steps[0], *drawings):
        assert len(d.draw(charts.NARROW).axes) == 1


def test_what_is_missing_is_said(tmp_path):
    groups = _groups(tmp_path, {"is_graded": False, "alpha": 0.5})
    drawings, missing = pictures.over_steps(groups)
    assert [d.name for d in drawings] == ["length", "distinct", "entropy", "residual"]
    (why,) = missing
    assert "accuracy: no evaluation graded answers" in why
    drawings, missing = pictures.of_samples(groups)
    assert drawings == [] and len(missing) == 2
    assert "pass@n" in missing[0] and "quality against diversity" in missing[1]


def test_one_evaluation_makes_no_curve(tmp_path):
    groups = _groups(tmp_path, {"answers": {0: fake_runs.SEED_0[0]}})
    drawings, missing = pictures.over_steps(groups)
    assert [d.name for d in drawings] == ["entropy", "residual"]
    assert all("one evaluation so far" in m for m in missing) and len(missing) == 3


@pytest.mark.parametrize(
    ("alphas", "is_drawn"),
    [((4.0,), False), ((0.5,), True), ((4.0, 2.0), True), ((4.0, 4.0), False)],
)
def test_quality_against_diversity_is_of_several_alphas_or_flat_ones(
    tmp_path, alphas, is_drawn
):
    settings = [{"alpha": a, "objective": f"o{i}"} for i, a in enumerate(alphas)]
    found = pictures.of_samples(_groups(tmp_path, *settings))
    assert ("quality" in _names(found)) == is_drawn and found[1] == []


def test_several_sets_have_a_picture_each(tmp_path):
    groups = _groups(tmp_path, {})
    for row in groups[0].runs[0].rows:
        if "eval/avg@2" in row:
            row["eval/math500/avg@2"] = row["eval/avg@2"]
    names = _names(pictures.over_steps(groups))
    assert names[:2] == ["accuracy-avg2", "accuracy-math500-avg2"]


def test_semantic_diversity_and_quality_are_preferred(tmp_path):
    groups = _groups(tmp_path, {"alpha": 0.5})
    for row in groups[0].runs[0].rows:
        row |= {"eval/semantic_diversity": 0.3, "eval/quality": 0.6}
    drawing = pictures.of_samples(groups)[0][-1]
    axes = drawing.draw(charts.NARROW).axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("semantic diversity", "quality")
    assert [tuple(*line.get_xydata()) for line in axes.lines] == [(0.3, 0.6)] * 2


def test_what_began_elsewhere_is_drawn_where_it_began(tmp_path):
    groups = _groups(
        tmp_path,
        {"alpha": 4.0},
        {"alpha": 2.0},
        {"alpha": 0.5, "model": "other", "answers": fake_runs.SEED_1},
    )
    drawing = pictures.of_samples(groups)[0][-1]
    figure = drawing.draw(charts.NARROW)
    axes = figure.axes[0]
    hollow = [tuple(*a.get_xydata()) for a in axes.lines if len(a.get_xydata()) == 1]
    assert hollow[-2:] == [(1.0, 0.25), (1.0, 0.5)]
    named = [t.get_text() for t in figure.legends[0].get_texts()]
    assert named[-2:] == ["before training", f"before {groups[2].name}"]

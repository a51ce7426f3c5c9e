"""Which charts there are, and what they show."""

import pytest

from pfjax.report import charts, runs
from tests.report import fake_runs


def _groups(tmp_path, *settings):
    for i, some in enumerate(settings):
        fake_runs.make(tmp_path / f"run{i:02d}", **some)
    return runs.group(runs.load([str(tmp_path)]))


def _drawn(groups):
    return {c["id"]: c for c in charts.draw(groups)[0]}


def test_all_that_is_known_is_drawn(tmp_path):
    groups = _groups(tmp_path, {}, {"alpha": 0.5}, {"alpha": 0.5, "seed": 1})
    drawn, missing = charts.draw(groups)
    assert [c["id"] for c in drawn] == [
        "accuracy", "length", "distinct", "entropy", "residual", "pass", "quality"
    ]  # fmt: skip
    assert missing == ["KL to the base"]
    assert all(" Good: " in c["caption"] for c in drawn)


def test_what_is_missing_is_said(tmp_path):
    groups = _groups(tmp_path, {"is_graded": False, "alpha": 0.5})
    drawn, missing = charts.draw(groups)
    assert [c["id"] for c in drawn] == ["length", "distinct", "entropy", "residual"]
    assert missing == [
        "Accuracy", "KL to the base", "pass@n", "Quality against diversity"
    ]  # fmt: skip


def test_one_or_no_evaluation_makes_no_curve(tmp_path):
    groups = _groups(tmp_path / "one", {"answers": {0: fake_runs.SEED_0[0]}})
    assert [*_drawn(groups)] == ["entropy", "residual", "pass"]
    assert [*_drawn(_groups(tmp_path / "none", {"answers": {}}))] == [
        "entropy", "residual"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("alphas", "is_drawn"),
    [((4.0,), False), ((0.5,), True), ((4.0, 2.0), True), ((4.0, 4.0), False)],
)
def test_quality_against_diversity_is_of_several_alphas_or_flat_ones(
    tmp_path, alphas, is_drawn
):
    settings = [{"alpha": a, "objective": f"o{i}"} for i, a in enumerate(alphas)]
    assert ("quality" in _drawn(_groups(tmp_path, *settings))) == is_drawn


def test_several_sets_have_a_chart_each(tmp_path):
    groups = _groups(tmp_path, {})
    for row in groups[0].runs[0].rows:
        if "eval/avg@2" in row:
            row["eval/math500/avg@2"] = row["eval/avg@2"]
    drawn = _drawn(groups)
    assert [*drawn][:2] == ["accuracy-avg-2", "accuracy-math500-avg-2"]
    assert drawn["accuracy-math500-avg-2"]["title"] == "Accuracy, math500/avg@2"


def test_a_path_leads_from_the_first_evaluation_to_the_last(tmp_path):
    settings = {"alpha": 0.5, "answers": fake_runs.SEED_1}
    chart = _drawn(_groups(tmp_path, {}, settings))["quality"]
    assert (chart["x_name"], chart["y_name"]) == (
        "distinct responses",
        "accuracy, avg@2",
    )
    # tests/report/fake_runs.py: 1/4 -> 3/4 and 1/2 -> 1; distinct 1 -> 1/2.
    assert [(c["x"], c["y"]) for c in chart["curves"]] == [
        ([1.0, 0.5], [0.25, 0.75]), ([1.0, 0.5], [0.5, 1.0])
    ]  # fmt: skip


def test_semantic_diversity_and_quality_are_preferred(tmp_path):
    groups = _groups(tmp_path, {"alpha": 0.5})
    for row in groups[0].runs[0].rows:
        row |= {"eval/semantic_diversity": 0.3, "eval/quality": 0.6}
    chart = _drawn(groups)["quality"]
    assert (chart["x_name"], chart["y_name"]) == ("semantic diversity", "quality")


def test_runs_with_steps_of_their_own_share_an_axis(tmp_path):
    groups = _groups(tmp_path, {}, {"alpha": 2.0})
    groups[0].runs[0].rows[2].pop("entropy")
    groups[1].runs[0].rows[3].pop("entropy")
    chart = _drawn(groups)["entropy"]
    assert chart["x"] == [1, 2, 3, 4]
    first, second = (c["y"] for c in chart["curves"])
    assert first == [0.1, None, 0.3, 0.4] and second == [0.1, 0.2, None, 0.4]


def test_seeds_have_a_band_and_pass_at_n_the_base(tmp_path):
    seeds = [{"answers": fake_runs.SEED_0}, {"seed": 1, "answers": fake_runs.SEED_1}]
    drawn = _drawn(_groups(tmp_path, *seeds))
    (curve,) = drawn["accuracy"]["curves"]
    assert (curve["low"], curve["high"]) == ([0.25, 0.75], [0.5, 1.0])
    assert drawn["pass"]["x"] == [1, 2] and drawn["pass"]["before"] == [0.375, 0.5]


def test_the_residual_is_a_running_median_beside_its_start(tmp_path):
    groups = _groups(tmp_path, {})
    rows = groups[0].runs[0].rows
    values = [0.8, *[0.4] * 15, *[0.2] * 15]
    values[20] = 50.0
    rows[:] = [
        {"step": i + 1, "tb/residual_std_within_prompt": v}
        for i, v in enumerate(values)
    ]
    chart = _drawn(groups)["residual"]
    (curve,) = chart["curves"]
    assert curve["y"][0] == 0.6  # of two steps
    assert (
        max(curve["y"][1:]) == 0.4
        and curve["y"][20] == 0.2
        and curve["raw"][20] == 50.0
    )
    assert chart["reference"] == 0.8
    assert "Running median of 3 steps; dots: single steps." in chart["caption"]


def test_a_long_run_is_thinned_and_keeps_its_end(tmp_path):
    groups = _groups(tmp_path, {})
    groups[0].runs[0].rows[:] = [{"step": i, "entropy": i / 1e4} for i in range(5000)]
    x = _drawn(groups)["entropy"]["x"]
    assert len(x) <= 301 and x[-1] == 4999


def test_pass_at_n_needs_no_completions_of_the_first_run(tmp_path):
    groups = _groups(tmp_path, {"answers": {}}, {"alpha": 2.0})
    chart = _drawn(groups)["pass"]
    assert [c["group"] for c in chart["curves"]] == [1]
    assert "before" not in chart and "Dashed" not in chart["caption"]

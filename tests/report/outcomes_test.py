"""Numbers of groups, worked by hand from `fake_runs`."""

import numpy as np
import pytest

from pfjax.report import outcomes, runs
from tests.report import fake_runs


@pytest.fixture
def pair(tmp_path):
    fake_runs.make(tmp_path / "a", 0, fake_runs.SEED_0)
    fake_runs.make(tmp_path / "b", 1, fake_runs.SEED_1)
    (group,) = runs.group(runs.load([str(tmp_path)]))
    return group


def test_values_are_means_with_the_deviation_over_seeds(pair):
    curve = outcomes.curve(pair, "eval/avg@2")
    # 1/4 and 1/2, then 3/4 and 1: each a deviation of (1/4) / sqrt 2.
    np.testing.assert_allclose(curve.mean, [0.375, 0.875])
    np.testing.assert_allclose(curve.spread, [0.25 / 2**0.5] * 2)
    assert outcomes.curve(pair, "eval/none") is None
    alone = outcomes.curve(pair._replace(runs=pair.runs[:1]), "eval/avg@2")
    assert alone.mean.tolist() == [0.25, 0.75] and alone.spread is None


def test_keys_are_found_by_name_of_every_set(pair):
    pair.runs[0].rows[0] |= {
        "eval/math500/avg@16": 0.5, "eval/avg@2_se": 0.5, "other/avg@2": 0.5
    }  # fmt: skip
    found = outcomes.keys_of([pair], "eval/avg")
    assert found == ["eval/avg@2", "eval/math500/avg@16"]
    assert outcomes.keys_of([pair], "entropy") == ["entropy"]
    assert outcomes.keys_of([pair], "eval/entropy") == []


def test_a_curve_spans_its_seeds_and_leaves_out_what_is_not_finite(pair):
    curve = outcomes.curve(pair, "entropy")
    assert curve.x.tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(curve.low, [0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(curve.high, [1.1, 1.2, 1.3, 1.4])
    np.testing.assert_allclose(curve.mean, [0.6, 0.7, 0.8, 0.9])
    pair.runs[1].rows[2]["entropy"] = float("nan")
    assert outcomes.curve(pair, "entropy").x.tolist() == [1, 3, 4]


def test_a_running_median_is_blind_to_single_steps(pair):
    x = np.arange(16)
    noisy = outcomes.Curve(x, np.array([[1.0] * 16, [*range(16)]]))
    noisy.values[0, [5, 15]] = 100.0
    assert outcomes.window(16) == 3 and outcomes.window(7) == 1
    assert outcomes.window(100) == 13  # an eighth, odd
    smooth = outcomes.smooth(noisy, 3)
    # Of two at the ends: (0 + 1) / 2 and (14 + 15) / 2.
    assert smooth.values[1].tolist() == [0.5, *range(1, 15), 14.5]
    assert smooth.values[0].tolist() == [1.0] * 15 + [50.5]


def test_pass_at_n_is_the_unbiased_estimate(pair):
    # Right of 2: seed 0 has 2 and 1, seed 1 has 2 and 2.
    curve = outcomes.pass_curve(pair.last)
    assert curve.x.tolist() == [1, 2]
    np.testing.assert_allclose(curve.mean, [0.875, 1.0])
    np.testing.assert_allclose(curve.low, [0.75, 1.0])
    assert outcomes.pass_curve([[], []]) is None


def test_without_answers_nothing_is_correct_or_incorrect(tmp_path):
    fake_runs.make(tmp_path / "a", is_graded=False)
    (group,) = runs.group(runs.load([str(tmp_path)]))
    assert outcomes.pass_curve(group.last) is None
    assert {p.num_correct for p in group.last[0]} == {None}


def test_every_metric_is_described():
    for metric in outcomes.METRICS:
        key = metric.key + "@8" * (metric.key in ("eval/avg", "eval/maj", "eval/pass"))
        assert metric.description(key).about, key
        assert metric.description(key).good or not metric.title, key

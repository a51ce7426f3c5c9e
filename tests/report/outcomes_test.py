"""Numbers of groups, worked by hand from `fake_runs`."""

import numpy as np
import pytest

from pfjax.report import outcomes, runs
from tests.evaluation import fake_runs


@pytest.fixture
def pair(tmp_path):
    fake_runs.make(tmp_path / "a", 0, fake_runs.SEED_0)
    fake_runs.make(tmp_path / "b", 1, fake_runs.SEED_1)
    (group,) = runs.group(runs.load([str(tmp_path)])[0])
    return group


def test_values_are_means_with_the_deviation_over_seeds(pair):
    first, last = outcomes.first_and_last(pair, "eval/avg@2")
    # 1/4 and 1/2, then 3/4 and 1: each a deviation of (1/4) / sqrt 2.
    assert first == pytest.approx((0.375, 0.25 / 2**0.5))
    assert last == pytest.approx((0.875, 0.25 / 2**0.5))
    assert outcomes.first_and_last(pair, "eval/none") is None
    alone = pair._replace(runs=pair.runs[:1])
    assert outcomes.first_and_last(alone, "eval/avg@2")[1] == (0.75, None)


def test_keys_are_found_by_name_of_every_set(pair):
    pair.runs[0].rows[0]["eval/math500/avg@16"] = 0.5
    pair.runs[0].rows[0]["eval/avg@2_se"] = 0.5
    assert outcomes.keys_of([pair], "avg") == ["eval/avg@2", "eval/math500/avg@16"]
    assert outcomes.keys_of([pair], "entropy") == []


def test_a_curve_spans_its_seeds_and_leaves_out_what_is_not_finite(pair):
    curve = outcomes.curve(pair, "entropy")
    assert curve.x.tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(curve.low, [0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(curve.high, [1.1, 1.2, 1.3, 1.4])
    np.testing.assert_allclose(curve.mean, [0.6, 0.7, 0.8, 0.9])
    pair.runs[1].rows[2]["entropy"] = float("nan")
    assert outcomes.curve(pair, "entropy").x.tolist() == [1, 3, 4]


def test_many_steps_are_averaged_in_windows(pair):
    assert outcomes.window(pair, "entropy", most=3) == 2
    curve = outcomes.curve(pair, "entropy", most=3)
    assert curve.x.tolist() == [1.5, 3.5]
    np.testing.assert_allclose(curve.mean, [0.65, 0.85])


def test_pass_at_n_is_the_unbiased_estimate(pair):
    # Right of 2: seed 0 has 2 and 1, seed 1 has 2 and 2.
    curve = outcomes.pass_curve(pair.last)
    assert curve.x.tolist() == [1, 2]
    np.testing.assert_allclose(curve.mean, [0.875, 1.0])
    np.testing.assert_allclose(curve.low, [0.75, 1.0])
    assert outcomes.pass_curve([[], []]) is None


@pytest.mark.parametrize(
    ("answers", "is_right"),
    [
        (("7", "3", "4"), True),  # a tie of three
        (("7", "3", "3"), False),
        (("7", None, None), True),  # no answer has no vote
        ((None, None, None), False),
    ],
)
def test_the_majority(answers, is_right):
    rows = [{"answer": a, "correct": a == "7"} for a in answers]
    assert outcomes.is_right_by_majority(runs.Problem((0, ""), rows)) == is_right


def test_problems_that_moved(pair):
    # Seed 0: a tie stays right, wrong to right; both shares rise. Seed 1: right stays
    # with its share, wrong to right.
    assert outcomes.moved(pair) == outcomes.Moved(
        gained=1, lost=0, kept=1, missed=0, rose=1.5, fell=0, stayed=0.5
    )


def test_telling_problems_are_those_that_changed_most_then_some_that_did_not(tmp_path):
    before = tuple(("0",) * 2 for _ in range(2))
    fake_runs.make(tmp_path / "a", answers={0: before, 4: (("0", "0"), ("9", "9"))})
    (group,) = runs.group(runs.load([str(tmp_path)])[0])
    shown = outcomes.telling(group, changed=1, unchanged=1)
    assert [x.key[0] for x, _ in shown] == [1, 0]
    assert [(x.share_right, y.share_right) for x, y in shown] == [(0, 1), (0, 0)]
    # By how much, and not by which comes first.
    answers = {0: before, 4: (("7", "0"), ("9", "9"))}
    fake_runs.make(tmp_path / "b/run", answers=answers)
    (group,) = runs.group(runs.load([str(tmp_path / "b")])[0])
    shown = outcomes.telling(group, changed=1, unchanged=1)
    assert [x.key[0] for x, _ in shown] == [1]


def test_without_answers_the_first_problems_are_shown(tmp_path):
    fake_runs.make(tmp_path / "a", is_graded=False)
    (group,) = runs.group(runs.load([str(tmp_path)])[0])
    assert outcomes.moved(group) is None and outcomes.pass_curve(group.last) is None
    assert [x.key[0] for x, _ in outcomes.telling(group, 1, 1)] == [0, 1]

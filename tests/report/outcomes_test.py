"""Numbers of groups, worked by hand from `fake_runs`."""

import numpy as np
import pytest

from pfjax.report import outcomes, runs
from tests.report import fake_runs


@pytest.fixture
def pair(tmp_path):
    fake_runs.make(tmp_path / "a", 0, fake_runs.SEED_0)
    fake_runs.make(tmp_path / "b", 1, fake_runs.SEED_1)
    (group,) = runs.group(runs.load([str(tmp_path)])[0])
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


def test_many_steps_are_averaged_in_windows(pair):
    curve = outcomes.curve(pair, "entropy", most=3)
    assert curve.window == 2
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
    ("answers", "is_correct"),
    [
        (("7", "3", "4"), True),  # a tie of three
        (("7", "3", "3"), False),
        (("7", None, None), True),  # no answer has no vote
        ((None, None, None), False),
    ],
)
def test_the_majority(answers, is_correct):
    rows = [{"answer": a, "correct": a == "7"} for a in answers]
    assert runs.Problem((0, "", ""), rows).is_majority_correct == is_correct


def test_problems_that_changed(pair):
    # Problem 0 stays correct by a tie and by all; problem 1 becomes correct in both seeds.
    assert outcomes.changes(pair) == (1, 0)
    back = pair._replace(first=pair.last, last=pair.first)
    assert outcomes.changes(back) == (0, 1)
    still = pair._replace(last=[pair.first[0], pair.last[1]])
    assert outcomes.changes(still) == (0.5, 0)  # mean over seeds


def test_telling_problems_are_those_that_changed_most_then_some_that_did_not(tmp_path):
    before = tuple(("0",) * 2 for _ in range(2))
    fake_runs.make(tmp_path / "a", answers={0: before, 4: (("0", "0"), ("9", "9"))})
    (group,) = runs.group(runs.load([str(tmp_path)])[0])
    shown = outcomes.telling(group, changed=1, unchanged=1)
    assert [x.key[0] for x, _ in shown] == [1, 0]
    assert [(x.fraction_correct, y.fraction_correct) for x, y in shown] == [
        (0, 1),
        (0, 0),
    ]
    # By how much, and not by which comes first.
    answers = {0: before, 4: (("7", "0"), ("9", "9"))}
    fake_runs.make(tmp_path / "b/run", answers=answers)
    (group,) = runs.group(runs.load([str(tmp_path / "b")])[0])
    shown = outcomes.telling(group, changed=1, unchanged=1)
    assert [x.key[0] for x, _ in shown] == [1]


def test_without_answers_the_first_problems_are_shown(tmp_path):
    fake_runs.make(tmp_path / "a", is_graded=False)
    (group,) = runs.group(runs.load([str(tmp_path)])[0])
    assert outcomes.changes(group) is None and outcomes.pass_curve(group.last) is None
    assert [x.key[0] for x, _ in outcomes.telling(group, 1, 1)] == [0, 1]

"""Estimators against brute force and by hand."""

import functools
import itertools
from collections import Counter

import numpy as np
import pytest

from pfjax.evaluation import estimators, scores
from pfjax.tasks import grading


@pytest.mark.parametrize(("n", "c"), [(4, 0), (4, 1), (5, 3), (6, 6)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n, c):
    samples = [1] * c + [0] * (n - c)
    for k in range(1, n + 1):
        want = np.mean([max(s) for s in itertools.combinations(samples, k)])
        assert estimators.pass_at_k(np.array([c]), n, k)[0] == pytest.approx(want)
    with pytest.raises(ValueError, match="k=7"):
        estimators.pass_at_k(np.array([c]), n, 7)


def test_pass_at_k_where_a_bootstrap_is_biased_low():
    # With replacement: 1 - (7/8)^8 = .656 and 1 - (15/16)^8 = .403.
    assert estimators.pass_at_k(np.array([1]), 8, 8)[0] == 1.0
    assert estimators.pass_at_k(np.array([1]), 16, 8)[0] == pytest.approx(0.5)


def test_majority_of_classes_with_ties_and_abstentions():
    right = np.array([True, True, False, False, False])
    maj = functools.partial(estimators.maj_at_k, is_correct=right, k=5)
    assert maj(np.array([0, 0, 1, 2, -1])) == 1.0
    assert maj(np.array([0, 0, 1, 1, -1])) == 0.5
    assert maj(np.array([0, -1, 1, 1, 2])) == 0.0
    assert maj(np.array([-1, -1, -1, -1, -1])) == 0.0


def brute_force_majority(classes, is_correct, k):
    scores = []
    for subset in itertools.combinations(range(len(classes)), k):
        votes = Counter(classes[i] for i in subset if classes[i] >= 0)
        top = [c for c in votes if votes[c] == max(votes.values())]
        right = {classes[i] for i in subset if is_correct[i]}
        scores.append(sum(c in right for c in top) / len(top) if top else 0.0)
    return np.mean(scores)


@pytest.mark.parametrize(
    "classes",
    [[0, 0, 1, 1, 2, -1, 0], [0, 1, 2, 3, 4, 5, 6], [-1] * 7, [1, 1, 1, 0, 0, -1, -1]],
)
def test_majority_of_k_is_the_mean_over_subsets(classes):
    classes = np.array(classes)
    is_correct = classes == 0
    for k in range(1, 8):  # 35 subsets at most
        want = brute_force_majority(classes, is_correct, k)
        exact = estimators.maj_at_k(classes, is_correct, k, num_subsets=35)
        assert exact == pytest.approx(want)
        drawn = estimators.maj_at_k(classes, is_correct, k, num_subsets=6)
        assert abs(drawn - want) < 0.5
    with pytest.raises(ValueError, match="k=8"):
        estimators.maj_at_k(classes, is_correct, 8)


def test_majority_of_three_by_hand():
    # Of four subsets of {right, right, wrong, silent} one has both right and the
    # wrong (1), one both right and the silent (1), two one of each (a tie, 1/2).
    classes, is_correct = np.array([0, 0, 1, -1]), np.array([True, True, False, False])
    assert estimators.maj_at_k(classes, is_correct, 3) == pytest.approx(3 / 4)


def test_drawn_subsets_are_without_replacement_and_of_a_seed():
    # C(24, 4) = 10626 subsets.
    classes = np.array([0] * 3 + list(range(1, 22)))
    is_correct = classes == 0
    want = brute_force_majority(classes, is_correct, 4)
    draw = functools.partial(estimators.maj_at_k, classes, is_correct, 4)
    assert draw(num_subsets=4000) == pytest.approx(want, abs=0.02)
    assert draw(num_subsets=50) == draw(num_subsets=50)
    assert len({draw(num_subsets=50, seed=seed) for seed in range(5)}) > 1
    # Of distinct wrong answers one sample drawn twice would win its subset.
    lone = np.arange(24)
    assert estimators.maj_at_k(lone, lone < 12, 23, num_subsets=5) == pytest.approx(
        0.5, abs=1 / 46 + 1e-9
    )


def test_entropy_of_answers():
    classes = np.array([0, 0, 1, 2, -1])  # shares 1/2, 1/4, 1/4
    assert estimators.answer_entropy(classes) == pytest.approx(1.5 * np.log(2))
    assert estimators.answer_entropy(np.array([3, 3])) == 0.0
    assert estimators.answer_entropy(np.array([-1, -1])) == 0


def test_standard_error_is_over_problems():
    assert estimators.standard_error(np.array([0.0, 1.0])) == pytest.approx(0.5)
    assert estimators.standard_error(np.array([0.3])) is None


class SameString(grading.Grader):
    """Stands in for the grading process: answers are their strings."""

    def is_equal(self, gold, answer):
        return gold == answer

    def classes(self, answers):
        known = [a for a in dict.fromkeys(answers) if a is not None]
        return [-1 if a is None else known.index(a) for a in answers]


def test_summary_of_rows_by_hand():
    def row(answer, gold, tokens, terminated=True, completion=None):
        return {
            "answer": answer, "gold": gold, "correct": answer == gold,
            "tokens": tokens, "terminated": terminated,
            "completion": completion or str(answer),
        }  # fmt: skip

    rows = [
        # right, right, wrong, unboxed: avg 1/2, maj 1, pass 1, 3 of 4 differ
        row("8", "8", 2), row("8", "8", 4), row("7", "8", 6), row(None, "8", 8, False),
        # one right of four classes of one: avg 1/4, maj 1/4, pass 1, all differ
        row("1", "1", 1), row("2", "1", 1), row("3", "1", 1), row("4", "1", 1),
    ]  # fmt: skip
    found = scores.summarise(rows, 4, SameString())
    assert found["avg@4"] == pytest.approx(3 / 8)
    assert found["maj@4"] == pytest.approx(5 / 8)
    assert found["pass@4"] == 1.0
    assert found["length_mean"] == 3.0
    assert found["truncated"] == pytest.approx(1 / 8)
    assert found["boxed_frac"] == pytest.approx(7 / 8)
    assert found["distinct"] == pytest.approx((3 / 4 + 1) / 2)
    assert found["avg@4_se"] == pytest.approx(0.125)
    # Classes 2 and 4; entropy of votes 2:1 of three, and of four that differ.
    assert found["answer_classes"] == 3.0
    of_three = np.log(3) - 2 / 3 * np.log(2)
    assert found["answer_entropy"] == pytest.approx((of_three + np.log(4)) / 2)
    more = scores.summarise(rows, 4, SameString(), fewer=(1, 2))
    assert more["pass@1"] == more["maj@1"] == found["avg@4"]
    # Of 2 of 4: 1 - 1/6 with two right, 1 - 3/6 with one.
    assert more["pass@2"] == pytest.approx((5 / 6 + 1 / 2) / 2)
    unlabelled = [{**r, "gold": None, "correct": None} for r in rows]
    assert "avg@4" not in scores.summarise(unlabelled, 4, SameString())

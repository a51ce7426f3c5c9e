"""Estimators against brute force and by hand."""

import itertools

import numpy as np
import pytest

from pfjax.evaluation import benchmarks, estimators, grading


@pytest.mark.parametrize(("n", "c"), [(4, 0), (4, 1), (5, 3), (6, 6)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n, c):
    samples = [1] * c + [0] * (n - c)
    for k in range(1, n + 1):
        want = np.mean([max(s) for s in itertools.combinations(samples, k)])
        assert estimators.pass_at_k(np.array([c]), n, k)[0] == pytest.approx(want)
    with pytest.raises(ValueError, match="k=7"):
        estimators.pass_at_k(np.array([c]), n, 7)


def test_majority_of_classes_with_ties_and_abstentions():
    right = np.array([True, True, False, False, False])
    maj = estimators.maj_at_n
    assert maj(np.array([0, 0, 1, 2, -1]), right) == 1.0
    assert maj(np.array([0, 0, 1, 1, -1]), right) == 0.5
    assert maj(np.array([0, -1, 1, 1, 2]), right) == 0.0
    assert maj(np.array([-1, -1, -1, -1, -1]), right) == 0.0


def test_standard_error_is_over_problems():
    assert estimators.standard_error(np.array([0.0, 1.0])) == pytest.approx(0.5)
    assert estimators.standard_error(np.array([0.3])) == 0.0


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
    scores = benchmarks.summarise(rows, 4, SameString())
    assert scores["avg@4"] == pytest.approx(3 / 8)
    assert scores["maj@4"] == pytest.approx(5 / 8)
    assert scores["pass@4"] == 1.0
    assert scores["length_mean"] == 3.0
    assert scores["truncated"] == pytest.approx(1 / 8)
    assert scores["boxed_frac"] == pytest.approx(7 / 8)
    assert scores["distinct"] == pytest.approx((3 / 4 + 1) / 2)
    assert scores["avg@4_se"] == pytest.approx(0.125)
    unlabelled = [{**r, "gold": None, "correct": None} for r in rows]
    assert "avg@4" not in benchmarks.summarise(unlabelled, 4, SameString())

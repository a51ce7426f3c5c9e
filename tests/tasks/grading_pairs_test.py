"""The grader on a table of pairs, all of whose disagreements are known."""

import pytest

from pfjax.tasks import grading
from tests.tasks.grading_pairs import PAIRS

# docs/benchmarks.md says why.
KNOWN = {
    (r"\ln 2", r"\log_e 2"),
    (r"\sin 30^\circ", r"\frac12"),
    (r"\sin 30^\circ", "0.5"),
    ("0<x<1", "1>x>0"),
    (r"\frac{1}{9}", r"0.\overline{1}"),
    (r"14\text{ cm}", r"14\text{ m}"),
    (r"3\text{ hours}", r"3\text{ minutes}"),
    ("9.81", r"9.81\ \mathrm{m/s^2}"),
    (r"(-\infty,-2)\cup(5,\infty)", r"x<-2 \text{ or } x>5"),
    ("(0,1)", "]0,1["),
    ("x>3", "2x>6"),
    ("24680", "x = 24,680"),
    (r"\text{ellipse}", r"\text{an ellipse}"),
    ("D", r"\text{Option D}"),
    ("16", "(D) 16"),
    ("BD", "B, D"),
    ("2, 5", r"\text{$2$ and $5$}"),
    ("x^3+C", "x^3"),
    ("58", r"\approx 58"),
    ("58", "58!?"),
    ("10110_2", r"10110_{\text{two}}"),
    ("abc", "cab"),
}


@pytest.fixture(scope="module")
def grader():
    with grading.Grader() as g:
        yield g


@pytest.mark.parametrize("kind", PAIRS)
def test_pairs_are_graded_right(grader, kind):
    graded = {
        (gold, x): want
        for gold, right, wrong in PAIRS[kind]
        for answers, want in ((right, True), (wrong, False))
        for x in answers
    }
    off = {pair for pair, want in graded.items() if grader.is_equal(*pair) != want}
    assert off == KNOWN & graded.keys()
    assert grader.timeouts == 0


def test_the_table_is_as_large_as_the_docs_say():
    rows = [row for kind in PAIRS.values() for row in kind]
    assert sum(len(right) for _, right, _ in rows) == 414
    assert sum(len(wrong) for *_, wrong in rows) == 375

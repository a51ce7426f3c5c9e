"""The grader on a table of pairs, all of whose disagreements are known."""

import pytest

from pfjax.tasks import grading
from tests.tasks.grading_pairs import PAIRS

# Right answers that it takes for wrong, all by math-verify or LaTeX's own ambiguity.
# docs/benchmarks.md says why; there is no wrong answer that it takes for right.
KNOWN = {
    (r"\ln 2", r"\log_e 2"),
    (r"\sin 30^\circ", r"\frac12"),
    (r"\sin 30^\circ", "0.5"),
    ("0<x<1", "1>x>0"),
}


@pytest.fixture(scope="module")
def grader():
    with grading.Grader() as g:
        yield g


@pytest.mark.parametrize("kind", PAIRS)
def test_pairs_are_graded_right(grader, kind):
    off = set()
    for gold, right, wrong in PAIRS[kind]:
        graded = [(x, True) for x in right] + [(x, False) for x in wrong]
        off |= {(gold, x) for x, want in graded if grader.is_equal(gold, x) != want}
    of_kind = {gold for gold, *_ in PAIRS[kind]}
    assert off == {pair for pair in KNOWN if pair[0] in of_kind}
    assert grader.timeouts == 0


def test_the_table_is_as_large_as_the_docs_say():
    rows = [row for kind in PAIRS.values() for row in kind]
    assert sum(len(right) for _, right, _ in rows) == 320
    assert sum(len(wrong) for *_, wrong in rows) == 298

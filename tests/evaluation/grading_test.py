r"""Grading: boxes, equality, classes, and a worker that cannot hang a run."""

import time

import pytest

from pfjax.evaluation import grading


@pytest.fixture(scope="module")
def grader():
    with grading.Grader() as g:
        yield g


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (r"so \boxed{82}", "82"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}} and }", r"\frac{1}{2}"),
        (r"\boxed{3} then \boxed{4", "3"),
        (r"\boxed{}", ""),
        ("82", None),
        (r"\boxed 82", None),
    ],
)
def test_last_closed_box(text, want):
    assert grading.last_boxed(text) == want


@pytest.mark.parametrize(
    ("gold", "answer", "want"),
    [
        ("82", "82", True),
        ("82", "72", False),
        ("82", "082", True),
        (r"\frac{1}{2}", "0.5", True),
        (r"3\sqrt{13}", "3", False),  # an unboxed gold would parse to 3
        (r"\text{Evelyn}", "Evelyn", True),
        ("6-5i", "5", False),
        ("5", "no number at all", False),
        ("2", "", False),
    ],
)
def test_equality(grader, gold, answer, want):
    assert grader.is_equal(gold, answer) is want


def test_classes_are_by_meaning(grader):
    answers = ["0.5", None, r"\frac{1}{2}", "3", "0.5", "1/2"]
    assert grader.classes(answers) == [0, -1, 0, 1, 0, 0]


def test_arithmetic_without_end_is_cut_off_and_the_next_answer_graded():
    with grading.Grader(deadline_seconds=3.0) as grader:
        assert grader.is_equal("4", "2+2")
        begin = time.monotonic()
        assert not grader.is_equal("7", "9^{9^{9^9}}+1")
        assert time.monotonic() - begin < 20
        assert grader.timeouts == 1
        assert grader.is_equal("6", "3+3")


def test_a_worker_that_died_is_replaced():
    with grading.Grader() as grader:
        assert grader.is_equal("6", "3+3")
        grader._worker.kill()
        grader._worker.wait()
        assert grader.is_equal("8", "4+4") and grader.timeouts == 0

r"""Grading: boxes, equality, classes, and a worker that cannot hang a run."""

import subprocess
import sys
import time
import tracemalloc

import pytest

from pfjax.tasks import grading


@pytest.fixture(scope="module")
def grader():
    with grading.Grader() as g:
        yield g


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        (r"so \boxed{82}", "82", "82"),
        (r"\boxed{1} no, \boxed{2}", "1", "2"),
        (r"\boxed{5} or \boxed{4}", "5", "4"),  # adjacent: one, not the set {5, 4}
        (r"\boxed{5}. Question: 3+4? \boxed{7}", "5", "7"),
        (r"\boxed{\frac{1}{2}} and }", r"\frac{1}{2}", r"\frac{1}{2}"),
        (r"{\boxed{{1},2}", "{1},2", "{1},2"),
        (r"\boxed{3} then \boxed{4", "3", "3"),
        (r"\boxed{3 then \boxed{4}", "4", "4"),
        (r"\boxed{x = \boxed{5}}", r"x = \boxed{5}", "5"),
        # An escaped brace is a character.
        (r"\boxed{\left\{ 1 \right.} }", r"\left\{ 1 \right.", r"\left\{ 1 \right."),
        (r"\boxed{a \\} \boxed{b}", r"a \\", "b"),
        (r"\boxed {6}", "6", "6"),
        (r"\\boxed{6}", "6", "6"),  # escaped twice, as in JSON
        # The instruction, repeated, is no answer.
        (r"\boxed{}", None, None),
        ("\\boxed{ \n}", None, None),
        (r"\boxed{5}: within \boxed{}.", "5", None),
        ("82", None, None),
        (r"\boxed 82", None, None),
        (r"\boxed{5", None, None),
        (r"\fbox{5}", None, None),
    ],
)
def test_first_and_last_closed_box(text, first, last):
    assert grading.boxed(text, "first") == first
    assert grading.boxed(text) == grading.last_boxed(text) == last


def test_boxes_that_never_close_take_linear_time():
    # Of this thread on a processor: a machine that is busy counts nothing. Some 30 ms.
    begin = time.thread_time()
    assert grading.boxed(r"\boxed{" * 20_000) is None
    assert time.thread_time() - begin < 2


def test_runs_of_backslashes_take_linear_time():
    begin = time.thread_time()
    assert grading.boxed("\\" * 200_000 + r"\boxed{5}") == "5"
    assert grading.boxed("\\" * 200_000 + r" \boxed{5}") == "5"
    assert grading.boxed("\\" * 200_001 + r"{\boxed{5}") == "5"
    assert time.thread_time() - begin < 2


def test_boxes_in_boxes_take_linear_memory():
    n = 20_000
    tracemalloc.start()
    assert grading.boxed(r"\boxed{" * n + "5" + "}" * n) == "5"
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 1000 * n


def test_a_grader_remembers_so_many_verdicts(monkeypatch):
    """A run of days compares millions of answers."""
    monkeypatch.setattr(grading, "_REMEMBERED", 8)
    with grading.Grader() as grader:
        for n in range(30):
            assert not grader.is_equal("1/2", f"{n}/7")
        assert grader._judge_once.cache_info().currsize == 8
        assert len(grader._fine) < 10


RIGHT = [
    # One number, written differently.
    ("82", "082"),
    ("33", "033"),
    ("27.0", "27"),
    ("3", "3."),
    ("5", "+5"),
    (r"\frac{1}{2}", "0.5"),
    (r"\frac{1}{2}", "1/2"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"),
    (r"\frac12", r"\dfrac{1}{2}"),
    (r"1\frac{1}{2}", r"\frac{3}{2}"),
    (r"1.5 \times 10^{3}", "1500"),
    ("2^{10}", "1024"),
    (r"\$5", "5"),
    ("$5$", "5"),
    ("2516_{8}", "2516_8"),
    ("90", r"90^\circ"),
    # Bare, these golds parse to nothing or to a fragment.
    (r"\sqrt{51}", r"\sqrt{3}\sqrt{17}"),
    ("p - q", "-q+p"),
    (r"3\sqrt{13}", r"\sqrt{117}"),
    ("6-5i", "6 - 5i"),
    (r"\text{Evelyn}", "Evelyn"),
    # Algebra.
    ("x^2+2x+1", "(x+1)^2"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
    ("ab", "ba"),
    ("x = 5", "5"),
    ("5", "x = 5"),
    ("y = 2x - 1", "2x - y - 1 = 0"),
    (
        r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
        r"\begin{bmatrix} \frac{2}{2} \\ 2 \end{bmatrix}",
    ),
    # Words.
    ("even", r"\text{even}"),
    ("even", "Even"),
    (r"\text{True}", "true"),
    (r"\text{no solution}", r"\text{No solution.}"),
    (r"\text{non-negative}", "nonnegative"),
    # Choices.
    ("A", "(A)"),
    ("A", r"\text{A}"),
    ("A", r"\textbf{(A)}"),
    (r"\text{(C)}", "C"),
    ("B", r"(\mathbf{B})"),
    ("E", r"\text{E}"),
    # A letter can be a number.
    ("e", "2.718282"),
    # Names tell values apart, or their order does.
    ("x=1, y=2", "(1,2)"),
    ("1,2", "a=1,b=2"),
    ("a=1,b=2", "b=2,a=1"),
    ("1,2", "x=2,x=1"),
    ("1,2", "x_1=2, x_2=1"),
    ("x_1=1,x_2=2", "2,1"),
    ("2,3", "m=3,n=2"),
    ("(1,2)", "y=2,x=1"),
    ("x=1,y=2", r"\{1,2\}"),
    # Mixed numbers, units of more than one sign, Python's power.
    ("2 1/2", "5/2"),
    ("2.5", "2 1/2"),
    ("10", "10 cm^2"),
    ("60", "60 km/h"),
    ("12", "12 USD"),
    ("x^2", "x**2"),
    # A base left out is the one that was asked for.
    ("2516_8", "2516"),
    ("2516", "2516_8"),
    ("(2516)_8", "2516_{8}"),
    ("4AC_{16}", "4AC"),
    # Lists are unordered; several golds stand in one.
    ("1,2", "2,1"),
    (r"\{1,2\}", "2, 1"),
    ("$1$, $2$", "2, 1"),
    (r"5 \text{ or } 4", "4, 5"),
    (r"3 \pm \sqrt{2}", r"3-\sqrt{2}, 3+\sqrt{2}"),
    ("(1,8,19), (2,7,13)", "(2,7,13), (1,8,19)"),
    ("(1,2), (3,4)", r"(3,4) \text{ or } (1,2)"),
    ("2x+2, x^2", "x^2, 2(x+1)"),
    ("x=1, y=2", "y=2, x=1"),
    # Tuples.
    ("(1,2)", r"\left( 1, 2 \right)"),
    (r"(3, \frac{\pi}{2})", r"(3, \pi/2)"),
    ("(1,2)", "x=1, y=2"),
    # Separators of thousands.
    ("10,080", "10080"),
    ("10{,}080", "10080"),
    (r"10,\!080", "10080"),
    ("11,111,111,100", "11111111100"),
    ("12345.5", r"12\,345.5"),
    # Percent, as harnesses for MATH have it.
    (r"10\%", "10"),
    ("10", r"10\%"),
    (r"10\%", "0.1"),
    # Intervals and inequalities.
    ("[-2,7]", r"-2 \le x \le 7"),
    (r"-2 \le x \le 7", "[-2,7]"),
    ("(-2,7)", "7 > x > -2"),
    (r"(-\infty, 3]", r"x \le 3"),
    ("[-2,7]", r"x \in [-2,7]"),
    (r"(-\infty,0)\cup(1,2)", r"(1,2)\cup(-\infty,0)"),
    # Scientific notation.
    ("4.5e33", r"4.5 \times 10^{33}"),
    (r"4.5 \times 10^{33}", "4.5e33"),
    ("1e11", "100000000000"),
    ("3.0E-4", "0.0003"),
    # Exact values.
    (r"\frac{1}{2004!}", r"\frac{1}{2003! \cdot 2004}"),
    ("x^2+1=0", "2x^2+2=0"),
    ("x^2+y^2=4", "4-x^2=y^2"),
    # As people write.
    ("90", "90°"),
    (r"90^\circ", "90°"),
    (r"3\sqrt{13}", "3√13"),
    (r"\sqrt{x+1}", "√(x+1)"),
    (r"(2,\infty)", "(2,∞)"),
    ("13535", "13 535"),
    ("13,535", r"13\,535"),
    ("0.5", "0,5"),
    ("3.25", "3{,}25"),
    (r"(-\infty,0)\cup(1,2)", r"(-\infty,0)\bigcup(1,2)"),
    (r"(-\infty,0)\cup(1,2)", "(−∞,0)∪(1,2)"),
    ("45", r"\mathbf{45}"),
    (r"\frac{1}{2}", r"\textbf{1/2}"),
    ("C", "C. 45"),
    ("A", "(A) 5"),
    ("C", r"(C) \frac{1}{2}"),
    ("C", r"\text{(C)} 45"),
    ("C", r"\textbf{(C) } 45"),
    ("7:30", r"7:30 \text{ p.m.}"),
    ("7:30", "07:30"),
    (r"2\pi", "2π"),
    (r"x \le 3", "x≤3"),
    # Six decimals.
    (r"\frac13", "0.333333"),
    (r"\pi", "3.141593"),
]

WRONG = [
    ("82", "72"),
    ("5", "no number at all"),
    ("2", ""),
    ("3", "-3"),
    ("5", "the result is 5"),
    # Fragments of a gold.
    (r"3\sqrt{13}", "3"),
    ("6-5i", "5"),
    (r"\sqrt{51}", r"\sqrt{15}"),
    ("p - q", "q - p"),
    # Fragments of an answer that does not parse.
    ("3", r"\frac{1}{2} & 3"),
    (r"\frac{1}{2}", r"5 \frac{1}{2} ??"),
    ("1", "x² + 1"),
    ("2", r"\left\{\begin{array}{l}x=1\\y=2\end{array}\right."),
    (r"\left\{\begin{array}{l}x=1\\y=2\end{array}\right.", "2"),
    # Algebra.
    ("1-1/e", "1+1/e"),
    (r"1-\frac{1}{e}", r"1+\frac{1}{e}"),
    ("3*x-1*y+13=0", "3x + 4y + 14=0"),
    ("y=2x+3", "y=2x+4"),
    ("4x^2+y^2=1", "x^2+4y^2=1"),
    (r"\sin x", r"\cos x"),
    (r"1\frac{1}{2}", r"\frac{1}{2}"),
    (
        r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
        r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}",
    ),
    ("x", "y"),
    (r"\alpha", "a"),
    # Words.
    ("even", "neve"),
    ("Evelyn", "lynEve"),
    (r"\text{Evelyn}", "lynEve"),
    (r"\text{no}", "on"),
    (r"\text{ab}", "ba"),
    ("a-b-c", "abc"),
    (r"\text{Monday}", "Tuesday"),
    (r"\text{two}", "2"),
    # Choices, and single letters: case is theirs.
    (r"\textbf{(A)}", "B"),
    ("A", "a"),
    ("x", "X"),
    ("x=1,y=2", "(2,1)"),
    ("a=1,b=2", "2,1"),
    ("a=1,b=2", "a=2,b=1"),
    ("10", "10x^2"),
    ("36 km/h", "36 m/s"),
    ("5 cm^2", "5 mm^2"),
    ("5", "5m/h"),
    # Bases.
    ("2516_8", "2516_9"),
    ("2516_8", "2516_{10}"),
    ("$2516_8$", "2516_9"),
    ("2516_8", "2517"),
    ("(2516)_{8}", "(2516)_{9}"),
    ("A_1", "A_2"),
    # Lists, tuples, sets, thousands.
    ("(1,2)", "1,2"),
    ("1,2", "(1,2)"),
    ("(1,2)", "(2,1)"),
    (r"\{1,2\}", "(2,1)"),
    ("1,2,3", "1,2"),
    ("1,2", "1,2,3"),
    ("(1,8,19), (2,7,13)", "(2,7,13), (8,1,19)"),
    ("x=1,y=2", "x=2,y=1"),
    ("1,000", "1,0"),
    ("1,000", "1, 000"),
    # Percent.
    ("10", "0.1"),
    (r"50\%", "5"),
    # Intervals.
    ("[1,2)", "(1,2]"),
    ("[-2,7]", "-2 < x < 7"),
    ("[-2,7]", r"x \ge -2"),
    (r"-2 \le x \le 7", r"-2 \le y \le 7"),
    # Scientific notation.
    ("1e11", "11e"),
    ("4.5e33", "4.5e34"),
    ("1e3", "e"),
    # Exact values.
    (r"\frac{1}{2004!}", r"\frac{1}{2006!}"),
    (r"\frac{1}{10^{12}}", r"\frac{1}{10^{13}}"),
    ("x^2+1=0", "x^2+2=0"),
    ("x^2+y^2=4", "x^2+y^2=5"),
    ("x^2+1=0", "0=0"),
    # Choices and times, numbers with commas.
    ("C", "B. 45"),
    ("C", "(A) C"),
    ("7:30", "7:31"),
    ("7:30", "730"),
    ("0.5", "0,6"),
    ("1.5", "1, 5"),
    # Too few decimals.
    (r"\frac13", "0.333"),
    (r"2\pi", "6.28"),
]

KNOWN_LIMITS = [
    # Right by mistake.
    (r"5\text{ cm}", r"5\text{ m}", True),
    ("100,200", "100200", True),
    ("1", "2x + z = 1", True),
    # Wrong by mistake.
    ("100,200", "100, 200", False),
    ("1", r"\tan 45^\circ", False),
    ("xyz", "zyx", False),
    ("5", r"\textbf{(A)}\ 5", False),
    ("2516_8", r"2516_{\text{eight}}", False),
    (r"(-\infty,1)\cup(2,\infty)", r"x<1 \text{ or } x>2", False),
    ("5", r"\approx 5 &", False),
]


@pytest.mark.parametrize(("gold", "answer"), RIGHT)
def test_right(grader, gold, answer):
    assert grader.is_equal(gold, answer) and grader.timeouts == 0


@pytest.mark.parametrize(("gold", "answer"), WRONG)
def test_wrong(grader, gold, answer):
    assert not grader.is_equal(gold, answer) and grader.timeouts == 0


@pytest.mark.parametrize(("gold", "answer", "today"), KNOWN_LIMITS)
def test_known_limit(grader, gold, answer, today):
    assert grader.is_equal(gold, answer) is today


def test_golds_of_this_file_equal_themselves(grader):
    grader.check_golds([gold for gold, _ in RIGHT + WRONG] + ["5", "5"])


_SOLUTION = "So we add all of them and " * 4 + "it is 5"


@pytest.mark.parametrize("gold", ["", " ", "}{", "5\n6", _SOLUTION])
def test_a_gold_that_nothing_equals_is_named(grader, gold):
    assert grader.is_equal(gold, gold)  # the short cut would hide it
    with pytest.raises(
        ValueError, match="1 of 3 gold answers.*leave their prompts out"
    ) as e:
        grader.check_golds(["5", gold, r"\frac{1}{2}"])
    assert repr([gold]) in str(e.value)


@pytest.mark.parametrize(
    ("gold", "answer", "tolerance", "want"),
    [
        ("1", "1.1", 0.1, True),  # 1.1 - 1 > 0.1 in floating point
        ("7", "7.11", 0.1, False),
        ("7", "6.9", 0.1, True),
        (r"\frac13", "0.333", 1e-3, True),
        (r"\frac13", "0.333", 1e-4, False),
        (r"\frac13", "x = 0.333", 1e-3, True),
        ("1,2", "2.05, 0.95", 0.1, True),
        ("1,2", "2.05, 0.85", 0.1, False),
        ("1,2", "1", 0.1, False),
        (r"10\%", "10", 1e-3, True),  # what is equal without it stays equal
        ("x", "1", 0.1, False),
        ("5", "1" + "0" * 400, 0.1, False),  # an infinite float
        (r"5, \pi", "3.1, 5.01", 0.1, True),
    ],
)
def test_numbers_within_a_tolerance(grader, gold, answer, tolerance, want):
    assert grader.is_equal(gold, answer, tolerance) is want
    assert grader.timeouts == 0


def test_a_verdict_is_remembered_for_its_tolerance_only(grader):
    assert not grader.is_equal("11", "11.05")
    assert grader.is_equal("11", "11.05", 0.1)
    assert not grader.is_equal("11", "11.05", 0.01)


def test_the_description_changes_with_what_moves_a_verdict():
    about = grading.Grader(deadline_seconds=2.0).describe()
    assert about["grader"] == "math-verify" and about["version"][0].isdigit()
    assert about["deadline_seconds"] == 2.0
    assert about["rules"] == grading.RULES_VERSION


def test_classes_are_by_meaning(grader):
    answers = ["0.5", None, r"\frac{1}{2}", "3", "0.5", "1/2"]
    assert grader.classes(answers) == [0, -1, 0, 1, 0, 0]


def test_members_of_a_class_equal_each_other_both_ways(grader):
    assert grader.is_equal("1", "2x + z = 1") and not grader.is_equal("2x + z = 1", "1")
    assert grader.classes(["1", "2x + z = 1"]) == [0, 1]
    assert grader.classes(["2x + z = 1", "1"]) == [0, 1]


def test_empty_boxes_are_no_class(grader):
    assert grader.classes(["", "5", " ", "5.0", ""]) == [-1, 0, -1, 0, -1]


def test_arithmetic_without_end_is_cut_off_and_the_next_answer_graded():
    with grading.Grader(deadline_seconds=1.0) as grader:
        assert grader.is_equal("4", "2+2")
        assert not grader.is_equal("7", "9^{9^{9^9}}+1")
        assert grader.timeouts == 1
        assert grader.is_equal("6", "3+3")


def test_an_answer_without_end_costs_its_deadline_once():
    with grading.Grader(deadline_seconds=1.0) as grader:
        answers = ["5", "9^{9^{9^9}}+1", "6", "7", "9^{9^{9^9}}+1", "5.0"]
        assert grader.classes(answers) == [0, 1, 2, 3, 1, 0]
        assert grader.timeouts == 1


def test_an_answer_that_takes_all_memory_or_has_no_end_is_wrong():
    with grading.Grader() as grader:
        assert grader.is_equal("2", "1+1")
        for answer in ("{" * 10**6, "1+" * 10**6 + "1", r"\frac{" * 5000):
            assert not grader.is_equal("2", answer)
        assert grader.timeouts == 0  # not even looked at
        assert not grader.is_equal("2", "(10^{9})!")
        assert grader.is_equal("3", "2+1")


def test_what_has_passed_is_never_condemned():
    with grading.Grader(deadline_seconds=1.0) as grader:
        grader.check_golds(["7"])
        assert not grader.is_equal("7", "9^{9^{9^9}}+1")
        assert grader.is_equal("7", "3+4") and grader._endless == {"9^{9^{9^9}}+1"}


@pytest.mark.slow
def test_no_right_answer_is_lost_on_a_busy_machine():
    """Eight loops that compute: a deadline of wall time condemned three answers."""
    loops = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(8)
    ]
    try:
        with grading.Grader(deadline_seconds=1.0) as grader:
            grader.check_golds([gold for gold, _ in RIGHT])
            for gold, answer in RIGHT:
                assert grader.is_equal(gold, answer), (gold, answer)
            assert grader.timeouts == 0
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def test_what_sympy_fails_on_is_wrong_and_costs_no_worker():
    with grading.Grader() as grader:
        assert grader.is_equal("8", "4+4")
        before = grader._worker
        # The right side of the answer is a set, which is taken off a number.
        assert not grader.is_equal(r"\infty=\infty", r"i\in\mathbb{Z}")
        assert grader.timeouts == 0 and grader._worker is before


def test_a_worker_that_a_scheduler_ended_costs_no_verdict(monkeypatch):
    """Slurm tells all processes of a step to end: while one starts, or compares."""
    with grading.Grader() as grader:
        read, ended = grader._read_line, []

        def told_to_end():
            if len(ended) < 2:
                ended.append(grader._worker)
                grader._worker.terminate()
                grader._worker.wait()
                return ""
            return read()

        monkeypatch.setattr(grader, "_read_line", told_to_end)
        assert grader.is_equal("6", "3+3")
        ended.pop()
        assert grader.is_equal("8", "4+4")
        assert grader.timeouts == 0 and grader._endless == set()


def test_a_worker_that_died_is_replaced():
    with grading.Grader() as grader:
        assert grader.is_equal("6", "3+3")
        grader._worker.kill()
        grader._worker.wait()
        assert grader.is_equal("8", "4+4") and grader.timeouts == 0

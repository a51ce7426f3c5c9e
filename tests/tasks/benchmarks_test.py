r"""Sets of problems: each form by hand, with the traps of its source."""

import hashlib
import json
import logging

import datasets
import pytest

from pfjax.infra import dataset_io
from pfjax.tasks import benchmarks, grading
from pfjax.tasks.benchmarks import STYLES, Problem

# One row of each set, in the form of its source, and what comes of it.
FORMS = {
    "math500": (
        {
            "problem": "What is $1+1$?", "solution": r"It is $\boxed{2}$.",
            "answer": "2", "subject": "Algebra", "level": 1, "unique_id": "test/a/1.json",
        },
        Problem("test/a/1.json", "What is $1+1$?", "2"),
    ),
    "olympiadbench": (
        {
            "id": 1606, "question": "Find all $x$.", "final_answer": ["$-1$,$7$"],
            "is_multiple_answer": True, "error": None, "answer_type": "Numerical",
        },
        Problem("1606", "Find all $x$.", "-1,7"),
    ),
    "aime24": (
        {"id": 60, "problem": "How many?", "solution": "...", "answer": "033",
         "url": "...", "year": "2024"},
        Problem("60", "How many?", "033"),
    ),
    "aime25": (
        {"problem": "How many?", "answer": "70", "id": "0"},
        Problem("0", "How many?", "70"),
    ),
    "amc23": (
        {"id": 0, "question": "When?", "answer": 27.0, "url": "..."},
        Problem("0", "When?", "27"),
    ),
    "gsm8k": (
        {"question": "How much?", "answer": "She has 2*600=<<2*600=1200>>1200.\n#### 1,200"},
        Problem("0", "How much?", "1200"),
    ),
    "minerva": (
        {"problem": "How far?", "type": "Physics",
         "solution": r"So $\boxed{1.5e-3}$ meters."},
        Problem("0", "How far?", "1.5e-3"),
    ),
    "joke": (
        {"prompt": "Tell me a joke about sums."},
        Problem("0", "Tell me a joke about sums.", None),
    ),
}  # fmt: skip


def _graded(problems):
    """What is asked and graded, without the columns that it came from."""
    return [problem[:4] for problem in problems]


def _write(folder, name, *found):
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in found))


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_the_sets(tmp_path, name):
    row, want = FORMS[name]
    _write(tmp_path, f"{name}.jsonl", row)
    assert _graded(benchmarks.read(name, str(tmp_path))) == [want[:4]]
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / f"{name}.parquet")
    (tmp_path / f"{name}.jsonl").unlink()
    assert _graded(benchmarks.read(name, str(tmp_path))) == [want[:4]]


def test_tolerance_of_olympiadbench(tmp_path):
    row = {**FORMS["olympiadbench"][0], "final_answer": ["3.14"], "error": "1e-1"}
    _write(tmp_path, "olympiadbench.jsonl", row)
    (problem,) = benchmarks.read("olympiadbench", str(tmp_path))
    assert problem.tolerance == 0.1 and problem.gold == "3.14"


def test_gpqa_shuffles_choices_by_the_seed_and_grades_the_letter(tmp_path):
    found = [
        {
            "Question": f"Which is {i}?", "Correct Answer": "right",
            **{f"Incorrect Answer {j}": f"wrong {j}" for j in (1, 2, 3)},
        }
        for i in range(40)
    ]  # fmt: skip
    _write(tmp_path, "gpqa.jsonl", *found)
    problems = benchmarks.read("gpqa", str(tmp_path), seed=3)
    for problem in problems:
        assert f"\n{problem.gold}. right\n" in problem.question
        assert all(f"wrong {j}\n" in problem.question for j in (1, 2, 3))
    # The source lists the right one first: every letter has its turn.
    assert {p.gold for p in problems} == set("ABCD")
    assert problems == benchmarks.read("gpqa", str(tmp_path), seed=3)
    assert problems != benchmarks.read("gpqa", str(tmp_path), seed=4)


def test_another_number_of_items_is_said(tmp_path, caplog):
    _write(tmp_path, "math500.jsonl", FORMS["math500"][0])
    with caplog.at_level(logging.WARNING):
        benchmarks.read("math500", str(tmp_path))
    assert "has 1 items, published scores are over 500" in caplog.text


def test_a_set_is_recognised_by_its_questions(tmp_path, caplog, monkeypatch):
    """In any order and spacing, whatever the file is called."""
    questions = ["What is 1 + 1?", "How far is 3?"]
    known = benchmarks.BENCHMARKS["math500"]
    letters = "\n".join(sorted(["whatis11", "howfaris3"]))
    content = hashlib.sha256(letters.encode()).hexdigest()[:10]
    monkeypatch.setitem(
        benchmarks.BENCHMARKS, "math500", known._replace(contents=("0", content))
    )
    rows = [{"problem": q, "answer": "2"} for q in questions]
    for file, asked in (
        ("mine.jsonl", rows[::-1]),
        ("math500.jsonl", rows),
        ("MATH-500.jsonl", [{"prompt": r["problem"].replace(" ", "\n")} for r in rows]),
    ):
        _write(tmp_path, file, *asked)
        with caplog.at_level(logging.WARNING):
            problems = benchmarks.read(str(tmp_path / file))
        assert benchmarks.recognise(problems) == "math500" and not caplog.text
    # Called by the name of another, or of one whose questions it has not.
    for file, asked, message in (
        ("gsm8k.jsonl", rows, "the 2 questions read as gsm8k are those of math500"),
        (
            "MATH-500.jsonl",
            rows[:1],
            "the 1 questions read as math500 are no wording of",
        ),
    ):
        _write(tmp_path, file, *asked)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            benchmarks.read(str(tmp_path / file))
        assert message in caplog.text


@pytest.mark.parametrize(
    ("row", "is_hidden"),
    [
        ({"question": "2+2?", "choices": ["3", "4"], "answer": 1}, True),
        ({"question": "2+2?", "options": ["3", "4"], "answer": "B"}, True),
        ({"question": "?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}}, True),
        ({"question": "2+2? A. 3 B. 4", "choices": ["3", "4"], "answer": "B"}, False),
        ({"question": "2+2?", "options": {"A": "3", "B": "4"}}, True),
        ({"question": "2+2?", "choices": 2, "options": {"seed": 0}}, False),
    ],
)
def test_choices_that_are_not_asked_are_said(tmp_path, caplog, row, is_hidden):
    _write(tmp_path, "p.jsonl", row, row)
    with caplog.at_level(logging.WARNING):
        benchmarks.read(str(tmp_path / "p.jsonl"))
    assert caplog.text.count("is not shown the column") == is_hidden


def test_a_row_of_another_form_is_named(tmp_path):
    for answer in (None, "", " ", [], [""], {"target": []}, float("nan"), "#### "):
        row = {"question": "?", "answer": answer}
        _write(tmp_path, "gsm8k.jsonl", FORMS["gsm8k"][0], row)
        with pytest.raises(ValueError, match=r"gsm8k.jsonl:2 has no answer, in \['ans"):
            benchmarks.read("gsm8k", str(tmp_path))
    _write(tmp_path, "math500.jsonl", {"text": "?"})
    with pytest.raises(ValueError, match=r"math500.jsonl:1: no prompt.*\['text'\]"):
        benchmarks.read("math500", str(tmp_path))
    _write(tmp_path, "gpqa.jsonl", {"Question": "?"})
    with pytest.raises(ValueError, match=r"gpqa.jsonl:1 is not of the form of gpqa"):
        benchmarks.read("gpqa", str(tmp_path))


@pytest.mark.parametrize(
    "row, gold",
    [
        ({"answer": ["9.6\n"]}, "9.6"),
        ({"answer": {"target": ["5"]}}, "5"),
        ({"answer": 27.0}, "27"),
        ({"answer": 2.5}, "2.5"),
        ({"answer": "6 - 2 = <<6-2=4>>4\n#### 1,004"}, "1004"),
        ({"answer": r"So it is $\boxed{\frac{1}{2}}$."}, r"\frac{1}{2}"),
        ({"answer": None, "solution": "That makes\n#### 18"}, "18"),
        ({"answer": "", "solution": r"Thus \boxed{7}."}, "7"),
        ({"solution": "It holds for all of them."}, None),
        ({"reward_model": {"ground_truth": {"target": ["5"]}, "style": "rule"}}, "5"),
        ({"reward_model": None}, None),
        ({"ground_truth": "3"}, "3"),
        ({"final_answer": ["$-1$,$7$"]}, "-1,7"),
        ({"final_answer": ["3", "4"]}, "3,4"),
        # As text: by str() of Python, JSON in a column, pandas.
        ({"answer": "['9.6\\n']"}, "9.6"),
        ({"answer": '["-3", "x"]'}, "-3"),
        ({"answer": b"2"}, "2"),
        ({"answer": "thus\n#### (1,2)"}, "(1,2)"),
        ({"answer": "roots\n#### 2, 3"}, "2, 3"),
        ({"answer": "#### $1,234,567.50"}, "$1234567.50"),
        ({"answer": "#### 5\n\nNote: checked."}, "5"),
        ({"final_answer": ["5"], "error": "0.1,0.2"}, "5"),
        ({"answer": "{'target': ['5']}"}, "5"),
        ({"answer": "['not closed"}, "['not closed"),
        ({"answer": "[2, 5]"}, "[2, 5]"),
        ({"answer": "[]", "ground_truth": "4"}, "4"),
        *(({"answer": x}, None) for x in ("None", "nan", "null", "N/A", "{}", "<NA>")),
        # With words around it.
        ({"answer": "<answer> 5 </answer>"}, "5"),
        ({"answer": "Answer: 12"}, "12"),
        ({"answer": "The final answer is $5$."}, "$5$"),
        ({"answer": "**Answer:** 5"}, "5"),
        ({"answer": "The correct answer is: (B)"}, "(B)"),
        ({"answer": "**5**"}, "5"),
        ({"answer": r"\[x^2\]"}, "x^2"),
        ({"answer": "2**3"}, "2**3"),
    ],
)
def test_an_answer_is_what_is_to_be_equalled(row, gold):
    assert benchmarks.from_row("f:1", {"prompt": "?", **row}).gold == gold


@pytest.mark.parametrize(
    "row",
    [
        {"answer": {"a": "1", "b": "2"}},
        {"answer": b"\xff"},
        {"prompt": [{"role": "user", "content": None}]},
        {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
        {"prompt": [{"content": "no role"}]},
        {"prompt": [["no message"]]},
        {"prompt": 3},
    ],
)
def test_what_is_no_row_is_named(row):
    with pytest.raises(ValueError, match="^f:1: "):
        benchmarks.from_row("f:1", {"prompt": "?", **row})


def test_parts_of_text_are_a_message():
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "2"}]
    row = {"prompt": [{"role": "user", "content": parts}]}
    (message,) = benchmarks.from_row("f:1", row).question
    assert message == {"role": "user", "content": "1+2"}


@pytest.mark.parametrize(
    "file", ["minerva_math/test.jsonl", "minerva.json", "minerva.csv"]
)
def test_copies_of_a_set_have_several_names_and_forms(tmp_path, file):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    row = {"problem": "How far?", "answer": "1.5e-3"}
    text = {".jsonl": json.dumps(row), ".json": json.dumps([row], indent=1)}
    path.write_text(text.get(path.suffix, "problem,answer\nHow far?,1.5e-3\n"))
    (problem,) = benchmarks.read("minerva", str(tmp_path))
    assert problem[:4] == ("0", "How far?", "1.5e-3", None)


def test_versions_of_a_set_differ_by_question_and_gold():
    one = [Problem("0", "?", "7")]
    assert benchmarks.version_of(one) == benchmarks.version_of(
        [Problem("0", "?", "7", columns={"level": 1})]
    )
    for other in (Problem("0", "?!", "7"), Problem("0", "?", "8")):
        assert benchmarks.version_of(one) != benchmarks.version_of([other])


def test_styles_keep_the_braces_of_questions_and_their_own():
    problem = Problem("0", r"What is $\frac{1}{2}{0}$?", "0.5")
    asked = benchmarks.prompt_of(problem, STYLES["boxed"])
    assert asked.startswith(r"What is $\frac{1}{2}{0}$? Let's think")
    assert asked.endswith(r"within \boxed{}.")
    assert r"within \boxed{{}}." in benchmarks.prompt_of(
        problem, STYLES["power-sampling"]
    )
    messages = [{"role": "user", "content": "as it is"}]
    asked = benchmarks.prompt_of(Problem("0", messages, None), STYLES["boxed"])
    assert asked == messages


def test_a_gold_that_no_answer_equals_stops():
    with grading.Grader() as grader:
        grader.check_golds([r"\frac{1}{2}", None])
        with pytest.raises(ValueError, match="not equal to themselves"):
            grader.check_golds(["}{"])


def test_revision_config_and_slice_of_a_hub_set_are_passed_on(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return [{"prompt": "?"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    sources = ("a/b", "a/b:test", "a/b@v2:main:test", "a/b:train[:9]", "a/b:c:x[1:9]")
    for source in sources:
        assert dataset_io.read(source) == [(f"{source} row 0", {"prompt": "?"})]
    assert asked == [
        (("a/b",), {"split": "train", "revision": None}),
        (("a/b",), {"split": "test", "revision": None}),
        (("a/b", "main"), {"split": "test", "revision": "v2"}),
        (("a/b",), {"split": "train[:9]", "revision": None}),
        (("a/b", "c"), {"split": "x[1:9]", "revision": None}),
    ]

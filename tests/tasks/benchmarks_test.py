r"""Sets of problems: each form by hand, with the traps of its source."""

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


def _write(folder, name, *found):
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in found))


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_the_sets(tmp_path, name):
    row, want = FORMS[name]
    _write(tmp_path, f"{name}.jsonl", row)
    assert benchmarks.read(name, str(tmp_path)) == [want]
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / f"{name}.parquet")
    (tmp_path / f"{name}.jsonl").unlink()
    assert benchmarks.read(name, str(tmp_path)) == [want]


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


def test_a_row_of_another_form_is_named(tmp_path):
    _write(tmp_path, "gsm8k.jsonl", FORMS["gsm8k"][0], {"question": "?", "answer": "7"})
    with pytest.raises(ValueError, match=r"gsm8k.jsonl:2 is not of the form of gsm8k"):
        benchmarks.read("gsm8k", str(tmp_path))
    _write(tmp_path, "math500.jsonl", {"text": "?"})
    with pytest.raises(ValueError, match=r"math500.jsonl:1 is not .* in \['text'\]"):
        benchmarks.read("math500", str(tmp_path))


def test_versions_of_a_set_differ_by_question_and_gold():
    one = [Problem("0", "?", "7")]
    assert benchmarks.fingerprint(one) == benchmarks.fingerprint(
        [Problem("0", "?", "7")]
    )
    for other in (Problem("0", "?!", "7"), Problem("0", "?", "8")):
        assert benchmarks.fingerprint(one) != benchmarks.fingerprint([other])


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


def test_a_revision_and_a_config_of_a_hub_set_are_passed_on(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return [{"prompt": "?"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in ("a/b", "a/b:test", "a/b@v2:main:test"):
        assert dataset_io.read(source) == [(f"{source} row 0", {"prompt": "?"})]
    assert asked == [
        (("a/b",), {"split": "train", "revision": None}),
        (("a/b",), {"split": "test", "revision": None}),
        (("a/b", "main"), {"split": "test", "revision": "v2"}),
    ]

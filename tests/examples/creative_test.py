"""python -m examples.creative on what python -m pfjax.evaluate left."""

import json
import subprocess
import sys

import pytest

from examples.creative import __main__ as creative

JUDGE = """
import json, sys
for line in sys.stdin:
    print(json.dumps({"id": json.loads(line)["id"], "score": 0.25}))
"""


def _write_set(folder, name, texts, gold=None, num_samples=2):
    """The files of an evaluation of prompts with `num_samples` responses each."""
    rows = [
        {
            "prompt_id": i // num_samples, "sample": i % num_samples,
            "prompt": f"{name} {i // num_samples}", "completion": text, "gold": gold,
        }
        for i, text in enumerate(texts)
    ]  # fmt: skip
    text = "".join(json.dumps(r) + "\n" for r in rows)
    (folder / f"{name}.jsonl").write_text(text)
    about = {
        "set": name,
        "settings": {"samples": num_samples, "items": len(texts) // num_samples},
        "graded": {"grader": {"box": "last"}},
        "scores": {"length_mean": 3.0},
    }
    (folder / f"{name}.json").write_text(json.dumps(about))


def _command(tmp_path):
    (tmp_path / "judge.py").write_text(JUDGE)
    return f"{sys.executable} {tmp_path}/judge.py"


def test_sets_without_answers_gain_diversity_and_quality(tmp_path, capsys):
    _write_set(tmp_path, "joke", ["a b", "a b", "a b", "c d"])
    _write_set(tmp_path, "poem", ["a b", "c d"])
    _write_set(tmp_path, "eval", ["a b", "c d"], gold="7")
    answered = (tmp_path / "eval.json").read_text()
    creative.score_folder(tmp_path, "lexical", _command(tmp_path), "")
    assert (tmp_path / "eval.json").read_text() == answered
    joke, poem = (
        json.loads((tmp_path / f"{n}.json").read_text()) for n in ("joke", "poem")
    )
    # Two copies and two strangers; and two strangers.
    assert joke["scores"]["semantic_diversity"] == pytest.approx(0.5)
    assert poem["scores"]["semantic_diversity"] == pytest.approx(1.0)
    assert joke["scores"]["quality"] == 0.25 and joke["scores"]["judged_frac"] == 1
    assert joke["scores"]["length_mean"] == 3.0
    assert joke["graded"]["embedder"] == "lexical"
    assert joke["graded"]["grader"] == {"box": "last"}
    assert joke["graded"]["judge"]["rubric"] == "joke"
    assert poem["graded"]["judge"]["rubric"] == "creative"
    assert "quality                 0.2500" in capsys.readouterr().out


def test_single_responses_are_judged_but_have_no_diversity(tmp_path):
    _write_set(tmp_path, "story", ["a b", "c d"], num_samples=1)
    creative.score_folder(tmp_path, "lexical", _command(tmp_path), "joke")
    found = json.loads((tmp_path / "story.json").read_text())
    assert found["scores"]["quality"] == 0.25 and "vendi" not in found["scores"]
    assert found["graded"]["judge"]["rubric"] == "joke"


def test_what_cannot_be_scored_is_said(tmp_path):
    with pytest.raises(ValueError, match="no scores of prompts without answers"):
        creative.score_folder(tmp_path, "lexical", "", "")
    _write_set(tmp_path, "poem", ["a b", "c d", "e f"])
    about = json.loads((tmp_path / "poem.json").read_text())
    for items in (1, 2):
        about["settings"]["items"] = items
        (tmp_path / "poem.json").write_text(json.dumps(about))
        with pytest.raises(ValueError, match=f"holds 3 responses, not {items} x 2"):
            creative.score_folder(tmp_path, "lexical", "", "")


@pytest.mark.slow  # samples a model in a process of its own
def test_the_two_commands_of_the_readme(tmp_path):
    prompts = [{"prompt": f"{a}+25"} for a in (17, 36, 48)]
    text = "".join(json.dumps(p) + "\n" for p in prompts)
    (tmp_path / "joke.jsonl").write_text(text)
    out = tmp_path / "out"
    for args in (
        ("pfjax.evaluate", "--benchmark=joke", f"--data={tmp_path}", "--samples=4",
         "--max_new_tokens=32", f"--out={out}"),
        ("examples.creative", str(out), "--embedder=lexical",
         f"--judge={_command(tmp_path)}"),
    ):  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", *args], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    found = json.loads((out / "joke.json").read_text())
    assert found["scores"]["quality"] == 0.25 and "avg@4" not in found["scores"]
    assert 0 < found["scores"]["semantic_diversity"] < 1
    assert 0 < found["scores"]["distinct"] <= 1
    assert found["graded"]["embedder"] == "lexical"
    assert found["graded"]["judge"]["rubric"] == "joke"

"""The judge: requests, replies, marks by hand, and a command that can be interrupted."""

import json
import logging
import sys

import numpy as np
import pytest

from examples.creative import judge

CREATIVE = judge.RUBRICS["creative"].criteria
JOKE = {"funniness": 5, "cleverness": 4, "originality": 3, "structure": 2}
# .40 * 5 + .25 * 4 + .20 * 3 + .15 * 2 = 3.9, of 5
JOKE_SCORE = 0.78


def _rows(num_prompts=2, samples=2):
    return [
        {
            "prompt_id": i, "sample": j, "prompt": f"Of {i}?", "completion": f"É {i}{j}",
            "tokens": 3,
        }
        for i in range(num_prompts) for j in range(samples)
    ]  # fmt: skip


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def _write(path, *rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def asked(tmp_path):
    """Requests for four jokes to two prompts: the file, and the ids."""
    path = tmp_path / "requests.jsonl"
    judge.write_requests(path, _rows(), "joke")
    return path, [r["id"] for r in _lines(path)]


def test_weights_sum_to_one_and_the_best_marks_to_one():
    assert len(CREATIVE) == 10
    for name, rubric in judge.RUBRICS.items():
        assert sum(w for w, _ in rubric.criteria.values()) == pytest.approx(1)
        best = dict.fromkeys(rubric.criteria, rubric.scale[1])
        assert judge.score_of_reply(json.dumps(best), name) == pytest.approx(1)


def test_a_request_is_a_chat_with_all_that_the_judge_needs(asked):
    path, ids = asked
    first = _lines(path)[0]
    assert set(first) == {"id", "prompt", "completion", "rubric", "messages"}
    assert (first["prompt"], first["completion"]) == ("Of 0?", "É 00")
    assert first["rubric"] == "joke" and first["id"].startswith("0-0-")
    (message,) = first["messages"]
    assert message["role"] == "user"
    for text in ["Of 0?", "É 00", "from 1 to 5", "punch line", *JOKE]:
        assert text in message["content"]
    assert len(set(ids)) == 4


def test_ids_change_with_what_is_judged_and_only_then(tmp_path, asked, monkeypatch):
    def ids(rows, rubric="joke"):
        judge.write_requests(tmp_path / "r", rows, rubric)
        return {r["id"] for r in _lines(tmp_path / "r")}

    before = ids(_rows())
    assert before == ids(_rows()[::-1])
    changed = _rows()
    changed[0]["completion"] += "!"
    assert len(before & ids(changed)) == 3
    assert not before & ids(_rows(), "creative")
    harder = judge.RUBRICS["joke"]._replace(task="Be hard.")
    monkeypatch.setitem(judge.RUBRICS, "joke", harder)
    assert not before & ids(_rows())


def test_mistakes_in_requests_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no rubric 'ode'.*creative.*joke"):
        judge.write_requests(tmp_path / "r", _rows(), "ode")
    with pytest.raises(ValueError, match="1 of 5 rows come twice"):
        judge.write_requests(tmp_path / "r", [*_rows(), _rows()[0]], "joke")


def test_marks_by_hand():
    # 0, 2, .. 18: mean 9, of 20
    marks = {name: 2 * i for i, name in enumerate(CREATIVE)}
    assert judge.score_of_reply(json.dumps(marks), "creative") == pytest.approx(0.45)
    assert judge.score_of_reply(json.dumps(JOKE), "joke") == pytest.approx(JOKE_SCORE)


@pytest.mark.parametrize(
    "reply",
    [
        "I think {so}: ```json\n" + json.dumps(JOKE, indent=1) + "\n```\nDone {}.",
        json.dumps({k: {"score": v, "justification": "{ha}"} for k, v in JOKE.items()}),
        json.dumps({**JOKE, "overall": 99, "cleverness": 4.0}),
        # the last complete set counts
        json.dumps(dict.fromkeys(JOKE, 1)) + json.dumps(JOKE) + '{"funniness": 1}',
    ],
)
def test_replies_that_are_read(reply):
    assert judge.score_of_reply(reply, "joke") == pytest.approx(JOKE_SCORE)


@pytest.mark.parametrize(
    "reply",
    [
        "", "4/5, funny", "{", json.dumps(JOKE)[:-1],
        json.dumps({k: v for k, v in JOKE.items() if k != "structure"}),
        json.dumps({**JOKE, "structure": 6}),
        json.dumps({**JOKE, "structure": 0}),
        json.dumps({**JOKE, "structure": True}),
        json.dumps({**JOKE, "structure": "3"}),
        json.dumps({**JOKE, "structure": None}),
        json.dumps({**JOKE, "structure": float("nan")}),
        json.dumps({**JOKE, "structure": {"marks": 3}}),
    ],
)  # fmt: skip
def test_replies_that_are_not_completed_clipped_or_guessed(reply):
    assert judge.score_of_reply(reply, "joke") is None


def test_what_is_missing_unparsable_duplicate_or_unknown_is_told(tmp_path):
    path = tmp_path / "requests.jsonl"
    judge.write_requests(path, _rows(3), "joke")
    a, b, c, d, e, f = [r["id"] for r in _lines(path)]
    answers = _write(
        tmp_path / "answers.jsonl",
        {"id": b, "reply": "no idea"},
        {"id": a, "score": 1},
        {"id": c, "score": 0.5}, {"id": c, "score": 0.5},
        {"id": d, "score": 0.5}, {"id": d, "score": 0.25},
        # asked for again, since it could not be read
        {"id": e, "reply": "hm"}, {"id": e, "reply": json.dumps(JOKE)},
        {"id": "another", "score": 0.5},
    )  # fmt: skip
    got = judge.read_judgements(answers, path)
    assert got.rubric == "joke"
    assert got.scores == pytest.approx({a: 1.0, c: 0.5, e: JOKE_SCORE})
    assert (got.missing, got.unparsable) == ([f], [b])
    assert (got.duplicate, got.unknown) == ([c, d], ["another"])


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("thinking ...", "no JSON object"),
        ("[1]", "no JSON object"),
        ('{"score": 0.5}', "no JSON object with an `id`"),
        ('{"id": 3, "score": 0.5}', "no JSON object with an `id`"),
        ('{"id": "x"}', "no `score` in 0..1"),
        ('{"id": "x", "score": 1.5}', "no `score` in 0..1"),
        ('{"id": "x", "score": true}', "no `score` in 0..1"),
        ('{"id": "x", "score": NaN}', "no `score` in 0..1"),
        ('{"id": "x", "score": null, "reply": "4"}', "no `score` in 0..1"),
        ('{"id": "x", "reply": 4}', "no `score` in 0..1"),
    ],
)
def test_a_line_that_is_no_judgement_is_named_by_file_and_line(
    tmp_path, asked, line, why
):
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"id": "x", "score": 0.5}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"answers\.jsonl:3: {why}"):
        judge.read_judgements(answers, asked[0])


def test_files_that_are_not_what_they_should_be(tmp_path, asked):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        judge.read_judgements(tmp_path / "nowhere", asked[0])
    other = tmp_path / "other.jsonl"
    judge.write_requests(other, _rows(), "creative")
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(asked[0].read_text() + other.read_text())
    with pytest.raises(ValueError, match="one of our rubrics"):
        judge.read_judgements(other, mixed)


def test_quality_by_hand(tmp_path, asked, caplog):
    path, ids = asked
    answers = _write(
        tmp_path / "answers.jsonl",
        {"id": ids[0], "score": 0.2}, {"id": ids[1], "score": 0.4},
        {"id": ids[3], "score": 0.9},
    )  # fmt: skip
    # prompts: (.2 + .4)/2 = .3 and .9, one being missing; mean .6, not .5 of responses;
    # sd .3 sqrt 2 over sqrt 2 prompts
    with caplog.at_level(logging.WARNING):
        got = judge.quality(judge.read_judgements(answers, path), _rows())
    want = {"quality": 0.6, "quality_se": 0.3, "judged_frac": 0.75}
    assert got == pytest.approx(want)
    assert "'missing': 1" in caplog.text
    assert judge.quality(judge.read_judgements(answers, path), _rows()[::-1]) == got
    with pytest.raises(ValueError, match="none of 4 responses"):
        judge.quality(judge.read_judgements(_write(answers), path), _rows())


# Judges by the last digit of a completion, and stops after as many as it is told to.
SCRIPT = """
import json, sys
for n, line in enumerate(sys.stdin):
    if n == int(sys.argv[1]):
        sys.exit(3)
    request = json.loads(line)
    score = int(request["completion"][-1]) / 10
    print(json.dumps({"id": request["id"], "score": score}), flush=True)
    print(n, file=sys.stderr)
"""


def test_a_command_judges_and_goes_on_where_it_stopped(tmp_path, asked):
    path, ids = asked
    answers = tmp_path / "answers.jsonl"
    script = tmp_path / "my judge.py"
    script.write_text(SCRIPT)
    command = f'"{sys.executable}" "{script}" '
    with pytest.raises(RuntimeError, match=r"exited with 3.*answers\.jsonl"):
        judge.run_command(command + "1", path, answers)
    assert [r["id"] for r in _lines(answers)] == ids[:1]
    # What the user added by hand counts too, without a last line end.
    by_hand = json.dumps({"id": ids[2], "score": 0.7})
    answers.write_text(answers.read_text() + by_hand)
    judge.run_command(command + "9", path, answers)
    assert [r["id"] for r in _lines(answers)] == [ids[i] for i in (0, 2, 1, 3)]
    got = judge.read_judgements(answers, path)
    np.testing.assert_allclose([got.scores[i] for i in ids], [0, 0.1, 0.7, 0.1])
    judge.run_command("exit 4", path, answers)  # is not run: nothing is open


def test_a_command_is_asked_again_for_what_could_not_be_read(tmp_path, asked):
    path, ids = asked
    answers = _write(
        tmp_path / "answers.jsonl",
        {"id": ids[0], "reply": "hm"}, {"id": ids[1], "score": 1},
        {"id": ids[2], "score": 0}, {"id": ids[2], "score": 1},
    )  # fmt: skip
    seen = tmp_path / "seen.jsonl"
    judge.run_command(f"cat > '{seen}'", path, answers)
    assert [r["id"] for r in _lines(seen)] == [ids[3], ids[0]]
    assert _lines(seen)[0] == _lines(path)[3]


def test_more_requests_than_a_pipe_holds_do_not_hang(tmp_path):
    path, answers = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    judge.write_requests(path, _rows(40, 20), "creative")
    # Reads nothing, and answers 800 lines of 120 bytes.
    line = json.dumps({"id": "x" * 90, "score": 0.5})
    judge.run_command(f"for i in $(seq 800); do echo '{line}'; done", path, answers)
    got = judge.read_judgements(answers, path)
    assert len(got.missing) == 800 and got.unknown == ["x" * 90]

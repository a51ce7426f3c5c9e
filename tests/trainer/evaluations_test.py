"""Evaluations are compared with those that asked the same."""

from ml_collections import FrozenConfigDict

from configs import default
from pfjax.trainer import evaluations, progress

ROWS = [
    {"step": 0, "eval/avg@2": 0.9, "evaluation/fingerprint": 7.0},
    {"step": 2, "eval/avg@2": 0.1, "evaluation/fingerprint": 8.0},
    {"step": 3, "tb/loss": 1.0},
    {"step": 4, "eval/avg@2": 0.2, "evaluation/fingerprint": 8.0},
]


def test_what_was_asked_tells_evaluations_apart():
    c = default.get_config()
    number = lambda prompts="a": evaluations.fingerprint(FrozenConfigDict(c), prompts)
    first = number()
    assert first == number() == float(first) and number("b") != first
    seen = {first}
    for name, value in {
        "eval_samples": 3,
        "eval_sampling.temperature": 0.5,
        "eval_sampling.top_k": 5,
        "eval_sampling.stop_strings": ("x",),
    }.items():
        c.update_from_flattened_dict({name: value})
        seen.add(number())
    assert len(seen) == 5
    c.data.eval, c.seed = "./another/spelling.jsonl", 1
    assert number() in seen


def test_scores_of_other_evaluations_than_the_last_are_left_out(tmp_path):
    assert [row["step"] for row in evaluations.evaluated(ROWS)] == [2, 4]
    kept = evaluations.comparable(ROWS)
    assert [row["step"] for row in kept] == [0, 2, 3, 4]
    assert "eval/avg@2" not in kept[0] and kept[2] is ROWS[2]
    table = progress.before_and_after(ROWS, tmp_path)
    assert "step 2" in table and "0.100" in table and "0.900" not in table


def test_an_older_run_did_not_say_what_it_asked():
    old = [{"step": 0, "eval/avg@2": 0.9}]
    assert evaluations.evaluated(old + ROWS[1:]) == [*old, ROWS[1], ROWS[3]]
    assert evaluations.comparable(old) == old

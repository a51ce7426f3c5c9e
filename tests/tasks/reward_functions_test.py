"""Reward functions of one's own: as TRL calls them, and what may go wrong."""

import math

import numpy as np
import pytest

from pfjax.tasks import grading, rewards
from pfjax.tasks.problems import Problem
from pfjax.tasks.reward_functions import RewardFunction

_MINE = """
import os, sys, time
import numpy as np

# Three as users of TRL write them.
def reward_len(completions, **kwargs):
    return [-abs(20 - len(completion)) for completion in completions]

def think_format_reward(completions, **kwargs):
    texts = [c[0]["content"] for c in completions]
    return [1.0 if t.startswith("<think>") and "</think>" in t else 0.0 for t in texts]

async def matches(prompts, completions, ground_truth, **kwargs):
    return [None if g is None else float(g in c)
            for c, g in zip(completions, ground_truth)]

def arrays(completions, **kwargs):
    print("noise on standard output")
    return np.arange(len(completions), dtype=np.float32)

def tokens(completion_ids):
    return [len(y) for y in completion_ids]

def later(completions, state, **kwargs):
    return [float(s["step"]) for s in state]

def fragile(completions, **kwargs):
    for text in completions:
        if text == "hang":
            time.sleep(1000)
        if text == "die":
            os._exit(3)
        if text == "raise":
            raise KeyError("no such thing")
    return [1] * len(completions)

def text(completions, **kwargs): return "good"
def words(completions, **kwargs): return ["good"] * len(completions)
def nothing(completions, **kwargs): return None
def nan(completions, **kwargs): return [float("nan")] * len(completions)
def few(completions, **kwargs): return [1.0]
def always(completions, **kwargs): raise RuntimeError("out of\\nluck")
not_callable = 3
"""


@pytest.fixture
def mine(tmp_path):
    """The path of a file of functions."""
    (tmp_path / "mine.py").write_text(_MINE)
    return tmp_path / "mine.py"


def _group(texts, **columns):
    ids = [[7] * len(x) for x in texts]
    group = {"prompts": ["q"] * len(texts), "completions": texts, "completion_ids": ids}
    return group | {k: [v] * len(texts) for k, v in columns.items()}


def _values(spec, *groups, **how):
    with RewardFunction(str(spec), **how) as function:
        return function(list(groups))


def test_functions_as_trl_calls_them(mine):
    group = _group(["a", "b" * 20])
    assert _values(f"{mine}:reward_len", group) == [[-19.0, 0.0]]
    chats = [[{"role": "assistant", "content": x}] for x in ("<think>a</think>b", "b")]
    assert _values(f"{mine}:think_format_reward", _group(chats)) == [[1.0, 0.0]]
    groups = _group(["42", "1"], ground_truth="42"), _group(["x"], ground_truth=None)
    assert _values(f"{mine}:matches", *groups) == [[1.0, 0.0], [0.0]]
    assert _values(f"{mine}:arrays", group) == [[0.0, 1.0]]
    assert _values(f"{mine}:tokens", group) == [[1.0, 20.0]]


def test_what_hangs_dies_or_raises_costs_its_own_reward_alone(mine):
    spec, groups = f"{mine}:fragile", (["a", "hang", "b"], ["die", "x", "raise", "y"])
    with RewardFunction(spec, seconds=0.5, num_workers=2) as function:
        got = function([_group(texts) for texts in groups])
        assert function.failures == 3
    flat = [v for group in got for v in group]
    assert [math.isnan(v) for v in flat] == [
        False,
        True,
        False,
        True,
        False,
        True,
        False,
    ]
    assert np.nansum(flat) == 4


def test_any_program_may_answer_over_a_pipe(tmp_path):
    program = tmp_path / "judge.sh"  # counts a letter
    program.write_text(
        'while read -r line; do z=${line//[^z]/}; echo "[${#z}]"; done\n'
    )
    got = _values(f"pipe:bash {program}", _group(["zz"]), _group(["a"]))
    assert got == [[2.0], [0.0]]
    for command, message in [
        ("none-such-program", "No such file"),
        ("sed -u s/.*/good/", "returned 'good', not a list of numbers"),
        ("true", "failed for every response: ended or took more"),
    ]:
        with pytest.raises(ValueError) as error:
            _values(f"pipe:{command}", _group(["a"]))
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text", "returned 'good', not a list of numbers"),
        ("words", "returned 'good' for a response, not a finite number"),
        ("nothing", "returned None, not a list of numbers"),
        ("nan", "returned nan for a response, not a finite number"),
        ("few", "returned 1 values for 2 responses"),
        (
            "always",
            "failed for every response: RuntimeError at mine.py:42: out of luck",
        ),
        ("missing", "has no function 'missing' (it has: reward_len"),
        ("not_callable", "has no function 'not_callable'"),
    ],
)
def test_what_is_no_reward_is_one_line(mine, name, message):
    with pytest.raises(ValueError) as error:
        _values(f"{mine}:{name}", _group(["a", "b"]))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith(f"--config.reward={mine}:{name}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("acuracy", "no reward 'acuracy'; did you mean accuracy?"),
        ("x * accuracy", "'x' is no weight"),
        ("accuracy, self_certainty", "self_certainty stands alone"),
    ],
)
def test_names_that_there_are_not_are_refused(text, message):
    with pytest.raises(ValueError) as error:
        rewards.check(text)
    assert message in str(error.value)


def test_terms_are_added_and_a_failure_is_no_better_than_the_worst(mine):
    problem = Problem("0", "q", "4", columns={"prompt": "q", "ground_truth": "4"})
    texts = [r"\boxed{4}", "a", "die", r"\boxed{5}"]
    ids = [np.arange(n + 1) for n in range(4)]
    text = f"accuracy, 0.5 * format, -0.1 * length, 2 * {mine}:fragile"
    with rewards.Reward(text) as reward, grading.Grader() as grader:
        got = reward.values([problem], texts, ids, grader)
        assert reward.failures == 1
    want = [1 + 0.5 - 0.1 + 2, -0.2 + 2, -0.3 + 0, 0.5 - 0.4 + 2]
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_columns_and_the_step_reach_a_function(mine):
    problems = [
        Problem("0", "q", None, columns={"ground_truth": "4"}),
        Problem("1", [{"role": "user", "content": "q"}], None, columns={}),
    ]
    with rewards.Reward(f"{mine}:later") as reward, grading.Grader() as grader:
        ids = [np.zeros(1)] * 4
        got = reward.values(problems, ["a"] * 4, ids, grader, step=7)
    np.testing.assert_array_equal(got, [7, 7, 7, 7])


def test_python_that_compiles_is_not_run(tmp_path):
    fence = "```"
    texts = [
        f"{fence}python\nopen({str(tmp_path / 'x')!r}, 'w')\n{fence}",
        f"{fence}python\ndef f(:\n{fence}",
        "x = 1",
        "",
        "(" * 100_000,
    ]
    with rewards.Reward("compiles_python") as reward, grading.Grader() as grader:
        got = reward.values([Problem("0", "q", None)], texts, [np.zeros(1)] * 5, grader)
    np.testing.assert_array_equal(got, [1, 0, 1, 0, 0])
    assert not (tmp_path / "x").exists()

"""Reward functions of one's own: as TRL calls them, and what may go wrong."""

import asyncio
import math
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from pfjax.tasks import grading, rewards
from pfjax.tasks.problems import Problem
from pfjax.tasks.reward_functions import Failed, LocalFunction, RewardFunction, Worker
from tests.conftest import ROOT, has_proc

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

def reads(completions, **kwargs):
    import subprocess  # a program that reads is at its input's end at once, and so is this
    sorted_lines = subprocess.run(["sort"], stdout=subprocess.PIPE).stdout
    return [float(sorted_lines == b"" and not sys.stdin.read())] * len(completions)

def huge(completions, **kwargs): return [1e300, 0]
def long_int(completions, **kwargs): return [0, 10**400]
def text(completions, **kwargs): return "good"
def words(completions, **kwargs): return ["good"] * len(completions)
def nothing(completions, **kwargs): return None
def nan(completions, **kwargs): return [float("nan")] * len(completions)
def infinite(completions, **kwargs): return [0.0, -float("inf")]
def mapping(completions, **kwargs): return {c: 1.0 for c in completions}
def pairs(completions, **kwargs): return [[1.0], [2.0]]
def inapplicable(completions, **kwargs): return [None] * len(completions)
def torch_tensor(completions, **kwargs):
    import torch
    return torch.tensor([0.5, 2.0], dtype=torch.bfloat16, requires_grad=True)
def column(completions, **kwargs): return np.ones((2, 1))
def scalars(completions, **kwargs): return [np.float32(0.5), np.bool_(True)]
def generator(completions, **kwargs): return (len(c) for c in completions)
def hangs(completions, **kwargs): time.sleep(1000)
def exits(completions, **kwargs): sys.exit("enough")
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
    assert _values(f"{mine}:reads", group, group) == [[1.0, 1.0]] * 2


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
        ("infinite", "returned -inf for a response, not a finite number"),
        ("huge", "returned 1e+300 for a response, not a finite number"),
        ("long_int", "returned 10000000"),
        ("mapping", "returned {'a': 1.0, 'b': 1.0}, not a list of numbers"),
        ("pairs", "returned [1.0] for a response, not a finite number"),
        ("column", "returned [1.0] for a response, not a finite number"),
        ("few", "returned 1 values for 2 responses"),
        ("hangs", "failed for every response: ended or took more than 0.2 s"),
        ("exits", "failed for every response: ended or took more than 0.2 s"),
        ("always", "failed for every response: RuntimeError at mine.py:61: out of"),
        ("missing", "has no function 'missing' (it has: reward_len"),
        ("not_callable", "has no function 'not_callable'"),
    ],
)
def test_what_is_no_reward_is_one_line(mine, name, message):
    with pytest.raises(ValueError) as error:
        _values(f"{mine}:{name}", _group(["a", "b"]), seconds=0.1)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith(f"--config.reward={mine}:{name}")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("inapplicable", [0.0, 0.0]),
        ("torch_tensor", [0.5, 2.0]),
        ("scalars", [0.5, 1.0]),
        ("generator", [1.0, 1.0]),
    ],
)
def test_whatever_holds_a_number_for_each_is_a_reward(mine, name, values):
    group = _group(["a", "b"])
    assert _values(f"{mine}:{name}", group, seconds=60.0) == [values]


_LIKE_TRL = r"""
import re

def reward_unique_chars(prompts, completions, **kwargs):
    return [len(set(completion)) for completion in completions]

def format_reward_func(completions, **kwargs):
    pattern = r"^<think>.*?</think>\s*<answer>.*?</answer>$"
    contents = [completion[0]["content"] for completion in completions]
    matches = [re.match(pattern, content, re.DOTALL) for content in contents]
    return [1.0 if match else 0.0 for match in matches]

async def accuracy_reward(completions: list[list[dict[str, str]]], solution: list[str],
                          **kwargs) -> list[float | None]:
    rewards = []
    for completion, gold in zip(completions, solution):
        found = re.search(r"<answer>(.*?)</answer>", completion[0]["content"])
        rewards.append(float(found is not None and found.group(1).strip() == gold))
    return rewards
"""


def test_functions_written_for_trl_are_rewards_as_they_are(tmp_path):
    file = tmp_path / "trl_rewards.py"
    file.write_text(_LIKE_TRL)
    texts = ["<think>a\nb</think> <answer>4</answer>", "<answer> 5 </answer>"]
    chat = [{"role": "user", "content": "2+2"}]
    problems = [
        Problem("0", chat, "4", columns={"prompt": chat, "solution": "4"}),
        Problem("1", chat, "5", columns={"prompt": chat, "solution": "5"}),
    ]
    text = f"{file}:format_reward_func, 10 * {file}:accuracy_reward"
    with rewards.Reward(text) as reward, grading.Grader() as grader:
        ids = [np.zeros(1)] * 4
        got = reward.values(problems, texts * 2, ids, grader)
    np.testing.assert_array_equal(got, [1 + 10, 0, 1, 10])
    assert _of_reward(f"{file}:reward_unique_chars", ["abca", ""]) == [3, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("acuracy", "no reward 'acuracy'; did you mean accuracy?"),
        ("x * accuracy", "'x' is no weight"),
        ("accuracy, self_certainty", "self_certainty stands alone"),
        ("2 * negative_entropy, format", "negative_entropy stands alone"),
        ('regex:"(a"', "'(a' is no regular expression: missing )"),
        ('accuracy, regex:"a', "a double quote is not closed"),
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


def test_coins_are_of_seed_and_step_and_of_nothing_else():
    problems, ids = [Problem("0", "q", None)] * 5, [np.zeros(1)] * 200

    def coins(seed, step, text="a"):
        with rewards.Reward("random", seed=seed) as reward, grading.Grader() as grader:
            return reward.values(problems, [text] * 200, ids, grader, step)

    one = coins(3, 7)
    np.testing.assert_array_equal(one, coins(3, 7, "b"))
    assert set(one) == {0, 1} and abs(one.mean() - 0.5) < 0.1
    for other in (coins(3, 8), coins(4, 7)):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.2


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


def _of_reward(text, completions, **columns):
    """Values of the reward `text` for the responses to one prompt."""
    ids = [np.zeros(1)] * len(completions)
    with rewards.Reward(text) as reward, grading.Grader() as grader:
        got = reward.values(
            [Problem("0", "q", None, columns=columns)], completions, ids, grader
        )
    return got.tolist()


def test_a_pattern_with_commas_and_stars_is_found_or_not():
    text = r'2 * regex:"^a,* *\\boxed\{\d+\}$", -0.5 * regex:z|y'
    rewards.check(text)
    found = ["a,, \\boxed{12}", "\\boxed{12}", "zy", ""]
    assert _of_reward(text, found) == [2.0, 0.0, -0.5, 0.0]


def test_a_pattern_that_backtracks_forever_costs_that_response_its_reward():
    function = RewardFunction('regex:"^(a+)+$"', seconds=0.5)
    with function:
        (got,) = function([_group(["aa", "a" * 50 + "b", "b"])])
    assert got[0] == 1 and math.isnan(got[1]) and got[2] == 0
    assert function.failures == 1


def test_a_function_may_be_async_where_a_notebook_runs_a_loop_already():
    async def ones(completions, **columns):
        await asyncio.sleep(0)
        return [1.0] * len(completions)

    async def cell():
        return LocalFunction("python:ones", ones)([_group(["a", "b"])])

    assert asyncio.run(cell()) == [[1.0, 1.0]]


@pytest.mark.slow
@pytest.mark.parametrize("has_template", [True, False])
def test_a_reward_model_scores_prompt_and_completion(tmp_path, has_template):
    torch = pytest.importorskip("torch")
    import transformers

    tok = transformers.AutoTokenizer.from_pretrained(ROOT / "pfjax/assets/toy")
    if not has_template:
        tok.chat_template = None
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.Qwen2Config(
        vocab_size=len(tok),
        num_labels=1,
        pad_token_id=tok.pad_token_id,
        **sizes,
        **heads,
    )
    torch.manual_seed(0)
    model = transformers.Qwen2ForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    texts = [
        "42",
        "7+5=12;",
        "4",
        "1",
        "2",
        "3",
        "15;9+6=",
        "1",
        "9",
        "8",
    ]  # two batches
    text = f"reward_model:{tmp_path}"
    rewards.check(text)
    with rewards.Reward(text, 60.0) as reward, grading.Grader() as grader:
        assert reward.models() == [tmp_path]
        ids = [np.zeros(1)] * len(texts)
        got = reward.values([Problem("0", "17+25", None)], texts, ids, grader)

    def alone(text):
        chat = [{"role": "user", "content": "17+25"}]
        chat.append({"role": "assistant", "content": text})
        whole = f"17+25{text}"
        if has_template:
            whole = tok.apply_chat_template(chat, tokenize=False)
        ids = tok(whole, add_special_tokens=not has_template, return_tensors="pt")
        return model(ids["input_ids"]).logits.item()

    np.testing.assert_allclose(got, [alone(x) for x in texts], rtol=1e-4, atol=1e-6)
    assert np.ptp(got) > 1e-3


def test_what_is_no_reward_model_is_said_before_anything_starts(tmp_path):
    with pytest.raises(ValueError, match="there is no .*nowhere/config.json"):
        rewards.check("reward_model:nowhere")
    with pytest.raises(ValueError, match="ForSequenceClassification, .* names Qwen2"):
        rewards.check(f"accuracy, reward_model:{ROOT / 'pfjax/assets/toy'}")


@pytest.mark.parametrize(("weight", "worst"), [(2.0, 0.0), (-2.0, -4.0)])
def test_a_failure_is_no_better_than_the_worst_whatever_the_weight(
    tmp_path, weight, worst
):
    code = tmp_path / "mine.py"
    code.write_text(
        "def lengths(completions, **kwargs):\n"
        "    return [1 / (x != 'x') * len(x) for x in completions]\n"
    )
    texts, ids = ["x", "a", "aa"], [np.zeros(1)] * 3
    problem = Problem("0", "q", None, columns={})
    text = f"{weight} * {code}:lengths"
    with rewards.Reward(text) as reward, grading.Grader() as grader:
        got = reward.values([problem], texts, ids, grader)
    np.testing.assert_array_equal(got, [worst, weight, 2 * weight])


# A Ctrl-C, which a terminal sends to all processes of a command, while a function and a
# comparison are under way; the command itself goes on, to save.
_INTERRUPTED = """
import os, signal, sys, threading, time
from pfjax.tasks import grading, reward_functions

heard = []
signal.signal(signal.SIGINT, lambda *unused: heard.append(time.monotonic()))
press = lambda: os.killpg(0, signal.SIGINT)
worker = reward_functions.Worker(sys.argv[1])
worker.start()
threading.Timer(0.3, press).start()
found = worker.call({"prompts": ["q"], "completions": ["y"], "completion_ids": [[1]]}, 60)
with grading.Grader() as grader:
    grader.is_equal("6", "3+3")
    first = grader._worker
    press()
    # As if the comparison had been under way: the process is found dead, or lives.
    time.sleep(0.3)
    is_alive = first.poll() is None
worker.stop()
print(found, len(heard), is_alive)
"""


def test_ctrl_c_does_not_reach_the_processes_of_a_run(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import time\n"
        "def slow(completions, **kwargs):\n"
        "    time.sleep(1)\n"
        "    return [0.5] * len(completions)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED, f"{tmp_path}/mine.py:slow"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("[0.5] 2 True\n", "")


SLOW = """
import json, sys, time
def slow(completions, **kwargs):
    time.sleep(0.5)
    return [0.5] * len(completions)
if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(slow(**json.loads(line))), flush=True)
"""


@pytest.mark.parametrize("is_program", [False, True])
@pytest.mark.parametrize("seconds", [0.0, 0.2])
def test_a_function_that_a_scheduler_ended_is_asked_again(
    tmp_path, is_program, seconds
):
    """Before a call, or during it; Slurm tells all processes of a step to end."""
    path = tmp_path / "mine.py"
    path.write_text(SLOW)
    spec = f"pipe:{sys.executable} {path}" if is_program else f"{path}:slow"
    worker = Worker(spec)
    worker.start()
    process = worker._process
    if seconds:
        threading.Timer(seconds, process.terminate).start()
    else:
        process.terminate()
        process.wait()
    given = {"prompts": ["q"], "completions": ["y"], "completion_ids": [[1]]}
    assert worker.call(given, 60) == [0.5]
    assert process.returncode == -signal.SIGTERM
    worker.stop()


def test_a_file_here_with_the_name_of_a_module_is_not_imported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("token", "random", "sympy", "math_verify", "pfjax"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('a file of mine')")
    with grading.Grader() as grader:
        assert grader.is_equal("6", "3+3")
    worker = Worker("regex:b+")
    given = {"prompts": ["q"], "completions": ["abb"], "completion_ids": [[1]]}
    assert worker.call(given, 60) == [1.0]
    worker.stop()


@has_proc
def test_what_a_function_has_started_ends_with_it(tmp_path):
    """Such as a program that runs the code of a response, and hangs."""
    (tmp_path / "mine.py").write_text(
        "import pathlib, subprocess\n"
        "def runs(completions, **kwargs):\n"
        "    child = subprocess.Popen(['sleep', '1000'])\n"
        f"    pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
        "    child.wait()\n"
    )
    worker = Worker(f"{tmp_path}/mine.py:runs")
    worker.start()
    given = {"prompts": ["q"], "completions": ["y"], "completion_ids": [[1]]}
    with pytest.raises(Failed):
        worker.call(given, 3)
    stat = pathlib.Path("/proc", (tmp_path / "pid").read_text(), "stat")
    until = time.monotonic() + 30
    # In a container nobody may take notice of its end: then it stays, as a zombie.
    while stat.exists() and ") Z " not in stat.read_text():
        assert time.monotonic() < until, "it goes on"
        time.sleep(0.1)

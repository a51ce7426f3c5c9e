"""The examples of one file do what they say, and the notebook runs."""

import ast
import re
import socket

import numpy as np
import pytest

from pfjax.tasks import grading, rewards
from pfjax.tasks.problems import Problem
from tests.conftest import ROOT, run_command

SHORT = ("own_loss", "own_reward", "own_target", "own_verifier", "torch_trainer")


def _printed(name: str, pattern: str) -> list[list[float]]:
    """The numbers that an example prints, match by match."""
    done = run_command(f"examples.{name}")
    assert done.returncode == 0, done.stderr
    return [
        [*map(float, match.groups())] for match in re.finditer(pattern, done.stdout)
    ]


@pytest.mark.parametrize("name", SHORT)
def test_an_example_is_short_and_says_how_to_run_it(name):
    text = (ROOT / "examples" / f"{name}.py").read_text()
    assert len(text.splitlines()) < 80
    assert f"python -m examples.{name}\n" in ast.get_docstring(ast.parse(text))


@pytest.mark.slow
def test_a_loss_of_pfjax_trains_in_torch():
    rows = _printed("torch_trainer", r"loss ([\d.]+)  total variation ([\d.]+)")
    (loss, first), (_, last) = rows[0], rows[-1]
    assert loss > 1 and first > 0.3 and last < 0.02


@pytest.mark.slow
def test_a_loss_of_ones_own_falls_and_the_policy_nears_the_target():
    rows = _printed("own_loss", r"loss (.+)  spread (.+)  correct (.+)")
    loss, spread, correct = zip(*rows, strict=True)
    assert min(loss[-3:]) < loss[0] / 4
    assert min(spread[-3:]) < spread[0] / 2
    assert correct[0] < 0.6 and correct[-1] > 0.85


@pytest.mark.slow
def test_a_reward_of_ones_own_tilts_the_base_as_far_as_it_should():
    rows = _printed("own_reward", r"(?:round .* reward|of the target) ([\d.]+)")
    (want,), (base,), *_ = rows
    last = sum(value for (value,) in rows[-5:]) / 5
    assert want > base + 0.2 and abs(last - want) < 0.06


def test_a_verifier_of_ones_own_passes_what_is_right_alone():
    done = run_command("examples.own_verifier")
    verdicts = dict(line.split() for line in done.stdout.splitlines())
    assert verdicts.pop("right") == "0"
    assert verdicts == dict.fromkeys(("wrong", "endless", "greedy", "quits"), "-1")


_ADD = "\ndef add(a, b): return a + b"
_HOSTILE = {
    "sleeps": "import time\ntime.sleep(60)",
    "prints": "while True: print('x' * 2**20)",
    "writes": f"with open('FILE', 'w') as file: file.write('x'){_ADD}",
    "exits": "raise SystemExit(0)",
    "calls": f"import socket\nsocket.create_connection(('127.0.0.1', PORT)){_ADD}",
    "ends early": f"assert add(1, 2) == 3{_ADD}",
}


@pytest.mark.slow
def test_hostile_programs_fail_a_verifier_and_leave_nothing(tmp_path):
    """As a reward of a run calls it, in a worker."""
    from examples import own_verifier

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        port, file = server.getsockname()[1], tmp_path / "x"
        fill = lambda code: code.replace("PORT", str(port)).replace("FILE", str(file))
        texts = [fill(code) for code in (_ADD, *_HOSTILE.values(), _ADD)]
        columns = {"asserts": ["assert add(1, 2) == 3"]}
        spec = f"{ROOT}/examples/own_verifier.py:passes"
        with rewards.Reward(spec) as reward, grading.Grader() as grader:
            problem = Problem(
                "0", [{"role": "user", "content": "q"}], None, None, columns
            )
            ids = [np.zeros(1)] * len(texts)
            first, *rest, last = reward.values([problem], texts, ids, grader)
            assert reward.failures == 0
        failed = dict(zip(_HOSTILE, rest, strict=True))
        if own_verifier.sandbox():
            with pytest.raises(BlockingIOError):  # nobody has called
                server.accept()
        else:
            failed.pop("calls")
        assert first == last == 0 and set(failed.values()) == {-1.0}
    assert not file.exists() or file.read_text() == ""


@pytest.mark.slow
def test_a_target_of_ones_own_is_trained_and_drawn():
    rows = _printed("own_target", r"(?:base|Monte Carlo|trained): ([\d.]+)")
    (base,), (exact,), (trained,) = rows
    assert exact > base + 0.1 and abs(trained - exact) < 0.08


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    import nbclient
    import nbformat

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    notebook = nbformat.read(ROOT / "examples/quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # stored without
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=500, resources=where).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "0.14 M parameters" in code[0].outputs[-1].data["text/plain"]
    shown = [
        x for cell in code for x in cell.outputs if "image/png" in x.get("data", {})
    ]
    assert len(shown) == 2

"""The benchmarks run: their numbers are looked at on the machines they are for."""

import json

import pytest

from tests.conftest import run_command

ROLLOUT = (
    "--prompts=2 --samples=2 --prompt_lengths=4,8 --max_new_tokens=8 --slots=2 "
    "--repeats=1 --simple --score"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, args, ratio",
    [
        ("rollout_benchmark", ROLLOUT, "ratio"),
        ("train_benchmark", "--limit=2 --repeats=1 --padded", "time_ratio"),
    ],
)
def test_a_benchmark_prints_one_line_of_numbers(name, args, ratio):
    done = run_command(f"tests.benchmarks.{name}", *args.split())
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    out = json.loads(line)
    assert out["tokens_per_s"]["median"] > 0 and out[ratio]["median"] > 0
    assert out["device"] == "cpu"

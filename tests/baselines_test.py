"""The baselines of docs/objectives.md, as a person runs them, for two steps."""

import json

import pytest

from pfjax.infra import dataset_io
from tests.conftest import ROOT, run_command

FROM_FILE = ["--config.behavior.base=0", "--config.behavior.from_file=1"]


@pytest.mark.parametrize(
    ("method", "behavior"),
    [
        ("", ["--config.behavior.base=1", "--config.behavior.base_temperature=0.25"]),
        pytest.param(
            "--method=smc --alpha=4 --log_z=-0.36 --particles=8 --ramp=4",
            FROM_FILE,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "--method=best_of --candidates=4", FROM_FILE, marks=pytest.mark.slow
        ),
    ],
    ids=["simple self-distillation", "power self-distillation", "best of N"],
)
def test_a_baseline_imitates_what_was_drawn(tmp_path, method, behavior):
    prompts, drawn = tmp_path / "prompts.jsonl", tmp_path / "drawn.jsonl"
    toy = (ROOT / "pfjax/assets/toy/train.jsonl").read_text()
    prompts.write_text("".join(toy.splitlines(keepends=True)[:8]))
    if method:
        args = (f"--prompts={prompts}", "--samples=4", "--max_new_tokens=32")
        done = run_command("pfjax.sample", *args, *method.split(), f"--out={drawn}")
        assert done.returncode == 0, done.stderr
        behavior = [*behavior, f"--config.behavior.file={drawn}"]
    args = ("--config=smoke", f"--workdir={tmp_path / 'run'}", "--config.objective=sft")
    few = {
        "data.train": prompts,
        "data.eval": "",
        "num_steps": 2,
        "prompts_per_step": 8,
    }
    few |= {"samples_per_prompt": 4, "microbatch_size": 32}
    args = (*args, *behavior, *(f"--config.{k}={v}" for k, v in few.items()))
    done = run_command("pfjax.train", *args)
    assert done.returncode == 0, done.stderr
    assert "sft, without a target: 8 prompts x 4 samples" in done.stdout
    rows = dataset_io.read_jsonl(tmp_path / "run/metrics.jsonl")[1:]
    # Nats per token.
    assert all(0 < row["tb/loss"] < 1 and row["grad_norm"] > 0 for row in rows)
    assert (
        "tb/slope" not in rows[0]
    )  # of samples of the policy, of which there are none
    if method:
        given = [json.loads(line) for line in drawn.read_text().splitlines()]
        assert rows[0]["num_tokens"] == sum(y["tokens"] for y in given)
        assert rows[1]["tb/loss"] < rows[0]["tb/loss"]  # of the same responses

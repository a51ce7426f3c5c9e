"""All commands against a bucket, as the user of a pod gives them."""

import json

import pytest

from pfjax.infra import storage
from tests.conftest import ROOT
from tests.faults_test import STEPS, finish, rows, start, start_command, wait_for_step


def _do(module, *args):
    """The command in a process of its own; what it printed."""
    process = start_command(module, *args)
    out, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    return out, errors


@pytest.fixture
def given(bucket):
    """Model and prompts in the bucket."""
    toy = ROOT / "pfjax/assets/toy"
    storage.upload(toy, storage.place(f"{bucket}/model"))
    names = {"model": "model", "data.train": "model/train.jsonl"}
    names["data.eval"] = "model/eval.jsonl"
    return [f"--config.{k}={bucket}/{name}" for k, name in names.items()]


@pytest.mark.slow
def test_a_run_in_a_bucket_is_killed_goes_on_and_is_used_there(bucket, given, tmp_path):
    """Nothing but copies of models is on this machine; all is as in a local folder."""
    run, local = f"{bucket}/runs/a", tmp_path / "run"
    process = start(run, *given)
    wait_for_step(run, 3, process)
    assert list(storage.place(run).glob("events.out.tfevents*"))
    process.kill()
    process.communicate()
    process = start(run, *given)
    status, errors = finish(process)
    assert status == 0 and "warning" not in errors.lower(), errors
    status, errors = finish(start(local))
    assert status == 0, errors
    assert [r["step"] for r in rows(run)] == list(range(STEPS + 1))
    assert rows(run) == rows(local)
    last = f"completions/step_{STEPS:06d}.jsonl"
    for name in ("hf/model.safetensors", last):
        assert storage.read_bytes(f"{run}/{name}") == (local / name).read_bytes(), name

    _do("pfjax.export", run, f"--step={STEPS}", f"--out={bucket}/exported")
    exported = storage.read_bytes(f"{bucket}/exported/model.safetensors")
    assert exported == (local / "hf/model.safetensors").read_bytes()
    for model, where in ((f"{bucket}/exported", bucket), (f"{local}/hf", tmp_path)):
        shared = [f"--model={model}", "--samples=2", "--max_new_tokens=32"]
        _, errors = _do(
            "pfjax.sample", *shared, "--prompt=17+25", f"--out={where}/s.jsonl"
        )
        sets = (
            "pfjax/toy/eval.jsonl"
            if where == tmp_path
            else f"{bucket}/model/eval.jsonl"
        )
        args = (f"--benchmark={sets}", "--limit=4", f"--out={where}/scores")
        _do("pfjax.evaluate", *shared, *args)
        _, again = _do("pfjax.evaluate", *shared, *args)
        assert "4 done before" in again
        for said in (errors, again):
            assert "gcsfs" not in said and "Traceback" not in said, said
    for name in ("s.jsonl", "scores/eval.jsonl"):
        text = storage.read_text(f"{bucket}/{name}")
        assert text == (tmp_path / name).read_text(), name
    scores = [
        json.loads(storage.read_text(f"{x}/scores/eval.json"))
        for x in (bucket, tmp_path)
    ]
    assert scores[0]["scores"] == scores[1]["scores"]
    out, _ = _do("pfjax.report", f"{bucket}/runs", f"--out={bucket}/report")
    assert out == f"{bucket}/report/index.html: 1 run(s) in 1 group(s)\n"
    assert "What training changed" in storage.read_text(f"{bucket}/report/index.html")

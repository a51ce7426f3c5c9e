"""What a run writes is what is described."""

import json

import pytest

from configs import smoke
from pfjax.infra import dataset_io, hardware
from pfjax.trainer import loop, metrics
from tests.conftest import use_one_device


@pytest.mark.slow
def test_every_metric_of_a_run_is_described_and_every_one_described_is_written(
    tmp_path, monkeypatch
):
    """Two runs that have, together, all that a metric may ask for."""
    use_one_device(monkeypatch)
    is_known = hardware.CHIPS["v5e"]._replace(kinds=("cpu",))
    monkeypatch.setitem(hardware.CHIPS, "x", is_known)
    target = tmp_path / "target.jsonl"
    sample = {"prompt_id": 0, "prompt_tokens": [2, 10, 3], "completion_tokens": [4, 5]}
    reward = "accuracy, 0 * compiles_python"
    sample |= {"alpha": 4.0, "log_z": -0.36, "beta": 1.0, "reward": reward}
    sample["problem"] = {"question": "1+1", "gold": "2", "columns": {}}
    target.write_text(json.dumps(sample) + "\n")
    c = smoke.get_config()
    with c.unlocked():
        c.update_from_flattened_dict(
            {
                "behavior.base": 0.5,
                "reward": reward,
                "schedules": "alpha:4@1,beta:1@1",
                "data.train": "pfjax/toy/train_answered.jsonl",
                "data.target": str(target),
                "num_steps": 1,
                "prompts_per_step": 8,
                "eval_samples": 2,
            }
        )
    loop.train_and_evaluate(c, str(tmp_path / "run"))
    rows = dataset_io.read_jsonl(tmp_path / "run/metrics.jsonl")
    with c.unlocked():
        c.max_staleness, c.behavior.base = 1, 0.0
        c.schedules, c.data.target = "alpha:0.5@1,beta:1@1", ""
        c.eta_cutoff = 0.003
    loop.train_and_evaluate(c, str(tmp_path / "stale"))
    rows += dataset_io.read_jsonl(tmp_path / "stale/metrics.jsonl")
    written = {metrics.described(key) for row in rows for key in row} - {"step"}
    assert written - metrics.METRICS.keys() == set(), "not described"
    assert metrics.METRICS.keys() - written == set(), "not written"

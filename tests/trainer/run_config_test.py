"""What a run finds in its folder: nothing that is of others is written over."""

import json

import pytest
from etils import epath
from ml_collections import FrozenConfigDict

from pfjax.trainer import run_config, settings

CONFIG = FrozenConfigDict(settings.default_config())


def _check(folder):
    run_config.check_workdir(CONFIG, epath.Path(folder))


def test_the_files_of_a_model_or_of_another_program_are_not_written_over(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ValueError, match="not of a run .perhaps of a model"):
        _check(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl would be written over"):
        _check(tmp_path)


def test_a_run_that_lost_its_checkpoints_starts_over_only_if_it_never_ended(tmp_path):
    about = {"config": json.loads(CONFIG.to_json())}
    (tmp_path / "config.json").write_text(json.dumps(about))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    _check(tmp_path)  # it was killed before its first checkpoint
    (tmp_path / "hf").mkdir()
    with pytest.raises(ValueError, match="no checkpoint to continue from"):
        _check(tmp_path)

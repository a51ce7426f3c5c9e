"""Settings: declared once, checked, and compared with those of an older run."""

import json

import ml_collections
import pytest
from etils import epath
from flax import traverse_util

from configs import default
from pfjax.trainer import settings


def _config(**changes):
    config = default.get_config()
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return ml_collections.FrozenConfigDict(config)


def test_the_config_holds_every_setting_and_its_default_is_allowed():
    config = _config()
    settings.check(config)
    flat = traverse_util.flatten_dict(json.loads(config.to_json()), sep=".")
    assert flat.keys() == settings.SETTINGS.keys()
    for name, setting in settings.SETTINGS.items():
        assert setting.about, name


@pytest.mark.parametrize(
    "name", [k for k, s in settings.SETTINGS.items() if s.is_positive]
)
def test_what_must_be_positive_may_not_be_zero(name):
    with pytest.raises(ValueError, match=rf"--config.{name}=0(.0)?: must be positive"):
        settings.check(_config(**{name: 0}))


@pytest.mark.parametrize("name", [k for k, s in settings.SETTINGS.items() if s.choices])
def test_a_choice_that_is_none_of_those_is_refused(name):
    with pytest.raises(ValueError, match=rf"--config.{name}=fulll: must be one of"):
        settings.check(_config(**{name: "fulll"}))


def _write(folder, config):
    (folder / "checkpoints/1").mkdir(parents=True)
    text = json.dumps({"config": json.loads(config.to_json())})
    (folder / "config.json").write_text(text)
    return epath.Path(folder)


def test_a_setting_that_an_older_run_did_not_know_has_its_default(tmp_path):
    folder = _write(tmp_path, _config())
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["config"]["format_penalty"], saved["config"]["optim"]["mu_dtype"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    settings.check_workdir(_config(), folder)
    with pytest.raises(ValueError, match=r"format_penalty: -0.5 -> 0.0"):
        settings.check_workdir(_config(format_penalty=0.0), folder)


def test_a_run_is_continued_with_other_records_but_no_other_results(tmp_path):
    folder = _write(tmp_path, _config())
    settings.check_workdir(_config(**{"num_steps": 7, "mesh.tensor": 2}), folder)
    with pytest.raises(ValueError, match="holds a run with another config") as error:
        settings.check_workdir(_config(seed=1, eval_every=2), folder)
    assert "seed: 0 -> 1" in str(error.value) and "eval_every" not in str(error.value)


def test_a_setting_that_is_gone_is_a_difference():
    assert settings.differences({"rows": 2}, {}) == ["rows: 2 -> (absent)"]

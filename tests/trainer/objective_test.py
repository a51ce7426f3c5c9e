"""Objectives of a person's own: a record or a loss, by file or from Python."""

import json

import ml_collections
import pytest

import pfjax
from pfjax import objectives
from pfjax.trainer import config_checks, run_config
from pfjax.trainer.objective import of_config
from tests.conftest import use_one_device

_MINE = """
import jax.numpy as jnp
import numpy as np
from pfjax.objectives import Objective, balance
from pfjax.targets import Target

class Short(Target):
    def log_reward(self, log_p_base, length, psi=0.0, reward=0.0):
        return self.alpha * log_p_base - 0.5 * length

def likelihood(y, c):
    return -y.log_pf / 7

shorter = Objective(balance, lambda c: Short(c.alpha, is_length_aware=False), "group")

def scalar(y, c): return y.log_pf.sum()
def whole(y, c): return y.length.astype(int)
def numpy(y, c): return np.exp(y.log_pf)
def branch(y, c):
    if y.log_pf[0] > 0:
        return y.log_pf
def typo(y, c): return y.log_p
def nothing(y, c): return None
three = 3
elsewhere = Objective(balance, log_z="elsewhere")
no_target = Objective(balance, lambda c: 4.0)
"""


@pytest.fixture
def mine(tmp_path):
    """The path of a file of objectives."""
    (tmp_path / "mine.py").write_text(_MINE)
    return tmp_path / "mine.py"


@pytest.fixture
def config(monkeypatch):
    """Two small steps of the toy."""
    use_one_device(monkeypatch)
    sizes = {"num_steps": 2, "prompts_per_step": 4, "samples_per_prompt": 2}
    sizes |= {"max_new_tokens": 8, "microbatch_size": 4, "mesh.data": 1}
    # The gradient of a loss of one's own is on policy.
    sizes |= {"behavior.base": 0.0, "updates_per_rollout": 1}
    return pfjax.recipe("smoke", **sizes, **{"data.eval": ""})


def _check(config):
    config_checks.check(ml_collections.FrozenConfigDict(config))


def _losses(config, folder, **own):
    seen = []
    pfjax.fine_tune(config, folder, lambda step, values: seen.append(values), **own)
    assert len(seen) == 2
    return seen


def test_a_clip_of_zero_is_none(config):
    config.residual_clip = 0.25
    assert of_config(config).residual_clip == 0.25
    config.residual_clip = 0.0
    assert of_config(config).residual_clip is None


@pytest.mark.slow
def test_a_loss_by_its_file_is_what_is_trained(config, mine, tmp_path):
    config.objective = f"{mine}:likelihood"
    config.max_new_tokens, config.optim.schedule = 1, "constant"
    for values in _losses(config, tmp_path / "run"):
        want = -values["policy/logp_per_token"] / 7  # responses are of one token
        assert values["grad_norm"] > 0 and values["tb/loss"] == pytest.approx(want)
    saved = json.loads((tmp_path / "run/config.json").read_text())["config"]
    assert saved["objective"] == f"{mine}:likelihood"
    # Its text is part of the run.
    mine.write_text(_MINE.replace("/ 7", "/ 8"))
    config.num_steps = 3
    with pytest.raises(run_config.OtherRun, match=r"code of .*mine.py: \w+ -> \w+"):
        pfjax.fine_tune(config, tmp_path / "run")


@pytest.mark.slow
def test_an_objective_from_python_has_its_own_target(config, tmp_path):
    class Long(objectives.Target):
        def log_reward(self, log_p_base, length, psi=0.0, reward=0.0):
            return self.alpha * log_p_base + 2.0 * length

    aware = {"has_format": False, "is_length_aware": False}
    of = lambda target: objectives.Objective(
        objectives.balance, lambda c: target(c.alpha, **aware), log_z="group"
    )
    config.objective, config.log_z = "tb_traj", "group"
    config.max_new_tokens = 1  # so that a term of the length is a constant of log Z
    named = _losses(config, tmp_path / "named")[0]
    own = _losses(config, tmp_path / "own", objective=of(Long))[0]
    assert own["tb/loss"] == pytest.approx(named["tb/loss"], rel=1e-4)
    assert own["tb/logz_mean"] - named["tb/logz_mean"] == pytest.approx(2.0, rel=1e-4)
    saved = json.loads((tmp_path / "own/config.json").read_text())["config"]
    assert saved["objective"] == "python:balance"
    config.objective = saved["objective"]
    with pytest.raises(
        ValueError, match="is an object of Python: call pfjax.fine_tune"
    ):
        pfjax.fine_tune(config, tmp_path / "other")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scalar", "loss of 3 trajectories is float32 (), not 3 floats"),
        ("whole", "loss of 3 trajectories is int32 (3,), not 3 floats"),
        ("numpy", "TracerArrayConversionError at mine.py:18: "),
        ("branch", "TracerBoolConversionError at mine.py:20: "),
        ("typo", "AttributeError at mine.py:22: "),
        ("nothing", "loss of 3 trajectories is None, not 3 floats"),
        ("three", "is neither an Objective nor a loss but 3"),
        ("missing", "has no function 'missing' (it has: "),
        ("elsewhere", "log_z='elsewhere' is none of any, group, none"),
        ("no_target", "target gives 4.0, not a Target"),
    ],
)
def test_what_is_no_objective_is_one_line(config, mine, name, message):
    config.objective = f"{mine}:{name}"
    with pytest.raises(ValueError) as error:
        _check(config)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith(f"--config.objective={mine}:{name}: ")


def test_a_file_that_is_broken_or_not_there_is_one_line(config, mine):
    mine.write_text("def f(y, c):\n    return y.log_pf\nx = 1 / 0\n")
    config.objective = f"{mine}:f"
    with pytest.raises(
        ValueError, match=r"f: ZeroDivisionError at mine.py:3: division"
    ):
        _check(config)
    config.objective = "nowhere.py:f"
    with pytest.raises(ValueError, match=r"nowhere.py:f: there is no file nowhere.py"):
        _check(config)


def test_an_objective_of_ones_own_may_take_a_reward_as_it_is(config, mine):
    config.objective, config.reward = f"{mine}:likelihood", "format"
    _check(config)
    config.objective = f"{mine}:shorter"
    config.reward, config.beta = "", 1.0
    with pytest.raises(ValueError, match="set --config.reward too"):
        _check(config)


def test_the_objective_of_the_end_is_that_of_the_last_step(config):
    config.schedules, config.num_steps = "alpha:1@0,4@100", 20
    assert of_config(config).alpha == pytest.approx(1.6)
    config.num_steps = 200
    assert of_config(config).alpha == 4.0

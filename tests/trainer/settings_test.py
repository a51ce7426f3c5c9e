"""Settings: declared once, checked, and compared with those of an older run."""

import dataclasses
import json
import math
import pathlib
import re

import jax
import ml_collections
import pytest
from etils import epath
from flax import traverse_util

from configs import default
from pfjax.model import lora, transformer
from pfjax.sampler import options
from pfjax.trainer import config_checks, recipes, run_config, settings


def _config(**changes):
    config = default.get_config()
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return ml_collections.FrozenConfigDict(config)


def test_the_config_holds_every_setting_and_its_default_is_allowed():
    config = _config()
    config_checks.check(config)
    flat = traverse_util.flatten_dict(json.loads(config.to_json()), sep=".")
    assert flat.keys() == settings.SETTINGS.keys()
    for name, setting in settings.SETTINGS.items():
        assert setting.about, name


def _numbers():
    is_number = lambda x: isinstance(x, int | float) and not isinstance(x, bool)
    # What TokenFilters checks by itself is below.
    filters = {f"eval_sampling.{name}" for name in options.FILTER_NAMES}
    return sorted(
        k
        for k, s in settings.SETTINGS.items()
        if is_number(s.default) and k not in filters
    )


@pytest.mark.parametrize("name", _numbers())
def test_a_number_out_of_its_bounds_is_refused(name):
    setting = settings.SETTINGS[name]
    kind = type(setting.default)
    outside = [] if kind is int else [math.nan, math.inf, -math.inf]
    outside += [] if setting.at_least is None else [kind(setting.at_least - 1)]
    outside += [] if setting.above is None else [kind(setting.above)]
    outside += [] if setting.at_most is None else [kind(setting.at_most + 1)]
    assert outside and setting.bounds(), f"{name} has no bounds"
    for value in outside:
        with pytest.raises(ValueError, match=rf"--config.{name}={value}: must be "):
            config_checks.check(_config(**{name: value}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"eval_sampling.top_p": 2.0},
            "--config.eval_sampling.top_p must be in (0, 1]",
        ),
        (
            {"eval_sampling.top_k": -1},
            "--config.eval_sampling.top_k must not be negative",
        ),
        ({"clip_low": 2.0}, "--config.clip_low=2.0 exceeds --config.clip_high=1.28"),
        ({"profile_steps": ("a", "b")}, "must be the first step to trace"),
        (
            {"temperature": 0.6, "objective": "grpo"},
            "the policy itself, at temperature 1",
        ),
        ({"temperature": 0.6, "objective": "rl_token"}, "such as powerflow"),
        (
            {"behavior.base": 0.5, "objective": "ttrl"},
            "such samples are those of balance",
        ),
        (
            {"schedules": "behavior.base:0.5@1,0@9", "objective": "rl_traj"},
            "such samples are those of balance",
        ),
        ({"behavior.base": 1.5}, "at least 0, at most 1"),
        (
            {"behavior.replay": 0.5, "objective": "grpo"},
            "such samples are those of balance",
        ),
        (
            {"behavior.base": 0.8, "behavior.replay": 0.3},
            "--config.behavior.base=0.8 + behavior.replay=0.3 exceeds 1: they",
        ),
        (
            {"behavior.base": 0.8, "behavior.file": "a.jsonl"},
            "--config.behavior.base=0.8 + behavior.from_file=0.25 exceeds 1: they",
        ),
        (
            {
                "schedules": "behavior.base:0@1,1@9,0@10",
                "behavior.file": "a.jsonl",
            },
            "behavior.base=1 + behavior.from_file=0.25 exceeds 1 at step 9",
        ),
        (
            {"behavior.base": 0.5, "samples_per_prompt": 1},
            "--config.behavior.base=0.5 of --config.samples_per_prompt=1 is no response",
        ),
        (
            {"behavior.file": "a.jsonl", "samples_per_prompt": 2},
            "behavior.from_file=0.25 of --config.samples_per_prompt=2 is no response",
        ),
        (
            {"behavior.replay": 0.1, "samples_per_prompt": 4},
            "behavior.replay=0.1 of --config.samples_per_prompt=4 is no response",
        ),
        ({"format_term": "fromat"}, "--config.format_term=fromat: there is no reward"),
        (
            {"format_term": "self_certainty"},
            "--config.format_term=self_certainty: self",
        ),
        (
            {"format_term": "random"},
            "--config.format_term=random: random does not tell the form",
        ),
        (
            {"reward": "0.1 * negative_entropy", "beta": 1.0},
            "so it makes no target for powerflow; objectives that may follow it: grpo,",
        ),
        ({"reward": "accuracy, random", "beta": 1.0}, "random is not of the response"),
        (
            {"format_term": "format", "objective": "tb_token"},
            "has no effect on tb_token",
        ),
        ({"format_term": "format", "objective": "grpo"}, "has no effect on grpo"),
        ({"format_term": "format", "format_penalty": -1.0}, "set one of them"),
        ({"format_term": "format", "data.target": "a.jsonl"}, "its bounds know no psi"),
        (
            {"behavior.file": "a.jsonl", "objective": "grpo"},
            "samples are those of balance",
        ),
        ({"schedules": "behavior.from_file:0.5@1"}, "has no effect without"),
        ({"objective": "sft"}, "part of the responses: set --config.behavior.base=1"),
        (
            {"objective": "sft", "behavior.base": 0.5, "behavior.replay": 0.5},
            "new or replayed",
        ),
        (
            {"objective": "sft", "behavior.base": 0.5, "behavior.file": "a.jsonl"},
            "learns nothing from samples of the policy itself",
        ),
        (
            {"objective": "sft", "schedules": "behavior.base:1@1,0@9"},
            "part of the responses at step 9",
        ),
        *(
            ({"objective": "sft", "behavior.base": 1.0, **change}, "no effect on sft")
            for change in (
                {"temperature": 0.5},
                {"reward": "accuracy"},
                {"mask_clipped_tokens": True},
                {"reward_kl": 0.1},
                {"loss_aggregation": "token"},
                {"beta": 1.0, "reward": "accuracy"},
                {"format_term": "format"},
                {"schedules": "alpha:1@1,2@9"},
            )
        ),
        ({"eta_cutoff": 0.003}, "eta_cutoff=0.003 has no effect at alpha=4"),
        (
            {"eta_cutoff": 0.003, "alpha": 0.5, "objective": "flowrl", "beta": 15.0},
            "no power of the base to flatten",
        ),
        *(
            ({"eta_cutoff": 0.003, "alpha": 0.5, **change}, "know rare tokens, without")
            for change in (
                {"objective": "subtb"},
                {"mask_clipped_tokens": True},
            )
        ),
        ({"beta": 1.0}, "weighs a reward in the target: set --config.reward too"),
        ({"beta": 1.0, "objective": "grpo"}, "has no effect on grpo"),
        (
            {"objective": "flowrl"},
            "set --config.beta above 0, in nats; its paper has 15",
        ),
        ({"reward": "accuracy"}, "set --config.beta above 0"),
        (
            {"advantage": "none"},
            "has no effect on powerflow, leave it out; objectives that read it: grpo",
        ),
        (
            {"loss_aggregation": "token", "objective": "rl_token"},
            "--config.loss_aggregation=token has no effect on rl_token",
        ),
        ({"reward_kl": 0.1, "objective": "subtb"}, "has no effect on subtb"),
        (
            {"divergence": 0.0, "objective": "subtb"},
            "has no effect on subtb, leave it out; objectives that read it: powerflow",
        ),
        (
            {
                "objective": "intuitor",
                "advantage": "batch",
                "updates_per_rollout": 2,
            },
            "self_certainty is known update by update",
        ),
        (
            {
                "objective": "grpo",
                "reward": "2 * sequence_log_prob",
                "advantage": "batch",
                "updates_per_rollout": 2,
            },
            "sequence_log_prob is known update by update",
        ),
        (
            {"objective": "intuitor", "teacher_decay": 0.9},
            "votes for the reward majority, which intuitor does not follow; ttrl does",
        ),
        (
            {"teacher_decay": 0.9, "reward": "majority", "beta": 1.0},
            "which powerflow does not follow",
        ),
        (
            {"eval_sampling.stop_strings": (12,)},
            "--config.eval_sampling.stop_strings=(12,): must be texts that are not empty",
        ),
        ({"eval_sampling.stop_strings": ("",)}, "must be texts that are not empty"),
        (
            {"reward": "nowhere.py:f", "beta": 1.0},
            "--config.reward=nowhere.py:f: there is no file nowhere.py",
        ),
        (
            {"format_term": "nowhere.py:f"},
            "--config.format_term=nowhere.py:f: there is no file nowhere.py",
        ),
        ({"lora.alpha": 16.0}, "lora.alpha=16.0 without adapters: give their rank"),
        (
            {"behavior.base_temperature": 2.0},
            "behavior.base_temperature=2.0 has no effect without samples of the base: set",
        ),
        (
            {"behavior.from_file": 0.5},
            "behavior.from_file=0.5 has no effect without a file",
        ),
        (
            {"reward_per": "token"},
            "reward_per=token has no effect without a reward: set",
        ),
        ({"profile_steps": (501, 503)}, "none of these is a step of the run"),
        ({"profile_steps": (0, 1)}, "none of these is a step of the run"),
        ({"reward": "acuracy", "beta": 1.0}, "did you mean accuracy?"),
        ({"reward": "format", "beta": 1.0, "objective": "subtb"}, "every prefix"),
        ({"temperature": 0.0}, "--config.eval_sampling.temperature=0"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config_checks.check(_config(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"lora.alpha": 16.0, "lora.init_from": "a"},
        {"behavior.base_temperature": 2.0, "schedules": "behavior.base:0@1,0.5@9"},
        {"behavior.from_file": 0.5, "behavior.file": "a.jsonl"},
        {"reward_per": "token", "objective": "flowrl", "beta": 15.0},
        {"reward_per": "token", "reward": "accuracy", "beta": 1.0},
        {"profile_steps": (500, 900)},
    ],
)
def test_what_something_reads_is_taken(changes):
    config_checks.check(_config(**changes))


@pytest.mark.parametrize("name", recipes.recipe_paths())
def test_every_recipe_is_taken(name):
    config_checks.check(ml_collections.FrozenConfigDict(recipes.recipe(name)))


def test_a_likelihood_takes_any_responses_but_the_policys():
    config_checks.check(_config(objective="sft", **{"behavior.base": 1.0}))
    half = {"behavior.base": 0.5, "behavior.file": "a.jsonl"}
    both = half | {"behavior.from_file": 0.5}
    config_checks.check(_config(objective="sft", **both))
    half["schedules"] = "behavior.base:1@1,0@9,behavior.from_file:0@1,1@9"
    config_checks.check(_config(objective="sft", **half))


@pytest.mark.parametrize("name", [k for k, s in settings.SETTINGS.items() if s.choices])
def test_a_choice_that_is_none_of_those_is_refused(name):
    with pytest.raises(ValueError, match=rf"--config.{name}=fulll: must be one of"):
        config_checks.check(_config(**{name: "fulll"}))


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
    run_config.check_workdir(_config(), folder)
    with pytest.raises(ValueError, match=r"format_penalty: -0.5 -> 0.0"):
        run_config.check_workdir(_config(format_penalty=0.0), folder)


def test_a_run_is_continued_with_other_records_but_no_other_results(tmp_path):
    folder = _write(tmp_path, _config())
    run_config.check_workdir(_config(**{"num_steps": 7, "mesh.tensor": 2}), folder)
    with pytest.raises(ValueError, match="holds a run with another config") as error:
        run_config.check_workdir(_config(seed=1, eval_every=2), folder)
    assert "seed: 0 -> 1" in str(error.value) and "eval_every" not in str(error.value)


def test_where_a_schedule_ends_is_part_of_the_run_unless_it_is_constant(tmp_path):
    decays = {"optim.schedule": "cosine", "num_steps": 4}
    folder = _write(tmp_path, _config(**decays))
    run_config.check_workdir(_config(**decays), folder)
    with pytest.raises(ValueError, match="restore these values") as error:
        run_config.check_workdir(_config(**decays | {"num_steps": 8}), folder)
    shown = "optim.schedule: cosine over num_steps=4 -> cosine over num_steps=8"
    assert shown in str(error.value)
    with pytest.raises(ValueError, match="cosine over num_steps=4 -> constant"):
        run_config.check_workdir(_config(num_steps=4), folder)


def test_a_warm_up_longer_than_a_schedule_is_refused():
    config_checks.check(_config(**{"optim.warmup_steps": 501}))
    with pytest.raises(ValueError, match="warmup_steps=501 exceeds num_steps=500"):
        config_checks.check(
            _config(**{"optim.warmup_steps": 501, "optim.schedule": "linear"})
        )


@pytest.fixture
def adapter(tmp_path, tiny_config) -> str:
    """A folder of adapters of rank 2 and alpha 6 on two projections."""
    targets = lora.projections("v_proj,q_proj")
    sizes = {"lora_rank": 2, "lora_alpha": 6.0, "lora_targets": targets}
    model = dataclasses.replace(tiny_config, **sizes)
    params = lora.init_params(model, jax.random.key(0))
    lora.save_peft(transformer.Policy(model, params), tmp_path / "adapter", "a/b")
    return str(tmp_path / "adapter")


def test_an_adapter_decides_its_rank_alpha_and_targets(adapter):
    start = {"lora.init_from": adapter}
    config = run_config.with_adapter(_config(**start))
    found = (config.lora.rank, config.lora.alpha, config.lora.targets)
    assert found == (2, 6.0, "q_proj,v_proj")
    config_checks.check(config)
    same = {"lora.rank": 2, "lora.alpha": 6.0, "lora.targets": "v_proj,q_proj"}
    assert run_config.with_adapter(_config(**start, **same)) == config
    for name, value in ("rank", 4), ("alpha", 2.0), ("targets", "q_proj"):
        said = rf"--config.lora.{name}={value}, but .*{adapter} has {name} {found[0]}"
        found = (*found[1:], found[0])
        with pytest.raises(ValueError, match=said):
            run_config.with_adapter(_config(**start, **{f"lora.{name}": value}))


def test_an_adapter_of_another_model_is_said(adapter, caplog):
    path = pathlib.Path(adapter) / "adapter_config.json"
    made_for = json.loads(path.read_text())
    for base, model, is_other in (
        ("a/b", "a/b", False),
        ("a/b", "/models/B/", False),
        ("a/b", "a/b@main", False),
        ("", "x/y", False),
        ("a/b", "a/b-Instruct", True),
        ("a/b", "pfjax/toy", True),
    ):
        path.write_text(json.dumps(made_for | {"base_model_name_or_path": base}))
        caplog.clear()
        run_config.with_adapter(_config(**{"lora.init_from": adapter, "model": model}))
        said = f"{adapter} was made for {base}, and is added to --config.model={model}"
        assert (said in caplog.text) == is_other == bool(caplog.text), model


def test_an_adapter_that_is_not_there_is_refused(adapter, tmp_path):
    with pytest.raises(ValueError, match="no/where does not exist"):
        run_config.with_adapter(_config(**{"lora.init_from": f"{tmp_path}/no/where"}))
    # Of a run, say.
    with pytest.raises(ValueError, match=f"no adapter_config.json: give {adapter}$"):
        run_config.with_adapter(_config(**{"lora.init_from": str(tmp_path)}))


def test_targets_are_checked():
    config_checks.check(_config(**{"lora.rank": 2, "lora.targets": "q_proj,o_proj"}))
    with pytest.raises(ValueError, match=r"lora.targets=q_prj: .* mean 'q_proj'"):
        config_checks.check(_config(**{"lora.rank": 2, "lora.targets": "q_prj"}))
    with pytest.raises(ValueError, match="targets=q_proj without adapters"):
        config_checks.check(_config(**{"lora.targets": "q_proj"}))
    with pytest.raises(ValueError, match="dropout=0.1 without adapters"):
        config_checks.check(_config(**{"lora.dropout": 0.1}))
    with pytest.raises(ValueError, match="offload_ref=True: with adapters"):
        config_checks.check(_config(**{"lora.init_from": "a", "offload_ref": True}))


def test_other_values_are_of_a_copy():
    config = _config(**{"mesh.fsdp": 2})
    one = run_config.with_values(config, {"mesh.tensor": 4, "alpha": 3.0})
    two = run_config.with_values(config, {"optim.mu_dtype": "bfloat16"})
    assert (one.mesh.fsdp, one.mesh.tensor, one.alpha) == (2, 4, 3.0)
    assert config == _config(**{"mesh.fsdp": 2})
    assert two == _config(**{"mesh.fsdp": 2, "optim.mu_dtype": "bfloat16"})
    with pytest.raises((KeyError, AttributeError), match="tensr"):
        run_config.with_values(config, {"mesh.tensr": 1})


def test_a_setting_that_is_gone_is_a_difference():
    assert run_config.differences({"rows": 2}, {}) == ["rows: 2 -> (absent)"]


def test_a_config_that_was_cut_short_is_named(tmp_path):
    folder = epath.Path(tmp_path)
    run_config.write_config(_config(), folder)
    path = tmp_path / "config.json"
    path.write_text(path.read_text()[:40])
    (tmp_path / "checkpoints/2").mkdir(parents=True)
    said = rf"^{path} is not JSON[^\n]*$"
    with pytest.raises(ValueError, match=said):
        run_config.read_config(folder)
    with pytest.raises(ValueError, match=said):
        run_config.check_workdir(_config(), folder)


def test_where_a_file_is_does_not_make_another_run():
    old = {
        "model": "models/a",
        "data.train": "./tr.jsonl",
        "behavior.file": "x/given.jsonl",
        "reward": "0.1 * code/mine.py:f, accuracy",
        "objective": "own.py:f",
        "code of own.py": "0123",
    }
    new = {
        "model": "/home/me/models/a/",
        "data.train": "/home/me/tr.jsonl",
        "behavior.file": "../x/given.jsonl",
        "reward": "0.1 * /home/me/code/mine.py:f, accuracy",
        "objective": "/home/me/own.py:f",
        "code of /home/me/own.py": "0123",
    }
    assert run_config.differences(old, new) == []
    assert run_config.differences(new, old) == []
    for name, value in {
        "model": "/home/me/models/b",
        "data.train": "tr2.jsonl",
        "behavior.file": "",
        "reward": "0.2 * code/mine.py:f, accuracy",
        "objective": "own.py:g",
        "code of /home/me/own.py": "4567",
    }.items():
        assert len(run_config.differences(old, new | {name: value})) == 1, name
    # A pattern is no file.
    assert run_config.differences({"reward": 'regex:"a/b"'}, {"reward": 'regex:"c/b"'})


def test_a_config_of_ones_own_may_leave_settings_out():
    given = ml_collections.ConfigDict({"alpha": 2, "lora": {"rank": 8}})
    found = settings.complete(given)
    found.alpha = 0.5  # of type float, as declared
    assert (found.lora.rank, found.lora.alpha, found.seed) == (8, 32.0, 0)
    config_checks.check(ml_collections.FrozenConfigDict(found))


@pytest.mark.parametrize(
    "given, said",
    [
        (
            {"optim": {"lerning_rate": 1.0}},
            "no setting 'optim.lerning_rate'; did you mean",
        ),
        ({"num_steps": 3.0}, "num_steps=3.0: must be of type int"),
        ({"num_steps": None}, "num_steps=None: must be of type int"),
        ({"alpha": True}, "alpha=True: must be of type float"),
        ({"offload_ref": 1}, "offload_ref=1: must be of type bool"),
    ],
)
def test_a_config_with_what_is_no_setting_or_no_value_is_refused(given, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        settings.complete(ml_collections.ConfigDict(given))


def test_recipes_of_ones_own_are_completed_and_checked(tmp_path):
    path = tmp_path / "own.py"
    text = "import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict({})"
    path.write_text(text.format("{'num_steps': 3}"))
    assert recipes.recipe(str(path), alpha=0.5).num_steps == 3
    path.write_text(text.format("{'num_step': 3}"))
    with pytest.raises(ValueError, match=r"own\.py: there is no setting 'num_step'"):
        recipes.recipe(str(path))


def test_a_time_that_no_timer_takes_is_refused():
    with pytest.raises(
        ValueError, match="step_seconds=1e[+]300: must be above 0, at most"
    ):
        config_checks.check(_config(**{"health_checks.step_seconds": 1e300}))

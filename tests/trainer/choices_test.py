"""The policy's samples scored with the experts that the sampler chose."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from pfjax import packing
from pfjax.batch import RolloutBatch
from pfjax.infra import dataset_io, sharding
from pfjax.model import experts, hf, transformer
from pfjax.sampler import engine
from pfjax.trainer import loop, setup, train_fns
from pfjax.trainer.minibatch import prepare_minibatch
from tests.conftest import use_one_device
from tests.model import small_families
from tests.trainer.loop_test import small_config


@pytest.fixture
def config(enumerable_folder, tmp_path):
    """Of a model with experts, whose responses are long and of the policy and the base."""
    small = dataclasses.replace(
        small_families.config_of("qwen3_moe", hf.load(enumerable_folder).config, 0),
        num_layers=6,
        num_experts=8,
        num_experts_per_tok=3,
    )
    params = transformer.init_params(small, jax.random.key(0))
    folder = tmp_path / "experts"
    hf.save(transformer.Policy(small, params), folder)
    for file in enumerable_folder.glob("*token*"):
        shutil.copy(file, folder)
    c = small_config(folder, tmp_path)
    c.replay_experts, c.behavior.base = True, 0.25
    c.max_new_tokens, c.pack_length, c.num_steps = 24, 64, 1
    return c


@pytest.mark.slow
def test_choices_are_those_of_the_tokens_that_responses_are_drawn_from(
    config, monkeypatch
):
    use_one_device(monkeypatch)
    config.mesh.data = 1
    config.prompts_per_step, config.samples_per_prompt = 2, 8
    mesh = sharding.make_mesh(1, 1, 1)
    with jax.set_mesh(mesh):
        trainer, state, _ = setup.setup(ml_collections.FrozenConfigDict(config), mesh)
        policy, prompts = trainer.policy(state), [[2, 3], [3, 2, 2, 3]]
        rollout = engine.rollout(policy, prompts, 8, 24, seed=1)
        rollout = rollout._replace(num_own=6, num_base=2)
        at = [*np.ndindex(rollout.lengths.shape)]
        responses = [rollout.tokens[i][: rollout.lengths[i]] for i in at]
        zeros = np.zeros(len(at), np.float32)
        data = RolloutBatch(prompts, rollout, responses, [""] * len(at), zeros, zeros)
        prepare = lambda rollout: prepare_minibatch(
            trainer.fns, data._replace(rollout=rollout), np.arange(len(at)),
            policy.params, trainer.base(), seed=(0, 1), is_first=True, is_scored=True,
        )  # fmt: skip
        made = prepare(rollout)
        score = lambda choices: trainer.fns.score_policy(
            policy.params, made.batch._replace(choices=choices), made.num_microbatches
        )[0]
        choices = made.batch.choices
        is_known = np.asarray(choices != experts.UNKNOWN)
        of_own = rollout.lengths.reshape(-1)[rollout.is_own].sum()
        assert is_known.all(axis=-1).sum() == is_known.any(axis=-1).sum() == of_own
        # In float32 the scorer chooses the same itself, and others elsewhere.
        np.testing.assert_allclose(made.log_p, score(None), atol=1e-5)
        moved = score(jnp.roll(choices, 1, axis=2))
        of_others = prepare(rollout._replace(choices=rollout.choices * 0))
    # The base, which is the policy here, is asked as it is.
    assert np.abs(of_others.log_p - made.log_p).max() > 1e-2
    np.testing.assert_array_equal(of_others.batch.log_p_base, made.batch.log_p_base)
    gaps = packing.unpack_responses(np.abs(moved - made.log_p), made.placement)
    gaps = np.array([gap.max() for gap in gaps])
    assert (gaps[rollout.is_own] > 1e-3).mean() > 0.8
    assert rollout.choices.shape[-1] == 6 * 3 and rollout.choices.max() < 8


@pytest.mark.slow
def test_sampler_and_update_agree_better_with_the_experts_of_the_sampler(
    config, tmp_path
):
    config.dtype = "bfloat16"
    gaps = {}
    for replays in (False, True):
        config.replay_experts = replays
        folder = tmp_path / str(replays)
        loop.train_and_evaluate(config, str(folder))
        rows = dataset_io.read_jsonl(folder / "metrics.jsonl")
        gaps[replays] = rows[-1]["rollout/logp_gap_mean"]
    assert 0 < gaps[True] < 0.7 * gaps[False]


@pytest.mark.slow
def test_devices_that_share_experts_train_as_those_that_share_matrices(
    config, tmp_path
):
    """With the sampler's choices of experts, and rollouts that have all of them."""
    config.num_steps, config.max_new_tokens = 3, 6
    config.microbatch_size, config.optim.learning_rate = 8, 1e-3
    found = []
    for name, sizes in (("fsdp", (4, 1)), ("expert", (1, 4))):
        config.mesh.data, (config.mesh.fsdp, config.mesh.expert) = 2, sizes
        loop.train_and_evaluate(config, str(tmp_path / name))
        rows = dataset_io.read_jsonl(tmp_path / name / "metrics.jsonl")
        found.append((hf.load(tmp_path / name / "hf").params["blocks"], rows[-1]))
    (want, of_want), (got, of_got) = found
    for name in ("tb/loss", "completions/mean_length", "entropy"):
        assert of_got[name] == pytest.approx(of_want[name], rel=1e-3)
    start = hf.load(config.model).params["blocks"]
    for name in ("w_router", "w_gate", "w_down", "wq"):
        moved = np.sqrt(np.square(want[name] - start[name]).mean())
        apart = np.sqrt(np.square(got[name] - want[name]).mean())
        assert 5e-4 < moved and apart < 0.02 * moved, (name, apart, moved)


def test_models_without_experts_have_none_to_share(enumerable_folder, tmp_path):
    c = small_config(enumerable_folder, tmp_path)
    c.mesh.data, c.mesh.expert = 4, 2
    with pytest.raises(ValueError, match="expert=2: .* qwen2 have no experts; .*fsdp"):
        loop.train_and_evaluate(c, str(tmp_path / "run"))


def test_models_without_experts_have_none_to_replay(enumerable_folder, tmp_path):
    c = small_config(enumerable_folder, tmp_path)
    c.replay_experts = True
    with pytest.raises(ValueError, match="replay_experts: .* qwen2 have no experts"):
        loop.train_and_evaluate(c, str(tmp_path / "run"))


def test_choices_among_more_experts_than_a_byte_can_name_are_refused(tiny_config):
    config = small_families.config_of("qwen3_moe", tiny_config, 0)
    train_fns._check_choices(dataclasses.replace(config, num_experts=255))
    with pytest.raises(ValueError, match="256 experts in a layer, at most 255"):
        train_fns._check_choices(dataclasses.replace(config, num_experts=256))

"""What a run is built of: an averaged teacher, and where it is kept."""

import jax
import numpy as np
import optax
import pytest
from ml_collections import FrozenConfigDict

from pfjax.infra import sharding
from pfjax.model import lora
from pfjax.sampler import engine, unstack
from pfjax.sampler.options import Capacity
from pfjax.tasks import grading
from pfjax.trainer import setup, train_fns
from pfjax.trainer.actor import Cursor
from tests.conftest import count_compiles
from tests.model import small_families
from tests.trainer.loop_test import small_config


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_the_teacher_is_the_average_and_draws_by_the_programs_of_the_policy(
    enumerable_folder, tmp_path, rank
):
    c = small_config(enumerable_folder, tmp_path)
    c.objective, c.teacher_decay, c.lora.rank = "ttrl", 0.9, rank
    c.mesh.data, c.mesh.fsdp = 2, 4
    mesh, prompts = sharding.make_mesh(**c.mesh), [[2, 3]] * 8
    with jax.set_mesh(mesh):
        trainer, state, _ = setup.setup(FrozenConfigDict(c), mesh)
        # Another than the policy: only values differ.
        is_average = lambda path: any(getattr(x, "name", "") == "average" for x in path)
        scaled = jax.tree_util.tree_map_with_path(
            lambda path, x: x * 2 + 0.1 if is_average(path) else x, state.opt_state
        )
        average = optax.tree.get(scaled, "average")["policy"]
        place = jax.tree.map(lambda x: x.sharding, state.params["policy"])
        assert jax.tree.map(lambda x: x.sharding, average) == place
        where = optax.tree.get(trainer.fns.state.opt_state, "average")["policy"]
        assert jax.tree.map(lambda x: x.sharding, where) == place
        policy, ids = trainer.policy(state), list(range(8))
        rollouts, how_drawn = trainer.rollouts, {"step": 3, "prompt_ids": ids}
        own = rollouts.now(policy, trainer.base_policy, prompts, **how_drawn)
        averaged = trainer.averaged(state._replace(opt_state=scaled))
        with count_compiles() as compiled:
            votes = rollouts.votes(averaged, prompts, **how_drawn)
        assert not compiled, dict(compiled)
        teacher = policy._replace(params=lora.join(trainer.frozen, average))
        how = {"max_new_tokens": 3, "seed": 0, "step": 3, "samples": range(16, 32)}
        want = engine.rollout(
            teacher, prompts, 16, prompt_ids=ids, capacity=Capacity(2, 128), **how
        )
        start = rollouts.votes(trainer.averaged(state), prompts, **how_drawn)
    np.testing.assert_array_equal(votes.lengths, want.lengths)
    np.testing.assert_array_equal(votes.log_probs, want.log_probs)
    # At first it is the policy, which has drawn others.
    assert np.abs(start.log_probs - votes.log_probs).max() > 0.1
    assert (start.lengths != own.lengths).mean() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_devices_that_share_matrices_in_rollouts_draw_the_same(
    enumerable_folder, tmp_path, rank, monkeypatch
):
    """Each of them reads half of the weights, and the parameters lie as they did."""
    c = small_config(enumerable_folder, tmp_path)
    c.mesh.data, c.mesh.fsdp, c.lora.rank, c.behavior.base = 2, 4, rank, 0.5
    c.data.eval = c.data.train
    mesh, found, shared = sharding.make_mesh(**c.mesh), {}, []
    whole = unstack.weights

    def weights(*args):
        shared.append(jax.sharding.get_abstract_mesh().shape["tensor"])
        return whole(*args)

    monkeypatch.setattr(unstack, "weights", weights)
    for tensor in (0, 2):
        c.rollout_tensor = tensor
        with jax.set_mesh(mesh), grading.Grader() as grader:
            trainer, state, _ = setup.setup(FrozenConfigDict(c), mesh)
            drawn = trainer.draw(state, Cursor(), 3).rollout
            scores = trainer.evaluate(trainer.policy(state), grader)[0]
            found[tensor] = drawn, scores
            where = jax.tree.map(lambda x: x.sharding.mesh, state.params)
            assert {*jax.tree.leaves(where)} == {mesh}
    # Of the policy, of the base, and of the policy in an evaluation.
    assert shared == [1, 1, 1, 2, 2, 2]
    (want, scores), (got, same_scores) = found.values()
    np.testing.assert_array_equal(
        got.tokens * (got.log_probs < 0), want.tokens * (want.log_probs < 0)
    )
    np.testing.assert_allclose(got.log_probs, want.log_probs, atol=1e-5)
    assert same_scores == pytest.approx(scores)


def test_adapters_of_what_the_model_has_not_are_refused_by_name(
    enumerable_folder, tmp_path, tiny_config
):
    c = small_config(enumerable_folder, tmp_path)
    c.lora.rank, c.lora.targets = 2, "q_proj,in_proj_z"
    model = small_families.config_of("qwen3_moe", tiny_config, window=0)
    policy_model = lambda: train_fns.policy_model(FrozenConfigDict(c), model)
    with pytest.raises(
        ValueError, match="have no in_proj_z; give some of q_proj,k_proj"
    ):
        policy_model()
    c.lora.targets = "q_proj,o_proj"
    assert policy_model().adapted == ("wq", "wo")


def test_adapters_of_experts_are_those_that_peft_loads(
    enumerable_folder, tmp_path, tiny_config
):
    c = small_config(enumerable_folder, tmp_path)
    model = small_families.config_of("qwen3_moe", tiny_config, window=0)
    policy_model = lambda: train_fns.policy_model(FrozenConfigDict(c), model)
    c.lora.rank, c.lora.targets = 2, "gate_proj,up_proj"
    with pytest.raises(ValueError, match="gate_proj,up_proj: of experts .* together"):
        policy_model()
    for c.lora.targets in ("v_proj,gate_proj,up_proj,down_proj", "down_proj"):
        targets = policy_model().adapted
        assert lora.target_names(targets) == c.lora.targets.split(",")
    c.lora.dropout = 0.1
    with pytest.raises(ValueError, match="lora.dropout=0.1: .*experts"):
        policy_model()
    c.lora.targets = "all-linear"
    assert policy_model().adapted == ("wq", "wk", "wv", "wo")

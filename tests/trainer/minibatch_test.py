"""What an update is given: rewards of the policy's own distributions."""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from pfjax import packing
from pfjax.batch import Rollout, RolloutBatch
from pfjax.infra import sharding
from pfjax.model import transformer
from pfjax.trainer import setup, step
from pfjax.trainer.minibatch import prepare_minibatch
from tests.conftest import all_responses, use_one_device
from tests.trainer.loop_test import small_config

PROMPT = [2, 3]
RESPONSES = all_responses(vocab=4, stop=1, max_tokens=3)


def _trainer(folder, tmp_path, reward):
    """With a place for every response in one minibatch."""
    c = small_config(folder, tmp_path)
    c.objective, c.reward = "grpo", reward
    c.advantage, c.loss_aggregation = "none", "constant"
    c.prompts_per_step, c.samples_per_prompt = 1, len(RESPONSES)
    c.mesh.data, c.microbatch_size = 1, 8
    mesh = sharding.make_mesh(1, 1, 1)
    with jax.set_mesh(mesh):
        trainer, state, _ = setup.setup(ml_collections.FrozenConfigDict(c), mesh)
    return trainer, state, mesh


def _every_response():
    num, most = len(RESPONSES), max(map(len, RESPONSES))
    rollout = Rollout(
        tokens=np.zeros((1, num, most), np.int32),
        lengths=np.array([[len(y) for y in RESPONSES]], np.int32),
        log_probs=np.zeros((1, num, most), np.float32),
        finished=np.ones((1, num), bool),
        slot_steps=0,
    )
    zeros = np.zeros(num, np.float32)
    of_each = [np.array(y, np.int32) for y in RESPONSES]
    return RolloutBatch([PROMPT], rollout, of_each, [""] * num, zeros, zeros)


def _exact(policy):
    """Log-prob of every response, and the sum of the entropies along it; `[S]`."""
    rows = np.array([PROMPT + y + [0] * (3 - len(y)) for y in RESPONSES])
    at = np.broadcast_to(np.arange(rows.shape[1]), rows.shape)
    is_in = at < np.array([[2 + len(y)] for y in RESPONSES])
    hidden, _ = transformer.forward_packed(
        policy.config, policy.params, *map(jnp.asarray, (rows, at, is_in.astype(int)))
    )
    log_p = jax.nn.log_softmax(hidden @ policy.params["head"].T)[:, 1:-1]
    of_tokens = jnp.take_along_axis(log_p, rows[:, 2:, None], axis=-1)[..., 0]
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    kept = lambda x: jnp.where(is_in[:, 2:], x, 0.0).sum(axis=1)
    return kept(of_tokens), kept(entropy)


@pytest.mark.slow
@pytest.mark.parametrize("reward", ["sequence_log_prob", "2 * negative_entropy"])
def test_policy_gradients_of_entropy_are_those_of_exact_sums(
    enumerable_folder, tmp_path, monkeypatch, reward
):
    use_one_device(monkeypatch)
    trainer, state, mesh = _trainer(enumerable_folder, tmp_path, reward)
    fns, policy = trainer.fns, trainer.policy(state)
    log_p, entropies = _exact(policy)
    p, num = np.exp(log_p), len(RESPONSES)
    with jax.set_mesh(mesh):
        made = prepare_minibatch(
            fns, _every_response(), np.arange(num), policy.params, trainer.base(),
            seed=(0, 1), is_first=True, is_scored=False,
        )  # fmt: skip
    is_sequence = reward == "sequence_log_prob"
    want = log_p if is_sequence else -2 * entropies
    np.testing.assert_allclose(made.reward, want, rtol=1e-4, atol=1e-5)
    # The mean of either is minus the entropy of whole responses.
    entropy = -np.sum(p * log_p)
    weight = 1 if is_sequence else 2
    np.testing.assert_allclose(np.sum(p * made.reward), -weight * entropy, rtol=1e-4)

    def exact(params):
        log_p, entropies = _exact(policy._replace(params=params))
        reward = log_p if is_sequence else -2 * jax.lax.stop_gradient(entropies)
        return -jnp.sum(jnp.exp(log_p) * reward) / fns.objective.max_new_tokens

    # Each response once, in the place of as many as it is likely.
    shape = made.batch.length.shape
    likely = packing.to_segments((num * p).astype(np.float32), made.placement, shape)
    batch = made.batch._replace(reward=made.batch.reward * likely)
    loss = functools.partial(
        step.loss_fn, model=fns.model, objective=fns.objective, stop_ids=(1,),
        remat="none",
    )  # fmt: skip
    gradient = jax.jit(jax.grad(loss, has_aux=True))
    with jax.set_mesh(mesh):
        sizes = jnp.float32(num), jnp.float32(0)
        got = []
        for i in range(int(made.num_microbatches)):
            part = jax.tree.map(lambda x, i=i: x[i], batch)
            got.append(gradient(state.params, {}, part, *sizes)[0])
    got = jax.tree.map(lambda *x: sum(x), *got)["policy"]
    want = jax.grad(exact)(policy.params)
    same = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(same, got, want)
    assert max(np.abs(x).max() for x in jax.tree.leaves(want)) > 0.01

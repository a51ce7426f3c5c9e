"""Rollouts of every family record what scoring finds."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from pfjax.infra import sharding
from pfjax.model import scoring, transformer
from pfjax.sampler import engine
from pfjax.sampler.options import Capacity
from tests.model import small_families

# Windows, states, experts; decoding by the others is made of the same parts.
SOME = ("gemma3", "qwen3_5", "qwen3_moe")


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        *(
            pytest.param(name, "", marks=() if name in SOME else pytest.mark.slow)
            for name in small_families.NAMES
        ),
        pytest.param("qwen3_moe", small_families.ALL, marks=pytest.mark.slow),
    ],
)
def test_recorded_log_probs_are_those_of_the_scorer(tiny_config, name, targets):
    """Past the window, in slots that are refilled; with adapters of experts too."""
    config = small_families.config_of(name, tiny_config, window=5)
    params = transformer.init_params(config, jax.random.key(0))
    params["blocks"] |= {x: 1.5 * params["blocks"][x] for x in ("wq", "wk", "wv", "wo")}
    policy = transformer.Policy(config, params)
    policy = small_families.adapted(policy, targets) if targets else policy
    prompts = [[2 + (i * j) % 9 for j in range(n)] for i, n in enumerate((1, 4, 23))]
    out = engine.rollout(policy, prompts, 4, 24, seed=1, capacity=Capacity(num_slots=5))
    at = list(np.ndindex(out.lengths.shape))
    responses = [out.tokens[i][: out.lengths[i]].tolist() for i in at]
    assert max(map(len, responses)) > 12
    lengths = [len(prompts[i[0]]) for i in at]
    sequences = [prompts[i[0]] + y for i, y in zip(at, responses, strict=True)]
    for i, want in zip(at, scoring.score(policy, sequences, lengths), strict=True):
        recorded = out.log_probs[i][: out.lengths[i]]
        np.testing.assert_allclose(recorded, want, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 1, 2), (1, 2, 4), (1, 1, 4)])
def test_rollouts_with_experts_on_several_devices_are_the_same(tiny_config, sizes):
    config = small_families.config_of("qwen3_moe", tiny_config, window=0)
    config = dataclasses.replace(config, replays_experts=True)
    params = transformer.init_params(config, jax.random.key(0))
    policy = transformer.Policy(config, params)
    config, params = policy = small_families.adapted(policy, small_families.ALL)
    prompts, run = [[2, 3], [4] * 9], functools.partial(engine.rollout, seed=1)
    want = run(policy, prompts, 4, 12)
    mesh = sharding.make_mesh(*sizes, jax.devices()[: np.prod(sizes)])
    where = sharding.tree_shardings(mesh, transformer.logical_axes(config), params)
    with jax.set_mesh(mesh):
        policy = transformer.Policy(config, jax.device_put(params, where))
        got = run(policy, prompts, 4, 12)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.log_probs, want.log_probs, atol=1e-5)
    for at in np.ndindex(got.lengths.shape):
        drawn = slice(0, got.lengths[at])
        np.testing.assert_array_equal(got.choices[at][drawn], want.choices[at][drawn])

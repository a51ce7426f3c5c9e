"""Rollouts of models whose layers keep a state instead of keys and values."""

import dataclasses

import jax
import numpy as np
import pytest

from pfjax.infra import sharding
from pfjax.model import hf, scoring, transformer
from pfjax.sampler import engine, mcmc, slots, smc
from pfjax.sampler.options import Capacity
from pfjax.targets import Target
from tests.model import small_families
from tests.sampler import windowed

# One of several chunks; one that is not prefilled at all, and takes the place of another.
LENGTHS = (2, 150, 8, 20, 1, 5)
PROMPTS = [[2 + (i + j) % 9 for j in range(n)] for i, n in enumerate(LENGTHS)]


@pytest.fixture
def policy(tiny_config):
    """Whose period stands twice."""
    config = small_families.config_of("qwen3_5", tiny_config, window=5)
    changes = {"layer_types": 2 * config.layer_types, "num_layers": 4}
    changes["max_positions"] = 2048
    # Of the output of a short state its norm leaves a sign, on which rounding would decide.
    changes["norm_eps"] = 1e-3
    config = dataclasses.replace(config, **changes)
    params = transformer.init_params(config, jax.random.key(0))
    return transformer.Policy(config, params)


@pytest.fixture(autouse=True)
def narrow_caches(monkeypatch):
    """Caches of 16, 32 and 64 tokens: they grow beside the states."""
    monkeypatch.setattr(slots, "_NARROWEST", 16)


def _draw(policy, new=50, **capacity):
    capacity = Capacity(**{"num_slots": 3} | capacity)
    return engine.rollout(policy, PROMPTS, 4, new, seed=1, capacity=capacity)


def _assert_recorded_truly(policy, out):
    at = list(np.ndindex(out.lengths.shape))
    sequences = [PROMPTS[i[0]] + out.tokens[i][: out.lengths[i]].tolist() for i in at]
    lengths = [len(PROMPTS[i[0]]) for i in at]
    for i, want in zip(at, scoring.score(policy, sequences, lengths), strict=True):
        recorded = out.log_probs[i][: out.lengths[i]]
        np.testing.assert_allclose(recorded, want, atol=1e-5)


@pytest.mark.slow
def test_recorded_log_probs_are_those_of_the_scorer(policy):
    """In slots that are refilled and taken away, by prompts whose places are reused."""
    out = _draw(policy)
    assert out.lengths.max() > 32
    _assert_recorded_truly(policy, out)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"num_slots": 8}, {"num_slots": 1}, {"num_slots": 20}, {"prompt_width": 300}],
)
def test_slots_and_widths_change_no_draw(policy, changes):
    windowed.assert_same_draws(_draw(policy, **changes), _draw(policy))


@pytest.mark.slow
@pytest.mark.parametrize("axes", [(2, 2, 2), (1, 8, 1)])
def test_a_mesh_changes_no_draw(policy, axes):
    want, mesh = _draw(policy, 20), sharding.make_mesh(*axes)
    axes = transformer.logical_axes(policy.config)
    where = sharding.tree_shardings(mesh, axes, policy.params)
    spread = policy._replace(params=jax.device_put(policy.params, where))
    with jax.set_mesh(mesh):
        got = _draw(spread, 20)
    windowed.assert_same_draws(got, want)


def test_what_a_token_costs_grows_in_layers_that_attend_alone(policy):
    """And the caches with it: a plan for longer responses holds no more states."""
    sizes = {"num_prompts": 4, "samples_per_prompt": 4, "prompt_width": 16}
    plans = [
        slots.make_plan(policy, **sizes, max_new_tokens=n, num_slots=16)
        for n in (64, 1024)
    ]
    short, long = plans
    assert short.state_bytes == long.state_bytes > 0
    attending = len(policy.config.layers_of_type("full_attention"))
    tokens = 16 * (1024 - 64) * attending
    assert long.cache_bytes - short.cache_bytes == tokens * short.token_bytes
    assert 2 * attending == policy.config.num_layers


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear_attention", "full_attention"])
def test_layers_of_one_type_alone(policy, tmp_path, kind):
    """What no layer has is not there: it is neither saved, loaded, adapted nor drawn by."""
    types = {"layer_types": (kind,) * 2, "num_layers": 2}
    sizes = {"lora_rank": 2, "lora_alpha": 2.0} | types
    config = dataclasses.replace(policy.config, **sizes)
    params = transformer.init_params(config, jax.random.key(0))
    hf.save(transformer.Policy(config, params), tmp_path)
    loaded = hf.load(tmp_path)
    assert loaded.config.layer_types == (types["layer_types"] if "lin" in kind else ())
    _assert_recorded_truly(loaded, _draw(loaded, 8))


@pytest.mark.parametrize(
    "method", [mcmc.metropolis_hastings, smc.sequential_monte_carlo]
)
def test_chains_cannot_go_back_to_an_earlier_state(policy, method):
    with pytest.raises(ValueError, match="keep a state, which cannot go back"):
        method(policy, PROMPTS, Target(0.5, has_format=False), 4, 40)

"""Targets with a reward are drawn exactly, by functions of text on the host."""

import numpy as np
import pytest

from pfjax.model import hf, tokenizer
from pfjax.sampler import mcmc, smc
from pfjax.targets import Target
from pfjax.tasks import target_reward
from pfjax.tasks.grading import Grader
from pfjax.tasks.problems import Problem
from pfjax.tasks.rewards import Reward
from tests.conftest import power_target, total_variation
from tests.sampler import enumerable

TARGET = Target(2.0, beta=1.5, has_format=False)
PROBLEMS = [
    Problem("0", "a b", None, columns={"worth": 1.0}),
    Problem("1", "b b a", None, columns={"worth": -1.0}),
]


def _threes(completion_ids, worth, **kwargs):
    return [w * y.count(3) for y, w in zip(completion_ids, worth, strict=True)]


def _reward(tok, function=_threes):
    return target_reward.ResponseReward(
        Reward("python:f", local=function), Grader(), tok, PROBLEMS
    )


@pytest.fixture
def policy(enumerable_folder):
    return hf.load(enumerable_folder)


@pytest.fixture
def tok(enumerable_folder):
    return tokenizer.load(enumerable_folder)


def _exact(policy):
    base = enumerable.base_log_probs(policy)
    threes = np.array([y.count(3) for y in enumerable.RESPONSES])
    exact, log_sum = power_target(base + 1.5 / 2 * threes, 2.0)
    plain, _ = power_target(base, 2.0)
    assert total_variation(exact, plain) > 5 * enumerable.floor(exact)
    return exact, log_sum


@pytest.mark.slow
def test_particles_draw_from_the_target_that_a_function_tilts(policy, tok):
    """Each prompt by its own columns, with more prompts than are drawn at once."""
    exact, log_sum = _exact(policy)
    out, found = smc.sequential_monte_carlo(
        policy,
        enumerable.PROMPTS,
        TARGET,
        enumerable.SAMPLES,
        3,
        particles=4 * enumerable.SAMPLES,
        ramp=2,
        reward=_reward(tok),
    )
    drawn = enumerable.frequencies(out)
    assert total_variation(drawn, exact) < enumerable.floor(exact)
    assert found.log_sum[0] == pytest.approx(log_sum, abs=0.05)
    # The reward of the other prompt is the opposite.
    is_three = (out.tokens == 3) & (np.arange(3) < out.lengths[..., None])
    first, second = is_three.sum(axis=(1, 2)) / enumerable.SAMPLES
    assert first > 3 * second


@pytest.mark.slow
def test_chains_draw_from_the_target_that_a_function_tilts(policy, tok):
    exact, _ = _exact(policy)
    out = mcmc.metropolis_hastings(
        policy,
        enumerable.PROMPTS[:1],
        TARGET,
        enumerable.SAMPLES,
        3,
        blocks=2,
        steps=60,
        reward=_reward(tok),
    )
    assert total_variation(enumerable.frequencies(out), exact) < enumerable.floor(exact)


@pytest.mark.slow
def test_each_response_is_rewarded_once_and_only_when_it_has_ended(policy, tok):
    seen = []

    def function(completion_ids, worth, **kwargs):
        seen.extend((w, *y) for y, w in zip(completion_ids, worth, strict=True))
        return [0.0] * len(worth)

    args = (policy, enumerable.PROMPTS, TARGET, 8, 3)
    smc.sequential_monte_carlo(*args, particles=64, reward=_reward(tok, function))
    assert len(seen) == len(set(seen)) > 10
    assert {w for w, *_ in seen} == {1.0, -1.0}
    assert all(y[-1] == 1 or len(y) == 3 for _, *y in seen)


def test_what_a_function_raises_is_said_at_the_end(policy, tok):
    with pytest.raises(ValueError, match="reward=lenght: there is no reward 'lenght'"):
        target_reward.check("lenght")
    with pytest.raises(ValueError, match="majority is none of a response alone"):
        target_reward.check("length, 2 * majority")
    with (
        pytest.raises(ValueError, match="accuracy: not all prompts have answers"),
        target_reward.started("accuracy", tok, PROBLEMS),
    ):
        pass
    reward = _reward(tok, lambda completions, **kwargs: ["good"] * len(completions))
    smc.sequential_monte_carlo(
        policy, enumerable.PROMPTS, TARGET, 8, 3, particles=8, reward=reward
    )
    assert "reward python:f" in str(reward.error)

"""Best of N, on a model whose responses can be listed."""

import numpy as np
import pytest

from pfjax.model import hf
from pfjax.sampler import engine
from pfjax.sampler.best_of import best_of
from pfjax.targets import Target
from tests.conftest import total_variation
from tests.sampler import enumerable
from tests.sampler.enumerable import LENGTH, PROMPTS, SAMPLES

N = 4


@pytest.fixture
def policy(enumerable_folder):
    return hf.load(enumerable_folder)


@pytest.fixture
def drawn(policy):
    return engine.rollout(policy, PROMPTS[:1], N * SAMPLES, 3)


@pytest.mark.parametrize(("alpha", "log_z"), [(1.0, 0.0), (2.0, -3.0)])
def test_the_best_has_the_distribution_of_the_highest_rank(policy, drawn, alpha, log_z):
    base = enumerable.base_log_probs(policy)
    order = np.argsort(alpha * base - log_z * LENGTH)
    # The highest of N ranks is at most k if all are.
    up_to = np.cumsum(np.exp(base[order])) ** N
    exact = np.empty_like(up_to)
    exact[order] = np.diff(up_to, prepend=0.0)
    floor = enumerable.floor(exact)
    assert total_variation(np.exp(base), exact) > 5 * floor
    kept = best_of(drawn, N, Target(alpha, has_format=False), log_z)
    assert kept.lengths.shape == (1, SAMPLES)
    assert kept.slot_steps == drawn.slot_steps
    assert total_variation(enumerable.frequencies(kept), exact) < floor


@pytest.mark.slow
def test_what_is_kept_is_recorded_as_it_was_drawn(policy):
    drawn = engine.rollout(policy, PROMPTS, 6 * N, 3)
    kept = best_of(drawn, N, Target(1.0, has_format=False))
    assert kept.lengths.shape == (2, 6)
    enumerable.assert_recorded_truly(policy, kept)

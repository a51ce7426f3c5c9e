"""All responses of the model of `enumerable_folder`, and how often each is drawn."""

import numpy as np

from pfjax.model import scoring
from tests.conftest import (
    all_responses,
    length_aware_target,
    log_power,
    power_target,
    total_variation,
)

PROMPTS = [[2, 3], [3, 3, 2]]
RESPONSES = [tuple(y) for y in all_responses(vocab=4, stop=1, max_tokens=3)]
LENGTH = np.array([len(y) for y in RESPONSES])
SAMPLES = 4096


def base_log_probs(policy) -> np.ndarray:
    """log p(y) of all responses to the first prompt."""
    scores = scoring.score(
        policy,
        [[*PROMPTS[0], *y] for y in RESPONSES],
        [len(PROMPTS[0])] * len(RESPONSES),
    )
    return np.array([x.sum() for x in scores])


def exact_target(
    policy, alpha, is_length_aware, eta_cutoff=0.0
) -> tuple[np.ndarray, float]:
    """Probabilities of all responses, and the log Z that goes with them."""
    log_r = log_power(base_log_probs(policy), alpha, eta_cutoff)
    if is_length_aware:
        return length_aware_target(log_r, LENGTH, 1.0)
    return power_target(log_r, 1.0)


def frequencies(rollout) -> np.ndarray:
    """How often each response was drawn to the first prompt."""
    index = {y: i for i, y in enumerate(RESPONSES)}
    both = zip(rollout.tokens[0].tolist(), rollout.lengths[0], strict=True)
    found = [index[tuple(y[:n])] for y, n in both]
    return np.bincount(found, minlength=len(RESPONSES)) / len(found)


def floor(target) -> float:
    """Total variation of as many samples of the target itself: mean and 4 sd."""
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(SAMPLES, target / target.sum(), size=200) / SAMPLES
    distance = [total_variation(x, target) for x in drawn]
    return np.mean(distance) + 4 * np.std(distance)


def assert_recorded_truly(policy, rollout) -> None:
    """Log-probs are the scorer's; what ends with a stop token is finished."""
    at = list(np.ndindex(rollout.lengths.shape))
    drawn = [rollout.tokens[i][: rollout.lengths[i]].tolist() for i in at]
    prompts = [PROMPTS[i[0]] for i in at]
    scores = scoring.score(
        policy,
        [p + y for p, y in zip(prompts, drawn, strict=True)],
        [len(p) for p in prompts],
    )
    for i, y, want in zip(at, drawn, scores, strict=True):
        np.testing.assert_allclose(rollout.log_probs[i][: len(y)], want, atol=1e-5)
        assert rollout.finished[i] == (y[-1] == 1)

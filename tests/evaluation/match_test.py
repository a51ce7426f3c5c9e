"""Estimates of the match, against sums over all responses."""

import numpy as np
import pytest

from pfjax.evaluation import match
from pfjax.targets import Target

P, G = 64, 16
NUM = 200  # responses that there are
ALPHA = 3.0


def _exact(base, target):
    """log density of the target of one prompt, and its log Z, by bisection."""
    log_p, length = base
    scale = length if target.is_length_aware else np.ones_like(length)
    log_r = target.log_density(log_p, length, 0.0)
    low, high = -50.0, 50.0
    for _ in range(200):
        x = (low + high) / 2
        is_low = np.logaddexp.reduce(log_r - x * scale) > 0
        low, high = (x, high) if is_low else (low, x)
    return log_r - x * scale, x


def _world(rng):
    """Log-probs of a base over `NUM` responses, likelier ones shorter or longer by chance."""
    length = rng.integers(2, 20, NUM).astype(float)
    log_p = -0.3 * length + rng.normal(0, 1.5, NUM)
    return log_p - np.logaddexp.reduce(log_p), length


def _policy(kind, log_p, wanted, rng):
    if kind == "base":
        out = log_p
    elif kind == "noisy":
        out = wanted + rng.normal(0, 0.1, NUM)
    elif kind == "far":
        out = wanted + rng.normal(0, 0.6, NUM)
    else:  # sharpened half of the way
        out = (wanted + log_p) / 2
    return out - np.logaddexp.reduce(out)


@pytest.mark.parametrize("is_length_aware", [True, False])
@pytest.mark.parametrize("kind", ["base", "noisy", "far", "half"])
@pytest.mark.parametrize(("seed", "alpha"), [*((s, ALPHA) for s in range(3)), (0, 0.5)])
def test_estimates_are_those_of_all_responses(is_length_aware, kind, seed, alpha):
    rng = np.random.default_rng(seed)
    target = Target(alpha, has_format=False, is_length_aware=is_length_aware)
    drawn, want = [], []
    for _ in range(P):
        log_p, length = _world(rng)
        wanted, log_z = _exact((log_p, length), target)
        log_pi = _policy(kind, log_p, wanted, rng)
        pi, p, p0 = np.exp(log_pi), np.exp(wanted), np.exp(log_p)
        log_hot = min(alpha, 1) * log_p  # as a base at temperature 1/alpha
        log_hot -= np.logaddexp.reduce(log_hot)
        by = (pi, p0, np.exp(log_hot))[: 2 + (alpha < 1)]
        at = np.concatenate([rng.choice(NUM, G, p=x / x.sum()) for x in by])
        hot = (log_hot[at],) if alpha < 1 else ()
        drawn.append((log_pi[at], log_p[at], length[at], *hot))
        x = log_p - p0 @ log_p
        y = log_pi - wanted + alpha * log_p
        gap = log_pi - wanted
        tv = 0.5 * np.abs(pi - p).sum()
        want.append((log_z, tv, pi @ gap, -p @ gap, (p0 * x) @ y, (p0 * x) @ x))
    got = match.measure(match.Samples(*map(np.array, zip(*drawn, strict=True))), target)
    want = np.array(want).T
    names = ("log_z", "total_variation", "kl_policy_target", "kl_target_policy")
    for name, exact in zip(names, want[:4], strict=True):
        # The logarithm of a mean of 2 x 16 weights is low where they differ much.
        bias = 0.1 if kind in ("noisy", "far") else 1 / 3
        assert got[name] == pytest.approx(exact.mean(), rel=bias, abs=0.02)
    assert 0.5 < got["total_variation"] / want[1].mean() < 2
    exponent = want[4].sum() / want[5].sum()
    noise = 4 * got["exponent_se"] + 1e-9
    assert got["exponent"] == pytest.approx(exponent, abs=noise) and noise < 0.8


def test_a_policy_that_is_the_target_has_no_distance_and_no_error():
    rng = np.random.default_rng(0)
    target = Target(ALPHA, has_format=False)
    drawn = []
    for _ in range(4):
        log_p, length = _world(rng)
        wanted, _ = _exact((log_p, length), target)
        at = np.concatenate(
            [rng.choice(NUM, G, p=np.exp(x) / np.exp(x).sum()) for x in (wanted, log_p)]
        )
        drawn.append((wanted[at], log_p[at], length[at]))
    got = match.measure(match.Samples(*map(np.array, zip(*drawn, strict=True))), target)
    assert got["total_variation"] < 1e-9 and abs(got["kl_policy_target"]) < 1e-9
    assert got["exponent"] == pytest.approx(ALPHA, abs=1e-9)


def test_log_z_of_a_few_samples_by_hand():
    # Weights 1/2 and 2 over lengths 1 and 2 sum to 2 x exp(0): e^-x / 2 + 2 e^-2x = 2.
    x = match._root(np.log([[0.5, 2.0]]), np.array([[1.0, 2.0]]), np.zeros(1))
    assert np.exp(-x) / 2 + 2 * np.exp(-2 * x) == pytest.approx(2.0)


def test_of_one_prompt_no_error_is_known(rng):
    log_p, log_p_base = -rng.uniform(1, 9, (2, 3, 8))
    several = match.Samples(log_p, log_p_base, np.full((3, 8), 4))
    one = match.Samples(log_p[:1], log_p_base[:1], np.full((1, 8), 4))
    found, alone = (match.measure(x, Target(2.0)) for x in (several, one))
    errors = {k for k in found if k.endswith("_se")}
    assert "exponent_se" in errors and alone.keys() == found.keys() - errors


def test_a_target_of_ones_own_need_not_know_of_rare_tokens(rng):
    class Own(Target):
        def log_reward(self, log_p_base, length, psi=0.0, reward=0.0):
            return self.alpha * log_p_base

    log_p, log_p_base = -rng.uniform(1, 9, (2, 3, 8))
    samples = match.Samples(log_p, log_p_base, np.full((3, 8), 4))
    want = match.measure(samples, Target(2.0, has_format=False))
    assert match.measure(samples, Own(2.0)) == pytest.approx(want)

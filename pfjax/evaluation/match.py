r"""How far a policy is from its target, estimated from samples of the policy and the base.

Half of the responses to a prompt are drawn by the policy, half by the base, and both score
them all. For alpha below 1 the base draws as many again at temperature 1/alpha: much of such a
target is text that it hardly says at 1. With q the density of that mixture, every sum over
responses is a mean,

.. math:: \sum_y f(y) = E_q[f(y) / q(y)]

(the balance heuristic of multiple importance sampling). The target's own normaliser, log Z
or log Z', is where its sum equals that of the policy, which is 1 but for the same sampling
noise, so that none is left where the two agree. With it,

.. math:: TV = \tfrac12 \sum_y |\pi - p|,\quad
          KL(\pi\,\|\,p) = E_\pi[\log\pi - \log p],\quad
          KL(p\,\|\,\pi) = \sum_y p\,(\log p - \log\pi)

are read off. These are estimates, not bounds. They are blind to a part of the target that
is hardly ever drawn by either. Far from the target, where few samples carry it (`ess`),
they are too small: by up to a third with 16 samples of each.

References:
  Veach and Guibas, 1995 (multiple importance sampling).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pfjax.evaluation.estimators import standard_error
from pfjax.model import scoring
from pfjax.model.transformer import Policy
from pfjax.targets import Target


class Samples(NamedTuple):
    """Responses of policy and base to P prompts, G of each; arrays `[P, 2 G]`, the policy's
    first, or `[P, 3 G]` where the base drew at another temperature too."""

    log_p: np.ndarray  # log pi(y), in nats per response
    log_p_base: np.ndarray  # log p_0(y)
    length: np.ndarray  # tokens, the stop token included
    log_p_hot: np.ndarray | None = None  # of the base at that temperature
    psi: np.ndarray | float = 0.0  # format term, see `Target.log_reward`
    reward: np.ndarray | float = 0.0
    log_p_rare: np.ndarray | None = None  # log p_0 of rare tokens, where some are


def score(
    policy: Policy,
    base: Policy,
    prompts: list[list[int]],
    responses: Sequence[np.ndarray | list[int]],
    base_temperature: float = 1.0,
    eta_cutoff: float = 0.0,
) -> Samples:
    """Scores responses by policy and base; psi and reward are left out.

    Args:
      policy, base: the models whose log-probs are returned.
      prompts: P lists of token ids.
      responses: those to a prompt side by side, as many of each.
      base_temperature: at which the base drew the last third of them, if not 1.
      eta_cutoff: under which tokens are rare, see `targets.rare`; 0: none is.
    """
    shape = (len(prompts), len(responses) // len(prompts))
    repeated = [p for p in prompts for _ in range(shape[1])]
    pairs = zip(repeated, responses, strict=True)
    sequences = [[*p, *map(int, y)] for p, y in pairs]
    starts = [len(p) for p in repeated]

    total = lambda found: np.array([x.sum(dtype=float) for x in found]).reshape(shape)

    def log_p(model: Policy, temperature: float = 1.0) -> np.ndarray:
        return total(scoring.score(model, sequences, starts, temperature))

    length = np.array([len(y) for y in responses]).reshape(shape)
    hot = None if base_temperature == 1 else log_p(base, base_temperature)
    rare = None
    if eta_cutoff:
        rare = total(scoring.rare_log_probs(base, sequences, starts, eta_cutoff))
    return Samples(log_p(policy), log_p(base), length, hot, log_p_rare=rare)


def measure(samples: Samples, target: Target) -> dict[str, float]:
    """Estimates, means over prompts, each with its standard error over prompts, `NAME_se`,
    unless there is one prompt alone.

    Returns:
      `log_z`: where the target sums to 1, nats per token (or per response).
      `total_variation`, `kl_policy_target`, `kl_target_policy` in nats per response.
      `exponent`: slope of log pi, less what else the target holds, on log p_0, weighted by
        the base's mass: alpha at the optimum.
      `exponent_target`: the same weighted by the target's mass.
      `ess`: effective sample size of the target's weights, as a fraction of all samples.
      `length`, `target_length`: mean length of the policy's responses and of the target's.
    """
    tilt = {"psi": np.asarray(samples.psi), "reward": np.asarray(samples.reward)}
    if samples.log_p_rare is not None:  # a target of one's own need not know it
        tilt |= {"log_p_rare": samples.log_p_rare}
    scale = samples.length if target.is_length_aware else np.ones_like(samples.length)
    log_r = target.log_density(samples.log_p_base, samples.length, 0.0, **tilt)
    drawn_by = [samples.log_p, samples.log_p_base]
    if samples.log_p_hot is not None:
        drawn_by.append(samples.log_p_hot)
    log_q = np.logaddexp.reduce(drawn_by) - np.log(len(drawn_by))
    sum_of_policy = np.exp(samples.log_p - log_q).mean(axis=1)
    log_z = _root(log_r - log_q, scale, np.log(sum_of_policy))
    log_target = log_r - log_z[:, None] * scale
    weight = lambda log_density: np.exp(log_density - log_q)
    of_target, of_policy, of_base = map(
        weight, (log_target, samples.log_p, samples.log_p_base)
    )
    num_own = samples.log_p.shape[1] // len(drawn_by)
    gap = samples.log_p - log_target
    # What the slope is of: alpha log p_0 where policy and target agree.
    power = gap + target.alpha * samples.log_p_base
    of_prompt = {
        "log_z": log_z,
        "total_variation": 0.5 * np.abs(of_policy - of_target).mean(axis=1),
        "kl_policy_target": gap[:, :num_own].mean(axis=1),
        "kl_target_policy": -(of_target * gap).mean(axis=1),
        "ess": of_target.mean(axis=1) ** 2 / (of_target**2).mean(axis=1),
        "length": samples.length[:, :num_own].mean(axis=1),
        "target_length": (of_target * samples.length).mean(axis=1),
    }
    out = {}
    for name, values in of_prompt.items():
        out[name], out[f"{name}_se"] = float(values.mean()), standard_error(values)
    for name, mass in {"exponent": of_base, "exponent_target": of_target}.items():
        out[name], out[f"{name}_se"] = slope(power, samples.log_p_base, mass)
    return {name: x for name, x in out.items() if x is not None}


def _root(log_weight: np.ndarray, scale: np.ndarray, log_sum: np.ndarray) -> np.ndarray:
    """The x `[P]` at which the mean of exp(log_weight - x * scale) over the samples of a
    prompt is exp(log_sum)."""
    # All terms are below the sum at the one end, one term is above it at the other.
    at = (log_weight - log_sum[:, None]) / scale
    low, high = at.min(axis=1), at.max(axis=1)
    for _ in range(100):
        x = (low + high) / 2
        exponent = log_weight - x[:, None] * scale
        most = exponent.max(axis=1, keepdims=True)
        log_mean = np.log(np.exp(exponent - most).mean(axis=1)) + most[:, 0]
        is_low = log_mean > log_sum
        low, high = np.where(is_low, x, low), np.where(is_low, high, x)
    return (low + high) / 2


def slope(
    y: np.ndarray, x: np.ndarray, weight: np.ndarray
) -> tuple[float, float | None]:
    """Slope of y on x `[P, n]` within prompts by weighted least squares, 0 where x is
    constant; and its standard error over prompts, None for one."""
    weight = weight / weight.sum(axis=1, keepdims=True)
    x, y = (v - (weight * v).sum(axis=1, keepdims=True) for v in (x, y))
    xx, xy = (weight * x * x).sum(axis=1), (weight * x * y).sum(axis=1)
    total = max(xx.sum(), np.finfo(np.float32).tiny)
    out = xy.sum() / total
    rest = xy - out * xx
    error = float(np.sqrt((rest**2).sum()) / total) if len(x) > 1 else None
    return float(out), error

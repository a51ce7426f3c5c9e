r"""Samples of the target, and the bounds that they and the policy's own put on its sum.

With the target's density :math:`\tilde p` (`Target.log_density`) and samples of both sides,

.. math:: E_\pi[\log\tilde p - \log\pi] \le \log\sum_y\tilde p \le
          E_{\tilde p/Z}[\log\tilde p - \log\pi]

The lower bound (ELBO) is blind to what the policy never says, the upper one (EUBO) is not;
what lies between them is KL(pi || target) + KL(target || pi).
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from pfjax.evaluation import match
from pfjax.model import tokenizer
from pfjax.model.transformer import Policy
from pfjax.sampler import engine
from pfjax.sampler.options import StopConditions
from pfjax.targets import Target
from pfjax.tasks import rewards
from pfjax.tasks.samples import TargetSamples


def bounds(
    policy: Policy,
    base: Policy,
    samples: TargetSamples,
    target: Target,
    tok: Any,
    *,
    format_penalty: float,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    seed: int,
    reward: Callable[[list[int], list[list[int]]], np.ndarray] | None = None,
) -> dict[str, float]:
    """`elbo`, from as many samples of the policy as there are of the target, and `eubo`.

    Where psi is not 0 the target's samples, drawn without it, are weighted by what it
    adds to the log density, within their prompts.

    Args:
      policy, base: what was trained toward `target`, and its frozen base.
      samples: of the target without psi, at their `log_z`.
      format_penalty: psi of a response without a box.
      max_new_tokens, stop_ids, seed: of the policy's samples.
      reward: r(y), where the target has one, by the numbers of prompts and responses.
    """
    num = len(samples.responses) // len(samples.prompts)
    numbers = [q for q in range(len(samples.prompts)) for _ in range(num)]

    def gap(responses: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """log target - log pi, and what psi adds to it, of each sequence; `[P, G]`."""
        asked = (policy, base, samples.prompts, responses)
        found = match.score(*asked, eta_cutoff=target.eta_cutoff)
        texts = [tokenizer.decode(tok, y) for y in responses]
        psi = rewards.format_term(texts, format_penalty).reshape(-1, num)
        r = reward(numbers, responses).reshape(-1, num) if reward else 0.0
        sums = (found.log_p_base, found.length, samples.log_z)
        tilt = {"reward": r, "log_p_rare": found.log_p_rare}
        density = target.log_density(*sums, psi=psi, **tilt)
        plain = target.log_density(*sums, **tilt)
        return density - found.log_p, density - plain

    how = {"seed": seed, "stop": StopConditions(stop_ids)}
    drawn = engine.rollout(policy, samples.prompts, num, max_new_tokens, **how)
    lower, _ = gap([y.tokens.tolist() for y in engine.all_finished(drawn)])
    upper, added = gap(samples.responses)
    weight = np.exp(added - added.max(axis=1, keepdims=True))
    weight /= weight.sum(axis=1, keepdims=True)
    eubo = (weight * upper).sum(axis=1).mean()
    return {"elbo": float(lower.mean()), "eubo": float(eubo)}

r"""Samples of the target, and the bounds that they and the policy's own put on its sum.

With :math:`\tilde p = p_0^\alpha e^{(\alpha\psi - \lambda)|y|}` and samples of both sides,

.. math:: E_\pi[\log\tilde p - \log\pi] \le \log\sum_y\tilde p \le
          E_{\tilde p/Z}[\log\tilde p - \log\pi]

The lower bound (ELBO) is blind to what the policy never says, the upper one (EUBO) is not;
what lies between them is KL(pi || target) + KL(target || pi).
"""

from typing import Any

import numpy as np

from pfjax.model import log_probs, tokenizer
from pfjax.model.transformer import Policy
from pfjax.sampler import engine
from pfjax.sampler.options import StopConditions
from pfjax.tasks import rewards
from pfjax.tasks.data import TargetSamples


def bounds(
    policy: Policy,
    base: Policy,
    target: TargetSamples,
    tok: Any,
    *,
    alpha: float,
    psi_unboxed: float,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    seed: int,
) -> dict[str, float]:
    """`elbo`, from as many samples of the policy as there are of the target, and `eubo`.

    Where psi is not 0 the target's samples, drawn without it, are weighted by
    :math:`e^{\\alpha\\psi|y|}` within their prompts.
    """
    samples = len(target.responses) // len(target.prompts)
    drawn = engine.rollout(
        policy,
        target.prompts,
        samples,
        max_new_tokens,
        seed=seed,
        stop=StopConditions(stop_ids),
    )
    own = [
        y[:n].tolist()
        for y, n in zip(
            drawn.tokens.reshape(len(target.responses), -1),
            drawn.lengths.ravel(),
            strict=True,
        )
    ]

    def gap(responses: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """log target - log pi, and the format term of each sequence; `[P, G]`."""
        prompts = [p for p in target.prompts for _ in range(samples)]
        sequences = [p + y for p, y in zip(prompts, responses, strict=True)]
        starts = [len(p) for p in prompts]
        log_p, log_p_base = (
            np.array(
                [x.sum(dtype=np.float64) for x in log_probs.score(m, sequences, starts)]
            )
            for m in (policy, base)
        )
        length = np.array([len(y) for y in responses])
        texts = [tokenizer.decode(tok, y) for y in responses]
        psi = alpha * rewards.format_term(texts, psi_unboxed) * length
        out = alpha * log_p_base + psi - target.log_z * length - log_p
        return out.reshape(-1, samples), psi.reshape(-1, samples)

    lower, _ = gap(own)
    upper, psi = gap(target.responses)
    weight = np.exp(psi - psi.max(axis=1, keepdims=True))
    weight /= weight.sum(axis=1, keepdims=True)
    return {
        "elbo": float(lower.mean()),
        "eubo": float((weight * upper).sum(axis=1).mean()),
    }

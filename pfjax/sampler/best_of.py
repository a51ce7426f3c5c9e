r"""Best of N: of several samples of a model, the one of the highest density.

No sample of a power distribution: let F(y) be the probability that a sample of the model
ranks no higher than y, and F(y-) that it ranks lower. The best of N is y with probability

.. math:: F(y)^N - F(y-)^N

so that N sharpens without end, as a power does, but shifts mass by rank alone.

References:
  Huang et al., arXiv 2412.01951 (ranks by log p(y)).
"""

import numpy as np

from pfjax.batch import Rollout
from pfjax.targets import Target


def best_of(
    rollout: Rollout, candidates: int, target: Target, log_z: float = 0.0
) -> Rollout:
    """Keeps one of every `candidates` responses to a prompt, the first of the highest log
    density.

    Args:
      rollout: G * N responses to each prompt; `slot_steps` is kept.
      candidates: N.
      target: whose density it is, without a format term. `Target(1.0, has_format=False)`
        at log Z = 0 ranks by the log-prob of whole responses.
      log_z: of the target; of a length-aware one in nats per token.

    >>> drawn = Rollout(
    ...     tokens=np.array([[[5, 1], [1, 0]]]), lengths=np.array([[2, 1]]),
    ...     log_probs=np.array([[[-1.0, -2.0], [-0.5, -9.0]]]),
    ...     finished=np.array([[True, True]]), slot_steps=4)
    >>> best_of(drawn, 2, Target(1.0, has_format=False)).lengths.tolist()
    [[1]]
    >>> best_of(drawn, 2, Target(1.0, has_format=False), log_z=-3.0).lengths.tolist()
    [[2]]
    """
    is_drawn = np.arange(rollout.log_probs.shape[-1]) < rollout.lengths[..., None]
    log_p = np.where(is_drawn, rollout.log_probs, 0.0).sum(axis=-1, dtype=np.float64)
    density = target.log_density(log_p, rollout.lengths, log_z)
    groups = density.reshape(len(density), -1, candidates)
    best = groups.argmax(axis=-1) + candidates * np.arange(groups.shape[1])
    prompt = np.arange(len(best))[:, None]
    arrays = ("tokens", "lengths", "log_probs", "finished")
    return rollout._replace(**{x: getattr(rollout, x)[prompt, best] for x in arrays})

r"""The distribution that training aims at, and how far a policy is from it.

For a prompt `q`, a response `y` of `|y|` tokens and the frozen base `p_0`, a target is

.. math:: \log R(y) = \alpha\,\log p_0(y) + (\alpha\,\psi(y) + \beta\,r(y))\,|y|

normalised in one of two ways:

- *length-aware*: :math:`R(y)\,e^{-\log Z'(q)\,|y|}`. log Z' is in nats per token, and the
  one value that makes the sum 1 is the target's: it says what a token costs.
- *of whole sequences*: :math:`R(y) / Z(q)`, where r counts once per response
  (:math:`\beta\,r(y)`, without the factor `|y|`) and log Z is in nats per response.

This is the only place that writes a target. Losses are squares of `residual`, the match
metrics, the bounds of `evaluation.elbo` and the samplers of the power distribution read
`log_density`: a new target is written here and named in `objectives.OBJECTIVES`.

It needs jax alone, and takes NumPy arrays as well as jax's.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

Array = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Target:
    """One target; hashable: a static argument.

    References:
      PowerFlow, arXiv 2603.18363, Eq. 1, section 3; `beta`: FlowRL, 2509.15207, Eq. 6.
    """

    alpha: Any  # power of the base; above 1 sharpens, below 1 flattens
    beta: float = 0.0  # weight of the reward, in nats
    has_format: bool = True  # whether psi counts
    is_length_aware: bool = True
    log_sum: float = 0.0  # of exp(log R) at the optimal log Z, before it is taken off

    def log_reward(
        self,
        log_p_base: Array,
        length: Array,
        psi: Array | float = 0.0,
        reward: Array | float = 0.0,
    ) -> Array:
        """log R(y), in nats per response.

        Args:
          log_p_base: `[*n]` log p_0(y), summed over tokens.
          length: `[*n]` |y|, the stop token included.
          psi: `[*n]` or scalar format term, in nats per token.
          reward: `[*n]` or scalar r(y).
        """
        tilted = log_p_base + psi * length if self.has_format else log_p_base
        out = self.alpha * tilted
        if self.beta:
            out = out + self.beta * reward * (length if self.is_length_aware else 1)
        return out - self.log_sum if self.log_sum else out

    def log_density(
        self, log_p_base: Array, length: Array, log_z: Array | float, **tilt: Any
    ) -> Array:
        """Log density at `log_z`: it sums to 1 over all responses at the optimal log Z.

        Args:
          log_p_base, length: as in `log_reward`.
          log_z: `[*n]` or scalar, in nats per token or per response.
          **tilt: `psi` and `reward`, as in `log_reward`.
        """
        log_reward = self.log_reward(log_p_base, length, **tilt)
        return log_reward - log_z * (length if self.is_length_aware else 1)

    def residual(
        self, log_pf: Array, log_p_base: Array, length: Array, log_z: Any, **tilt: Any
    ) -> Array:
        """Residual of the balance condition: 0 for every response at the optimum.

        It is in nats per token for a length-aware target, per response otherwise, and
        linear in log Z with slope 1. So minus the mean residual at log Z = 0 is the
        group estimate of log Z, and where the head starts.

        Args:
          log_pf: `[*n]` log pi(y), summed over the same tokens as `log_p_base`.
          log_p_base, length, log_z, **tilt: as in `log_density`.
        """
        log_reward = self.log_reward(log_p_base, length, **tilt)
        length = length if self.is_length_aware else None
        return residual(log_pf, log_reward, log_z, length)


def residual(
    log_pf: Array, log_reward: Array, log_z: Array | float, length: Array | None = None
) -> Array:
    """log Z + log pi - log R; with `length`, the last two are divided by it.

    Entries of `length` that are 0 (padding) are divided by 1, so that they stay finite.
    """
    if length is None:
        return log_z + log_pf - log_reward
    return log_z + (log_pf - log_reward) / tokens(length)


def tokens(length: Array) -> Array:
    """Replaces 0 by 1 in `length`, for means over tokens."""
    return length + (length == 0)

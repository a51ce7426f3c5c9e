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
`log_density`: a new target needs a change here and nowhere else.

It needs jax alone, and takes NumPy arrays as well as jax's.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

Array = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Target:
    """One target. Hashable, so that it can be a static argument.

    References:
      PowerFlow, arXiv 2603.18363, Eq. 1 and section 3; with `beta`, FlowRL, arXiv
      2509.15207, Eq. 6.
    """

    alpha: Any  # power of the base; above 1 sharpens, below 1 flattens
    beta: float = 0.0  # weight of the reward, in nats
    has_format: bool = True  # whether psi counts
    is_length_aware: bool = True
    # Taken off log R: what its powers and tilts sum to at the right log Z is e^log_sum.
    log_sum: float = 0.0

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
        """log R(y) less what log Z takes from it: a log density, as it sums to 1 over all
        responses at the right log Z.

        Args:
          log_p_base, length: as in `log_reward`.
          log_z: `[*n]` or scalar, in nats per token or per response.
          **tilt: `psi` and `reward`, as in `log_reward`.
        """
        log_reward = self.log_reward(log_p_base, length, **tilt)
        return log_reward - log_z * (length if self.is_length_aware else 1)

    def residual(
        self,
        log_pf: Array,
        log_p_base: Array,
        length: Array,
        log_z: Array | float,
        **tilt: Any,
    ) -> Array:
        """What balance squares: 0 for every response when policy and target agree.

        It is in nats per token for a length-aware target, per response otherwise, and
        linear in log Z with slope 1. So the mean residual that log Z = 0 leaves is minus
        the log Z that takes it away: this starts the head, and is the group estimate.

        Args:
          log_pf: `[*n]` log pi(y), summed over the same tokens as `log_p_base`.
          (the others): as in `log_density`.
        """
        log_reward = self.log_reward(log_p_base, length, **tilt)
        return residual(
            log_pf, log_reward, log_z, length if self.is_length_aware else None
        )


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
    """`length`, with 1 for 0: what means over tokens are divided by."""
    return length + (length == 0)

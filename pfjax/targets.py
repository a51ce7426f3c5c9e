r"""The distribution that training aims at, and how far a policy is from it.

For a prompt `q`, a response `y` of `|y|` tokens and the frozen base `p_0`, a target is

.. math:: \log R(y) = \alpha\,(\log p_0(y) + \psi(y)\,|y|) + \beta\,r(y)\,|y|^{k}

with a format term psi per token and a reward r, counted once per response (k = 0) or per
token (k = 1). It is normalised in one of two ways:

- *length-aware*: :math:`R(y)\,e^{-\log Z'(q)\,|y|}`. log Z' is in nats per token, and the
  one value that makes the sum 1 is the target's: it says what a token costs.
- *of whole sequences*: :math:`R(y) / Z(q)`, with log Z in nats per response and k = 0.

What beta does to a length-aware target depends on k:

- k = 0, :math:`p_0^\alpha e^{\beta r - \lambda |y|}`: of two responses of one length the
  odds change by e^{beta (r_1 - r_2)}, as in whole sequences and as in RL with a KL to the
  base of weight 1 / beta. In the residual, which is per token, it enters as beta r / |y|. A
  constant added to r is not absorbed by Z, there being none, but by lambda: it lengthens
  (if negative) or shortens responses. So let a reward be 0 for what should stay as it is:
  a verifier is 0 for what passes and -1 for what fails, and beta says how many nats a
  failure costs. As beta grows nothing that fails is left: :math:`p_0^\alpha` given the
  verifier, and with alpha = 1 the base given the verifier (DMVR, arXiv 2512.05962).
- k = 1, :math:`p_0^\alpha e^{(\beta r - \lambda) |y|}`: beta r in the residual, as FlowRL has
  it. The odds grow with length: beta = 1 and 100 tokens are 100 nats. lambda absorbs a
  constant, so that group-normalised rewards may be used.

Below alpha = 1 some tokens may be left out of the flattening. Of a vocabulary most words are
hardly ever right, but they are many: raised to a power below 1, together they outweigh the
few that are. With a set of *rare* tokens (`rare`) these keep the power 1,

.. math:: p_0^\alpha \;\to\; \prod_{t\ \text{common}} p_0(y_t)^\alpha
   \prod_{t\ \text{rare}} p_0(y_t)

so that what is likely is flattened, and what is not stays as unlikely as in the base.

This is the only place that writes a target. Losses are squares of `residual`, the match
metrics, the bounds of `evaluation.elbo` and the samplers of the power distribution read
`log_density`: a new target is written here and named in `objectives.OBJECTIVES`.

It needs jax alone, and takes NumPy arrays as well as jax's.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Target:
    """One target; hashable: a static argument.

    References:
      PowerFlow, arXiv 2603.18363, Eq. 1, section 3; `beta`: FlowRL, 2509.15207, Eq. 6.
    """

    alpha: Any  # power of the base; above 1 sharpens, below 1 flattens
    beta: Any = 0.0  # weight of the reward, in nats
    has_format: bool = True  # whether psi counts
    is_length_aware: bool = True
    is_reward_per_token: bool = False  # k = 1; of length-aware targets only
    log_sum: float = 0.0  # of exp(log R) at the optimal log Z, before it is taken off
    eta_cutoff: float = 0.0  # below alpha 1, under which tokens are rare; 0: none is

    @property
    def has_reward(self) -> bool:
        """Whether the reward counts; of a beta that is traced, it may."""
        return not isinstance(self.beta, int | float) or self.beta != 0

    def log_reward(
        self,
        log_p_base: Array,
        length: Array,
        psi: Array | float = 0.0,
        reward: Array | float = 0.0,
        log_p_rare: Array | None = None,
    ) -> Array:
        """log R(y), in nats per response.

        Args:
          log_p_base: `[*n]` log p_0(y), summed over tokens.
          length: `[*n]` |y|, the stop token included.
          psi: `[*n]` or scalar format term, in nats per token.
          reward: `[*n]` or scalar r(y), per response or per token.
          log_p_rare: `[*n]` log p_0 of the rare tokens, summed; None: no token is rare.

        Raises:
          ValueError: if two shapes differ (scalars excepted).
        """
        check_shapes(
            log_p_base=log_p_base,
            length=length,
            psi=psi,
            reward=reward,
            log_p_rare=0.0 if log_p_rare is None else log_p_rare,
            alpha=self.alpha,
            beta=self.beta,
        )
        log_p_base, length, psi = map(_array, (log_p_base, length, psi))
        tilted = log_p_base + psi * length if self.has_format else log_p_base
        out = self.alpha * tilted
        if log_p_rare is not None:
            # 0 above alpha 1.
            lacking = (1 - self.alpha + abs(1 - self.alpha)) / 2
            out = out + lacking * _array(log_p_rare)
        if self.has_reward:
            is_per_token = self.is_length_aware and self.is_reward_per_token
            # A float first: whole numbers of 8 bits would wrap around.
            tilt = 1.0 * self.beta * _array(reward)
            out = out + (tilt * length if is_per_token else tilt)
        return out - self.log_sum if self.log_sum else out

    def log_density(
        self, log_p_base: Array, length: Array, log_z: Array | float, **tilt: Any
    ) -> Array:
        """Log density at `log_z`: it sums to 1 over all responses at the optimal log Z.

        Args:
          log_p_base, length: as in `log_reward`.
          log_z: `[*n]` or scalar, in nats per token or per response.
          **tilt: `psi`, `reward` and `log_p_rare`, as in `log_reward`.
        """
        log_reward = self.log_reward(log_p_base, length, **tilt)
        check_shapes(log_p_base=log_p_base, log_z=log_z)
        log_z = _array(log_z)
        return log_reward - log_z * (_array(length) if self.is_length_aware else 1)

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

    Where `length` is below 1 (padding), they are divided by 1, so that they stay finite.

    Raises:
      ValueError: if two shapes differ (scalars excepted).
    """
    of_token = {} if length is None else {"length": length}
    check_shapes(log_pf=log_pf, log_reward=log_reward, log_z=log_z, **of_token)
    log_pf, log_reward, log_z = map(_array, (log_pf, log_reward, log_z))
    if length is None:
        return log_z + log_pf - log_reward
    return log_z + (log_pf - log_reward) / tokens(length)


def rare(log_p: jax.Array, entropy: jax.Array, eta_cutoff: float) -> jax.Array:
    r"""log p of the tokens that eta sampling would never draw; 0 for the others: those of

    .. math:: p < \min(\eta, \sqrt\eta\,e^{-H})

    with H the entropy of the distribution that the token is drawn from.

    Args:
      log_p: `[*n]` of tokens, in nats.
      entropy: `[*n]` of the distributions that they are drawn from.
      eta_cutoff: between 0 and 1.

    References:
      Hewitt et al., arXiv 2210.15191, Eq. 7; `eta_cutoff` of transformers.
    """
    log_eta = np.log(eta_cutoff)
    is_rare = log_p < jnp.minimum(log_eta, log_eta / 2 - entropy)
    return jnp.where(is_rare, log_p, 0.0)


def tokens(length: Array) -> Array:
    """`length`, and 1 where it is less (padding), for means over tokens."""
    maximum = jnp.maximum if isinstance(length, jax.Array) else np.maximum
    return maximum(_array(length), 1)


def check_shapes(**given: Any) -> None:
    """Raises ValueError if two arrays differ in shape: [n] and [n, 1] would broadcast."""
    shapes = {name: np.shape(x) for name, x in given.items() if np.ndim(x)}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"shapes must agree (or be scalar), got {shapes}")


def _array(x: Any) -> Any:
    """Of a list, which Python would repeat or add to another."""
    return np.asarray(x) if isinstance(x, list | tuple) else x

r"""The objective of a step, by name: what `--config.objective=` chooses.

An objective maps what is known of each trajectory to a loss and a residual, both
`[*n]` and unreduced. Three kinds of them:

- *Balance*: `powerflow`, `tb_traj`, `tb_token`, `flowrl` square a residual that is
  linear in log Z, so that its mean with log Z = 0 calibrates the head, and its mean over
  a prompt's samples is the group estimate. `subtb` needs no log Z.
- *Policy gradient toward the power distribution*: `rl_traj`, `rl_token`; the same
  residuals as a reward, the group estimate of log Z being the baseline.
- *Policy gradient of a reward of the answer*: `grpo` (is it right?), `ttrl` (is it the
  majority's?), `empo` (how many gave it?), `intuitor` (how sure were the tokens?).
  Their residual is that of PowerFlow, for comparison only.

Only `grpo` and `flowrl` read answers of the training prompts.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from pfjax import losses
from pfjax.batch import Array


class Trajectories(NamedTuple):
    """Trajectories as an objective sees them; sums are over tokens, those of the
    response that are kept (see `step.loss_fn`). Gradients flow where said."""

    log_pf: Array  # [*n] sum of log pi; gradient
    log_p_base: Array  # [*n] sum of log p_0
    log_z: Array  # [*n]; gradient
    length: Array  # [*n] tokens of the sums, stop token included
    psi: Array  # [*n] format term, nats a token
    weight: Array  # [*n] importance weight of the sequence
    advantage: Array  # [*n] group-normalised reward
    log_ratio: Array  # [*n] sum of log(pi / pi_old); gradient
    capped: Array  # [*n] sum of min(pi / pi_old, high); gradient
    floored: Array  # [*n] sum of max(pi / pi_old, low); gradient
    kl: Array  # [*n] sum of p_0/pi - log(p_0/pi) - 1; gradient
    prefix_variance: Array  # [*n] of the residuals of prefixes; gradient


@dataclasses.dataclass(frozen=True)
class Coefficients:
    alpha: float
    beta: float = 15.0  # of the advantage in `flowrl`
    kl: float = 0.0  # of KL(pi || p_0) a token, in the objectives of a reward
    low: float = 0.8  # of ratios
    high: float = 1.28


_Loss = Callable[
    [Trajectories, Coefficients], tuple[Float[Array, "*n"], Float[Array, "*n"]]
]


class Objective(NamedTuple):
    loss: _Loss
    log_z: str = "any"  # "any": as the config says; else "group" or "none"
    reward: str = ""  # a name in `rewards.OF_ANSWERS`, or "self_certainty"
    has_prefixes: bool = False  # reads `prefix_variance`


def powerflow(y: Trajectories, c: Coefficients) -> tuple[Array, Array]:
    r"""Length-aware balance with the format term.

    .. math:: w\,(\log Z' + \tfrac1{|y|}\log\pi - \alpha[\tfrac1{|y|}\log p_0 + \psi])^2

    With alpha = 1 only the format is trained.

    References:
      PowerFlow, arXiv 2603.18363, Eq. 10.
    """
    loss = losses.powerflow(
        y.log_pf,
        y.log_p_base,
        y.log_z,
        y.length,
        alpha=c.alpha,
        psi=y.psi,
        weight=y.weight,
    )
    return loss, _per_token_residual(y, c, y.psi)


def tb_traj(y: Trajectories, c: Coefficients) -> tuple[Array, Array]:
    r"""Trajectory balance on whole sequences; collapses onto short responses.

    .. math:: w\,(\log Z + \log\pi - \alpha\log p_0)^2

    References:
      PowerFlow, Eq. 5 and its ablation "TB-traj".
    """
    residual = y.log_z + y.log_pf - c.alpha * y.log_p_base
    loss = losses.trajectory_balance(y.log_pf, c.alpha * y.log_p_base, y.log_z)
    return y.weight * loss, residual


def tb_token(y: Trajectories, c: Coefficients) -> tuple[Array, Array]:
    r"""PowerFlow without its format term.

    .. math:: w\,(\log Z' + \tfrac1{|y|}(\log\pi - \alpha\log p_0))^2

    References:
      PowerFlow's ablation "TB-token", whose formula is not given; this is our reading.
    """
    loss = losses.length_aware_trajectory_balance(
        y.log_pf, c.alpha * y.log_p_base, y.log_z, y.length
    )
    return y.weight * loss, _per_token_residual(y, c, 0.0)


def rl_traj(y: Trajectories, c: Coefficients) -> tuple[Array, Array]:
    r"""Policy gradient of -KL(pi || p_0^alpha / Z): the sequence's log p_0 as reward,
    with KL to p_0 of weight 1/(alpha - 1).

    .. math:: w\,\mathrm{sg}[\log\hat Z + \log\pi - \alpha\log p_0]\,\log\pi

    Half the gradient of `tb_traj` with the group estimate of log Z.

    References:
      PowerFlow's ablation "RL-traj"; the formula is our reading.
    """
    residual = lax.stop_gradient(y.log_z + y.log_pf - c.alpha * y.log_p_base)
    return y.weight * residual * y.log_pf, residual


def rl_token(y: Trajectories, c: Coefficients) -> tuple[Array, Array]:
    r"""Policy gradient with means over tokens: reward (1/|y|) log p_0, and the mean
    over tokens of log pi/p_0 as its penalty, of weight 1/(alpha - 1).

    .. math:: w\,\mathrm{sg}[\log\hat Z' + \tfrac1{|y|}(\log\pi - \alpha\log p_0 + 1)]
              \,\log\pi

    The 1 is the gradient of the penalty itself, which vanishes for sums over tokens but
    not for means. The optimum is p_0^alpha e^{-mu |y|}, with mu such that
    sum p_0^alpha e^{-mu |y|} = e, where PowerFlow has 1.

    References:
      PowerFlow's ablation "RL-token"; the formula is our reading.
    """
    residual = _per_token_residual(y, c, 0.0) + 1 / _tokens(y)
    residual = lax.stop_gradient(residual)
    return y.weight * residual * y.log_pf, residual


def subtb(y: Trajectories, c: Coefficients) -> tuple[Array, Array]:
    r"""Sub-trajectory balance where every prefix may stop: with u_t the residual
    log pi - alpha log p_0 of the first t tokens followed by a stop,

    .. math:: w\,\mathrm{mean}_{i<j}\,(u_i - u_j)^2 = 2 w\,\mathrm{Var}_t\,u_t

    Sums of flow differences over a stretch telescope to u_i - u_j, so that all pairs cost
    no more than a variance, and no log Z is left. The optimum is p_0^alpha / Z.

    References:
      Madan et al., arXiv 2209.12782; Hu et al., arXiv 2310.04363, Eq. 3.
    """
    residual = y.log_pf - c.alpha * y.log_p_base
    return y.weight * 2 * y.prefix_variance, lax.stop_gradient(residual)


def flowrl(y: Trajectories, c: Coefficients) -> tuple[Array, Array]:
    r"""Balance toward the base tilted by a reward, here whether the answer is right.

    .. math:: w\,(\log Z' + \tfrac1{|y|}\log\pi - \tfrac1{|y|}\log p_0 - \beta A)^2

    References:
      FlowRL, arXiv 2509.15207, Eq. 6.
    """
    # With a power of 1 and beta A in the place of psi.
    tilt = c.beta * y.advantage
    loss = losses.powerflow(
        y.log_pf,
        y.log_p_base,
        y.log_z,
        y.length,
        alpha=1.0,
        psi=tilt,
        weight=y.weight,
    )
    return loss, _per_token_residual(y, dataclasses.replace(c, alpha=1.0), tilt)


def grpo(y: Trajectories, c: Coefficients) -> tuple[Array, Array]:
    r"""Clipped policy gradient of a group-normalised reward, a mean over tokens.

    .. math:: -\tfrac1{|y|}\sum_t \min(\rho_t A,\ \mathrm{clip}(\rho_t, low, high) A)
              + \tfrac{k}{|y|}\sum_t (p_0/\pi - \log(p_0/\pi) - 1)_t

    References:
      GRPO, arXiv 2402.03300, Eq. 3; with the rewards of `ttrl` (arXiv 2504.16084) and
      `intuitor` (arXiv 2505.19590).
    """
    return _surrogate(y, c, y.capped / _tokens(y), y.floored / _tokens(y))


def empo(y: Trajectories, c: Coefficients) -> tuple[Array, Array]:
    r"""As `grpo`, with one ratio a sequence, the geometric mean of its tokens'.

    .. math:: -\min(s A,\ \mathrm{clip}(s, low, high) A),\quad
              s = (\pi/\pi_{old})^{1/|y|}

    References:
      EMPO, arXiv 2504.05812; the ratio is GSPO's, as in its recipe.
    """
    ratio = jnp.exp(y.log_ratio / _tokens(y))
    return _surrogate(y, c, jnp.minimum(ratio, c.high), jnp.maximum(ratio, c.low))


OBJECTIVES: dict[str, Objective] = {
    "powerflow": Objective(powerflow),
    "tb_traj": Objective(tb_traj),
    "tb_token": Objective(tb_token),
    "rl_traj": Objective(rl_traj, log_z="group"),
    "rl_token": Objective(rl_token, log_z="group"),
    "subtb": Objective(subtb, log_z="none", has_prefixes=True),
    "flowrl": Objective(flowrl, reward="correct"),
    "grpo": Objective(grpo, log_z="none", reward="correct"),
    "ttrl": Objective(grpo, log_z="none", reward="majority"),
    "empo": Objective(empo, log_z="none", reward="cluster"),
    "intuitor": Objective(grpo, log_z="none", reward="self_certainty"),
}


def log_z_of(name: str, chosen: str) -> str:
    """Where log Z comes from: "head", "group" or "none"; `chosen` is the config's."""
    wanted = OBJECTIVES[name].log_z
    return chosen if wanted == "any" else wanted


def group_log_z(
    residual: Float[Array, "*n"], prompt_index: Int[Array, "*n"], num_prompts: int
) -> Float[Array, "*n"]:
    """log Z of each prompt from the residuals that its samples leave at log Z = 0."""
    zeros = jnp.zeros_like(residual)
    return losses.group_log_z(residual, zeros, zeros + 1.0, prompt_index, num_prompts)


def _tokens(y: Trajectories) -> Array:
    return jnp.maximum(y.length, 1)


def _per_token_residual(y: Trajectories, c: Coefficients, psi: Any) -> Array:
    target = c.alpha * (y.log_p_base / _tokens(y) + psi)
    return y.log_z + y.log_pf / _tokens(y) - target


def _surrogate(
    y: Trajectories, c: Coefficients, capped: Array, floored: Array
) -> tuple[Array, Array]:
    """The worse of the plain and the clipped ratio: from above where the advantage is
    positive, from below where it is negative."""
    gain = y.advantage * jnp.where(y.advantage >= 0, capped, floored)
    residual = jax.lax.stop_gradient(_per_token_residual(y, c, y.psi))
    return c.kl * y.kl / _tokens(y) - gain, residual

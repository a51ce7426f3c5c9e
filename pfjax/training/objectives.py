"""The objective of a step, by name.

An objective maps what is known of each trajectory to a loss and a residual, both
`[*n]` and unreduced. The residual is linear in log Z, so its mean with log Z = 0
calibrates the head, and its mean over a prompt's samples is the group estimate.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import Float, Int

from pfjax import losses
from pfjax.types import Array


class Trajectories(NamedTuple):
    """Trajectories as an objective sees them; log-probs are sums over tokens."""

    log_pf: Array  # [*n] of the policy; gradient flows
    log_p_base: Array  # [*n] of the frozen base
    log_z: Array  # [*n]; gradient flows
    length: Array  # [*n] response tokens, stop token included
    psi: Array  # [*n] format term, nats a token
    weight: Array  # [*n] importance weight


Objective = Callable[
    [Trajectories, float], tuple[Float[Array, "*n"], Float[Array, "*n"]]
]


def powerflow(y: Trajectories, alpha: float) -> tuple[Array, Array]:
    """Length-aware balance with the format term: PowerFlow, Eq. 10."""
    loss = losses.powerflow(
        y.log_pf,
        y.log_p_base,
        y.log_z,
        y.length,
        alpha=alpha,
        psi=y.psi,
        weight=y.weight,
    )
    tokens = jax.numpy.maximum(y.length, 1)
    target = alpha * (y.log_p_base / tokens + y.psi)
    return loss, y.log_z + y.log_pf / tokens - target


def tb_traj(y: Trajectories, alpha: float) -> tuple[Array, Array]:
    """Trajectory balance on whole sequences: PowerFlow, Eq. 5, its ablation.

    No length normalisation and no format term; collapses onto short responses.
    """
    log_reward = alpha * y.log_p_base
    loss = losses.trajectory_balance(y.log_pf, log_reward, y.log_z)
    return y.weight * loss, y.log_z + y.log_pf - log_reward


OBJECTIVES: dict[str, Objective] = {"powerflow": powerflow, "tb_traj": tb_traj}


def group_log_z(
    residual: Float[Array, "*n"], prompt_index: Int[Array, "*n"], num_prompts: int
) -> Float[Array, "*n"]:
    """log Z of each prompt from the residuals that its samples leave at log Z = 0."""
    zeros = jax.numpy.zeros_like(residual)
    return losses.group_log_z(residual, zeros, zeros + 1.0, prompt_index, num_prompts)

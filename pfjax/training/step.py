"""One update: the algorithm on one screen.

`train_step` takes micro-batches `[M, B, T]` of which the first `num_micro` hold
trajectories. The loop over them has a trip count known only at run time, so one
compiled program serves however many rows packing needed, and padding past them
costs nothing.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Float, Int

from pfjax import losses
from pfjax.packing import response_log_prob
from pfjax.policy import logprobs, lora, model, partition
from pfjax.training import objectives
from pfjax.types import Array, OldScores, PackedBatch


@dataclasses.dataclass(frozen=True)
class StepConfig:
    model: model.ModelConfig
    objective: str
    alpha: float
    weight_low: float
    weight_high: float
    remat: str  # a name in `model.REMAT`


class TrainState(NamedTuple):
    """What an update changes; together with the data cursor, what is saved."""

    step: Int[Array, ""]  # updates done
    params: model.Params  # {"policy": what is trained of it, "log_z": ...}
    opt_state: Any


class StepTable(NamedTuple):
    """What the update saw of each trajectory, `[*m, B, N]`, for metrics."""

    log_pf: Array
    log_p_base: Array
    log_z: Array
    weight: Array
    loss: Array
    residual: Array
    entropy: Array  # summed over the response's tokens
    log_p: Array  # [*m, B, T] of each token, before the update


def loss_fn(
    params: model.Params,
    frozen: model.Params,
    batch: PackedBatch,
    old: OldScores,
    num_trajectories: Float[Array, ""],
    config: StepConfig,
) -> tuple[Float[Array, ""], StepTable]:
    """The share of one micro-batch in the mean loss over all trajectories."""
    policy = lora.join(frozen, params["policy"])
    log_p, entropy, hidden = logprobs.packed_log_probs(
        config.model, policy, batch, config.remat
    )
    log_pf = response_log_prob(log_p, batch)
    if old.log_z is None:
        log_z = partition.apply(params["log_z"], hidden, batch)
    else:
        log_z = old.log_z
    log_pf_old = lax.stop_gradient(log_pf)  # on policy: the ratio is 1 by definition
    if old.log_p_old is not None:
        before = response_log_prob(old.log_p_old, batch)
        log_pf_old = jnp.where(old.is_on_policy, log_pf_old, before)
    trajectories = objectives.Trajectories(
        log_pf=log_pf,
        log_p_base=response_log_prob(old.log_p_base, batch),
        log_z=log_z,
        length=batch.length,
        psi=batch.psi,
        weight=losses.importance_weight(
            log_pf, log_pf_old, low=config.weight_low, high=config.weight_high
        ),
    )
    # Padding is set to 0 before the loss: masking after it would let a NaN through
    # in the gradient, as 0 * NaN.
    trajectories = jax.tree.map(lambda x: jnp.where(batch.is_real, x, 0), trajectories)
    loss, residual = objectives.OBJECTIVES[config.objective](trajectories, config.alpha)
    table = StepTable(
        log_pf=trajectories.log_pf,
        log_p_base=trajectories.log_p_base,
        log_z=trajectories.log_z,
        weight=trajectories.weight,
        loss=loss,
        residual=residual,
        entropy=response_log_prob(entropy, batch),
        log_p=log_p,
    )
    total = jnp.sum(jnp.where(batch.is_real, loss, 0.0))
    return total / num_trajectories, table


def train_step(
    state: TrainState,
    frozen: model.Params,
    batch: PackedBatch,
    old: OldScores,
    num_micro: Int[Array, ""],
    *,
    config: StepConfig,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, Array], StepTable]:
    """Gradients summed over micro-batches with one denominator, then one update.

    Args:
      state: donated when jitted.
      frozen: parameters of the policy that are not trained; empty but for LoRA.
      batch: `[M, B, ...]`.
      old: `[M, B, ...]` scores from before the update.
      num_micro: micro-batches to go through, the rest being padding.
      config: static.
      optimizer: static; takes params `{"policy", "log_z"}`.

    Returns:
      The new state, scalars (`loss`, `grad_norm`, `log_z_grad_norm`), and the table.
    """
    num_trajectories = jnp.sum(batch.is_real).astype(jnp.float32)
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    @jax.named_scope("update")
    def micro_batch(i, carry):
        loss, grads, table = carry
        part = jax.tree.map(lambda x: x[i], (batch, old))
        (part_loss, part_table), part_grads = grad_fn(
            state.params, frozen, *part, num_trajectories, config
        )
        grads = jax.tree.map(jnp.add, grads, part_grads)
        table = jax.tree.map(lambda all_, x: all_.at[i].set(x), table, part_table)
        return loss + part_loss, grads, table

    of_slots = jnp.zeros(batch.length.shape, jnp.float32)
    of_tokens = jnp.zeros(batch.tokens.shape, jnp.float32)
    empty = StepTable(*[of_slots] * 7, log_p=of_tokens)
    grads = jax.tree.map(jnp.zeros_like, state.params)
    loss, grads, table = lax.fori_loop(
        0, num_micro, micro_batch, (jnp.float32(0), grads, empty)
    )
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    scalars = {
        "loss": loss,
        "grad_norm": optax.tree.norm(grads["policy"]),
        "log_z_grad_norm": optax.tree.norm(grads["log_z"]),
    }
    return TrainState(state.step + 1, params, opt_state), scalars, table


def score_step(
    params: model.Params,
    batch: PackedBatch,
    num_micro: Int[Array, ""],
    *,
    config: model.ModelConfig,
) -> Float[Array, "m b t"]:
    """Token log-probs of packed rows under a frozen policy, `[M, B, T]`."""

    @jax.named_scope("base_pass")
    def micro_batch(i, out):
        part = jax.tree.map(lambda x: x[i], batch)
        return out.at[i].set(logprobs.packed_log_probs(config, params, part)[0])

    empty = jnp.zeros(batch.tokens.shape, jnp.float32)
    return lax.fori_loop(0, num_micro, micro_batch, empty)

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

from pfjax import losses, objectives
from pfjax.batch import Array, OldScores, PackedBatch, response_sum
from pfjax.model import log_probs, lora, transformer
from pfjax.trainer.log_z import apply_head


@dataclasses.dataclass(frozen=True)
class StepConfig:
    model: transformer.ModelConfig
    objective: str
    coefficients: objectives.Coefficients
    keep_band: bool  # leave tokens out whose ratio is outside [low, high]
    stop_ids: tuple[int, ...]
    remat: str  # a name in `transformer.REMAT`


class TrainState(NamedTuple):
    """What an update changes; together with the data cursor, what is saved."""

    step: Int[Array, ""]  # updates done
    params: transformer.Params  # {"policy": what is trained of it, "log_z": ...}
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
    kept: Array  # tokens in the sums above
    log_p: Array  # [*m, B, T] of each token, before the update


class Scores(NamedTuple):
    """Of each response token, `[*m, B, T]`; None where not asked for."""

    log_p: Array
    log_p_stop: Array | None
    self_certainty: Array | None


def loss_fn(
    params: transformer.Params,
    frozen: transformer.Params,
    batch: PackedBatch,
    old: OldScores,
    num_trajectories: Float[Array, ""],
    config: StepConfig,
) -> tuple[Float[Array, ""], StepTable]:
    """The share of one micro-batch in the mean loss over all trajectories."""
    policy = lora.join(frozen, params["policy"])
    log_p, entropy, hidden = log_probs.packed_log_probs(
        config.model, policy, batch, config.remat
    )
    objective = objectives.OBJECTIVES[config.objective]
    log_p_stop = None
    if objective.has_prefixes:
        log_p_stop = log_probs.stop_log_probs(
            policy, hidden, log_p, batch, config.stop_ids
        )
    log_z = old.log_z
    if objective.log_z == "none":
        log_z = jnp.zeros(batch.length.shape)
    elif log_z is None:
        log_z = apply_head(params["log_z"], hidden, batch)
    y = _trajectories(batch, old, log_p, log_p_stop, log_z, config)
    # Padding is set to 0 before the loss: masking after it would let a NaN through
    # in the gradient, as 0 * NaN.
    y = jax.tree.map(lambda x: jnp.where(batch.is_real, x, 0), y)
    loss, residual = objective.loss(y, config.coefficients)
    table = StepTable(
        log_pf=y.log_pf,
        log_p_base=y.log_p_base,
        log_z=y.log_z,
        weight=y.weight,
        loss=loss,
        residual=residual,
        entropy=response_sum(entropy, batch),
        kept=y.length,
        log_p=log_p,
    )
    total = jnp.sum(jnp.where(batch.is_real, loss, 0.0))
    return total / num_trajectories, table


def _trajectories(
    batch: PackedBatch,
    old: OldScores,
    log_p: Array,
    log_p_stop: Array | None,
    log_z: Array,
    config: StepConfig,
) -> objectives.Trajectories:
    """Tokens -> trajectories."""
    c, zero = config.coefficients, jnp.zeros(batch.length.shape)
    of_response = lambda x: jnp.where(batch.is_response, x, 0.0)
    log_p_old = lax.stop_gradient(log_p)  # on policy: the ratio is 1 by definition
    if old.log_p_old is not None:
        log_p_old = jnp.where(old.is_on_policy, log_p_old, old.log_p_old)
    log_ratio = log_p - of_response(log_p_old)
    ratio, is_kept = jnp.exp(log_ratio), batch.is_response
    if config.keep_band:
        is_kept &= (ratio >= c.low) & (ratio <= c.high)
    total = lambda x: response_sum(jnp.where(is_kept, x, 0.0), batch)
    log_p_base = of_response(old.log_p_base)
    log_inverse = log_p_base - log_p
    kl = jnp.exp(log_inverse) - log_inverse - 1  # never negative
    variance = zero
    if log_p_stop is not None:
        variance = _prefix_variance(
            batch,
            log_p - c.alpha * log_p_base,
            log_p_stop - c.alpha * of_response(old.log_stop_base),
        )
    return objectives.Trajectories(
        log_pf=total(log_p),
        log_p_base=total(log_p_base),
        log_z=log_z,
        length=total(jnp.ones_like(log_p)),
        psi=batch.psi,
        weight=losses.importance_weight(total(log_ratio), zero, low=c.low, high=c.high),
        advantage=zero if old.advantage is None else old.advantage,
        log_ratio=total(log_ratio),
        capped=total(jnp.minimum(ratio, c.high)),
        floored=total(jnp.maximum(ratio, c.low)),
        kl=total(kl),
        prefix_variance=variance,
    )


def _prefix_variance(
    batch: PackedBatch, step: Float[Array, "b t"], stop: Float[Array, "b t"]
) -> Float[Array, "b n"]:
    """Unbiased variance, over the prefixes of each response, of the sum of `step` over
    the prefix's tokens plus `stop` at the token in the place of which it ends."""
    # Sums from the row's start differ from those of the response by a constant.
    prefix = jnp.cumsum(step, axis=1) - step + stop
    mean = response_sum(prefix, batch) / jnp.maximum(batch.length, 1)
    of_token = jnp.take_along_axis(mean, jnp.maximum(batch.segment_ids - 1, 0), axis=1)
    squares = response_sum((prefix - of_token) ** 2, batch)
    return squares / jnp.maximum(batch.length - 1, 1)


def train_step(
    state: TrainState,
    frozen: transformer.Params,
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
    empty = StepTable(*[of_slots] * 8, log_p=of_tokens)
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
    params: transformer.Params,
    batch: PackedBatch,
    num_micro: Int[Array, ""],
    *,
    config: transformer.ModelConfig,
    stop_ids: tuple[int, ...] = (),
    with_certainty: bool = False,
) -> Scores:
    """Token log-probs of packed rows under a frozen policy, `[M, B, T]`; with
    `stop_ids` those of stopping too, and with `with_certainty` how sure it was."""

    @jax.named_scope("base_pass")
    def micro_batch(i, out):
        part = jax.tree.map(lambda x: x[i], batch)
        log_p, _, hidden = log_probs.packed_log_probs(config, params, part)
        args = (params, hidden, log_p, part)
        scores = Scores(
            log_p,
            log_probs.stop_log_probs(*args, stop_ids) if stop_ids else None,
            log_probs.self_certainty(*args) if with_certainty else None,
        )
        return jax.tree.map(lambda all_, x: all_.at[i].set(x), out, scores)

    empty = jnp.zeros(batch.tokens.shape, jnp.float32)
    out = Scores(empty, empty if stop_ids else None, empty if with_certainty else None)
    return lax.fori_loop(0, num_micro, micro_batch, out)

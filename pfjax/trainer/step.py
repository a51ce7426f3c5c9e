"""One update: micro-batches of packed trajectories in, a new state out.

`train_step` takes micro-batches `[M, B, T]` of which the first `num_microbatches` hold
trajectories. The loop's trip count is known only at run time: one compiled program serves
however many rows packing needed, and padding past them costs nothing.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Float, Int

from pfjax import losses, objectives
from pfjax.batch import PackedBatch, TrajectoryStats
from pfjax.infra import shard_map
from pfjax.model import lora, scoring, transformer
from pfjax.model.config import ModelConfig
from pfjax.objectives import ObjectiveConfig
from pfjax.packing import response_sum
from pfjax.targets import Array
from pfjax.trainer.log_z import apply_head


class TrainState(NamedTuple):
    """What an update changes; together with the data cursor, what is saved."""

    step: Int[Array, ""]  # updates done
    params: transformer.Params  # {"policy": what is trained of it, "log_z": ...}
    opt_state: Any


def loss_fn(
    params: transformer.Params,
    frozen: transformer.Params,
    batch: PackedBatch,
    num_trajectories: Float[Array, ""],
    mean_length: Float[Array, ""],
    *,
    model: ModelConfig,
    objective: ObjectiveConfig,
    stop_ids: tuple[int, ...],
    remat: str,
    dropout: float = 0.0,
) -> tuple[Float[Array, ""], tuple[TrajectoryStats, Array]]:
    """Computes a micro-batch's contribution to the mean loss over all trajectories, whose
    number and mean length are given; and, without gradient, statistics `[B, N]` and token
    log-probs `[B, T]`."""
    policy = lora.join(frozen, params["policy"])
    how = (remat, dropout)
    log_p, entropy, hidden = scoring.packed_log_probs(model, policy, batch, *how)
    log_p_stop = None
    if objective.kind.has_prefixes:
        log_p_stop = scoring.stop_log_probs(policy, hidden, log_p, batch, stop_ids)
    log_z = batch.log_z
    if objective.log_z_source == "none":
        log_z = jnp.zeros(batch.length.shape)
    elif log_z is None:
        log_z = apply_head(params["log_z"], hidden, batch, model.alpha_range)
    y = _sum_over_tokens(batch, log_p, log_p_stop, entropy, log_z, objective)
    y = y._replace(mean_length=jnp.full_like(y.log_pf, mean_length))
    # Padding is set to 0 before the loss: masking after it would let a NaN through
    # in the gradient, as 0 * NaN.
    y = jax.tree.map(lambda x: jnp.where(batch.is_real, x, 0), y)
    y = objectives.add_loss(y, objective)
    total = jnp.sum(jnp.where(batch.is_real, y.loss, 0.0))
    return total / num_trajectories, (y, log_p)


def _sum_over_tokens(
    batch: PackedBatch,
    log_p: Array,
    log_p_stop: Array | None,
    entropy: Array,
    log_z: Array,
    c: ObjectiveConfig,
) -> TrajectoryStats:
    """Sums token values per response; `loss` and `residual` are left out, and 0 stands for
    what is of all."""
    zero = jnp.zeros(batch.length.shape)
    of_response = lambda x: jnp.where(batch.is_response, x, 0.0)
    log_p_old = lax.stop_gradient(log_p)  # on policy: the ratio is 1 by definition
    if batch.log_p_old is not None:
        log_p_old = jnp.where(batch.is_on_policy, log_p_old, batch.log_p_old)
    log_ratio = log_p - of_response(log_p_old)
    ratio, in_loss = jnp.exp(log_ratio), batch.is_response
    if c.mask_clipped_tokens:
        in_loss &= (ratio >= c.clip_low) & (ratio <= c.clip_high)
    total = lambda x: response_sum(jnp.where(in_loss, x, 0.0), batch)
    clip = {"low": c.clip_low, "high": c.clip_high}
    log_p_base = of_response(batch.log_p_base)
    log_inverse = log_p_base - log_p
    kl = jnp.exp(log_inverse) - log_inverse - 1  # never negative
    variance = zero
    if log_p_stop is not None:
        one = jnp.ones_like(log_p)  # the sums are of single tokens
        reward = lambda log_p_base: c.target.log_reward(log_p_base, one)
        stop = log_p_stop - reward(of_response(batch.log_stop_base))
        variance = _prefix_variance(batch, log_p - reward(log_p_base), stop)
    return TrajectoryStats(
        log_pf=total(log_p),
        log_p_base=total(log_p_base),
        log_z=log_z,
        num_loss_tokens=total(jnp.ones_like(log_p)),
        psi=batch.psi,
        reward=zero if batch.reward is None else batch.reward,
        weight=losses.importance_weight(total(log_ratio), zero, **clip),
        log_ratio=total(log_ratio),
        capped=total(jnp.minimum(ratio, c.clip_high)),
        floored=total(jnp.maximum(ratio, c.clip_low)),
        kl=total(kl),
        prefix_variance=variance,
        mean_length=zero,
        entropy=response_sum(entropy, batch),
        length=batch.length,
        prompt_index=batch.prompt_index,
        alpha=batch.alpha,
        log_p_rare=batch.log_p_rare,
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
    num_microbatches: Int[Array, ""],
    constants: dict[str, Any] | None = None,
    *,
    optimizer: optax.GradientTransformation,
    objective: ObjectiveConfig,
    **static: Any,
) -> tuple[TrainState, dict[str, Array], TrajectoryStats, Float[Array, "m b t"]]:
    """Sums gradients over micro-batches with one denominator, then updates once.

    Args:
      state: donated when jitted.
      frozen: parameters of the policy that are not trained; empty without LoRA.
      batch: `[M, B, ...]`, with the scores that the objective reads.
      num_microbatches: to go through, the rest being padding.
      constants: of the objective, in place of its own.
      optimizer: static; takes params `{"policy", "log_z"}`.
      objective, **static: `model`, `stop_ids`, `remat` and `dropout` of `loss_fn`.

    Returns:
      The new state; scalars (`loss`, `grad_norm`, `log_z_grad_norm`); statistics
      `[M, B, N]`; and log-probs of each token, `[M, B, T]`, both from before the update.
    """
    static["objective"] = dataclasses.replace(objective, **(constants or {}))
    num_trajectories = jnp.sum(batch.is_real).astype(jnp.float32)
    mean_length = jnp.sum(batch.length) / num_trajectories
    accumulate = functools.partial(_accumulate, **static)
    whole = (state.params, frozen, num_microbatches, num_trajectories, mean_length)
    (loss, grads), seen = shard_map.by_copy(accumulate, dim=1)(whole, batch)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    scalars = {
        "loss": loss,
        "grad_norm": optax.tree.norm(grads["policy"]),
        "log_z_grad_norm": optax.tree.norm(grads["log_z"]),
    }
    return TrainState(state.step + 1, params, opt_state), scalars, *seen


def _accumulate(
    whole: tuple[Any, ...], batch: PackedBatch, **static: Any
) -> tuple[tuple[Array, transformer.Params], tuple[TrajectoryStats, Array]]:
    """Goes through the micro-batches: their loss and its gradients, summed; and what
    `loss_fn` says of each trajectory."""
    params, frozen, num_microbatches, *of_all = whole
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    @jax.named_scope("update")
    def microbatch(i, carry):
        loss, grads, seen = carry
        part = jax.tree.map(lambda x: x[i], batch)
        (part_loss, part_seen), part_grads = grad_fn(
            params, frozen, part, *of_all, **static
        )
        grads = jax.tree.map(jnp.add, grads, part_grads)
        seen = jax.tree.map(lambda all_, x: all_.at[i].set(x), seen, part_seen)
        return loss + part_loss, grads, seen

    zeros = jnp.zeros(batch.length.shape, jnp.float32)
    stats = TrajectoryStats(*[zeros] * len(TrajectoryStats._fields))
    counts = jnp.zeros_like(batch.length)
    stats = stats._replace(length=counts, prompt_index=counts)
    for name in ("alpha", "log_p_rare"):
        if getattr(batch, name) is None:
            stats = stats._replace(**{name: None})
    log_p = jnp.zeros(batch.tokens.shape, jnp.float32)
    grads = jax.tree.map(jnp.zeros_like, params)
    start = (jnp.float32(0), grads, (stats, log_p))
    loss, grads, seen = lax.fori_loop(0, num_microbatches, microbatch, start)
    return (loss, grads), seen


def score_step(
    params: transformer.Params,
    batch: PackedBatch,
    num_microbatches: Int[Array, ""],
    *,
    model: ModelConfig,
    stop_ids: tuple[int, ...] = (),
    of_token: Callable[..., Array] | None = None,
) -> tuple[Array, Array | None, Array | None]:
    """Scores packed rows under a frozen policy.

    Returns `[M, B, T]` log-probs of response tokens; with `stop_ids` those of stopping in
    their places; and with `of_token` its values (see `scoring.TokenReward`).
    """

    def score(whole, batch):
        params, num_microbatches = whole

        @jax.named_scope("base_pass")
        def microbatch(i, out):
            part = jax.tree.map(lambda x: x[i], batch)
            log_p, entropy, hidden = scoring.packed_log_probs(model, params, part)
            stop = values = None
            if stop_ids:
                stop = scoring.stop_log_probs(params, hidden, log_p, part, stop_ids)
            if of_token:
                values = of_token(params, hidden, log_p, entropy, part)
            scores = (log_p, stop, values)
            return jax.tree.map(lambda all_, x: all_.at[i].set(x), out, scores)

        empty = jnp.zeros(batch.tokens.shape, jnp.float32)
        out = (empty, empty if stop_ids else None, empty if of_token else None)
        return (), lax.fori_loop(0, num_microbatches, microbatch, out)

    return shard_map.by_copy(score, dim=1)((params, num_microbatches), batch)[1]

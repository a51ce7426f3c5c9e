"""From the trajectories of a step to what one update takes: packed, placed, scored."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pfjax import losses
from pfjax.batch import (
    PACKED,
    Array,
    Field,
    Minibatch,
    OldScores,
    PackedBatch,
    PackShape,
    RolloutBatch,
    from_segments,
    pack,
    response_sum,
    to_segments,
)
from pfjax.infra import sharding
from pfjax.model.transformer import Params
from pfjax.objectives import OBJECTIVES, ObjectiveConfig
from pfjax.tasks import rewards

# (parameters, packed batch, number of micro-batches) -> see `step.score_step`.
Score = Callable[[Params, PackedBatch, Array], tuple[Array, Array | None, Array | None]]


def prepare_minibatch(
    data: RolloutBatch,
    indices: np.ndarray,
    policy: Params,
    base: Params,
    *,
    is_first: bool,
    score_base: Score,
    score_policy: Score,
    objective: ObjectiveConfig,
    log_z: str,
    shape: PackShape,
    mesh: Mesh,
    is_only: bool,
) -> Minibatch:
    """Packs the trajectories `indices` of a step and scores them before it updates.

    Args:
      data: the whole step.
      indices: the samples of a prompt side by side.
      policy: parameters of the policy as it is now.
      base: those of the frozen base.
      is_first: whether this minibatch is the first that the step updates on: it is on
        policy, and its own log-probs are those of before the update.
      score_base, score_policy: token log-probs and what else the objective reads.
      objective: what is trained.
      log_z: where log Z comes from: "head", "group" or "none".
      shape: of the packed batch.
      mesh: that it is placed on.
      is_only: whether a step has one update only.
    """
    samples = len(data.texts) // len(data.prompts)
    prompt_index = indices // samples
    prompts = [data.prompts[q] for q in prompt_index]
    responses = [data.responses[i] for i in indices]
    host, placement, used = pack(
        [np.concatenate(x) for x in zip(prompts, responses, strict=True)],
        np.array([len(x) for x in prompts]),
        shape,
        psi=data.psi[indices],
        prompt_index=prompt_index.astype(np.int32),
    )
    batch = sharding.put_batch(mesh, host, dim=1)
    num_microbatches = jnp.int32(used)
    log_p_base, log_stop_base, _ = score_base(base, batch, num_microbatches)
    reward, log_p = data.reward[indices], None
    kind = OBJECTIVES[objective.name]
    is_sure = kind.reward == "self_certainty"
    if log_z == "group" or is_sure or not is_first:
        log_p, _, certainty = score_policy(policy, batch, num_microbatches)
    if is_sure:
        sums = jax.vmap(response_sum)(certainty, batch)
        reward = from_segments(sums, placement) / placement.length
    advantage = group_log_z = log_p_old = is_on_policy = None
    if kind.reward:
        normalized = rewards.group_normalized(reward, samples)
        segments = to_segments(normalized, placement, host.length.shape)
        advantage = sharding.put_batch(mesh, segments, dim=1)
    if log_z == "group":
        residual = residual_without_log_z(
            objective, batch, log_p, log_p_base, advantage
        )
        group_log_z = losses.group_log_z(
            residual, jnp.zeros_like(residual), jnp.ones_like(residual),
            batch.prompt_index, len(data.prompts),
        )  # fmt: skip
    if not is_only:  # one program for all updates
        log_p_old = jnp.zeros_like(log_p_base) if log_p is None else log_p
        is_on_policy = jnp.full(shape.num_microbatches, is_first)
    old = OldScores(
        log_p_base=log_p_base,
        log_p_old=log_p_old,
        is_on_policy=is_on_policy,
        log_z=group_log_z,
        advantage=advantage,
        log_stop_base=log_stop_base,
    )
    return Minibatch(batch, old, num_microbatches, placement, reward)


def residual_without_log_z(
    objective: ObjectiveConfig,
    batch: PackedBatch,
    log_p: Array,
    log_p_base: Array,
    advantage: Array | None,
) -> Array:
    """Residuals `[M, B, N]` of the target at log Z = 0."""
    sums = jax.vmap(response_sum)
    return objective.target.residual(
        sums(log_p, batch),
        sums(log_p_base, batch),
        batch.length,
        0.0,
        psi=batch.psi,
        reward=0.0 if advantage is None else advantage,
    )


def init_log_z(
    params: Params, minibatches: list[Minibatch], objective: ObjectiveConfig
) -> Params:
    """Sets the log Z head so that the first mean residual is 0.

    An error of log Z' acts as a reward on length, and at usual learning rates the head
    would need thousands of steps to undo it.

    Args:
      params: of the head.
      minibatches: of the first step.
      objective: what is trained.
    """
    total = count = 0.0
    for m in minibatches:
        # The policy is still the base: its log-probs are the base's.
        residual = residual_without_log_z(
            objective, m.batch, m.old.log_p_base, m.old.log_p_base, m.old.advantage
        )
        total += float(jnp.where(m.batch.is_real, residual, 0.0).sum())
        count += float(m.batch.is_real.sum())
    out = {**params["out"], "bias": params["out"]["bias"] - total / count}
    return {**params, "out": out}


def fill(minibatches: list[Minibatch], shape: PackShape) -> float:
    """The fraction of computed tokens that trajectories take."""
    packed = sum(
        int((m.placement.prompt_length + m.placement.length).sum()) for m in minibatches
    )
    computed = sum(int(m.num_microbatches) for m in minibatches)
    return packed / (computed * shape.microbatch_size * shape.pack_length)


def abstract(
    shape: PackShape, mesh: Any, objective: ObjectiveConfig, log_z: str, is_only: bool
) -> tuple[PackedBatch, OldScores, jax.ShapeDtypeStruct]:
    """Shapes and shardings of what an update is given, from `PACKED`."""
    whole = sharding.replicated(mesh)

    def array(field: Field, where: Any = None) -> jax.ShapeDtypeStruct:
        dims = shape.of(field)
        split = sharding.of_batch(mesh, dims, dim=1)
        return jax.ShapeDtypeStruct(dims, field.dtype, sharding=where or split)

    kind = OBJECTIVES[objective.name]
    of_token, of_segment = Field("T", "float32"), Field("N", "float32")
    old = OldScores(
        log_p_base=array(of_token, whole),
        log_p_old=None if is_only else array(of_token, whole),
        is_on_policy=None
        if is_only
        else jax.ShapeDtypeStruct((shape.num_microbatches,), bool),
        log_z=array(of_segment, whole) if log_z == "group" else None,
        advantage=array(of_segment) if kind.reward else None,
        log_stop_base=array(of_token, whole) if kind.has_prefixes else None,
    )
    batch = PackedBatch(*(array(f) for f in PACKED))
    return batch, old, jax.ShapeDtypeStruct((), "int32")

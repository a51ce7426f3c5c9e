"""From the trajectories of a step to what one update takes: packed, placed, scored."""

import jax
import jax.numpy as jnp
import numpy as np

from pfjax import batch as packing
from pfjax import losses, objectives
from pfjax.batch import Array, Minibatch, PackedBatch, Placement, RolloutBatch
from pfjax.infra import sharding
from pfjax.model import attention
from pfjax.model.transformer import Params
from pfjax.objectives import ObjectiveConfig
from pfjax.tasks import rewards
from pfjax.trainer.train_fns import TrainFns


def prepare_minibatch(
    fns: TrainFns,
    data: RolloutBatch,
    indices: np.ndarray,
    policy: Params,
    base: Params,
    is_first: bool,
) -> Minibatch:
    """Packs the trajectories `indices` of a step and scores them before it updates.

    Args:
      fns, data: of the run, and of the whole step.
      indices: the samples of a prompt side by side.
      policy, base: parameters of the policy as it is now, and of the frozen base.
      is_first: whether this minibatch is the first that the step updates on: it is on
        policy, and its own log-probs are those of before the update.
    """
    samples = len(data.texts) // len(data.prompts)
    host, placement, used = _pack(fns, data, indices, samples)
    mesh, num_microbatches = jax.sharding.get_mesh(), jnp.int32(used)
    batch = sharding.put_batch(mesh, host, dim=1)
    log_p_base, log_stop_base, _ = fns.score_base(base, batch, num_microbatches)
    reward, log_p = data.reward[indices], None
    kind, is_group = fns.objective.kind, fns.objective.log_z_source == "group"
    needs_certainty = kind.reward == "self_certainty"
    if is_group or needs_certainty or not is_first:
        log_p, _, certainty = fns.score_policy(policy, batch, num_microbatches)
    if needs_certainty:
        sums = jax.vmap(packing.response_sum)(certainty, batch)
        reward = packing.from_segments(sums, placement) / placement.length
    if kind.reward:
        normalized = rewards.group_normalized(reward, samples)
        segments = packing.to_segments(normalized, placement, host.length.shape)
        batch = batch._replace(advantage=sharding.put_batch(mesh, segments, dim=1))
    batch = batch._replace(log_p_base=log_p_base, log_stop_base=log_stop_base)
    if is_group:
        residual = _residuals(fns.objective, batch, log_p)
        zero, one = jnp.zeros_like(residual), jnp.ones_like(residual)
        groups = (batch.prompt_index, len(data.prompts))
        log_z = losses.group_log_z(residual, zero, one, *groups)
        batch = batch._replace(log_z=log_z)
    if fns.num_updates > 1:  # one program for all updates
        batch = batch._replace(
            log_p_old=jnp.zeros_like(log_p_base) if log_p is None else log_p,
            is_on_policy=jnp.full(fns.shape.num_microbatches, is_first),
        )
    return Minibatch(batch, num_microbatches, placement, reward)


def score_policy(fns: TrainFns, minibatch: Minibatch, policy: Params) -> Array:
    """Token log-probs `[M, B, T]` of the policy before it is updated."""
    batch = minibatch.batch._replace(**dict.fromkeys(packing.SCORES))
    return fns.score_policy(policy, batch, minibatch.num_microbatches)[0]


def _pack(
    fns: TrainFns, data: RolloutBatch, indices: np.ndarray, samples: int
) -> tuple[PackedBatch, Placement, int]:
    prompt_index = indices // samples
    prompts = [data.prompts[q] for q in prompt_index]
    pairs = zip(prompts, indices, strict=True)
    host, placement, used = packing.pack(
        [np.append(p, data.responses[i]) for p, i in pairs],
        np.array([len(x) for x in prompts]),
        fns.shape,
        psi=data.psi[indices],
        prompt_index=prompt_index,
    )
    c = fns.base_model
    if attention.pays_for_segments(c.attention, c.head_dim, c.dtype):
        host = packing.trim_segments(host, placement)
    return host, placement, used


def _residuals(objective: ObjectiveConfig, batch: PackedBatch, log_p: Array) -> Array:
    """Residuals `[M, B, N]` of the target at log Z = 0."""
    total, tilt = jax.vmap(packing.response_sum), objectives.tilt(batch)
    sums = (total(log_p, batch), total(batch.log_p_base, batch))
    return objective.target.residual(*sums, batch.length, 0.0, **tilt)


def init_log_z(
    params: Params,
    batches: list[PackedBatch],
    log_p: list[Array],
    objective: ObjectiveConfig,
) -> Params:
    """Sets the log Z head so that the first mean residual of the policy, whose token
    log-probs `log_p` are, is 0.

    An error of log Z' acts as a reward on length, and at usual learning rates the head
    would need thousands of steps to undo it.
    """
    total = count = 0.0
    for batch, of_policy in zip(batches, log_p, strict=True):
        residual = _residuals(objective, batch, of_policy)
        total += float(jnp.where(batch.is_real, residual, 0.0).sum())
        count += float(batch.is_real.sum())
    out = {**params["out"], "bias": params["out"]["bias"] - total / count}
    return {**params, "out": out}

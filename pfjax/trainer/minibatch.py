"""From the trajectories of a step to what one update takes: packed, placed, scored."""

import jax
import jax.numpy as jnp
import numpy as np

from pfjax import losses, objectives, packing
from pfjax.batch import PACKED, Minibatch, PackedBatch, Placement, Rollout, RolloutBatch
from pfjax.infra import sharding
from pfjax.model import attention, scoring
from pfjax.model.transformer import Params
from pfjax.objectives import ObjectiveConfig
from pfjax.targets import Array
from pfjax.tasks import rewards
from pfjax.trainer import log_z
from pfjax.trainer.train_fns import TrainFns


def prepare_minibatch(
    fns: TrainFns,
    data: RolloutBatch,
    indices: np.ndarray,
    policy: Params,
    base: Params,
    seed: tuple[int, int],
    is_first: bool,
    is_scored: bool,
) -> Minibatch:
    """Packs the trajectories `indices` of a step and scores them before it updates.

    Args:
      fns, data: of the run, and of the whole step.
      indices: the samples of a prompt side by side.
      policy, base: parameters of the policy as it is now, and of the frozen base.
      seed: of the run, and the step.
      is_first: whether this minibatch is the first that the step updates on: it is on
        policy, and its own log-probs are those of before the update.
      is_scored: whether the policy's log-probs are asked for even so.
    """
    samples = len(data.texts) // len(data.prompts)
    host, placement, used = _pack(fns, data, indices, samples)
    mesh, num_microbatches = jax.sharding.get_mesh(), jnp.int32(used)
    if data.rollout.alpha is not None:
        of_each = data.rollout.alpha[indices // samples]
        alpha = packing.to_segments(of_each, placement, host.length.shape)
        host = host._replace(alpha=alpha)
    batch = sharding.put_batch(mesh, host, dim=1)
    of_base = (base, batch._replace(choices=None), num_microbatches)
    log_p_base, log_stop_base, rare = fns.score_base(*of_base)
    reward, log_p = data.reward[indices], None
    is_group = fns.objective.log_z_source == "group"
    token_term = rewards.token_term(fns.objective.reward_source)
    # With dropout the update's own are not those of the policy that has sampled.
    is_scored |= is_group or bool(token_term) or not is_first or fns.has_dropout
    if is_scored:
        log_p, _, of_token = fns.score_policy(policy, batch, num_microbatches)
    if token_term:
        sums = jax.vmap(packing.response_sum)(of_token, batch)
        reward = token_term.weight * packing.from_segments(sums, placement)
        if scoring.TOKEN_REWARDS[token_term.name].is_mean:
            reward = reward / placement.length

    def placed(values: np.ndarray) -> Array:
        """One value for each response, where the update reads it."""
        segments = packing.to_segments(values, placement, host.length.shape)
        return sharding.put_batch(mesh, segments, dim=1)

    if fns.objective.reward_source:
        weighed = reward
        if fns.objective.kind.reward:
            weighed = _advantages(fns.objective, data, indices, reward)
        batch = batch._replace(reward=placed(weighed))
    if fns.has_dropout:
        seeds = dropout_seeds(*seed, len(data.texts))[indices]
        batch = batch._replace(dropout_seed=placed(seeds))
    batch = batch._replace(log_p_base=log_p_base, log_stop_base=log_stop_base)
    if rare is not None:
        batch = batch._replace(log_p_rare=jax.vmap(packing.response_sum)(rare, batch))
    if is_group:
        of_group = _group_log_z(fns.objective, batch, log_p, len(data.prompts))
        batch = batch._replace(log_z=of_group)
    if fns.num_updates > 1:  # one program for all updates
        batch = batch._replace(
            log_p_old=jnp.zeros_like(log_p_base) if log_p is None else log_p,
            is_on_policy=jnp.full(fns.shape.num_microbatches, is_first),
        )
    is_own = data.rollout.is_own[indices]
    return Minibatch(batch, num_microbatches, placement, reward, is_own, log_p)


def _advantages(
    objective: ObjectiveConfig, data: RolloutBatch, indices: np.ndarray, reward: Array
) -> np.ndarray:
    """What the loss takes for the reward of a minibatch, normalised in the whole step."""
    of_step = data.reward.astype(reward.dtype)
    of_step[indices] = reward  # a reward of tokens is known of these alone
    samples = len(data.texts) // len(data.prompts)
    return rewards.advantages(of_step, samples, objective.advantage)[indices]


def dropout_seeds(seed: int, step: int, number: int) -> np.ndarray:
    """A seed for each trajectory of a step, uint32 `[S]`."""
    return np.random.SeedSequence([seed, step]).generate_state(number)


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
    if fns.shape.num_choices:
        host = host._replace(choices=_choices(fns, data.rollout, indices, placement))
    c = fns.base_model
    if attention.pays_for_segments(c.attention, c.head_dim, c.dtype):
        host = packing.trim_segments(host, placement)
    return host, placement, used


def _choices(
    fns: TrainFns, rollout: Rollout, indices: np.ndarray, placement: Placement
) -> np.ndarray:
    """The experts of tokens that the policy's own responses were drawn from, packed."""
    dims, dtype, unknown = PACKED.choices
    out = np.full(fns.shape.of(dims), unknown, dtype)
    if not rollout.is_own.any():
        return out
    of_row = out.reshape(-1, *out.shape[2:])
    recorded = rollout.choices.reshape(-1, *rollout.choices.shape[2:])
    # A response's first token is drawn from its prompt's last.
    first = placement.start + placement.prompt_length - 1
    places = zip(indices, placement.row, first, placement.length, strict=True)
    for i, row, at, length in places:
        if rollout.is_own[i]:
            of_row[row, at : at + length] = recorded[i, :length]
    return out


def _group_log_z(
    objective: ObjectiveConfig, batch: PackedBatch, log_p: Array, num_prompts: int
) -> Array:
    """Log Z `[M, B, N]` by the residuals of a prompt's samples."""
    residual = _residuals(objective, batch, log_p)
    zero, one = jnp.zeros_like(residual), jnp.ones_like(residual)
    return losses.group_log_z(residual, zero, one, batch.prompt_index, num_prompts)


def _residuals(objective: ObjectiveConfig, batch: PackedBatch, log_p: Array) -> Array:
    """Residuals `[M, B, N]` of the target at log Z = 0."""
    total, tilt = jax.vmap(packing.response_sum), objectives.tilt(batch)
    sums = (total(log_p, batch), total(batch.log_p_base, batch))
    target = objectives.at_alpha(objective, batch).target
    return target.residual(*sums, batch.length, 0.0, **tilt)


def init_log_z(
    params: Params,
    minibatches: list[Minibatch],
    objective: ObjectiveConfig,
    alpha_range: tuple[float, ...] = (),
) -> Params:
    """Sets the log Z head so that the first mean residual is 0.

    Where each prompt has its own alpha, the residuals grow with (alpha - 1) as long as the
    policy is the base, and their slope is set to 0. A minibatch without log-probs of the
    policy is one of the base, which the policy is.

    An error of log Z' acts as a reward on length, and at usual learning rates the head
    would need thousands of steps to undo it.
    """
    total = square = 0.0
    for m in minibatches:
        batch, log_p = m.batch, m.batch.log_p_base if m.log_p is None else m.log_p
        x = log_z.features(batch, alpha_range)[..., 0]
        residual = _residuals(objective, batch, log_p)
        total += float(jnp.where(batch.is_real, x * residual, 0.0).sum())
        square += float(jnp.where(batch.is_real, x * x, 0.0).sum())
    return _moved(params, -total / square)


def follow_target(
    params: Params,
    minibatches: list[Minibatch],
    before: ObjectiveConfig,
    now: ObjectiveConfig,
) -> Params:
    r"""Moves the log Z head as the change of a schedule moves log Z.

    Of whole sequences :math:`d\log Z = E[d\log R]`, and per token
    :math:`d\log Z' = E[d\log R] / E[|y|]`, both means under the target, which are taken
    over the policy's own samples; where a step has none, over all, so that the mean
    residual stays. The head's own steps are small and would trail far behind.
    """
    total = count = 0.0
    has_own = any(m.is_own.any() for m in minibatches)
    for m in minibatches:
        batch = m.batch
        counts = m.is_own if has_own else np.ones_like(m.is_own)
        counts = packing.to_segments(counts, m.placement, batch.length.shape)
        new, old = (_residuals(c, batch, batch.log_p_base) for c in (now, before))
        weight = batch.length if now.target.is_length_aware else 1
        total += float(jnp.where(counts, (new - old) * weight, 0.0).sum())
        count += float(jnp.where(counts, weight, 0).sum())
    return _moved(params, -total / count)


def _moved(params: Params, by: float) -> Params:
    """The log Z head with its first output moved by a constant."""
    bias = params["out"]["bias"].at[0].add(by)
    return {**params, "out": {**params["out"], "bias": bias}}

"""From the responses of a step to what its updates take, and from what these saw to
metrics."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pfjax import objectives
from pfjax.batch import (
    OldScores,
    PackedBatch,
    Placement,
    Rollout,
    fill_slots,
    pack,
    response_sum,
    unpack_responses,
    unpack_slots,
)
from pfjax.infra import distributed, sharding
from pfjax.model import tokenizer, transformer
from pfjax.tasks import grading, rewards
from pfjax.trainer import metrics, setup, step
from pfjax.trainer.log_z import calibrate_head


class Drawn(NamedTuple):
    """The S = P * G responses of a step, prompt by prompt."""

    prompts: list[list[int]]
    rollout: Rollout
    responses: list[np.ndarray]  # cut to their lengths
    texts: list[str]
    psi: np.ndarray  # [S]
    reward: np.ndarray  # [S]; zeros if the objective has none, or one of the tokens


class Update(NamedTuple):
    """One mini-batch of a step, packed and placed on the mesh."""

    batch: PackedBatch
    host: PackedBatch  # the same, where every process has all of it
    placement: Placement
    num_micro: jax.Array
    old: OldScores
    reward: np.ndarray  # one entry a trajectory
    prompt_lengths: np.ndarray
    lengths: np.ndarray


def judge(
    run: setup.Run, chosen: list[int], rollout: Rollout, grader: grading.Grader
) -> Drawn:
    """Texts of the responses, and what they are worth."""
    config = run.config
    rows = rollout.tokens.reshape(-1, rollout.tokens.shape[-1])
    responses = [y[:n] for y, n in zip(rows, rollout.lengths.reshape(-1), strict=True)]
    texts = [tokenizer.decode(run.tok, y.tolist()) for y in responses]
    wanted = objectives.OBJECTIVES[config.objective].reward
    reward = np.zeros(len(texts), np.float32)
    if wanted in rewards.OF_ANSWERS:
        reward = rewards.of_answers(
            wanted,
            [grading.last_boxed(text) for text in texts],
            [run.train.problems[i].gold for i in chosen],
            config.samples_per_prompt,
            grader,
        )
        # A grader that runs out of time may do so on one host alone.
        reward = distributed.from_first(reward)
    return Drawn(
        prompts=[run.train.tokens[i] for i in chosen],
        rollout=rollout,
        responses=responses,
        texts=texts,
        psi=rewards.format_term(texts, config.psi_unboxed),
        reward=reward,
    )


def pack_and_score(
    run: setup.Run,
    state: step.TrainState,
    base: transformer.Params,
    drawn: Drawn,
    part: np.ndarray,
    *,
    is_first: bool,
) -> Update:
    """Packs the trajectories `part` of a step and scores them before it updates."""
    config, made = run.config, run.programs
    prompt_index = part // config.samples_per_prompt
    prompt_lengths = np.array([len(drawn.prompts[q]) for q in prompt_index])
    host, placement, used = pack(
        [
            np.concatenate([drawn.prompts[q], drawn.responses[i]])
            for i, q in zip(part, prompt_index, strict=True)
        ],
        prompt_lengths,
        rows=made.rows,
        row_length=config.row_length,
        slots=made.row_slots,
        micro_batches=made.micro_batches,
        psi=drawn.psi[part],
        prompt_index=prompt_index.astype(np.int32),
    )
    lengths = np.array([len(drawn.responses[i]) for i in part])
    batch = sharding.put_batch(run.mesh, host, dim=1)
    num_micro = jnp.int32(used)
    objective = objectives.OBJECTIVES[config.objective]
    of_base = made.score_step(
        base,
        batch,
        num_micro,
        config=made.base_config,
        stop_ids=made.step_config.stop_ids if objective.has_prefixes else (),
    )
    reward, of_policy = drawn.reward[part], None
    source = objectives.log_z_of(config.objective, config.log_z)
    is_sure = objective.reward == "self_certainty"
    # The first update is on policy: it takes its own log-probs for those of before.
    if source == "group" or is_sure or not is_first:
        policy = setup.policy_of(run, state)
        of_policy = made.score_step(
            policy.params,
            batch,
            num_micro,
            config=policy.config,
            with_certainty=is_sure,
        )
    if is_sure:
        sums = jax.vmap(response_sum)(of_policy.self_certainty, batch)
        reward = unpack_slots(sums, placement) / lengths
    advantage = log_z = log_p_old = is_on_policy = None
    if objective.reward:
        normalized = rewards.group_normalized(reward, config.samples_per_prompt)
        slots = fill_slots(normalized, placement, host.length.shape)
        advantage = sharding.put_batch(run.mesh, slots, dim=1)
    if source == "group":
        residual = _residual_without_log_z(
            run, batch, of_policy.log_p, of_base.log_p, advantage
        )
        log_z = objectives.group_log_z(
            residual, batch.prompt_index, config.prompts_per_step
        )
    if config.updates_per_rollout > 1:  # one program for all updates
        log_p_old = of_policy.log_p if of_policy else jnp.zeros_like(of_base.log_p)
        is_on_policy = jnp.full(made.micro_batches, is_first)
    old = OldScores(
        log_p_base=of_base.log_p,
        log_p_old=log_p_old,
        is_on_policy=is_on_policy,
        log_z=log_z,
        advantage=advantage,
        log_stop_base=of_base.log_p_stop,
    )
    return Update(
        batch, host, placement, num_micro, old, reward, prompt_lengths, lengths
    )


def _residual_without_log_z(
    run: setup.Run,
    batch: PackedBatch,
    log_p: jax.Array,
    log_p_base: jax.Array,
    advantage: jax.Array | None,
) -> jax.Array:
    """Residuals `[M, B, N]` at log Z = 0."""
    sums, zero = jax.vmap(response_sum), jnp.zeros(batch.length.shape)
    y = objectives.Trajectories(*[zero] * len(objectives.Trajectories._fields))
    y = y._replace(
        log_pf=sums(log_p, batch),
        log_p_base=sums(log_p_base, batch),
        length=batch.length,
        psi=batch.psi,
        advantage=zero if advantage is None else advantage,
    )
    objective = objectives.OBJECTIVES[run.config.objective]
    return objective.loss(y, run.programs.step_config.coefficients)[1]


def calibrate(
    run: setup.Run, state: step.TrainState, updates: list[Update]
) -> step.TrainState:
    """Sets the log Z' head so that the first mean residual is 0."""
    total = count = 0.0
    for u in updates:
        # The policy is still the base: its log-probs are the base's.
        residual = _residual_without_log_z(
            run, u.batch, u.old.log_p_base, u.old.log_p_base, u.old.advantage
        )
        total += float(jnp.where(u.batch.is_real, residual, 0.0).sum())
        count += float(u.batch.is_real.sum())
    head = calibrate_head(state.params["log_z"], total / count)
    return state._replace(params={**state.params, "log_z": head})


def step_metrics(
    run: setup.Run,
    updates: list[Update],
    tables: list[step.StepTable],
    drawn: Drawn,
) -> dict[str, float]:
    config = run.config
    record = _record(run, updates, tables, drawn)
    scored: list[np.ndarray] = []
    for i, (u, table) in enumerate(zip(updates, tables, strict=True)):
        # Of the policy that drew: later updates of a step have moved it.
        log_p = table.log_p if i == 0 else u.old.log_p_old
        scored += unpack_responses(log_p, u.placement, u.prompt_lengths, u.lengths)
    has_box = np.array([grading.last_boxed(text) is not None for text in drawn.texts])
    packed = sum(int((u.host.segment_ids > 0).sum()) for u in updates)
    tokens = run.programs.rows * config.row_length
    computed = sum(int(u.num_micro) for u in updates) * tokens
    clamps = (config.importance.low, config.importance.high)
    out = {
        **metrics.balance_metrics(record, clamps),
        **metrics.match_metrics(record, config.alpha),
        **metrics.completion_metrics(record, has_box),
        **metrics.repetition_metrics(drawn.responses),
        **metrics.rollout_metrics(drawn.rollout, scored),
        "pack/fill": packed / computed,
    }
    if objectives.OBJECTIVES[config.objective].reward:
        reward = np.concatenate([u.reward for u in updates])
        groups = reward.reshape(-1, config.samples_per_prompt)
        out |= {"reward/mean": reward.mean(), "reward/std": groups.std(axis=1).mean()}
    return {k: float(v) for k, v in out.items()}


def _record(
    run: setup.Run,
    updates: list[Update],
    tables: list[step.StepTable],
    drawn: Drawn,
) -> metrics.StepRecord:
    """The tables of all updates, one entry a trajectory, in the order drawn."""

    def gather(name: str) -> np.ndarray:
        return np.concatenate(
            [
                unpack_slots(getattr(t, name), u.placement)
                for u, t in zip(updates, tables, strict=True)
            ]
        )

    def gather_batch(name: str) -> np.ndarray:
        return np.concatenate(
            [unpack_slots(getattr(u.host, name), u.placement) for u in updates]
        )

    record = metrics.StepRecord(
        prompt_index=gather_batch("prompt_index"),
        length=gather_batch("length"),
        finished=drawn.rollout.finished.reshape(-1),
        psi=gather_batch("psi"),
        log_pf=gather("log_pf"),
        log_p_base=gather("log_p_base"),
        log_z=gather("log_z"),
        weight=gather("weight"),
        loss=gather("loss"),
        residual=gather("residual"),
        entropy=gather("entropy"),
        kept=gather("kept"),
    )
    if objectives.log_z_of(run.config.objective, run.config.log_z) == "none":
        means = metrics.mean_by_prompt(record.residual, record.prompt_index)
        record = record._replace(log_z=-means, residual=record.residual - means)
    return record

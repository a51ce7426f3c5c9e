"""One iteration of training, from top to bottom."""

import functools

import jax
import numpy as np

from pfjax.batch import Minibatch
from pfjax.model.transformer import Params
from pfjax.tasks import grading
from pfjax.trainer import diagnostics
from pfjax.trainer.actor import Cursor, Drawn
from pfjax.trainer.minibatch import follow_target, init_log_z, prepare_minibatch
from pfjax.trainer.profiling import Clock
from pfjax.trainer.setup import Trainer
from pfjax.trainer.step import TrainState


def train_iteration(
    trainer: Trainer,
    state: TrainState,
    cursor: Cursor,
    step: int,
    grader: grading.Grader,
) -> tuple[TrainState, Cursor, dict[str, float], Drawn]:
    """Does one step: rollout, rewards, minibatches, updates, metrics.

    Returns the new state, the new data cursor, the step's metrics, and what it trained on.
    Raises FloatingPointError if the loss or a gradient is not finite.
    """
    clock = Clock()
    fns, policy = trainer.fns_at(step), trainer.policy(state)
    with clock.part("rollout"):
        drawn = trainer.draw(state, cursor, step)
    indices, rollout = drawn.indices, drawn.rollout
    failed = trainer.failures()
    with clock.part("reward"):
        data = trainer.compute_rewards(indices, rollout, grader, step, drawn.votes)
    # Split by prompts: the samples of one stay in one update.
    by_prompt = np.arange(len(data.texts)).reshape(len(indices), -1)
    groups = enumerate(np.array_split(by_prompt, fns.num_updates))
    with clock.part("base_pass"):
        base = trainer.base()
        prepare = functools.partial(
            prepare_minibatch,
            fns,
            data,
            policy=policy.params,
            base=base,
            seed=(trainer.seed, step),
            is_scored=step == 1 and not trainer.starts_at_base,
        )
        minibatches = [prepare(x.ravel(), is_first=i == 0) for i, x in groups]
        if fns.objective.log_z_source == "head":
            head = _log_z_head(trainer, state.params["log_z"], minibatches, step)
            state = state._replace(params={**state.params, "log_z": head})
        jax.block_until_ready([m.batch for m in minibatches])
        # An offloaded base leaves room, the policy is donated.
        del base, policy, prepare
    seen = []
    with clock.part("update"):
        for batch, num, *_ in minibatches:
            args = (state, trainer.frozen, batch, num, trainer.constants(step))
            state, *of_update = fns.train_step(*args)
            seen.append(of_update)
        scalars, stats, log_p = map(list, zip(*seen, strict=True))
        values = {k: float(np.mean([s[k] for s in scalars])) for k in scalars[0]}
    _check_finite(values, step)
    del values["loss"]  # tb/loss
    if trainer.reward.functions or trainer.own_psi.functions:
        values["reward/failed"] = float(trainer.failures() - failed)
    values["lr"] = trainer.learning_rate(step)
    values |= {f"target/{k}": v for k, v in trainer.constants(step).items()}
    values |= diagnostics.step_metrics(
        fns, minibatches, stats, log_p, data, clock, step
    )
    values |= diagnostics.staleness_metrics(drawn, step)
    return state, cursor.after(drawn.ids), values, drawn


def _log_z_head(
    trainer: Trainer, head: Params, minibatches: list[Minibatch], step: int
) -> Params:
    """The head before a step updates: set at the first, moved where a schedule moves log Z."""
    fns = trainer.fns_at(step)
    if step == 1:
        return init_log_z(head, minibatches, fns.objective, fns.model.alpha_range)
    before = trainer.fns_at(step - 1).objective
    if before == fns.objective:
        return head
    return follow_target(head, minibatches, before, fns.objective)


def _check_finite(values: dict[str, float], step: int) -> None:
    for name in ("loss", "grad_norm"):
        if not np.isfinite(values[name]):
            cure = (
                "the last checkpoint, if there is one, is good. Look at grad_norm and "
                "tb/residual_p95_abs of the steps before; a smaller optim.learning_rate or "
                "clip_norm, or a residual_clip, is the usual cure"
            )
            if step == 1:
                cure = "nothing was learned yet: look at the loss, the reward and the model"
            raise FloatingPointError(f"{name} is {values[name]} at step {step}; {cure}")

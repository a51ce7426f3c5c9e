"""Builds what draws the responses of a run, from its config."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from pfjax.batch import Rollout
from pfjax.infra import sharding
from pfjax.model import dial, lora
from pfjax.model.config import ModelConfig
from pfjax.model.transformer import Params, Policy, abstract_params, logical_axes
from pfjax.sampler import engine, options, slots, stream
from pfjax.sampler.buffers import Settings
from pfjax.tasks import data
from pfjax.trainer import actor, behavior, schedules, update_memory
from pfjax.trainer.replay import Replay
from pfjax.trainer.train_fns import TrainFns, shardings_of


def rollout_mesh(c: FrozenConfigDict, mesh: Mesh, model: ModelConfig) -> Mesh:
    """The devices as rollouts group them. Raises ValueError if the model does not divide."""
    out = sharding.regrouped(mesh, c.rollout_tensor)
    try:
        axes, shapes = logical_axes(model), abstract_params(model)
        sharding.rollout_shardings(out, axes, shapes)
    except ValueError as error:
        raise ValueError(
            f"--config.rollout_tensor={c.rollout_tensor}: {error}"
        ) from None
    return out


def behavior_of(c: FrozenConfigDict, responses: behavior.Given) -> behavior.Behavior:
    return behavior.Behavior(
        temperature=c.temperature,
        base=c.behavior.base,
        base_temperature=c.behavior.base_temperature,
        from_file=c.behavior.from_file,
        replay=c.behavior.replay,
        given=responses,
        by_step=schedules.parse(c.schedules),
    )


def plan_sizes(c: FrozenConfigDict, width: int) -> dict[str, Any]:
    """Arguments of `slots.plan_for` that a config decides: of the one rollout of a step, or
    of each stream where responses may be stale.

    Args:
      width: of the longest prompt.
    """
    num_samples = c.prompts_per_step * c.samples_per_prompt
    return {
        "num_prompts": _room(c),
        "samples_per_prompt": c.samples_per_prompt,
        "max_new_tokens": c.max_new_tokens,
        "prompt_width": width,
        "num_slots": c.rollout_slots or None,
        # A stream has room for more than it is to draw at once.
        "most_slots": num_samples if c.max_staleness else None,
    }


def num_drawing_at_once(c: FrozenConfigDict) -> int:
    """Models whose caches are in memory together: where responses may be stale, policy and
    base draw side by side, otherwise in turn."""
    if not c.max_staleness:
        return 1
    of_base = behavior_of(c, {}).counts(0, c.samples_per_prompt)[1]
    return 2 if of_base else 1


class Rollouts(NamedTuple):
    """What draws the responses that steps train on, with what a run never changes bound."""

    mesh: Mesh  # the devices as rollouts group them
    prompts: list[list[int]]  # to train on
    next_prompts: Callable  # number -> indices, ids, next number
    now: Callable  # policy, base, prompts, step, prompt_ids, earlier -> Rollout
    votes: Callable  # averaged policy, prompts, step, prompt_ids -> Rollout
    replay: Replay  # holds responses of earlier steps
    actor: actor.Actor | None  # draws where responses may be stale

    def draw(
        self,
        params: Params,
        policy: Policy,
        base: Callable[[], Policy],
        averaged: Policy | None,
        cursor: actor.Cursor,
        step: int,
    ) -> actor.Drawn:
        """What a step trains on.

        Args:
          params: what is trained of the policy.
          averaged: draws votes, by the programs of the policy.
          cursor: of the steps before.
        """
        if self.actor is not None:
            return self.actor.draw(params, cursor, step)
        indices, ids, _ = self.next_prompts(cursor.end)
        prompts = [self.prompts[i] for i in indices]
        earlier = self.replay.of(indices)
        with jax.set_mesh(self.mesh):
            rollout = self.now(policy, base, prompts, step, ids, earlier)
            self.replay.add(indices, rollout)
            votes = averaged and self.votes(
                averaged, prompts, step=step, prompt_ids=ids
            )
        return actor.Drawn(ids, indices, rollout, votes)


def of_config(
    c: FrozenConfigDict,
    fns: TrainFns,
    meshes: tuple[Mesh, Mesh],
    plan: slots.Plan,
    weights: tuple[Params, Callable[[], Params]],
    train: data.PromptSet,
    responses: behavior.Given,
) -> Rollouts:
    """Builds it.

    Args:
      meshes: of training, and of its devices as rollouts group them.
      plan: of the policy's rollouts.
      weights: the policy's that are not trained (none without adapters), and the base's.
      responses: of `behavior.file`.
    """
    samples = c.samples_per_prompt
    how = {
        "samples_per_prompt": samples,
        "max_new_tokens": c.max_new_tokens,
        "seed": c.seed,
        "capacity": options.Capacity(train.longest(), plan.slots * plan.dp_size),
    }
    mixture, bind = behavior_of(c, responses), functools.partial
    num = {"num": c.prompts_per_step, "seed": c.seed}
    return Rollouts(
        meshes[1],
        train.tokens,
        next_prompts=bind(data.next_prompts, train, **num),
        now=bind(behavior.rollout, behavior=mixture, **how),
        # Others than the policy's, which draws the first so many.
        votes=bind(engine.rollout, samples=range(samples, 2 * samples), **how),
        replay=Replay(samples if mixture.replays else 0),
        actor=actor_of(c, fns, meshes, weights, train, mixture),
    )


def base_policy(fns: TrainFns, frozen: Params, base: Callable[[], Params]) -> Policy:
    """The frozen base, with adapters of zeros where the policy has some, so that one program
    samples from both."""
    if not frozen:
        return Policy(fns.base_model, base())
    adapters = fns.state.params["policy"]
    zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), adapters)
    zeros = jax.jit(zeros, out_shardings=shardings_of(adapters))()
    return Policy(fns.model, lora.join(frozen, zeros))


def _room(c: FrozenConfigDict) -> int:
    """Prompts that are drawn for at once, at most."""
    return (1 + c.max_staleness) * c.prompts_per_step


def _stream_plan(
    c: FrozenConfigDict, fns: TrainFns, mesh: Mesh, where: Mesh, width: int
) -> slots.Plan:
    """Shapes of a stream on `where`, beside an update on `mesh`."""
    device = where.local_devices[0]
    # Where an update has the same devices, caches stay beside it.
    kept = 0 if c.mesh.rollout else update_memory.of_update(fns, mesh, c.remat)
    memory = lambda: (slots.free_bytes(device) - kept) // num_drawing_at_once(c)
    sizes = plan_sizes(c, width)
    return slots.plan_for(fns.model, sharding.kind_of(device), memory, **sizes)


def _streams(
    c: FrozenConfigDict,
    fns: TrainFns,
    base_model: ModelConfig,
    counts: tuple[int, ...],
    plan: slots.Plan,
) -> list[stream.Stream]:
    """What the policy draws, and the base, if it draws some of `counts`."""
    own, others, *_ = counts
    drawn = [(fns.model, c.temperature, range(own))]
    if others:
        samples = range(own, own + others)
        drawn.append((base_model, c.behavior.base_temperature, samples))
    how = (c.seed, c.max_new_tokens, _room(c))
    settings = lambda model: Settings(
        model, plan, c.samples_per_prompt, fns.model.stop_ids
    )
    return [stream.Stream(settings(model), *how, *rest) for model, *rest in drawn]


def actor_of(
    c: FrozenConfigDict,
    fns: TrainFns,
    meshes: tuple[Mesh, Mesh],
    weights: tuple[Params, Callable[[], Params]],
    train: data.PromptSet,
    mixture: behavior.Behavior,
) -> actor.Actor | None:
    """What draws where responses may be stale; see `of_config`."""
    if not c.max_staleness:
        return None
    (mesh, grouped), (frozen, base) = meshes, weights
    where = grouped
    if c.mesh.rollout:
        where = sharding.rollout_mesh(c.mesh.rollout, grouped.shape["tensor"])
    counts = mixture.counts(0, c.samples_per_prompt)
    base_model = fns.model if frozen else fns.base_model
    of_stream = functools.partial(_stream_plan, c, fns, mesh, where, train.longest())
    plan = functools.cache(of_stream)  # of all rounds

    def send_base() -> Params:
        model, params = base_policy(fns, frozen, base)
        return actor.sender(model, {}, grouped, where)(params)

    if c.mesh.rollout and counts[1]:
        # Once, and not from a thread: the learner's devices have their part in it.
        send_base = functools.partial(lambda params: params, send_base())

    def join(
        drawn: list[Rollout], indices: list[int], ids: list[int], step: int
    ) -> Rollout:
        of_prompts = (
            [train.tokens[i] for i in indices],
            [(c.seed, step, i) for i in ids],
        )
        how = (mixture.given, None, c.max_new_tokens, fns.model.stop_ids)
        joined = behavior.join(drawn, counts, *of_prompts, *how)
        return joined._replace(alpha=dial.draw(fns.model.alpha_range, c.seed, ids))

    return actor.Actor(
        where,
        lambda: _streams(c, fns, base_model, counts, plan()),
        actor.sender(fns.model, frozen, grouped, where),
        send_base,
        join,
        lambda ids: data.indices_of(train, ids, c.seed),
        train.tokens,
        prompts_per_step=c.prompts_per_step,
        num_steps=c.num_steps,
        checkpoint_every=c.checkpoint_every,
        eval_every=c.eval_every if c.data.eval or c.data.target else 0,
        max_staleness=c.max_staleness,
        ahead=actor.AHEAD if c.mesh.rollout else 0,
    )

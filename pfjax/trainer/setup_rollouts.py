"""Builds what draws the responses of a run, from its config."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from pfjax.batch import Rollout
from pfjax.infra import sharding
from pfjax.model import dial, lora
from pfjax.model.config import ModelConfig
from pfjax.model.transformer import Params, Policy, abstract_params, logical_axes
from pfjax.sampler import decode, slots, stream
from pfjax.tasks import data
from pfjax.trainer import actor, behavior, schedules, update_memory
from pfjax.trainer.actor import Actor
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


def on_mesh(mesh: Mesh) -> Callable[[Callable], Callable]:
    """Has functions run with this mesh as the current one."""

    def of(f: Callable) -> Callable:
        @functools.wraps(f)
        def run(*args, **kwargs):
            with jax.set_mesh(mesh):
                return f(*args, **kwargs)

        return run

    return of


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


def has_replay(c: FrozenConfigDict) -> bool:
    return bool(c.behavior.replay or "behavior.replay" in schedules.parse(c.schedules))


def plan_of(c: FrozenConfigDict, policy: Policy, width: int) -> slots.Plan:
    return slots.make_plan(
        policy,
        num_prompts=c.prompts_per_step,
        samples_per_prompt=c.samples_per_prompt,
        max_new_tokens=c.max_new_tokens,
        prompt_width=width,
        num_slots=c.rollout_slots or None,
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


def actor_of(
    c: FrozenConfigDict,
    fns: TrainFns,
    meshes: tuple[Mesh, Mesh],
    frozen: Params,
    base: Callable[[], Params],
    train: data.PromptSet,
    longest: int,
    responses: behavior.Given,
) -> Actor | None:
    """What draws where responses may be stale.

    Args:
      meshes: of training, and of its devices as rollouts group them.
    """
    if not c.max_staleness:
        return None
    mesh, where = meshes
    if c.mesh.rollout:
        where = sharding.rollout_mesh(c.mesh.rollout, where.shape["tensor"])
    room = (1 + c.max_staleness) * c.prompts_per_step
    mixture = behavior_of(c, responses)
    counts = mixture.counts(0, c.samples_per_prompt)
    own, others, *_ = counts

    @functools.cache
    def plan() -> slots.Plan:
        device = where.local_devices[0]
        # Where an update has the same devices, caches stay beside it.
        kept = 0 if c.mesh.rollout else update_memory.of_update(fns, mesh, c.remat)
        return slots.plan_for(
            fns.model,
            device.platform,
            lambda: (slots.free_bytes(device) - kept) // (2 if others else 1),
            num_prompts=room,
            samples_per_prompt=c.samples_per_prompt,
            max_new_tokens=c.max_new_tokens,
            prompt_width=longest,
            num_slots=c.rollout_slots or None,
            most_slots=c.prompts_per_step * c.samples_per_prompt,
        )

    def stream_of(model: ModelConfig, *how: Any) -> stream.Stream:
        stop_ids = fns.model.stop_ids
        settings = decode.Settings(model, plan(), c.samples_per_prompt, stop_ids)
        return stream.Stream(settings, c.seed, c.max_new_tokens, room, *how)

    def make_streams() -> list[stream.Stream]:
        out = [stream_of(fns.model, c.temperature, range(own))]
        if others:
            model = fns.model if frozen else fns.base_model
            samples = range(own, own + others)
            out.append(stream_of(model, c.behavior.base_temperature, samples))
        return out

    def send_base() -> Params:
        model, params = base_policy(fns, frozen, base)
        return actor.sender(model, {}, meshes[1], where)(params)

    if c.mesh.rollout and others:
        # Once, and not from a thread: the learner's devices have their part in it.
        send_base = functools.partial(lambda weights: weights, send_base())

    def join(
        drawn: list[Rollout], indices: list[int], ids: list[int], step: int
    ) -> Rollout:
        prompts = [tuple(train.tokens[i]) for i in indices]
        known = [mixture.given[p] for p in prompts] if counts[2] else None
        seeds = [(c.seed, step, i) for i in ids]
        how = (seeds, c.max_new_tokens, fns.model.stop_ids)
        joined = behavior.join(drawn, counts, (known, None), *how)
        return joined._replace(alpha=dial.draw(fns.model.alpha_range, c.seed, ids))

    return Actor(
        where,
        make_streams,
        actor.sender(fns.model, frozen, meshes[1], where),
        send_base,
        join,
        lambda ids: data.indices_of(train, ids, c.seed),
        train.tokens,
        prompts_per_step=c.prompts_per_step,
        num_steps=c.num_steps,
        checkpoint_every=c.checkpoint_every,
        max_staleness=c.max_staleness,
        ahead=actor.AHEAD if c.mesh.rollout else 0,
    )

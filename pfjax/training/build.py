"""Everything a run needs, built from its config."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh

from pfjax import packing, sharding
from pfjax.policy import hf, hf_config, lora, model, partition, tokenizer
from pfjax.sampling import slots
from pfjax.training import checks, data, optim, step


class Run(NamedTuple):
    """What stays the same during a run."""

    config: ml_collections.FrozenConfigDict
    mesh: Mesh
    tok: Any
    train: data.PromptSet
    eval: data.PromptSet | None
    stop_ids: tuple[int, ...]
    prompt_width: int
    rollout_plan: slots.Plan
    micro_batches: int  # that always suffice for an update
    row_slots: int  # trajectories a row may hold
    step_config: step.StepConfig
    base_config: model.ModelConfig
    base: model.Params  # frozen, in the type of the computation
    frozen: model.Params  # what the policy shares with it: all of it, or nothing
    train_step: Any  # jitted
    score_step: Any  # jitted


def build(
    config: ml_collections.FrozenConfigDict, mesh: Mesh
) -> tuple[Run, step.TrainState]:
    """Everything a run needs, cheap and fallible things first."""
    source = hf.resolve(config.model)
    model_config = hf_config.read(source)
    tok = tokenizer.load(source)
    load = functools.partial(
        data.load_prompts,
        tok=tok,
        max_prompt_tokens=config.data.max_prompt_tokens,
        suffix=config.data.suffix,
    )
    train = load(config.data.train)
    held_out = config.data.eval and load(config.data.eval)
    longest = max(len(p) for s in (train, held_out or train) for p in s.tokens)
    max_length = longest + config.max_new_tokens
    checks.check_lengths(config, longest, model_config.max_positions)

    policy = hf.load(source, mesh)
    base_config = dataclasses.replace(policy.config, dtype=config.dtype)
    model_config, trained = base_config, policy.params
    if config.lora.rank:
        model_config = dataclasses.replace(
            base_config, lora_rank=config.lora.rank, lora_alpha=config.lora.alpha
        )
        trained = _init_adapters(model_config, config.seed, mesh)
    # A copy, since training gives the buffers of its parameters away.
    base = jax.tree.map(lambda x: jnp.array(x, config.dtype), policy.params)
    optimizer = optim.make_optimizer(optim.OptimConfig(**config.optim))
    state, shardings = _init_state(trained, model_config, optimizer, config, mesh)
    step_config = step.StepConfig(
        model=model_config,
        objective=config.objective,
        alpha=config.alpha,
        weight_low=config.importance.low,
        weight_high=config.importance.high,
        remat=config.remat,
    )
    everywhere = sharding.replicated(mesh)
    prompts_per_update = -(-config.prompts_per_step // config.updates_per_rollout)
    run = Run(
        config=config,
        mesh=mesh,
        tok=tok,
        train=train,
        eval=held_out or None,
        stop_ids=tokenizer.stop_ids(tok, model_config.stop_ids),
        prompt_width=longest,
        rollout_plan=slots.make_plan(
            model.Policy(model_config, lora.join(base, trained)),
            num_prompts=config.prompts_per_step,
            samples_per_prompt=config.samples_per_prompt,
            max_new_tokens=config.max_new_tokens,
            prompt_width=longest,
            num_slots=config.rollout_slots or None,
        ),
        micro_batches=packing.max_micro_batches(
            prompts_per_update * config.samples_per_prompt,
            max_length,
            config.rows,
            config.row_length,
        ),
        row_slots=packing.slots_per_row(config.row_length, max_length),
        step_config=step_config,
        base_config=base_config,
        base=base,
        frozen=base if config.lora.rank else {},
        train_step=jax.jit(
            functools.partial(step.train_step, config=step_config, optimizer=optimizer),
            donate_argnums=0,
            out_shardings=(shardings, everywhere, everywhere),
        ),
        score_step=jax.jit(
            step.score_step, static_argnames="config", out_shardings=everywhere
        ),
    )
    return run, state


def policy_of(run: Run, state: step.TrainState) -> model.Policy:
    """The policy as it is now."""
    params = lora.join(run.frozen, state.params["policy"])
    return model.Policy(run.step_config.model, params)


def _init_adapters(config: model.ModelConfig, seed: int, mesh: Mesh) -> model.Params:
    axes = lora.select(model.logical_axes(config))
    shapes = lora.select(model.abstract_params(config))
    where = sharding.tree_shardings(mesh, axes, shapes)
    init = functools.partial(lora.init_params, config)
    return jax.jit(init, out_shardings=where)(jax.random.key(seed))


def _init_state(
    params: model.Params,
    model_config: model.ModelConfig,
    optimizer: optax.GradientTransformation,
    config: ml_collections.FrozenConfigDict,
    mesh: Mesh,
) -> tuple[step.TrainState, step.TrainState]:
    """The state before the first update, and the sharding of each of its parts."""
    everywhere = sharding.replicated(mesh)
    head = partition.init_params(model_config.embed_dim, jax.random.key(config.seed))
    params = {"policy": params, "log_z": jax.device_put(head, everywhere)}
    of_params = jax.tree.map(lambda x: x.sharding, params)
    # Each group's chain holds a MaskedNode in place of the other group.
    is_masked = lambda x: isinstance(x, optax.MaskedNode)
    # Left to itself jit would put the moments on one device.
    of_opt = optax.tree.map_params(
        optimizer,
        lambda x, s: x if is_masked(x) else s,
        jax.eval_shape(optimizer.init, params),
        of_params,
        transform_non_params=lambda _: everywhere,
        is_leaf=is_masked,
    )
    opt_state = jax.jit(optimizer.init, out_shardings=of_opt)(params)
    start = jax.device_put(jnp.int32(0), everywhere)
    state = step.TrainState(start, params, opt_state)
    return state, step.TrainState(everywhere, of_params, of_opt)


def describe(run: Run) -> str:
    """What follows from the two batch numbers, for the start of the log."""
    c, m = run.config, run.step_config.model
    responses = c.prompts_per_step * c.samples_per_prompt
    parameters = sum(x.size for x in jax.tree.leaves(model.abstract_params(m)))
    sizes = " x ".join(f"{k} {v}" for k, v in run.mesh.shape.items())
    return (
        f"{c.model}: {parameters / 1e6:.2f} M parameters on {run.mesh.size} "
        f"{jax.devices()[0].platform} device(s), mesh {sizes}\n"
        f"{c.objective}, alpha {c.alpha:g}: {c.prompts_per_step} prompts x "
        f"{c.samples_per_prompt} samples = {responses} responses a step, "
        f"{c.updates_per_rollout} update(s) of at most {run.micro_batches} micro-"
        f"batches of {c.rows} x {c.row_length} tokens\n"
        f"rollouts: {run.rollout_plan}\n"
        f"{len(run.train.tokens)} training prompts, "
        f"{len(run.eval.tokens) if run.eval else 0} for evaluation"
    )

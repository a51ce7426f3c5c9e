"""Everything a run needs, built from its config."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from pfjax import objectives
from pfjax.batch import OldScores, PackedBatch, max_micro_batches, slots_per_row
from pfjax.infra import sharding
from pfjax.model import (
    attention,
    attention_check,
    hf,
    hf_config,
    lora,
    tokenizer,
    transformer,
)
from pfjax.sampler import slots
from pfjax.tasks import data
from pfjax.trainer import optim, settings, step
from pfjax.trainer.log_z import init_head


class Programs(NamedTuple):
    """What devices run in an update, and the shapes it takes."""

    step_config: step.StepConfig
    base_config: transformer.ModelConfig
    optimizer: optax.GradientTransformation
    state: step.TrainState  # shapes and shardings
    base: transformer.Params  # shapes and shardings, of the type of the computation
    rows: int  # B
    row_slots: int  # N, trajectories a row may hold
    micro_batches: int  # M that always suffice for an update
    train_step: Any  # jitted
    score_step: Any  # jitted


class Run(NamedTuple):
    """What stays the same during a run."""

    config: ml_collections.FrozenConfigDict
    mesh: Mesh
    tok: Any
    train: data.PromptSet
    eval: data.PromptSet | None
    target: data.TargetSamples | None
    stop_ids: tuple[int, ...]
    prompt_width: int
    rollout_plan: slots.Plan
    programs: Programs
    base: transformer.Params  # frozen; see `base_on_devices`
    frozen: transformer.Params  # what the policy shares with it: all of it, or nothing
    fingerprint: str  # of the base's files


def programs(
    config: ml_collections.FrozenConfigDict,
    base_config: transformer.ModelConfig,
    longest_prompt: int,
    mesh: Mesh | AbstractMesh,
    stop_ids: tuple[int, ...] = (),
) -> Programs:
    """The programs of a config for the devices of `mesh`, which need not be here.

    Args:
      config: of the run.
      base_config: of the checkpoint.
      longest_prompt: in tokens.
      mesh: not current (see `jax.set_mesh`) if its devices are not here.
      stop_ids: tokens that end a response; the checkpoint's when not given.
    """
    base_config = dataclasses.replace(
        base_config, dtype=config.dtype, attention=config.attention
    )
    axes, shapes = (
        transformer.logical_axes(base_config),
        transformer.abstract_params(base_config),
    )
    base = placed(shapes, sharding.tree_shardings(mesh, axes, shapes), config.dtype)
    policy_config = base_config
    if config.lora.rank:
        policy_config = dataclasses.replace(
            base_config, lora_rank=config.lora.rank, lora_alpha=config.lora.alpha
        )
        axes = lora.select(transformer.logical_axes(policy_config))
        shapes = lora.select(transformer.abstract_params(policy_config))
    trained = placed(shapes, sharding.tree_shardings(mesh, axes, shapes), "float32")
    optimizer = optim.make_optimizer(optim.OptimConfig(**config.optim))
    state = _abstract_state(trained, policy_config, optimizer, mesh)
    step_config = step.StepConfig(
        model=policy_config,
        objective=config.objective,
        coefficients=objectives.Coefficients(
            alpha=config.alpha,
            beta=config.flowrl_beta,
            kl=config.reward_kl,
            low=config.importance.low,
            high=config.importance.high,
        ),
        keep_band=config.importance.keep_band,
        stop_ids=stop_ids or base_config.stop_ids,
        remat=config.remat,
    )
    max_length = longest_prompt + config.max_new_tokens
    prompts_per_update = -(-config.prompts_per_step // config.updates_per_rollout)
    rows = config.rows * sharding.batch_ways(mesh)
    everywhere = sharding.replicated(mesh)
    return Programs(
        step_config=step_config,
        base_config=base_config,
        optimizer=optimizer,
        state=state,
        base=base,
        rows=rows,
        row_slots=slots_per_row(config.row_length, max_length),
        micro_batches=max_micro_batches(
            prompts_per_update * config.samples_per_prompt,
            max_length,
            rows,
            config.row_length,
        ),
        train_step=jax.jit(
            functools.partial(step.train_step, config=step_config, optimizer=optimizer),
            donate_argnums=0,
            out_shardings=(_shardings(state), everywhere, everywhere),
        ),
        score_step=jax.jit(
            step.score_step,
            static_argnames=("config", "stop_ids", "with_certainty"),
            out_shardings=everywhere,
        ),
    )


def abstract_batch(
    made: Programs, config: ml_collections.FrozenConfigDict, mesh: Mesh | AbstractMesh
) -> tuple[PackedBatch, OldScores, Any]:
    """Shapes of what an update is given: rows, scores from before, their number."""
    m, b, t, n = made.micro_batches, made.rows, config.row_length, made.row_slots
    whole = sharding.replicated(mesh)

    def array(last: int, dtype: str, where: NamedSharding | None = None) -> Any:
        split = NamedSharding(
            mesh, sharding.spec(mesh, (None, "batch", None), (m, b, 1))
        )
        return jax.ShapeDtypeStruct((m, b, last), dtype, sharding=where or split)

    batch = PackedBatch(
        tokens=array(t, "int32"),
        positions=array(t, "int32"),
        segment_ids=array(t, "int32"),
        is_response=array(t, "bool"),
        length=array(n, "int32"),
        psi=array(n, "float32"),
        prompt_index=array(n, "int32"),
        is_real=array(n, "bool"),
    )
    has_old = config.updates_per_rollout > 1
    objective = objectives.OBJECTIVES[config.objective]
    source = objectives.log_z_of(config.objective, config.log_z)
    old = OldScores(
        log_p_base=array(t, "float32", whole),
        log_p_old=array(t, "float32", whole) if has_old else None,
        is_on_policy=jax.ShapeDtypeStruct((m,), bool) if has_old else None,
        log_z=array(n, "float32", whole) if source == "group" else None,
        advantage=array(n, "float32") if objective.reward else None,
        log_stop_base=array(t, "float32", whole) if objective.has_prefixes else None,
    )
    return batch, old, jax.ShapeDtypeStruct((), "int32")


def build(
    config: ml_collections.FrozenConfigDict, mesh: Mesh
) -> tuple[Run, step.TrainState]:
    """Everything a run needs, cheap and fallible things first."""
    source = hf.resolve(config.model)
    base_config = hf_config.read(source)
    tok = tokenizer.load(source)
    load = functools.partial(
        data.load_prompts,
        tok=tok,
        max_prompt_tokens=config.data.max_prompt_tokens,
        suffix=config.data.suffix,
    )
    train = load(config.data.train)
    held_out = config.data.eval and load(config.data.eval)
    if held_out:
        data.warn_of_overlap(train, held_out)
    target = config.data.target or None
    if target:
        target = data.load_target(target, config.alpha)
    settings.check_answers(config, [p.gold for p in train.problems])
    longest = max(len(p) for s in (train, held_out or train) for p in s.tokens)
    settings.check_lengths(config, longest, base_config.max_positions)
    stop_ids = tokenizer.stop_ids(tok, base_config.stop_ids)
    made = programs(config, base_config, longest, mesh, stop_ids)
    attention_check.check(made.base_config, mesh, made.row_slots + 1)

    policy = hf.load(source, mesh)
    trained = policy.params
    if config.lora.rank:
        init = functools.partial(lora.init_params, made.step_config.model)
        where = _shardings(made.state.params["policy"])
        trained = jax.jit(init, out_shardings=where)(jax.random.key(config.seed))
    # A copy, since training gives the buffers of its parameters away.
    base = jax.tree.map(lambda x: jnp.array(x, config.dtype), policy.params)
    if config.base_memory == "host":
        to_host = lambda x: x.sharding.with_memory_kind("pinned_host")
        base = jax.device_put(base, jax.tree.map(to_host, base))
    state = first_state(made, trained, config.seed, mesh)
    run = Run(
        config=config,
        mesh=mesh,
        tok=tok,
        train=train,
        eval=held_out or None,
        target=target,
        stop_ids=stop_ids,
        prompt_width=longest,
        rollout_plan=slots.make_plan(
            transformer.Policy(made.step_config.model, lora.join(base, trained)),
            num_prompts=config.prompts_per_step,
            samples_per_prompt=config.samples_per_prompt,
            max_new_tokens=config.max_new_tokens,
            prompt_width=longest,
            num_slots=config.rollout_slots or None,
        ),
        programs=made,
        base=base,
        frozen=base if config.lora.rank else {},
        fingerprint=hf.fingerprint(source),
    )
    return run, state


def base_on_devices(run: Run) -> transformer.Params:
    """The frozen base where programs read it: a copy if it waits in host memory."""
    if run.config.base_memory == "device":
        return run.base
    return jax.device_put(run.base, _shardings(run.programs.base))


def policy_of(run: Run, state: step.TrainState) -> transformer.Policy:
    """The policy as it is now."""
    params = lora.join(run.frozen, state.params["policy"])
    return transformer.Policy(run.programs.step_config.model, params)


def placed(shapes: Any, shardings: Any, dtype: str | None = None) -> Any:
    """Shapes with the places that arrays of them shall have."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=s),
        shapes,
        shardings,
    )


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)


def _abstract_state(
    trained: transformer.Params,
    config: transformer.ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | AbstractMesh,
) -> step.TrainState:
    """Shapes and shardings of all that an update changes."""
    everywhere = sharding.replicated(mesh)
    replicated = lambda tree: placed(tree, jax.tree.map(lambda _: everywhere, tree))
    head = jax.eval_shape(lambda: init_head(config.embed_dim, jax.random.key(0)))
    params = {"policy": trained, "log_z": replicated(head)}
    # Each group's chain holds a MaskedNode in place of the other group.
    is_masked = lambda x: isinstance(x, optax.MaskedNode)
    # Left to itself jit would put the moments on one device.
    moments = jax.eval_shape(optimizer.init, params)
    where = optax.tree.map_params(
        optimizer,
        lambda x, s: x if is_masked(x) else s,
        moments,
        _shardings(params),
        transform_non_params=lambda _: everywhere,
        is_leaf=is_masked,
    )
    start = replicated(jax.ShapeDtypeStruct((), jnp.int32))
    return step.TrainState(start, params, placed(moments, where))


def first_state(
    made: Programs, trained: transformer.Params, seed: int, mesh: Mesh
) -> step.TrainState:
    """The state before the first update."""
    everywhere = sharding.replicated(mesh)
    width = made.base_config.embed_dim
    head = init_head(width, jax.random.key(seed))
    params = {"policy": trained, "log_z": jax.device_put(head, everywhere)}
    init = jax.jit(made.optimizer.init, out_shardings=_shardings(made.state.opt_state))
    start = jax.device_put(jnp.int32(0), everywhere)
    return step.TrainState(start, params, init(params))


def describe(run: Run) -> str:
    """What follows from the two batch numbers, for the start of the log."""
    c, m, made = run.config, run.programs.step_config.model, run.programs
    responses = c.prompts_per_step * c.samples_per_prompt
    parameters = sum(x.size for x in jax.tree.leaves(transformer.abstract_params(m)))
    sizes = " x ".join(f"{k} {v}" for k, v in run.mesh.shape.items())
    return (
        f"{c.model}: {parameters / 1e6:.2f} M parameters on {run.mesh.size} "
        f"{jax.devices()[0].platform} device(s), mesh {sizes}\n"
        f"{c.objective}, alpha {c.alpha:g}: {c.prompts_per_step} prompts x "
        f"{c.samples_per_prompt} samples = {responses} responses a step, "
        f"{c.updates_per_rollout} update(s) of at most {made.micro_batches} micro-"
        f"batches of {made.rows} x {c.row_length} tokens\n"
        f"attention: {attention.chosen(m.attention, m.head_dim, m.dtype)}; layers computed again: {c.remat}\n"
        f"rollouts: {run.rollout_plan}\n"
        f"{len(run.train.tokens)} training prompts, "
        f"{len(run.eval.tokens) if run.eval else 0} for evaluation"
    )

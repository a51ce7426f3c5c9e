"""Jitted functions of an update, for the devices of any mesh, present or abstract."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from pfjax import batch, packing, targets
from pfjax.batch import PackedBatch, PackShape
from pfjax.infra import sharding
from pfjax.infra.sharding import AnyMesh
from pfjax.model import attention, dial, experts, lora, scoring, transformer
from pfjax.model.config import ModelConfig
from pfjax.model.transformer import Params
from pfjax.objectives import ObjectiveConfig
from pfjax.tasks import rewards
from pfjax.trainer import optim, step, update_memory
from pfjax.trainer.log_z import init_head
from pfjax.trainer.objective import of_config


class TrainFns(NamedTuple):
    """Jitted functions of an update, and shapes and shardings of what they take."""

    model: ModelConfig  # of the policy
    base_model: ModelConfig
    objective: ObjectiveConfig
    num_updates: int  # per step
    shape: PackShape
    has_dropout: bool  # of what adapters read, in the update's pass
    learning_rate: optax.Schedule  # of the policy, by the steps before
    state: step.TrainState  # shapes and shardings
    base: Params  # shapes and shardings, in the type of the computation
    init_opt_state: Any  # this one and what follows are jitted
    score_base: Any
    score_policy: Any
    train_step: Any


def train_fns(
    config: FrozenConfigDict,
    start: ModelConfig,
    longest_prompt: int,
    mesh: AnyMesh,
    base_model: ModelConfig | None = None,
    own_objective: Any = None,
) -> TrainFns:
    """Builds them from a config for the devices of `mesh`. If these are absent, it must
    not be current (see `jax.set_mesh`).

    Args:
      start: of the checkpoint that the policy starts from.
      base_model: of the frozen base, where that is another.
      own_objective: see `objective.of_config`.
    """
    if mesh.shape["expert"] > 1 and not start.experts:
        raise ValueError(
            f"--config.mesh.expert={mesh.shape['expert']}: models of the family "
            f"{start.model_type} have no experts; --config.mesh.fsdp splits their weights"
        )
    if config.replay_experts:
        _check_choices(start)
    same = {"dtype": config.dtype, "attention": config.attention}
    same["replays_experts"] = config.replay_experts
    start = dataclasses.replace(start, **same)
    base_model = dataclasses.replace(base_model or start, **same)
    model = policy_model(config, start)
    trained = trained_params(model, mesh)
    learning_rate, optimizer = optimizer_of(config)
    state = _abstract_state(trained, model, optimizer, mesh)
    base = _abstract_params(base_model, mesh, config.dtype)
    objective, stop_ids = of_config(config, own_objective), start.stop_ids
    whole, bind = sharding.replicated(mesh), functools.partial
    of_state, kind = shardings_of(state), objective.kind
    stops = stop_ids if kind.has_prefixes else ()
    score_base = bind(step.score_step, model=base_model, stop_ids=stops)
    if eta := objective.eta_cutoff:
        rare = lambda _p, _h, log_p, entropy, _b: targets.rare(log_p, entropy, eta)
        score_base = bind(score_base, of_token=rare)
    term = rewards.token_term(objective.reward_source)
    of_token = scoring.TOKEN_REWARDS[term.name].of_token if term else None
    score_policy = bind(step.score_step, model=model, of_token=of_token)
    static = {"model": model, "objective": objective, "stop_ids": stop_ids}
    static |= {"optimizer": optimizer, "remat": config.remat}
    static |= {"dropout": config.lora.dropout}
    train_step = bind(step.train_step, **static)
    return TrainFns(
        model=model,
        base_model=base_model,
        objective=objective,
        num_updates=config.updates_per_rollout,
        shape=_pack_shape(config, longest_prompt, mesh, model, state, base),
        has_dropout=config.lora.dropout > 0,
        learning_rate=learning_rate,
        state=state,
        base=base,
        init_opt_state=jax.jit(optimizer.init, out_shardings=of_state.opt_state),
        score_base=jax.jit(score_base, out_shardings=whole),
        score_policy=jax.jit(score_policy, out_shardings=whole),
        train_step=jax.jit(
            train_step, out_shardings=(of_state, whole, whole, whole), donate_argnums=0
        ),
    )


def _check_choices(model: ModelConfig) -> None:
    """Raises ValueError for a model whose choices of experts cannot be recorded."""
    most = model.experts.num_experts if model.experts else 0
    said = f"models of the family {model.model_type} have no experts"
    if most > experts.UNKNOWN:
        said = f"{most} experts in a layer, at most {experts.UNKNOWN} can be recorded"
    if not 0 < most <= experts.UNKNOWN:
        raise ValueError(f"--config.replay_experts: {said}")


def optimizer_of(
    c: FrozenConfigDict,
) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """The policy's learning rate by steps, and what goes by it."""
    rate = functools.partial(
        optim.rate, warmup_steps=c.optim.warmup_steps, num_steps=c.num_steps
    )
    of_policy = rate(c.optim.schedule, c.optim.learning_rate)
    # That of log Z' stays: it has to follow the policy to the end, as an error of log Z'
    # acts as a reward on length.
    of_log_z = rate("constant", c.optim.log_z_learning_rate)
    return of_policy, optim.make_optimizer(
        of_policy,
        of_log_z,
        weight_decay=c.optim.weight_decay,
        clip_norm=c.optim.clip_norm,
        mu_dtype=c.optim.mu_dtype,
        updates_per_step=c.updates_per_rollout,
        average_decay=c.teacher_decay,
    )


def policy_model(config: FrozenConfigDict, base_model: ModelConfig) -> ModelConfig:
    """The base with the adapters that are trained beside it, if any.

    Raises:
      ValueError: if they are asked for on projections that it has not, or as no file of
        peft's could hold them.
    """
    if not config.lora.rank:
        return base_model
    targets, own = lora.projections(config.lora.targets), base_model.block.projections
    if absent := tuple(x for x in targets if x not in own):
        has = lambda names: ",".join(lora.target_names(tuple(names)))
        raise ValueError(
            f"--config.lora.targets={config.lora.targets}: models of the family "
            f"{base_model.model_type} have no {has(absent)}; give some of {has(own)}"
        )
    if of_experts := [x for x in targets if own[x].stacked]:
        _check_experts_adapters(config, of_experts)
        if config.alpha_range:
            raise ValueError(
                f"--config.alpha_range={config.alpha_range}: adapters of experts have no "
                "scale that depends on alpha; leave gate_proj, up_proj and down_proj out of "
                "--config.lora.targets"
            )
    return dataclasses.replace(
        base_model,
        lora_rank=config.lora.rank,
        lora_alpha=config.lora.alpha,
        lora_targets=targets,
        alpha_range=dial.parse(config.alpha_range),
    )


def _check_experts_adapters(config: FrozenConfigDict, targets: list[str]) -> None:
    """Raises ValueError for adapters of experts that peft does not load, or only warns of."""
    if config.lora.dropout:
        raise ValueError(
            f"--config.lora.dropout={config.lora.dropout}: peft has none in adapters of "
            "experts; leave it out, or gate_proj, up_proj and down_proj in "
            "--config.lora.targets"
        )
    if targets not in (["w_down"], ["w_gate", "w_up", "w_down"]):
        raise ValueError(
            f"--config.lora.targets={config.lora.targets}: of experts peft loads adapters "
            "of gate_proj,up_proj,down_proj together, or of down_proj alone"
        )


def trained_params(model: ModelConfig, mesh: AnyMesh) -> Params:
    """Shapes and shardings of what is trained of a policy."""
    params = _abstract_params(model, mesh, "float32")
    return lora.select(params) if model.lora_rank else params


def _pack_shape(
    c: FrozenConfigDict,
    longest_prompt: int,
    mesh: AnyMesh,
    model: ModelConfig,
    state: step.TrainState,
    base: Params,
) -> PackShape:
    """A shape that fits the responses of any update."""
    max_length, length = longest_prompt + c.max_new_tokens, c.pack_length
    with jax.sharding.use_abstract_mesh(getattr(mesh, "abstract_mesh", mesh)):
        how = (model.attention, model.head_dim, model.dtype)
        for window in model.windows:
            attention.check_shared(attention.chosen(*how, window), length)
    responses = -(-c.prompts_per_step // c.updates_per_rollout) * c.samples_per_prompt
    ways = sharding.batch_ways(mesh)
    number = lambda rows: packing.max_microbatches(responses, max_length, rows, length)
    rows = c.microbatch_size or update_memory.rows_that_fit(
        model,
        mesh,
        pack_length=length,
        most=number(ways),
        remat=c.remat,
        param_bytes=sharding.part_bytes(state.params),
        resident_bytes=sharding.part_bytes((state, {} if c.offload_ref else base)),
    )
    segments = packing.segments_per_row(length, max_length)
    sizes = (number(rows * ways), rows * ways, length, segments)
    return PackShape(*sizes, model.num_choices)


# Scores that the host gives.
_FROM_HOST = ("reward", "dropout_seed", "choices", "alpha")


def abstract_minibatch(
    fns: TrainFns, mesh: AnyMesh
) -> tuple[PackedBatch, jax.ShapeDtypeStruct]:
    """Shapes and shardings of what an update is given: a packed batch and its scores, and
    the number of micro-batches."""
    is_scored = {
        "log_p_old": fns.num_updates > 1,
        "is_on_policy": fns.num_updates > 1,
        "log_z": fns.objective.log_z_source == "group",
        "reward": bool(fns.objective.reward_source),
        "log_stop_base": fns.objective.kind.has_prefixes,
        "dropout_seed": fns.has_dropout,
        "choices": fns.shape.num_choices > 0,
        "alpha": bool(fns.model.alpha_range),
        "log_p_rare": fns.objective.eta_cutoff > 0,
    }
    fields = {}
    for name, (dims, dtype, _) in batch.PACKED._asdict().items():
        shape = fns.shape.of(dims)
        where = sharding.replicated(mesh)  # as programs return scores
        if name not in batch.SCORES or name in _FROM_HOST:
            where = sharding.of_batch(mesh, shape, dim=1)
        if is_scored.get(name, True):
            fields[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=where)
    return PackedBatch(**fields), jax.ShapeDtypeStruct((), "int32")


def _abstract_params(model: ModelConfig, mesh: AnyMesh, dtype: str) -> Params:
    """Shapes and shardings of a model's parameters."""
    axes, shapes = transformer.logical_axes(model), transformer.abstract_params(model)
    return placed(shapes, sharding.tree_shardings(mesh, axes, shapes), dtype)


def placed(shapes: Any, shardings: Any, dtype: str | None = None) -> Any:
    """Adds shardings, and perhaps a type, to a tree of shapes."""
    one = lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=s)
    return jax.tree.map(one, shapes, shardings)


def shardings_of(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)


def _abstract_state(
    trained: Params,
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: AnyMesh,
) -> step.TrainState:
    """Shapes and shardings of all that an update changes."""
    everywhere = sharding.replicated(mesh)
    replicated = lambda tree: placed(tree, jax.tree.map(lambda _: everywhere, tree))
    init = functools.partial(init_head, alpha_range=model.alpha_range)
    head = jax.eval_shape(lambda: init(model.embed_dim, jax.random.key(0)))
    params = {"policy": trained, "log_z": replicated(head)}
    # Each group's chain holds a MaskedNode in place of the other group.
    is_masked = lambda x: isinstance(x, optax.MaskedNode)
    # Left to itself jit would put the moments on one device.
    moments = jax.eval_shape(optimizer.init, params)
    where = optax.tree.map_params(
        optimizer,
        lambda x, s: x if is_masked(x) else s,
        moments,
        shardings_of(params),
        transform_non_params=lambda _: everywhere,
        is_leaf=is_masked,
    )
    start = replicated(jax.ShapeDtypeStruct((), jnp.int32))
    return step.TrainState(start, params, placed(moments, where))


def first_state(
    fns: TrainFns, trained: Params, seed: int, mesh: Mesh
) -> step.TrainState:
    """The state before the first update."""
    everywhere = sharding.replicated(mesh)
    key, ends = jax.random.key(seed), fns.model.alpha_range
    head = init_head(fns.model.embed_dim, key, ends)
    head, start = jax.device_put((head, jnp.int32(0)), everywhere)
    params = {"policy": trained, "log_z": head}
    return step.TrainState(start, params, fns.init_opt_state(params))

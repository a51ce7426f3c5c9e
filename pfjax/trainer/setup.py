"""Builds what a run needs from its config; what it builds reads none."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from pfjax.evaluation import elbo, scores
from pfjax.model import (
    attention,
    attention_check,
    hf,
    hf_config,
    lora,
    tokenizer,
    transformer,
)
from pfjax.model.transformer import Params, Policy
from pfjax.sampler import engine, options, slots
from pfjax.tasks import data, rewards
from pfjax.trainer import diagnostics, minibatch, settings, step
from pfjax.trainer.train_fns import TrainFns, first_state, shardings_of, train_fns


class Trainer(NamedTuple):
    """Functions of one iteration in call order, what a run never changes bound."""

    next_prompts: Callable  # cursor -> indices, ids, cursor
    rollout: Callable  # policy, indices, ids, step -> Rollout
    compute_rewards: Callable  # indices, rollout, grader -> RolloutBatch
    base: Callable[[], Params]  # the frozen base, on the devices
    prepare_minibatch: Callable  # see `minibatch`
    init_log_z: Callable | None  # parameters of the head, minibatches -> parameters
    train_step: Callable  # state, minibatch -> state, scalars, stats, log-probs
    step_metrics: Callable  # see `diagnostics`
    policy: Callable[[step.TrainState], Policy]
    evaluate: Callable | None  # state, grader -> scores, rows
    updates_per_rollout: int


def setup(
    config: ml_collections.FrozenConfigDict, mesh: Mesh
) -> tuple[Trainer, step.TrainState, str]:
    """Builds everything a run needs, cheap and fallible things first.

    Returns:
      The parts of an iteration; the first state; and what follows from the config, for
      the start of the log.
    """
    source = hf.resolve(config.model)
    base_model = hf_config.read(source)
    tok = tokenizer.load(source)
    load = functools.partial(
        data.load_prompts,
        tok=tok,
        max_prompt_tokens=config.data.max_prompt_tokens,
        suffix=config.data.suffix,
    )
    train = load(config.data.train)
    held_out = load(config.data.eval) if config.data.eval else None
    if held_out:
        data.warn_of_overlap(train, held_out)
    settings.check_answers(config, [p.gold for p in train.problems])
    longest = max(len(p) for s in (train, held_out or train) for p in s.tokens)
    settings.check_lengths(config, longest, base_model.max_positions)
    stop_ids = tokenizer.stop_ids(tok, base_model.stop_ids)
    fns = train_fns(config, base_model, longest, mesh, stop_ids)
    target = None
    if config.data.target:
        target = data.load_target(config.data.target, fns.objective.target)
    attention_check.check(fns.base_model, mesh, fns.shape.max_segments + 1)

    policy = hf.load(source, mesh)
    trained = policy.params
    if config.lora.rank:
        init = functools.partial(lora.init_params, fns.model)
        where = shardings_of(fns.state.params["policy"])
        trained = jax.jit(init, out_shardings=where)(jax.random.key(config.seed))
    # A copy, since training gives the buffers of its parameters away.
    base = jax.tree.map(lambda x: jnp.array(x, config.dtype), policy.params)
    if config.offload_ref:
        to_host = lambda x: x.sharding.with_memory_kind("pinned_host")
        base = jax.device_put(base, jax.tree.map(to_host, base))
    state = first_state(fns, trained, config.seed, mesh)
    plan = slots.make_plan(
        Policy(fns.model, lora.join(base, trained)),
        num_prompts=config.prompts_per_step,
        samples_per_prompt=config.samples_per_prompt,
        max_new_tokens=config.max_new_tokens,
        prompt_width=longest,
        num_slots=config.rollout_slots or None,
    )
    sampling = {
        "stop": options.StopConditions(stop_ids),
        "capacity": options.Capacity(longest, plan.slots * plan.dp_size),
    }
    trainer = _iteration(config, fns, tok, train, base, sampling, mesh)
    evaluate = _evaluation(
        config, fns, trainer, tok, held_out, target, stop_ids, longest
    )
    about = _describe(config, fns, mesh, plan, train, held_out)
    return trainer._replace(evaluate=evaluate), state, about


def _iteration(
    config: ml_collections.FrozenConfigDict,
    fns: TrainFns,
    tok: Any,
    train: data.PromptSet,
    base: Params,
    sampling: dict[str, Any],
    mesh: Mesh,
) -> Trainer:
    """Binds what a run never changes; `evaluate` is left out."""
    frozen = base if config.lora.rank else {}
    is_head = fns.objective.log_z_source == "head"
    rate, warmup = config.optim.learning_rate, max(config.optim.warmup_steps, 1)

    def rollout(policy: Policy, indices: list[int], ids: list[int], step: int) -> Any:
        return engine.rollout(
            policy,
            [train.tokens[i] for i in indices],
            config.samples_per_prompt,
            config.max_new_tokens,
            config.temperature,
            config.seed,
            step=step,
            prompt_ids=ids,
            **sampling,
        )

    def base_on_devices() -> Params:
        # A copy if the base waits in host memory.
        return (
            jax.device_put(base, shardings_of(fns.base)) if config.offload_ref else base
        )

    bind = functools.partial
    return Trainer(
        next_prompts=bind(
            data.next_prompts, train, num=config.prompts_per_step, seed=config.seed
        ),
        rollout=rollout,
        compute_rewards=bind(
            rewards.compute_rewards,
            tok=tok,
            prompts=train,
            reward=fns.objective.kind.reward,
            format_penalty=config.format_penalty,
        ),
        base=base_on_devices,
        prepare_minibatch=bind(minibatch.prepare_minibatch, fns=fns, mesh=mesh),
        init_log_z=bind(minibatch.init_log_z, objective=fns.objective)
        if is_head
        else None,
        train_step=lambda state, m: fns.train_step(
            state, frozen, m.batch, m.num_microbatches
        ),
        step_metrics=bind(
            diagnostics.step_metrics,
            objective=fns.objective,
            shape=fns.shape,
            model=fns.model,
            learning_rate=lambda step: rate * min(1.0, step / warmup),
        ),
        policy=lambda state: Policy(
            fns.model, lora.join(frozen, state.params["policy"])
        ),
        evaluate=None,
        updates_per_rollout=config.updates_per_rollout,
    )


def _evaluation(
    config: ml_collections.FrozenConfigDict,
    fns: TrainFns,
    trainer: Trainer,
    tok: Any,
    held_out: data.PromptSet | None,
    target: data.TargetSamples | None,
    stop_ids: tuple[int, ...],
    prompt_width: int,
) -> Callable:
    """What an evaluation does: (state, grader) -> scores, rows; nothing without prompts
    held out or samples of the target."""
    how = scores.Settings(
        samples_per_prompt=config.eval_samples,
        max_new_tokens=config.max_new_tokens,
        temperature=config.eval_sampling.temperature,
        seed=config.seed,
        token_filters=options.token_filters(config.eval_sampling.to_dict()),
        stop_strings=tuple(config.eval_sampling.stop_strings),
        stop_ids=stop_ids,
        prompt_width=prompt_width,
    )

    def evaluate(state: step.TrainState, grader: Any) -> tuple[dict, list]:
        policy, values, rows = trainer.policy(state), {}, []
        if held_out is not None:
            values, rows = scores.evaluate(
                policy, tok, grader, held_out.problems, held_out.tokens, how
            )
        if target is not None:
            values = values | elbo.bounds(
                policy,
                Policy(fns.base_model, trainer.base()),
                target,
                fns.objective.target,
                tok,
                format_penalty=config.format_penalty,
                max_new_tokens=config.max_new_tokens,
                stop_ids=stop_ids,
                seed=config.seed,
            )
        return values, rows

    return evaluate


def _describe(
    c: ml_collections.FrozenConfigDict,
    fns: TrainFns,
    mesh: Mesh,
    plan: slots.Plan,
    train: data.PromptSet,
    held_out: data.PromptSet | None,
) -> str:
    """Describes the run and what follows from the batch numbers, for the log."""
    m, shape = fns.model, fns.shape
    responses = c.prompts_per_step * c.samples_per_prompt
    leaves = jax.tree.leaves(transformer.abstract_params(m))
    parameters = sum(int(np.prod(x.shape)) for x in leaves)
    sizes = " x ".join(f"{k} {v}" for k, v in mesh.shape.items())
    backend = attention.chosen(m.attention, m.head_dim, m.dtype)
    return (
        f"{c.model}: {parameters / 1e6:.2f} M parameters on {mesh.size} "
        f"{jax.devices()[0].platform} device(s), mesh {sizes}\n"
        f"{c.objective}, alpha {c.alpha:g}: {c.prompts_per_step} prompts x "
        f"{c.samples_per_prompt} samples = {responses} responses per step, "
        f"{c.updates_per_rollout} update(s) of at most {shape.num_microbatches} micro-"
        f"batches of {shape.microbatch_size} x {c.pack_length} tokens\n"
        f"attention: {backend}; rematerialisation: {c.remat}\n"
        f"rollouts: {plan}\n"
        f"{len(train.tokens)} training prompts, "
        f"{len(held_out.tokens) if held_out else 0} for evaluation"
    )

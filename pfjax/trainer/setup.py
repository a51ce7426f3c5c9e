"""Builds what a run needs from its config; what it builds reads none."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from pfjax.evaluation import elbo, scores
from pfjax.model import (
    attention_check,
    hf,
    hf_config,
    hub,
    lora,
    tokenizer,
)
from pfjax.model.config import ModelConfig
from pfjax.model.transformer import Params, Policy
from pfjax.objectives import ObjectiveConfig
from pfjax.sampler import options, slots
from pfjax.tasks import rewards, samples, target_reward
from pfjax.trainer import (
    config_checks,
    describe,
    inputs,
    match,
    objective,
    schedules,
    setup_rollouts,
)
from pfjax.trainer.actor import Cursor, Drawn
from pfjax.trainer.step import TrainState
from pfjax.trainer.train_fns import TrainFns, first_state, shardings_of, train_fns


class Functions(NamedTuple):
    """What a caller from Python brings, in the place of files; see `pfjax.fine_tune`."""

    reward: Callable | None = None
    format_term: Callable | None = None
    objective: Any = None


NO_FUNCTIONS = Functions()


class Trainer(NamedTuple):
    """What an iteration needs, with what a run never changes bound."""

    fns: TrainFns
    frozen: Params  # of the policy's parameters; empty without LoRA
    base: Callable[[], Params]  # the frozen base, on the devices
    seed: int  # of everything random
    starts_at_base: bool  # whether the policy is the base before the first step
    golds: list[str | None]  # that responses are graded by
    inputs: dict[str, str]  # what decides beside config and base, by fingerprint
    rollouts: setup_rollouts.Rollouts  # of what steps train on
    reward: rewards.Reward  # holds processes, once it is started
    own_psi: rewards.Reward  # as well
    compute_rewards: Callable  # indices, rollout, grader, step, votes -> RolloutBatch
    evaluate: Callable  # policy, grader -> scores, rows
    measure_match: Callable | None  # policy, base, grader -> estimates
    learning_rate: Callable[[int], float]  # of a step
    constants: Callable[[int], dict[str, float]]  # of the objective at a step, where
    # they have a schedule

    def policy(self, state: TrainState) -> Policy:
        return Policy(self.fns.model, lora.join(self.frozen, state.params["policy"]))

    def at_alpha(self, policy: Policy) -> Policy:
        """A policy for every alpha at the one that is evaluated; others as they are."""
        if not policy.config.alpha_range:
            return policy
        return lora.at_alpha(policy, self.fns.objective.alpha)

    def draw(self, state: TrainState, cursor: Cursor, step: int) -> Drawn:
        """What a step trains on."""
        params = state.params["policy"]
        policies = (self.policy(state), self.base_policy, self.averaged(state))
        return self.rollouts.draw(params, *policies, cursor, step)

    def averaged(self, state: TrainState) -> Policy | None:
        """The averaged policy, if there is one."""
        average = optax.tree.get(state.opt_state, "average")
        if average is None:
            return None
        return Policy(self.fns.model, lora.join(self.frozen, average["policy"]))

    def failures(self) -> int:
        """Values that functions have failed to give."""
        return self.reward.failures + self.own_psi.failures

    def fns_at(self, step: int) -> TrainFns:
        """With the objective of a step."""
        constants = self.constants(step)
        objective = dataclasses.replace(self.fns.objective, **constants)
        return self.fns._replace(objective=objective)

    def base_policy(self) -> Policy:
        return setup_rollouts.base_policy(self.fns, self.frozen, self.base)


def setup(
    config: FrozenConfigDict,
    mesh: Mesh,
    functions: Functions = NO_FUNCTIONS,
) -> tuple[Trainer, TrainState, str]:
    """Builds everything a run needs, cheap and fallible things first; also the first state,
    and what follows from the config, for the start of the log."""
    source, start, tok = _read_model(config)
    config_checks.check_rank(config, start)
    terms = objective.of_config(config, functions.objective).reward_source
    all_terms = ", ".join(filter(None, (terms, config.format_term)))
    given = inputs.load(config, tok, start, all_terms)
    config_checks.check_lengths(config, given.longest_of_any(), start.max_positions)
    other_base = inputs.other_base(config, given, tok)
    longest = given.train.longest()
    fns = train_fns(config, start, longest, mesh, other_base, functions.objective)
    rollout_mesh = setup_rollouts.rollout_mesh(config, mesh, fns.model)
    target = _load_target(config.data.target, fns.objective)
    responses = samples.load_responses(
        config.behavior.file, given.train.tokens, config.max_new_tokens
    )
    max_segments, windows = fns.shape.max_segments + 1, fns.base_model.windows
    attention_check.check(fns.base_model, mesh, max_segments, windows)

    base, on_devices, trained = _load_params(config, source, fns, mesh)
    state = first_state(fns, trained, config.seed, mesh)
    frozen = base if config.lora.rank else {}
    policy = Policy(fns.model, lora.join(base, trained))
    with jax.set_mesh(rollout_mesh):
        plan = slots.make_plan(policy, **setup_rollouts.plan_sizes(config, longest))
    how_rewarded = _how_rewarded(config, terms, functions, tok)
    reward, own_psi = how_rewarded["reward"], how_rewarded["own_psi"]
    meshes, weights = (mesh, rollout_mesh), (frozen, on_devices)
    graded = (given, target, how_rewarded)
    trainer = Trainer(
        fns,
        golds=given.golds(with_train=rewards.needs_answers(all_terms)),
        inputs=inputs.fingerprints(
            config, given, tok, target, responses, reward, own_psi
        ),
        frozen=frozen,
        base=on_devices,
        seed=config.seed,
        starts_at_base=not (config.lora.init_from or config.base),
        rollouts=setup_rollouts.of_config(
            config, fns, meshes, plan, weights, given.train, responses
        ),
        reward=reward,
        own_psi=own_psi,
        compute_rewards=functools.partial(
            rewards.compute_rewards, prompts=given.train, **how_rewarded
        ),
        evaluate=_evaluation(config, fns, rollout_mesh, on_devices, *graded),
        measure_match=_match(config, fns, given, all_terms, how_rewarded),
        # In the digits that float32 has.
        learning_rate=lambda step: float(f"{float(fns.learning_rate(step - 1)):.7g}"),
        constants=_constants(config),
    )
    about = [describe.run(config, fns, mesh, plan), inputs.describe(given, tok)]
    about += describe.notes(config, len(given.train.tokens))
    return trainer, state, "\n".join(about)


def _how_rewarded(
    config: FrozenConfigDict, terms: str, functions: Functions, tok: Any
) -> dict[str, Any]:
    """What `rewards.compute_rewards` takes at every step."""
    limits = config.reward_seconds, config.reward_workers
    psi = (config.format_term, *limits, functions.format_term, "format_term")
    return {
        "tok": tok,
        "reward": rewards.Reward(terms, *limits, functions.reward, seed=config.seed),
        "format_penalty": config.format_penalty,
        "own_psi": rewards.Reward(*psi),
    }


def _constants(config: FrozenConfigDict) -> Callable[[int], dict[str, float]]:
    """Those of the objective that have a schedule, by training step."""
    found = schedules.parse(config.schedules)
    names = [name for name in ("alpha", "beta") if name in found]
    at = lambda name, step: schedules.value(found, name, step, config[name])
    return lambda step: {name: at(name, step) for name in names}


def _read_model(config: FrozenConfigDict) -> tuple[pathlib.Path, ModelConfig, Any]:
    """Folder, config and tokenizer of the model that the policy starts from."""
    source = hub.resolve(config.model)
    tok = tokenizer.load(source, config.data.chat_template_kwargs, config.data.clock)
    model = hf_config.read(source)
    # The list that is trained with, sampled with, and exported.
    stop_ids = tokenizer.stop_ids(tok, model)
    own = {"stop_ids": stop_ids, "load_tokenizer": lambda: tok}
    return source, dataclasses.replace(model, **own), tok


def _load_params(
    config: FrozenConfigDict, source: Any, fns: TrainFns, mesh: Mesh
) -> tuple[Params, Callable[[], Params], Params]:
    """The frozen base, where it waits and on the devices; and what is trained."""
    adapters = _load_adapters(config, fns) if config.lora.rank else None
    params = hf.load(source, mesh).params
    trained = params if adapters is None else adapters
    if config.base:
        base = hf.load(config.base, mesh, config.dtype).params
    else:  # a copy, since training gives the buffers of its parameters away
        base = jax.tree.map(lambda x: jnp.array(x, config.dtype), params)
    if config.offload_ref:
        to_host = lambda x: x.sharding.with_memory_kind("pinned_host")
        base = jax.device_put(base, jax.tree.map(to_host, base))
    place = lambda: jax.device_put(base, shardings_of(fns.base))
    return base, place if config.offload_ref else lambda: base, trained


def _load_adapters(config: FrozenConfigDict, fns: TrainFns) -> Params:
    """The adapters that training starts from, given or new."""
    where = shardings_of(fns.state.params["policy"])
    if config.lora.init_from:
        adapter = lora.read_peft(hub.resolve_adapter(config.lora.init_from))
        return lora.load_peft(adapter, fns.model, where)
    init = functools.partial(lora.init_params, fns.model)
    return jax.jit(init, out_shardings=where)(jax.random.key(config.seed))


def _load_target(
    source: str, objective: ObjectiveConfig
) -> samples.TargetSamples | None:
    if not source:
        return None
    terms = objective.reward if objective.is_tilted else ""
    if objective.is_tilted and objective.kind.reward:
        raise ValueError(
            f"--config.data.target={source}: the reward of {objective.name} is relative to "
            "the other samples of a step, so nobody can draw from its target"
        )
    target_reward.check(terms)
    return samples.load_target(source, objective.target, terms)


def _evaluation(
    config: FrozenConfigDict,
    fns: TrainFns,
    rollout_mesh: Mesh,
    base: Callable[[], Params],
    given: inputs.Inputs,
    target: samples.TargetSamples | None,
    how_rewarded: dict[str, Any],
) -> Callable:
    """What an evaluation does, which may be nothing."""
    tok, reward = how_rewarded["tok"], how_rewarded["reward"]
    shared = {
        "max_new_tokens": config.max_new_tokens,
        "seed": config.seed,
        "stop_ids": fns.model.stop_ids,
    }
    how = scores.Settings(
        samples_per_prompt=config.eval_samples,
        temperature=config.eval_sampling.temperature,
        token_filters=options.token_filters(config.eval_sampling.to_dict()),
        stop_strings=tuple(config.eval_sampling.stop_strings),
        prompt_width=given.longest_of_any(),
        **shared,
    )

    def evaluate(policy: Policy, grader: Any) -> tuple[dict, list]:
        values, rows = {}, []
        for name, of_set in given.held_out.items():
            with jax.set_mesh(rollout_mesh):
                found, new = scores.evaluate(
                    policy, tok, grader, of_set.problems, of_set.tokens, how
                )
            prefix = f"{name}/" if len(given.held_out) > 1 else ""
            values |= {prefix + key: value for key, value in found.items()}
            rows += [{"set": name, **row} for row in new]
        if target is not None:
            policies = (policy, Policy(fns.base_model, base()))
            what = (target, fns.objective.target, tok)
            tilt = {"format_penalty": config.format_penalty}
            if target.problems:
                of = target_reward.ResponseReward(reward, grader, tok, target.problems)
                tilt["reward"] = of.shared_values
            values = values | elbo.bounds(*policies, *what, **tilt, **shared)
        return values, rows

    return evaluate


def _match(
    config: FrozenConfigDict,
    fns: TrainFns,
    given: inputs.Inputs,
    terms: str,
    how_rewarded: dict[str, Any],
) -> Callable | None:
    """What measures the match, if there is a target: on held-out prompts, unless what
    rewards them needs answers that they lack."""
    if not (config.match_prompts and fns.objective.has_target):
        return None
    chosen = next(iter(given.held_out.values()), given.train)
    if rewards.needs_answers(terms):
        problems = chosen.problems[: config.match_prompts]
        is_missing = any(p.gold is None for p in problems)
        chosen = given.train if is_missing else chosen
    how_rewarded = {**how_rewarded, "prompts": chosen, "step": config.num_steps}
    compute_rewards = functools.partial(rewards.compute_rewards, **how_rewarded)
    return functools.partial(
        match.measure,
        prompts=chosen.tokens[: config.match_prompts],
        objective=fns.objective,
        compute_rewards=compute_rewards,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        capacity=options.Capacity(given.longest_of_any()),
    )

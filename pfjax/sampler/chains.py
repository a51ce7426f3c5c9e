"""What Metropolis-Hastings and sequential Monte Carlo share: prompts in caches, one
token for every chain, and the log density that both weigh responses by.

Every slot of `decode.py` holds one chain (or particle); its cache is kept up to the
token from which it is drawn again. A response that reaches `max_new_tokens` is cut there,
and is an outcome like any other.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from pfjax import targets
from pfjax.batch import Rollout
from pfjax.infra import shard_map, sharding
from pfjax.model.config import ModelConfig
from pfjax.model.transformer import Policy
from pfjax.sampler import buffers, decode, options, slots, unstack
from pfjax.sampler.buffers import Prompts, SamplerState, Settings, Slots
from pfjax.targets import Array, Target

# r(y) of responses: tokens [s, r], undefined past length [s], and numbers of their prompts
# [s], to [s]. Traced by jit. Of responses that have not ended the length is 0.
Reward = Callable[[Array, Array, Array], Array]


class Spec(NamedTuple):
    """What programs are compiled for, besides shapes. Hashable."""

    method: Callable[..., tuple["Chains", Array, Any]]  # see `draw`
    constants: tuple[int, ...]  # of the method
    settings: Settings  # samples_per_prompt: particles or chains
    target: Target
    reward: Reward | None
    max_new_tokens: int


class Run(NamedTuple):
    """What the chains of one shard read, and never change."""

    spec: Spec
    state: SamplerState
    log_z: Float[Array, ""]
    tokens: Int[Array, "p t"]  # of the prompts
    prompt_length: Int[Array, "p"]
    prompt_id: Int[Array, "p"]
    cached: Prompts


class Chains(NamedTuple):
    """One response per slot. Past `length` the content is undefined."""

    tokens: Int[Array, "s r"]
    log_p: Float[Array, "s r"]
    log_q: Float[Array, "s r"]  # of the proposal
    length: Int[Array, "s"]
    is_stopped: Bool[Array, "s"]
    cache: Any
    # What of log_p is of rare tokens, if the target has some.
    log_p_rare: Float[Array, "s r"] | None = None


def _check(
    config: ModelConfig,
    target: Target,
    reward: Reward | None,
    temperature: float | None,
) -> None:
    if not target.alpha > 0:
        raise ValueError(f"alpha must be positive, got {target.alpha}")
    if target.has_format:
        raise ValueError(
            "psi needs the text of a response: choose a target with has_format=False, "
            "and give what psi says of tokens as the reward"
        )
    if target.beta and reward is None:
        raise ValueError(f"a target with beta={target.beta} needs a reward")
    if temperature is not None and not temperature > 0:
        raise ValueError(
            f"the proposal's temperature must be positive, got {temperature}"
        )
    if config.delta:
        raise ValueError(
            f"models of type {config.model_type} keep a state, which cannot go back "
            "to an earlier token: mh and smc do not sample from them"
        )


@sharding.for_rollouts
def draw(
    method: Callable[..., tuple[Chains, Array, Any]],
    constants: tuple[int, ...],
    policy: Policy,
    prompts: list[list[int]],
    chains_per_prompt: int,
    max_new_tokens: int,
    target: Target,
    log_z: float,
    reward: Reward | None,
    temperature: float | None,
    seed: int,
    stop_ids: tuple[int, ...] | None,
) -> tuple[Rollout, Any]:
    """Draws the responses to all prompts.

    Args:
      method: takes what `begin` returns, and `constants`; returns the responses, how many
        steps they took, and what else it found, a tree of `[P]`; draw returns it too.
      (the others): as in `mcmc.metropolis_hastings`.
    """
    config = policy.config
    _check(config, target, reward, temperature)
    options.check_whole("seed", seed, 0, options.LARGEST_SEED)
    lengths = slots.check_prompts(config, prompts, max_new_tokens)
    plan = slots.make_plan(
        policy,
        num_prompts=len(prompts),
        samples_per_prompt=chains_per_prompt,
        max_new_tokens=max_new_tokens,
        prompt_width=int(lengths.max()),
        keeps_all=True,
    )
    settings = Settings(
        config=config,
        plan=plan,
        samples_per_prompt=chains_per_prompt,
        stop_ids=config.stop_ids if stop_ids is None else stop_ids,
    )
    spec = Spec(method, constants, settings, target, reward, max_new_tokens)
    state = SamplerState(
        unstack.weights(config, policy.params),
        jax.random.key(seed),
        np.float32(temperature or 1 / target.alpha),
    )
    return _in_groups(spec, state, np.float32(log_z), prompts, lengths)


def _in_groups(
    spec: Spec,
    state: SamplerState,
    log_z: np.float32,
    prompts: list[list[int]],
    lengths: Int[np.ndarray, "p"],
) -> tuple[Rollout, Any]:
    """Runs as many prompts at once as memory holds, with one program for all."""
    plan = spec.settings.plan
    at_once = plan.dp_size * max(plan.slots // spec.settings.samples_per_prompt, 1)
    tokens = np.zeros((len(prompts), plan.prompt_width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    groups = []
    for first in range(0, len(prompts), at_once):
        ids = np.arange(first, first + at_once, dtype=np.int32)
        index = np.minimum(ids, len(prompts) - 1)  # the last fills up a group
        found = _draw(state, log_z, tokens[index], lengths[index], ids, spec=spec)
        last = len(prompts) - first
        groups.append(jax.tree.map(lambda x: x[:last], sharding.fetch(found)))  # noqa: B023
    join = lambda *xs: np.concatenate(xs)
    tokens, log_p, length, is_stopped, steps, found = jax.tree.map(join, *groups)
    return Rollout(tokens, length, log_p, is_stopped, int(steps.sum())), found


@functools.partial(jax.jit, static_argnames="spec")
def _draw(*whole_and_prompts: Any, spec: Spec) -> tuple[Any, ...]:
    """Tokens, log-probs, lengths, ends `[P, G, ...]`; slot-steps and more `[P]`."""

    def local(state, log_z, *prompts):
        start = begin(spec, state, log_z, *prompts)
        y, steps, found = spec.method(*start, *spec.constants)
        num = len(prompts[0])
        split = lambda x: x.reshape(num, -1, *x.shape[1:])
        out = tuple(split(x) for x in (y.tokens, y.log_p, y.length, y.is_stopped))
        # Of all particles, of which the responses may be some.
        work = jnp.full(num, steps * spec.settings.samples_per_prompt, jnp.int32)
        return (*out, work, found)

    return shard_map.over_batch(local, 2)(*whole_and_prompts)


def begin(
    spec: Spec,
    state: SamplerState,
    log_z: Array,
    tokens: Array,
    length: Array,
    prompt_id: Array,
) -> tuple[Run, Chains]:
    """Prompts but their last tokens in caches; empty responses."""
    s, (num, width) = spec.settings, tokens.shape
    count = num * s.samples_per_prompt
    positions = jnp.broadcast_to(jnp.arange(width), tokens.shape)
    is_cached = positions < length[:, None] - 1
    cached = decode.prefill_local(
        state,
        Prompts(
            buffers.empty_cache(s, num, s.plan.prompt_widths), jnp.zeros(num, jnp.int32)
        ),
        tokens,
        positions,
        is_cached.astype(jnp.int32),
        jnp.where(is_cached, jnp.arange(num)[:, None], -1),
        length - 1,
        s=s,
    )
    zeros = jnp.zeros((count, spec.max_new_tokens))
    empty = Chains(
        tokens=zeros.astype(jnp.int32),
        log_p=zeros,
        log_q=zeros,
        length=jnp.zeros(count, jnp.int32),
        is_stopped=jnp.zeros(count, bool),
        cache=buffers.empty_cache(s, count, s.plan.response_widths(s.plan.widths[-1])),
        log_p_rare=zeros if spec.target.eta_cutoff else None,
    )
    return Run(spec, state, log_z, tokens, length, prompt_id, cached), empty


def one_token(
    run: Run, y: Chains, is_active: Bool[Array, "s"], number: Int[Array, ""] | int
) -> Chains:
    """Draws the next token of the active responses; those that end are stopped. `number`
    enters the random numbers, so that a place that is drawn again is drawn anew."""
    s, g = run.spec.settings, run.spec.settings.samples_per_prompt
    slot = jnp.arange(len(y.length), dtype=jnp.int32)
    prompt = slot // g
    # A response at rest runs its own last token again, which changes nothing.
    at = jnp.minimum(y.length, s.plan.widths[-1] - 1)
    take = lambda x, at: jnp.take_along_axis(x, at[:, None], axis=1)[:, 0]
    of_prompt = take(run.tokens, run.prompt_length - 1)
    before = take(y.tokens, jnp.maximum(at - 1, 0))
    running = Slots(
        sample=slot,
        grid_index=slot,
        drawn=at,
        last=jnp.where(at > 0, before, of_prompt[prompt]),
        begun=jnp.zeros(1, jnp.int32),
        slot_steps=jnp.zeros(1, jnp.int32),
    )
    logits, cache, _ = decode.forward(s, run.state, run.cached, running, y.cache, g)
    log_p = jax.nn.log_softmax(logits)
    log_q = jax.nn.log_softmax(logits / run.state.temperature)

    def sample(prompt_id, member, position, x):
        key = run.state.key
        for n in (prompt_id, member, position, number):
            key = jax.random.fold_in(key, n)
        return jax.random.categorical(key, x).astype(jnp.int32)

    token = jax.vmap(sample)(run.prompt_id[prompt], slot % g, at, log_q)
    # At rest: out of bounds.
    where = (slot, jnp.where(is_active, at, run.spec.max_new_tokens))
    put = lambda x, new: x.at[where].set(new, mode="drop")
    stops = jnp.isin(token, jnp.array(s.stop_ids, jnp.int32))
    log_p_rare = y.log_p_rare
    if log_p_rare is not None:
        entropy = jax.scipy.special.entr(jnp.exp(log_p)).sum(axis=-1)
        drawn = (take(log_p, token), entropy, run.spec.target.eta_cutoff)
        log_p_rare = put(log_p_rare, targets.rare(*drawn))
    return Chains(
        tokens=put(y.tokens, token),
        log_p=put(y.log_p, take(log_p, token)),
        log_q=put(y.log_q, take(log_q, token)),
        length=y.length + is_active,
        is_stopped=y.is_stopped | (stops & is_active),
        cache=cache,
        log_p_rare=log_p_rare,
    )


def is_open(run: Run, y: Chains) -> Bool[Array, "s"]:
    """Which responses have not ended."""
    return ~y.is_stopped & (y.length < run.spec.max_new_tokens)


def log_density(run: Run, y: Chains, alpha: Array | None = None) -> Float[Array, "s"]:
    """Log density of responses so far under the target, with `alpha` in place of its own if
    given; the reward counts once they end."""
    target, reward = run.spec.target, 0.0
    if alpha is not None:
        target = dataclasses.replace(target, alpha=alpha)
    if run.spec.reward is not None:
        is_left = is_open(run, y)
        prompt = jnp.repeat(run.prompt_id, run.spec.settings.samples_per_prompt)
        length = jnp.where(is_left, 0, y.length)
        reward = run.spec.reward(y.tokens, length, prompt)
        reward = jnp.where(is_left, 0.0, reward)
    tilt = {"reward": reward}
    if y.log_p_rare is not None:  # a target of one's own need not know it
        tilt["log_p_rare"] = sum_from(y.log_p_rare, y)
    return target.log_density(sum_from(y.log_p, y), y.length, run.log_z, **tilt)


def sum_from(x: Float[Array, "s r"], y: Chains, first: Any = 0) -> Float[Array, "s"]:
    """Sums over the tokens of each response, from `first` on."""
    place = jnp.arange(x.shape[1])[None]
    first = jnp.broadcast_to(first, y.length.shape)
    inside = (place >= first[:, None]) & (place < y.length[:, None])
    return jnp.where(inside, x, 0.0).sum(axis=1)


def uniform(
    run: Run, name: int, number: Array | int, shape: tuple[int, ...] = ()
) -> Float[Array, "p *n"]:
    """Random numbers of each prompt for a purpose, on its own or the `number`-th time."""
    key = jax.random.fold_in(jax.random.fold_in(run.state.key, name), number)
    of_prompt = jax.vmap(lambda i: jax.random.fold_in(key, i))(run.prompt_id)
    return jax.vmap(lambda k: jax.random.uniform(k, shape))(of_prompt)

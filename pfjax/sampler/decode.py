"""What runs on the devices in a rollout: prefill and decode; `resize.py` has the rest.

Every function below sees one part of the batch, as `buffers.py` describes it.

A prompt's last token is not prefilled: a slot begins by running it, and draws the
response's first token from what it predicts. All tokens thus come from one place.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from pfjax.infra import shard_map
from pfjax.model import (
    attention,
    decode_attention,
    delta,
    dial,
    experts,
    log_probs,
    transformer,
)
from pfjax.sampler import filters, windows
from pfjax.sampler.buffers import (
    Cache,
    Prompts,
    Queue,
    Results,
    SamplerState,
    Settings,
    Slots,
    placed,
)
from pfjax.targets import Array


@jax.named_scope("rollout")
def prefill_local(
    state: SamplerState,
    prompts: Prompts,
    tokens: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    segment_ids: Int[Array, "b t"],
    prefix_slot: Int[Array, "b t"],
    length: Int[Array, "prefix_slots"],
    alpha: Float[Array, "prefix_slots"] | None = None,
    *,
    s: Settings,
) -> Prompts:
    """Fills prefix slots from packed rows of prompts, in one part of the batch.

    Args:
      prefix_slot: where each token's keys and values go; -1 drops them.
      length: new lengths of all prefix slots.
      alpha: of their prompts, where each has its own.
    """
    new = []

    def attend(q, k, v, layer):
        window, cache = s.plan.windows[layer], prompts.cache[layer]
        of_layer = (window, cache[1].shape[2], length)
        at = windows.prompt_index(*of_layer, prefix_slot, positions)
        own = (s.plan.backend, cache, (k, v))
        new.append(decode_attention.write_prompts(*own, *at))
        how = (segment_ids, s.config.attention)
        return attention.packed_attention(q, k, v, *how, window=window)

    def recur(x, layer):
        out, ends = delta.packed_with_ends(s.config.delta, x, segment_ids, *last)
        new.append(_where(is_new, ends, prompts.cache[layer]))
        return out

    # Where the last token of each prompt stands that is new.
    is_last = (prefix_slot >= 0) & (positions == length[prefix_slot] - 1)
    row, place = jnp.indices(tokens.shape, jnp.int32)
    at = jnp.where(is_last, prefix_slot, len(length))
    put = lambda x, to: to.at[at].set(x, mode="drop")
    last = [put(x, jnp.zeros_like(length)) for x in (row, place)]
    is_new = put(True, jnp.zeros(length.shape, bool))
    features = _features(s, None if alpha is None else alpha[prefix_slot])
    how = (tokens, positions, attend, recur, None, features)
    transformer.apply_layers(s.config, state.weights, *how)
    return Prompts(placed(new), length)


def _where(condition: Bool[Array, "s"], x: Any, y: Any) -> Any:
    """Of trees of arrays of equal shapes, by sequence."""
    of = lambda x: condition.reshape(-1, *(1,) * (x.ndim - 1))
    return jax.tree.map(lambda x, y: jnp.where(of(x), x, y), x, y)


@functools.partial(jax.jit, static_argnames="s", donate_argnames="prompts")
def prefill(
    state: SamplerState, prompts: Prompts, *new: Array | None, s: Settings
) -> Prompts:
    """Fills prefix slots of all parts; `new` and the rest as `prefill_local` takes them."""
    local = functools.partial(prefill_local, s=s)
    return shard_map.over_batch(local, 1)(state, prompts, *new)


@functools.partial(
    jax.jit, static_argnames=("s", "samples_per_prefix"), donate_argnames="cache"
)
def decode(
    state: SamplerState,
    prompts: Prompts,
    queue: Queue,
    slots: Slots,
    cache: Cache,
    results: Results,
    *,
    s: Settings,
    samples_per_prefix: int,
) -> tuple[Slots, Cache, Results]:
    """Draws `queue.steps` tokens per slot, or until nothing is left to draw.

    A slot whose sample ends takes the next ready one before the following step.
    """

    def local(state, prompts, queue, slots, cache, results):
        n = results.length.shape[0]

        def is_busy(carry):
            i, slots, _, _ = carry
            some = (slots.sample < n).any() | (slots.begun < queue.ready).any()
            return (i < queue.steps[0]) & some

        @jax.named_scope("rollout")
        def body(carry):
            i, slots, cache, results = carry
            slots = _begin(queue, slots, samples_per_prefix)
            own = (slots, cache, samples_per_prefix)
            logits, cache, choices = forward(
                s, state, prompts, *own, _alpha(queue, slots)
            )
            seen = (slots, results, logits, choices)
            slots, results = _record(s, state, queue, *seen)
            return i + 1, slots, cache, results

        is_cut = jnp.append(queue.is_cut, False)[slots.sample]
        slots = slots._replace(sample=jnp.where(is_cut, n, slots.sample))
        start = (jnp.int32(0), slots, cache, results)
        return lax.while_loop(is_busy, body, start)[1:]

    args = (prompts, queue, slots, cache, results)
    return shard_map.over_batch(local, 1)(state, *args)


def _begin(queue: Queue, slots: Slots, samples_per_prefix: int) -> Slots:
    """Idle slots take the next ready samples."""
    n, g = queue.is_cut.shape[0], queue.per_prompt
    is_idle = slots.sample >= n
    number = slots.begun + jnp.cumsum(is_idle, dtype=jnp.int32) - 1
    takes = is_idle & (number < queue.ready)
    prompt = queue.order[number // g % queue.order.shape[0]]
    sample = jnp.where(takes, prompt * g + number % g, slots.sample)
    of_prompt = lambda x: x[jnp.minimum(sample // g, x.shape[0] - 1)]
    # On a grid narrower than the samples per prompt nothing is left to begin.
    grid_index = of_prompt(queue.prefix_slot) * samples_per_prefix + sample % g
    nowhere = jnp.iinfo(jnp.int32).max
    before = jnp.where(is_idle, nowhere, slots.grid_index)
    grid_index = jnp.where(takes, grid_index, before)
    return slots._replace(
        sample=sample,
        grid_index=grid_index,
        drawn=jnp.where(is_idle, 0, slots.drawn),
        last=jnp.where(takes, of_prompt(queue.last_token), slots.last),
        begun=slots.begun + takes.sum(dtype=jnp.int32),
    )


def _features(s: Settings, alpha: Float[Array, "b t"] | None) -> Array | None:
    """What scales of adapters are functions of, of each token, if they are."""
    return None if alpha is None else dial.features(s.config.alpha_range, alpha)


def _alpha(queue: Queue, slots: Slots) -> Float[Array, "s"] | None:
    """Of the sample of each slot, where each prompt has its own."""
    if queue.alpha is None:
        return None
    prompt = slots.sample // queue.per_prompt
    return queue.alpha[jnp.minimum(prompt, queue.alpha.shape[0] - 1)]


def forward(
    s: Settings,
    state: SamplerState,
    prompts: Prompts,
    slots: Slots,
    cache: Cache,
    samples_per_prefix: int,
    alpha: Float[Array, "s"] | None = None,
) -> tuple[Float[Array, "s v"], Cache, Array | None]:
    """Runs the last token of every slot; logits of the next, and the experts that were
    chosen, where they are to be replayed."""
    new, chosen = [], []
    prefix_slot = slots.grid_index // samples_per_prefix
    prefix_slot = jnp.minimum(prefix_slot, len(prompts.length) - 1)

    def attend(q, k, v, layer):
        # Written before it is read: the loop then updates the cache in place.
        kv, backend = (k[:, 0], v[:, 0]), s.plan.backend
        window, of_prompt = s.plan.windows[layer], prompts.cache[layer]
        of_slots = (window, slots.drawn, s.plan.keeps_all)
        at = windows.response_index(*of_slots)
        own = decode_attention.write(backend, cache[layer], kv, at)
        new.append(own)
        own_length, own_start = windows.of_response(*of_slots)
        of_layer = (window, of_prompt[1].shape[2], prompts.length)
        length, start = windows.of_prompt(*of_layer, prefix_slot, slots.drawn)
        how = (own_length, length, slots.grid_index, samples_per_prefix, backend)
        starts = {"own_start": own_start, "prompt_start": start}
        caches = (own, of_prompt)
        out = decode_attention.decode_attention(q[:, 0], *caches, *how, **starts)
        return out[:, None]

    def recur(x, layer):
        mixed, log_decay, beta, kernel = x
        of_token = delta.Inputs(mixed[:, 0], log_decay[:, 0], beta[:, 0], kernel)
        of_prompts = (prompts.cache[layer], prompts.length, prefix_slot)
        before = _begun_states(begins, cache[layer], *of_prompts)
        out, after = delta.step(s.config.delta, of_token, before)
        new.append(after)
        return out[:, None]

    def choose(probs):
        chosen.append(experts.likeliest(s.config.experts, probs))
        return chosen[-1]

    # Idle slots have no place on the grid.
    num_places = len(prompts.length) * samples_per_prefix
    begins = (slots.drawn == 0) & (slots.grid_index < num_places)
    positions = prompts.length[prefix_slot] + slots.drawn
    features = _features(s, None if alpha is None else alpha[:, None])
    how = (slots.last[:, None], positions[:, None], attend, recur, choose, features)
    hidden = transformer.apply_layers(s.config, state.weights, *how)
    logits = log_probs.logits(hidden[:, 0], transformer.head_weight(state.weights))
    choices = None
    if s.config.num_choices:
        choices = jnp.concatenate(chosen, axis=-1)[:, 0].astype(jnp.uint8)
    return logits, placed(new), choices


def _begun_states(
    begins: Bool[Array, "s"],
    own: delta.State,
    of_prompts: delta.State,
    length: Int[Array, "prefix_slots"],
    prefix_slot: Int[Array, "s"],
) -> delta.State:
    """States of the slots, of those that begin their prompts'."""
    of_prompts = jax.tree.map(lambda x: x[prefix_slot], of_prompts)
    # A prompt of one token is not prefilled.
    is_there = length[prefix_slot] > 0
    of_prompts = _where(is_there, of_prompts, jax.tree.map(jnp.zeros_like, own))
    return _where(begins, of_prompts, own)


def _record(
    s: Settings,
    state: SamplerState,
    queue: Queue,
    slots: Slots,
    results: Results,
    logits: Float[Array, "s v"],
    choices: Array | None,
) -> tuple[Slots, Results]:
    """Draws the next token of every slot; those that end their sample go idle."""
    n = results.length.shape[0]
    token = _draw(s, state, queue, slots, logits)
    log_p, _ = log_probs.log_softmax_at(logits, token)
    at = (slots.sample, slots.drawn)  # an idle slot's sample is out of bounds
    drawn = slots.drawn + 1
    stops = jnp.isin(token, jnp.array(s.stop_ids, jnp.int32))
    ends = (stops | (drawn >= queue.limit)) & (slots.sample < n)
    ended = jnp.where(ends, slots.sample, n)
    results = Results(
        tokens=results.tokens.at[at].set(token, mode="drop"),
        log_probs=results.log_probs.at[at].set(log_p, mode="drop"),
        length=results.length.at[ended].set(drawn, mode="drop"),
        is_stopped=results.is_stopped.at[ended].set(stops, mode="drop"),
        choices=jax.tree.map(
            lambda x, new: x.at[at].set(new, mode="drop"), results.choices, choices
        ),
    )
    slots = slots._replace(
        sample=jnp.where(ends, n, slots.sample),
        drawn=drawn,
        last=token,
        slot_steps=slots.slot_steps + len(slots.sample),
    )
    return slots, results


def _draw(
    s: Settings,
    state: SamplerState,
    queue: Queue,
    slots: Slots,
    logits: Float[Array, "s v"],
) -> Int[Array, "s"]:
    if s.is_greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    g = queue.per_prompt
    prompt = jnp.minimum(slots.sample // g, queue.prompt_id.shape[0] - 1)

    def one(prompt_id, sample, position, logits):
        key = state.key
        for number in (prompt_id, sample, position):
            key = jax.random.fold_in(key, number)
        return jax.random.categorical(key, logits).astype(jnp.int32)

    logits = filters.apply(s.token_filters, logits / state.temperature)
    sample = queue.first + slots.sample % g
    numbers = (queue.prompt_id[prompt], sample, slots.drawn)
    return jax.vmap(one)(*numbers, logits)

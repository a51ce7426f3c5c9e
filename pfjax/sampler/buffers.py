"""What a rollout holds on the devices, and its start with nothing begun.

Each array is one part of the batch's (see `shard_map.over_batch`): S slots, each decoding one
sample; a queue of N samples, G of each prompt; prefix slots, each holding the keys and values
of one prompt. Scalars are arrays of one element, so that all arrays are split the same way.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from pfjax.infra import shard_map, sharding
from pfjax.model import decode_attention, delta
from pfjax.model.config import ModelConfig
from pfjax.model.decode_attention import KeyValue
from pfjax.model.transformer import Params
from pfjax.sampler.options import NO_FILTERS, TokenFilters
from pfjax.sampler.slots import Plan
from pfjax.targets import Array


class Settings(NamedTuple):
    """What the programs are compiled for, besides shapes. Hashable."""

    config: ModelConfig
    plan: Plan
    samples_per_prompt: int  # G
    stop_ids: tuple[int, ...]
    is_greedy: bool = False  # the most likely token; filters are then ignored
    token_filters: TokenFilters = NO_FILTERS


class SamplerState(NamedTuple):
    """What random numbers and probabilities come from, whole on every device."""

    weights: Params  # see `weights`
    key: Array  # of seed and step
    temperature: Float[Array, ""]


class Queue(NamedTuple):
    """The samples to draw; prompt q owns q*g to (q+1)*g - 1, g of its G."""

    order: Int[
        Array, "q"
    ]  # the prompts as they are begun; after the last the first again
    prompt_id: Int[Array, "q"]  # in the random numbers
    last_token: Int[Array, "q"]  # of the prompt
    prefix_slot: Int[Array, "q"]
    ready: Int[Array, "1"]  # samples whose prompt has been prefilled
    per_prompt: Int[Array, "1"]  # g
    first: Int[Array, "1"]  # the first of them among G, in the random numbers
    limit: Int[Array, "1"]  # tokens per sample at most
    steps: Int[Array, "1"]  # to decode before the host is asked again
    is_cut: Array  # bool [N], samples to be ended now
    alpha: Array | None = None  # float32 [q], of each prompt's, see `dial`


# Keys and values, or a state, one entry per layer. That of the slots holds their prompt's
# last token and all tokens drawn but the last; of both a layer keeps what its window reaches.
Cache = list[KeyValue | delta.State]


class Prompts(NamedTuple):
    """The prompts but their last tokens, one per prefix slot."""

    cache: Cache
    length: Int[Array, "prefix_slots"]


class Slots(NamedTuple):
    """What is being decoded. An idle slot has sample N."""

    sample: Int[Array, "s"]
    grid_index: Int[Array, "s"]  # its place on the grid of `decode_attention`
    drawn: Int[Array, "s"]  # tokens drawn so far
    last: Int[Array, "s"]  # token to be run next
    begun: Int[Array, "1"]  # samples begun so far
    slot_steps: Int[Array, "1"]  # slots times steps computed so far


class Results(NamedTuple):
    tokens: Int[Array, "n r"]
    log_probs: Float[Array, "n r"]
    length: Int[Array, "n"]  # 0 until the sample has ended
    is_stopped: Array  # bool [n], whether a stop token was drawn
    choices: Array | None = None  # uint8 [n, r, c], see `Rollout`


def empty_cache(s: Settings, batch: int, widths: tuple[int, ...]) -> Cache:
    """Caches of as many tokens as `widths` says of each layer."""
    c, p = s.config, s.plan

    def of_layer(window: int | None, width: int) -> KeyValue | delta.State:
        if window is None:
            return delta.empty_state(c.delta, batch, c.dtype)
        shapes = (batch, c.num_kv_heads, width, c.head_dim)
        keys, values = decode_attention.cache_shapes(p.backend, *shapes)
        return jnp.zeros(keys, p.cache_dtype), jnp.zeros(values, p.cache_dtype)

    return placed([of_layer(*x) for x in zip(p.windows, widths, strict=True)])


def placed(caches: Cache) -> Cache:
    """Caches split over the mesh as their sequences and heads are."""
    heads = ("batch", "kv_heads", None, None)  # inputs of convolutions have none
    axes = lambda x: heads if x.ndim == 4 else ("batch", None, None)
    return jax.tree.map(lambda x: sharding.constrain(x, *axes(x)), caches)


@functools.partial(jax.jit, static_argnames=("s", "width", "new"))
def start(
    queue: Queue, *, s: Settings, width: int, new: int
) -> tuple[Prompts, Slots, Cache, Results]:
    """Nothing begun, nothing prefilled; `new` tokens are kept of each sample."""

    def local(queue):
        n, slots, prefix_slots = len(queue.is_cut), s.plan.slots, s.plan.prefix_slots
        zeros = lambda *shape: jnp.zeros(shape, jnp.int32)
        empty = Slots(
            sample=jnp.full(slots, n, jnp.int32),
            grid_index=jnp.full(slots, prefix_slots * s.samples_per_prompt, jnp.int32),
            drawn=zeros(slots),
            last=zeros(slots),
            begun=zeros(1),
            slot_steps=zeros(1),
        )
        log_p, is_stopped = jnp.zeros((n, new)), jnp.zeros(n, bool)
        choices = None
        if s.config.num_choices:
            choices = jnp.zeros((n, new, s.config.num_choices), jnp.uint8)
        results = Results(zeros(n, new), log_p, zeros(n), is_stopped, choices)
        cache = empty_cache(s, prefix_slots, s.plan.prompt_widths)
        prompts = Prompts(cache, zeros(prefix_slots))
        own = empty_cache(s, slots, s.plan.response_widths(width))
        return prompts, empty, own, results

    return shard_map.over_batch(local, 0)(queue)

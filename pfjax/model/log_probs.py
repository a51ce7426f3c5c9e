"""Log-probs of given tokens from hidden states, without the logits of a batch."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from pfjax.infra import shard_map, sharding
from pfjax.model import transformer
from pfjax.targets import Array

# Tokens of a device whose logits exist at once. 512 x 151,936 float32 are 0.3 GB.
CHUNK = 512
# Words whose logits exist at once on CPU: 512 x 4,096 stay in its cache, twice as fast.
CPU_TILE = 4096
_HIDDEN, _HEAD, _TOKEN = transformer.HIDDEN, ("vocab", None), transformer.HIDDEN[:2]


@jax.custom_vjp
def token_log_probs(
    hidden: Float[Array, "b t d"],
    head: Float[Array, "v d"],
    targets: Int[Array, "b t"],
    where: Bool[Array, "b t"],
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """log p of each target under the full vocabulary at temperature 1, float32.

    Logits exist for `CHUNK` tokens per device at once, forward and backward, and only of
    tokens that are asked for. Under `jax.set_mesh` the vocabulary stays where it is:
    devices pass on the states of a chunk and partial sums, never a part of the head.

    Args:
      hidden: states from which each target is predicted.
      head: output projection; used in the type of `hidden`.
      where: tokens that are asked for.

    Returns:
      Log-probs (gradients flow to `hidden` and `head`) and the entropy of each
      predicting distribution in nats (no gradient); 0 where not asked for.
    """
    return _forward(hidden, head, targets, where)[0]


def _forward(*args):
    axes = (_HIDDEN, _HEAD, _TOKEN, _TOKEN)
    local = functools.partial(_local_forward, _Split.here())
    run = shard_map.by_device(local, axes, (_TOKEN,) * 3)
    log_p, entropy, log_total = run(*args)
    return (log_p, entropy), (*args, log_total)


def _backward(saved, gradient):
    axes = (_HIDDEN, _HEAD, _TOKEN, _TOKEN, _TOKEN, _TOKEN)
    local = functools.partial(_local_backward, _Split.here())
    run = shard_map.by_device(local, axes, (_HIDDEN, _HEAD))
    return *run(*saved, gradient[0]), None, None


token_log_probs.defvjp(_forward, _backward)


_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


class _Split(NamedTuple):
    """Mesh axes that the vocabulary and the tokens are split over."""

    words: tuple[str, ...]
    tokens: tuple[str, ...]

    @classmethod
    def here(cls) -> "_Split":
        """As a function `by_device` will find them, seen from outside of it."""
        tokens = (sharding.axes_of(axis) for axis in ("batch", "tokens"))
        return cls(sharding.axes_of("vocab"), sum(tokens, ()))


class _Chunks:
    """The tokens of one device that are asked for, in chunks; and what joins devices.

    The vocabulary is split over `over`. Devices along all of it but "tensor" hold other
    tokens, and work on the chunks of all of them, each on its part of the vocabulary.
    """

    def __init__(
        self, split: _Split, hidden: Array, head: Array, targets: Array, where: Array
    ):
        self.hidden = hidden.reshape(-1, hidden.shape[-1])
        self.targets, self.words = targets.ravel(), len(head)
        tile = CPU_TILE if sharding.platform()[0] == "cpu" else self.words
        self.tiles = -(-self.words // tile)
        # [tiles, words, d]; the last are filled up.
        fill = ((0, -self.words % self.tiles), (0, 0))
        head = jnp.pad(head.astype(hidden.dtype), fill)
        self.head = head.reshape(self.tiles, -1, head.shape[1])
        self.over = split.words
        self.of_tokens = tuple(a for a in split.tokens if a in self.over)
        tokens = len(self.targets)
        self.size = min(CHUNK, tokens)
        first = jnp.argsort(~where.ravel(), stable=True).astype(jnp.int32)
        # Past the end of the arrays: read as anything, written nowhere.
        self.order = jnp.pad(first, (0, -tokens % self.size), constant_values=tokens)
        count = -(-where.sum(dtype=jnp.int32) // self.size)
        # The same on every device, as all of them meet in every chunk.
        everyone = tuple(dict.fromkeys(split.tokens + self.over))
        self.count = lax.pmax(count, everyone)

    def index(self, i: Array) -> Int[Array, "n"]:
        return lax.dynamic_slice_in_dim(self.order, i * self.size, self.size)

    def take(self, x: Array, at: Array, **mode: Any) -> Array:
        """Values of a chunk, on all devices that hold other tokens: `[m, ...]`."""
        mine = jnp.take(x, at, axis=0, **mode)
        return lax.all_gather(mine, self.of_tokens, tiled=True)

    def own(self, x: Array) -> Array:
        """This device's part, along the last axis, of what `take` gathered."""
        first = lax.axis_index(self.of_tokens) * self.size
        return lax.dynamic_slice_in_dim(x, first, self.size, axis=-1)

    def states(self, at: Array) -> tuple[Array, Array]:
        """States `[m, d]` and targets `[m]` of a chunk."""
        return tuple(self.take(x, at, mode="clip") for x in (self.hidden, self.targets))

    def logits(self, states: Array, targets: Array, tile: Array) -> tuple[Array, Array]:
        """Logits of a tile of words and, as `[m, v]` too, which is the target."""
        word = tile * self.head.shape[1] + jnp.arange(self.head.shape[1])[None]
        first = lax.axis_index(self.over) * self.words
        x = logits(states, self.head[tile])
        is_target = (targets - first)[:, None] == word
        if self.words % self.tiles:
            # What fills up the last tile has numbers of words of the next device.
            x = jnp.where(word < self.words, x, -1e30)
            is_target &= word < self.words
        return x, is_target


def _local_forward(split, hidden, head, targets, where):
    c = _Chunks(split, hidden, head, targets, where)

    def body(i, found):
        at = c.index(i)
        states, of_chunk = c.states(at)

        def of_tile(tile, carry):
            top, sums = carry
            x, is_target = c.logits(states, of_chunk, tile)
            total, moment, chosen = sums
            new = jnp.maximum(top, x.max(axis=-1))
            weights, shrink = jnp.exp(x - new[:, None]), jnp.exp(top - new)
            total = shrink * total + weights.sum(-1)
            moment = shrink * moment + (weights * x).sum(-1)
            chosen = chosen + jnp.where(is_target, x, 0.0).sum(axis=-1)
            return new, [total, moment, chosen]

        zero = jnp.zeros(len(states), jnp.float32)
        top, sums = lax.fori_loop(0, c.tiles, of_tile, (zero - 1e30, [zero] * 3))
        if c.over:
            own, top = top, lax.pmax(top, c.over)
            shrink = jnp.exp(own - top)
            sums = [shrink * sums[0], shrink * sums[1], sums[2]]
            sums = lax.psum(jnp.stack(sums), c.over)
        total, moment, chosen = sums
        log_total = top + jnp.log(total)
        new = jnp.stack([chosen - log_total, log_total - moment / total, log_total])
        return found.at[:, at].set(c.own(new), mode="drop")

    empty = jnp.zeros((3, targets.size), jnp.float32)
    found = lax.fori_loop(0, c.count, body, empty)
    # The last chunk is filled up with tokens that nobody asked for.
    return tuple(jnp.where(where, x.reshape(where.shape), 0.0) for x in found)


def _local_backward(split, hidden, head, targets, where, log_total, gradient):
    c = _Chunks(split, hidden, head, targets, where)
    gradient = jnp.where(where, gradient, 0.0)
    replicas = tuple(a for a in c.over if a not in c.of_tokens)

    def body(i, carry):
        d_hidden, d_head = carry
        at = c.index(i)
        states, of_chunk = c.states(at)
        take = lambda x: c.take(x.ravel(), at, mode="fill", fill_value=0)[:, None]
        scale, shift = take(gradient), take(log_total)

        def of_tile(tile, carry):
            d_states, d_head = carry
            x, is_target = c.logits(states, of_chunk, tile)
            d_logits = scale * (is_target.astype(x.dtype) - jnp.exp(x - shift))
            d_logits = d_logits.astype(states.dtype)
            d_states = d_states + _dot("mv,vd->md", d_logits, c.head[tile])
            return d_states, d_head.at[tile].add(_dot("mv,md->vd", d_logits, states))

        empty = jnp.zeros(states.shape, jnp.float32)
        d_states, d_head = lax.fori_loop(0, c.tiles, of_tile, (empty, d_head))
        d_states = lax.psum(d_states, replicas)
        d_states = lax.psum_scatter(d_states, c.of_tokens, tiled=True)
        return d_hidden.at[at].set(d_states, mode="drop"), d_head

    # Both in float32: cast inside of the loop, XLA would add the parts of devices in
    # bfloat16.
    empty = (jnp.zeros(x.shape, jnp.float32) for x in (c.hidden, c.head))
    d_hidden, d_head = lax.fori_loop(0, c.count, body, tuple(empty))
    d_head = d_head.reshape(-1, head.shape[1])[: c.words]
    others = tuple(a for a in split.tokens if a not in c.over)
    d_head = lax.psum(d_head, others)
    d_hidden = d_hidden.astype(hidden.dtype).reshape(hidden.shape)
    return d_hidden, d_head.astype(head.dtype)


def logits(
    hidden: Float[Array, "*b d"], head: Float[Array, "v d"]
) -> Float[Array, "*b v"]:
    """Unnormalised log-probs in float32."""
    return _dot("...d,vd->...v", hidden, head.astype(hidden.dtype))


def log_softmax_at(
    logits: Float[Array, "*b v"], targets: Int[Array, "*b"]
) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    """Log-prob of each target and the entropy of its distribution."""
    log_p = jax.nn.log_softmax(logits)
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    return jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0], entropy

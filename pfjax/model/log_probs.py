"""Log-probs of given tokens from hidden states, without the logits of a batch."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Float, Int

from pfjax import batch as packing
from pfjax import targets
from pfjax.batch import Array, PackedBatch, PackShape
from pfjax.infra import sharding
from pfjax.model import attention, dial, lora, transformer
from pfjax.model.config import ModelConfig

# Tokens of a device whose logits exist at once. 512 x 151,936 float32 are 0.3 GB.
CHUNK = 512
# Words whose logits exist at once on CPU: 512 x 4,096 stay in its cache, twice as fast.
CPU_TILE = 4096
# Rows that `score` runs at once, or more, for each device to have one.
SCORE_ROWS = 8
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
    run = sharding.by_device(local, axes, (_TOKEN,) * 3)
    log_p, entropy, log_total = run(*args)
    return (log_p, entropy), (*args, log_total)


def _backward(saved, gradient):
    axes = (_HIDDEN, _HEAD, _TOKEN, _TOKEN, _TOKEN, _TOKEN)
    local = functools.partial(_local_backward, _Split.here())
    run = sharding.by_device(local, axes, (_HIDDEN, _HEAD))
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

        zero = jnp.zeros(len(states))
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
            d_logits = (scale * (is_target - jnp.exp(x - shift))).astype(states.dtype)
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


def packed_log_probs(
    config: ModelConfig,
    params: transformer.Params,
    batch: PackedBatch,
    remat: str = "none",
    dropout: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Float[Array, "b t"], Float[Array, "b t"], Float[Array, "b t d"]]:
    """Log-prob of every token of packed rows given those before it in its segment.

    Args:
      dropout: fraction of the adapters' inputs that is dropped, by `batch.dropout_seed`.
      temperature: at which tokens are sampled.

    Returns:
      Log-probs and entropies, `[B, T]`, 0 where not `batch.is_response`; and the
      hidden states.
    """
    thin = lora.dropout(config, batch, dropout) if dropout else None
    how = (remat, batch.length.shape[-1] + 1, thin)  # segments, and padding
    how = (*how, batch.choices, dial.of_tokens(config.alpha_range, batch))
    hidden, _ = transformer.forward_packed(config, params, *batch[:3], *how)
    before, head = _predicting(hidden), transformer.head_weight(params)
    if temperature != 1:
        before = before / temperature  # as logits are linear in it
    return *token_log_probs(before, head, batch.tokens, batch.is_response), hidden


def stop_log_probs(
    params: transformer.Params,
    hidden: Float[Array, "b t d"],
    log_p: Float[Array, "b t"],
    batch: PackedBatch,
    stop_ids: tuple[int, ...],
) -> Float[Array, "b t"]:
    """log p of stopping (any of `stop_ids`) in the place of every response token.

    Args:
      hidden, log_p: what `packed_log_probs` returned; gradients flow.
    """
    before, head = _predicting(hidden), transformer.head_weight(params)
    stops = jax.nn.logsumexp(logits(before, head[jnp.array(stop_ids)]), axis=-1)
    log_p_stop = stops - _log_totals(before, head, log_p, batch)
    return jnp.where(batch.is_response, log_p_stop, 0.0)


def self_certainty(
    params: transformer.Params,
    hidden: Float[Array, "b t d"],
    log_p: Float[Array, "b t"],
    batch: PackedBatch,
) -> Float[Array, "b t"]:
    r"""How far each predicting distribution is from the uniform one, in nats:
    :math:`\log\sum_v e^{x_v} - \tfrac1V\sum_v x_v = KL(U || p) + \log V`.

    References:
      Intuitor, arXiv 2505.19590.
    """
    before, head = _predicting(hidden), transformer.head_weight(params)
    mean = logits(before, head.astype(jnp.float32).mean(axis=0)[None])[..., 0]
    certainty = _log_totals(before, head, log_p, batch) - mean
    return jnp.where(batch.is_response, certainty, 0.0)


class TokenReward(NamedTuple):
    """What a policy's own distributions of the tokens of a response say of it."""

    # params, hidden, log_p, entropy (see `packed_log_probs`), batch -> [B, T]
    of_token: Callable[..., Float[Array, "b t"]]
    is_mean: bool = False  # over the tokens of a response, rather than their sum


# The sums have the same mean, minus the entropy of whole responses: EM-RL-sequence and
# EM-RL-token, arXiv 2505.15134.
TOKEN_REWARDS = {
    "self_certainty": TokenReward(
        lambda params, hidden, log_p, _, batch: self_certainty(
            params, hidden, log_p, batch
        ),
        is_mean=True,
    ),
    "sequence_log_prob": TokenReward(lambda _p, _h, log_p, _e, _b: log_p),
    "negative_entropy": TokenReward(lambda _p, _h, _l, entropy, _b: -entropy),
}


def _predicting(hidden: Array) -> Array:
    # A token is predicted from the state of the one before it. A response never
    # opens a segment, so the first of a row, predicted from zeros, is never used.
    return jnp.pad(hidden[:, :-1], ((0, 0), (1, 0), (0, 0)))


def _log_totals(before: Array, head: Array, log_p: Array, batch: PackedBatch) -> Array:
    """Log-sum-exp of the logits of each token, from the one logit and its log-prob."""
    words = head[batch.tokens].astype(before.dtype)
    return _dot("btd,btd->bt", before, words) - log_p


@functools.partial(jax.jit, static_argnames=("config", "temperature", "eta_cutoff"))
def _score(config, params, batch, temperature, eta_cutoff=0.0):
    log_p, entropy, _ = packed_log_probs(config, params, batch, temperature=temperature)
    return targets.rare(log_p, entropy, eta_cutoff) if eta_cutoff else log_p


def score(
    policy: transformer.Policy,
    sequences: list[list[int]],
    prompt_lengths: Sequence[int] | np.ndarray,
    temperature: float = 1.0,
) -> list[np.ndarray]:
    """Log-probs of the response tokens of each sequence; they are packed into rows.

    Args:
      sequences: prompt and response together, token ids.
      prompt_lengths: tokens of each sequence that are prompt, at least 1.
      temperature: at which tokens are sampled.

    Returns:
      One float32 array per sequence, a value in nats per response token: under the full
      vocabulary.

    Raises:
      ValueError: if a sequence lacks a prompt or a response, or is longer than the
        model's positions; for a temperature that is not positive.

    >>> import pfjax
    >>> policy = pfjax.load("pfjax/toy")
    >>> [x.shape for x in score(policy, [[2, 10, 3, 4], [2, 3, 4, 5, 6]], [3, 2])]
    [(1,), (3,)]
    """
    if not temperature > 0:
        raise ValueError(f"the temperature must be positive, got {temperature}")
    temperature = float(temperature)  # hashable: programs are compiled for it
    return _scores(policy, sequences, prompt_lengths, temperature)


def rare_log_probs(
    policy: transformer.Policy,
    sequences: list[list[int]],
    prompt_lengths: Sequence[int] | np.ndarray,
    eta_cutoff: float,
) -> list[np.ndarray]:
    """As `score`, at temperature 1, of rare tokens (see `targets.rare`); 0 of the others."""
    return _scores(policy, sequences, prompt_lengths, 1.0, eta_cutoff)


def _scores(
    policy: Any, sequences: Any, prompt_lengths: Any, *how: float
) -> list[np.ndarray]:
    """What `_score` says of each response token; `how` is what it takes."""
    arrays, starts = packing.trajectories(sequences, prompt_lengths)
    if not arrays:
        return []
    c, params = transformer.as_policy(policy)
    transformer.check_tokens(c, arrays)
    longest = max(map(len, arrays))
    if longest > c.max_positions:
        raise ValueError(
            f"a sequence has {longest} tokens, the model {c.max_positions} positions"
        )
    # Powers of two: few programs to compile for sequences of any length.
    pack_length = attention.shared_length(max(64, 1 << (longest - 1).bit_length()))
    mesh = jax.sharding.get_mesh()
    ways = 1 if mesh.empty else sharding.batch_ways(mesh)
    rows = -(-SCORE_ROWS // ways) * ways
    most = -(-len(arrays) // rows)
    segments = packing.segments_per_row(pack_length, pack_length)
    shape = PackShape(most, rows, pack_length, segments)
    batch, placement, used = packing.pack(arrays, starts, shape)
    if attention.pays_for_segments(c.attention, c.head_dim, c.dtype):
        batch = packing.trim_segments(batch, placement)
    part = lambda i: jax.tree.map(lambda x: x[i], batch)
    log_p = sharding.fetch([_score(c, params, part(i), *how) for i in range(used)])
    return packing.unpack_responses(np.stack(log_p), placement)

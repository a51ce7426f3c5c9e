"""Gated DeltaNet: a recurrent state in the place of keys and values.

Of each head the state S, a matrix, answers a query q with q S. A token forgets some of it,
and replaces what S answers to its key by its value, as far as beta says:

  S <- exp(g) S;  S <- S + beta k (v - k S)

Before that queries, keys and values pass a short causal convolution, which keeps its last
inputs. Both begin anew with each sequence. Packed rows are computed a chunk at a time,
within which the recurrence is a triangular system; decoding computes it as it stands.

References:
  Yang et al., arXiv 2412.06464 (Gated DeltaNet), 2406.06484 (the chunked form).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from pfjax.infra import sharding
from pfjax.targets import Array

CHUNK = 64
# Of matrix products in float32: errors in the triangular system would grow.
_PRECISION = lax.Precision.HIGHEST


class Sizes(NamedTuple):
    """Of one layer. Value head i reads key head i // (value_heads // key_heads)."""

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int
    kernel: int  # tokens that the convolution sees

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


class Inputs(NamedTuple):
    """What a layer computed of each token, `*b` being rows and places, or slots."""

    mixed: Float[Array, "*b n"]  # queries, keys and values before the convolution
    log_decay: Float[Array, "*b h"]  # g, float32, at most 0
    beta: Float[Array, "*b h"]  # float32, 0 to 1
    kernel: Float[Array, "n w"]  # of the convolution, the newest token's weight last


class State(NamedTuple):
    """What one layer keeps of each sequence."""

    conv: Float[Array, "s n w-1"]  # the last inputs of the convolution
    memory: Float[Array, "s h k v"]  # S, float32


def empty_state(z: Sizes, num: int, dtype: str) -> State:
    """Before the first token; `dtype` is that of the computation."""
    conv = jnp.zeros((num, z.conv_dim, z.kernel - 1), dtype)
    shape = (num, z.value_heads, z.key_dim, z.value_dim)
    return State(conv, jnp.zeros(shape, jnp.float32))


def state_bytes(z: Sizes, dtype: str, tensor: int = 1) -> int:
    """Bytes of the state of a sequence in one layer, on one device.

    Args:
      tensor: devices that heads are split over, where they divide.
    """
    ways = tensor if z.value_heads % tensor == 0 else 1
    shapes = jax.eval_shape(lambda: empty_state(z, 1, dtype))
    conv, memory = (x.size * x.dtype.itemsize for x in shapes)
    return conv + memory // ways


def pass_floats(z: Sizes) -> int:
    """Numbers in float32 that are held per token at the peak of a forward pass of a layer.

    Fitted to programs compiled for TPUs: channels around the convolution, and of each head
    matrices of a chunk (as wide as 128 lanes) and vectors.
    """
    of_head = 8 * max(CHUNK, 128) + 8 * (z.key_dim + z.value_dim)
    return 8 * z.conv_dim + z.value_heads * of_head


def token_flops(z: Sizes) -> int:
    """FLOPs of the recurrence for one token in one layer, in chunks of `CHUNK`."""
    # Products of keys and of queries with keys, the inverse of the system and its product
    # with what is known, within the chunk, and three with the state.
    inverse = 2 * (CHUNK.bit_length() - 1) * CHUNK
    within = CHUNK * (3 * z.key_dim + 2 * z.value_dim + inverse)
    return int(2 * z.value_heads * (within + 3 * z.key_dim * z.value_dim))


def step(z: Sizes, x: Inputs, state: State) -> tuple[Float[Array, "s h v"], State]:
    """The next token of each slot."""
    window = jnp.concatenate([state.conv, x.mixed[..., None]], axis=-1)
    mixed = (window.astype(jnp.float32) * x.kernel.astype(jnp.float32)[None]).sum(-1)
    q, k, v = _heads(z, jax.nn.silu(mixed))
    memory = state.memory * jnp.exp(x.log_decay)[..., None, None]
    # Sums rather than products of matrices, which would be rounded.
    answer = (memory * k[..., None]).sum(axis=-2)
    change = x.beta[..., None] * (v - answer)
    memory = memory + k[..., None] * change[..., None, :]
    out = (memory * q[..., None]).sum(axis=-2)
    return out, State(window[..., 1:], memory)


def packed(
    z: Sizes, x: Inputs, segment_ids: Int[Array, "b t"]
) -> Float[Array, "b t h v"]:
    """Packed rows of whole sequences."""
    return _packed(z, x, segment_ids)[0]


def packed_with_ends(
    z: Sizes,
    x: Inputs,
    segment_ids: Int[Array, "b t"],
    row: Int[Array, "p"],
    place: Int[Array, "p"],
) -> tuple[Float[Array, "b t h v"], State]:
    """As `packed`, and the states after some of the tokens."""
    out, (keys, changes, befores, decays) = _packed(z, x, segment_ids)
    chunk, i = place // CHUNK, place % CHUNK
    pick = lambda x: x[row, chunk]
    first = _within(decays.since_start, i, (row, chunk))
    last = _within(decays.between, i, (row, chunk))
    ends = first[..., None, None] * befores[chunk, row] + jnp.einsum(
        "phj,phjk,phjv->phkv", last, pick(keys), pick(changes), precision=_PRECISION
    )
    # Of the inputs of the convolution those of the same sequence.
    back = jnp.arange(z.kernel - 1)[::-1]
    at = place[:, None] - back[None]
    of_row = segment_ids[row[:, None], jnp.maximum(at, 0)]
    is_same = (at >= 0) & (of_row == segment_ids[row, place][:, None])
    inputs = jnp.where(is_same[..., None], x.mixed[row[:, None], jnp.maximum(at, 0)], 0)
    return out, State(jnp.swapaxes(inputs, 1, 2), ends)


class _Decays(NamedTuple):
    """What is left of a state after some tokens of its chunk; 0 across sequences."""

    between: Float[Array, "b n h c c"]  # after token j, at token i, for j <= i
    since_start: Float[Array, "b n h c"]  # of the state before the chunk, at token i


def _within(x: Array, i: Int[Array, "p"], at: tuple[Array, Array]) -> Array:
    """Of some tokens, in their chunks."""
    of_chunk = jnp.moveaxis(x, 3, 2)  # [b, n, c, h, ...]
    return of_chunk[(*at, i)]


def _packed(z: Sizes, x: Inputs, segment_ids: Int[Array, "b t"]):
    # Every device computes its heads over whole rows.
    whole = lambda y, *axes: sharding.constrain(y, "batch", None, *axes)
    mixed = _convolve(whole(x.mixed, None), x.kernel, segment_ids)
    q, k, v = (whole(y, "heads", None) for y in _heads(z, mixed))
    rows, length = segment_ids.shape
    num = -(-length // CHUNK)

    def chunks(y: Array) -> Array:
        """`[b, t, h, ...]` to `[b, n, h, c, ...]`."""
        widths = [(0, 0), (0, num * CHUNK - length)] + [(0, 0)] * (y.ndim - 2)
        y = jnp.pad(y, widths).reshape(rows, num, CHUNK, *y.shape[2:])
        return jnp.moveaxis(y, 3, 2)

    q, k, v = chunks(q), chunks(k), chunks(v)
    g, beta = chunks(x.log_decay), chunks(x.beta)[..., None]
    segment = chunks(segment_ids[..., None])[:, :, 0]
    decays = _decays(g, segment)
    dot = lambda names, *ys: jnp.einsum(names, *ys, precision=_PRECISION)
    keys = dot("bnhik,bnhjk->bnhij", k * beta, k) * decays.between
    since_start = decays.since_start[..., None]
    # What each token changes: what it would into an empty state, less what the state
    # before the chunk already answers.
    known = jnp.concatenate([v * beta, k * beta * since_start], axis=-1)
    before = jnp.tri(CHUNK, k=-1, dtype=bool)[None, None, None]
    inverse = _inverse(jnp.where(before, keys, 0.0))
    solved = dot("bnhij,bnhjx->bnhix", inverse, known)
    alone, reading = jnp.split(solved, [z.value_dim], axis=-1)
    attention = dot("bnhik,bnhjk->bnhij", q, k) * decays.between
    to_end = decays.between[..., -1, :, None]
    left = decays.since_start[..., -1]

    def of_chunk(memory, y):
        alone, reading, queries, attention, keys, left = y
        change = alone - dot("bhik,bhkv->bhiv", reading, memory)
        out = dot("bhik,bhkv->bhiv", queries, memory)
        out = out + dot("bhij,bhjv->bhiv", attention, change)
        after = dot("bhik,bhiv->bhkv", keys, change)
        return memory * left[..., None, None] + after, (out, change, memory)

    first = jnp.zeros((rows, z.value_heads, z.key_dim, z.value_dim), jnp.float32)
    by_chunk = (alone, reading, q * since_start, attention, k * to_end, left)
    by_chunk = jax.tree.map(lambda y: jnp.moveaxis(y, 1, 0), by_chunk)
    _, (out, changes, befores) = lax.scan(of_chunk, first, by_chunk)
    out = out.transpose(1, 0, 3, 2, 4).reshape(rows, num * CHUNK, -1, z.value_dim)
    out = whole(out[:, :length], "heads", None)
    return out, (k, jnp.moveaxis(changes, 0, 1), befores, decays)


@jax.custom_vjp
def _inverse(n: Float[Array, "*b c c"]) -> Float[Array, "*b c c"]:
    """The inverse of 1 + n, n being strictly lower triangular.

    Of blocks twice as large it follows from those of their two halves, so that no entry is
    a difference of large powers of n. By products alone: XLA's solver on a CPU waits for
    threads that the solvers of other devices hold, and hangs.
    """
    size = n.shape[-1]
    i = jnp.arange(size)
    found = jnp.broadcast_to(jnp.eye(size), n.shape)
    half = 1
    while half < size:
        # Rows of a second half, columns of the first half of the same block.
        block, is_second = i // (2 * half), i // half % 2 == 1
        is_between = (block[:, None] == block[None]) & (
            is_second[:, None] & ~is_second[None]
        )
        between = jnp.where(is_between[(None,) * (n.ndim - 2)], n, 0.0)
        found = found - _product(_product(found, between), found)
        half *= 2
    return found


def _product(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, precision=_PRECISION)


def _inverse_forward(n):
    found = _inverse(n)
    return found, found


def _inverse_backward(found, g):
    transposed = found.swapaxes(-1, -2)
    return (-_product(_product(transposed, g), transposed),)


_inverse.defvjp(_inverse_forward, _inverse_backward)


def _decays(g: Float[Array, "b n h c"], segment: Int[Array, "b n c"]) -> _Decays:
    is_past = jnp.tri(g.shape[-1], dtype=bool)[None, None]
    is_before = jnp.tri(g.shape[-1], k=-1, dtype=bool)[None, None, None]
    # Sums of what lies between two tokens, and no differences of sums from the start, in
    # which small decays would drown.
    after = jnp.where(is_before, g[..., None], 0.0)
    is_same = (segment[..., None] == segment[..., None, :]) & is_past
    between = jnp.where(is_same[:, :, None], jnp.cumsum(after, axis=-2), -jnp.inf)
    before = jnp.pad(segment[:, :-1, -1], [(0, 0), (1, 0)], constant_values=-1)
    goes_on = (segment == before[..., None])[:, :, None]
    since_start = jnp.where(goes_on, jnp.cumsum(g, axis=-1), -jnp.inf)
    return _Decays(jnp.exp(between), jnp.exp(since_start))


def _convolve(
    x: Float[Array, "b t n"],
    kernel: Float[Array, "n w"],
    segment_ids: Int[Array, "b t"],
) -> Float[Array, "b t n"]:
    """The causal convolution within each sequence, and its activation, in float32."""
    width = kernel.shape[1]
    total = jnp.zeros(x.shape, jnp.float32)
    for back in range(width):
        weight = kernel[:, width - 1 - back].astype(jnp.float32)[None, None]
        is_same = _shifted(segment_ids, back, -1) == segment_ids
        seen = jnp.where(is_same[..., None], _shifted(x, back, 0), 0)
        total += weight * seen.astype(jnp.float32)
    return jax.nn.silu(total)


def _shifted(x: Array, back: int, padding: int) -> Array:
    """What stands so many tokens back in each row."""
    widths = [(0, 0), (back, 0)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, widths, constant_values=padding)[:, : x.shape[1]]


def _heads(
    z: Sizes, mixed: Float[Array, "*b n"]
) -> tuple[Float[Array, "*b h k"], Float[Array, "*b h k"], Float[Array, "*b h v"]]:
    """Queries and keys of length one, queries scaled, and values."""
    keys = z.key_heads * z.key_dim
    # Whole on devices that share the heads: an equal share of all channels is no share of
    # queries, keys or values, and parts of them would be sent around.
    whole = lambda y: sharding.constrain(y, "batch", *(None,) * (y.ndim - 1))
    parts = map(whole, jnp.split(whole(mixed), [keys, 2 * keys], axis=-1))
    sizes = ((z.key_heads, z.key_dim),) * 2 + ((z.value_heads, z.value_dim),)
    q, k, v = (
        x.reshape(*mixed.shape[:-1], *size)
        for x, size in zip(parts, sizes, strict=True)
    )
    times = z.value_heads // z.key_heads
    unit = lambda y: y * lax.rsqrt((y * y).sum(axis=-1, keepdims=True) + 1e-6)
    q, k = (jnp.repeat(unit(y), times, axis=-2) for y in (q, k))
    return q * z.key_dim**-0.5, k, v

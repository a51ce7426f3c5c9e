"""Causal attention over packed rows: one function, back ends, one reference.

Key/value heads are grouped (H a multiple of K); logits and softmax are in float32; `q`
comes unscaled. The tokens of a segment are contiguous, as `batch.pack` lays them.

| back end | for | memory | segments that it skips | sliding windows |
|---|---|---|---|---|
| plain | the reference | T^2 | none | masked |
| chunked | CPU; what no kernel takes | T | all others | skips what is before |
| splash | TPU, JAX's Pallas kernel | T | none, but what comes later | skips what is before |
| cudnn | GPU from Hopper on, 16-bit | T | all others | skips what is before |
| triton | other GPUs, JAX's Pallas kernel | T | none, but what comes later | has none |

JAX 0.12 calls the Triton kernel deprecated in favour of tokamax, which is no home for packed
rows yet: its public functions take no segments but as a mask of T^2 numbers, and so does its
backward pass before Hopper, whatever the forward one is told (0.0.17). cuDNN refuses packed
rows there. JAX's kernel takes segment ids both ways; when JAX parts with it, what remains for
these GPUs is "chunked".
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from pfjax.infra import hardware, shard_map, sharding
from pfjax.model import chunked_attention
from pfjax.targets import Array

# Kernels read blocks of this many tokens, or of more that divide the row.
_BLOCK = 128
# The first GPUs whose cuDNN attends over packed rows: Hopper.
_PACKED_CUDNN = (9, 0)


def packed_attention(
    q: Float[Array, "b t h c"],
    k: Float[Array, "b t k c"],
    v: Float[Array, "b t k c"],
    segment_ids: Int[Array, "b t"],
    backend: str = "auto",
    max_segments: int | None = None,
    window: int = 0,
) -> Float[Array, "b t h c"]:
    """Attention of each token to itself and earlier tokens of its own segment.

    Under `jax.set_mesh` rows are split over its batch axes, heads over "tensor", and the
    queries of a row over "context": these devices gather its keys and values. Key and value
    heads too few for "tensor" are repeated.

    Args:
      segment_ids: of contiguous segments; those of padding are 0, and what comes out
        there is finite and means nothing.
      backend: one of `BACKENDS`, or "auto", see `chosen`.
      max_segments: of a row, padding included; T when not given. Only "cudnn" asks,
        see `pays_for_segments`.
      window: how many tokens of its segment each attends to, itself and the last ones
        before it; 0 for all.
    """
    if window >= k.shape[1]:
        window = 0  # the same, and one program
    backend = chosen(backend, q.shape[-1], q.dtype, window)
    tensor = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    k, v = _with_heads(math.lcm(k.shape[2], tensor), k, v)
    attend = _BACKENDS[backend]
    if backend == "cudnn":
        attend = functools.partial(attend, max_segments=max_segments or q.shape[1])
    if window:
        attend = functools.partial(attend, window=window)
    if split := sharding.axes_of("tokens"):
        check_shared(backend, k.shape[1])
        attend = functools.partial(attend, split=split)
    queries, kv = ("batch", "tokens", "heads", None), ("batch", None, "kv_heads", None)
    run = shard_map.by_device(attend, (queries, kv, kv, kv[:2]), queries)
    return run(q, k, v, segment_ids)


def chosen(backend: str, head_dim: int, dtype: str | jnp.dtype, window: int = 0) -> str:
    """The back end that a name stands for: "auto" is that of the devices of the mesh,
    or of this machine without one. Raises ValueError if it has no sliding windows and
    `window` is one."""
    if window and backend.startswith("triton"):
        raise ValueError(
            f"{backend} attention has no sliding windows, and layers of this model have "
            "one: choose --config.attention=chunked"
        )
    if backend != "auto":
        return backend
    platform, kind = sharding.platform()
    if platform == "tpu" and head_dim in (64, 128, 256):
        return "splash"
    is_whole = not sharding.axes_of("tokens")
    has_kernels = hardware.runs_triton(platform, kind)
    if has_kernels and head_dim in (64, 128) and is_whole:
        capability = hardware.compute_capability(kind) or (0, 0)
        if jnp.dtype(dtype).itemsize == 2 and capability >= _PACKED_CUDNN:
            return "cudnn"
        return "chunked" if window else "triton"
    return "chunked"


def check_shared(backend: str, length: int) -> None:
    """Raises ValueError if the devices of the current mesh that share rows cannot share
    those of `length` tokens."""
    parts = _parts()
    if parts > 1 and backend not in _OF_PARTS:
        raise ValueError(
            f"{backend} attention takes whole rows: choose --config.mesh.context=1 or "
            "--config.attention=chunked"
        )
    in_blocks = parts > 1 and backend.startswith("splash")
    multiple = parts * _BLOCK if in_blocks else parts
    if length % multiple:
        blocks = f" of whole blocks of {_BLOCK} tokens" if in_blocks else ""
        raise ValueError(
            f"--config.pack_length={length} does not split into --config.mesh.context="
            f"{parts} parts{blocks}: choose a multiple of {multiple}"
        )


def shared_length(length: int) -> int:
    """The least row length, from this one on, that the devices of the current mesh which
    share rows can share, whatever the back end."""
    parts = _parts()
    multiple = parts * _BLOCK if parts > 1 else 1
    return -(-length // multiple) * multiple


def _parts() -> int:
    """Devices that share a row."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in sharding.axes_of("tokens"))


def pays_for_segments(backend: str, head_dim: int, dtype: str | jnp.dtype) -> bool:
    """Whether segments that a row might have, but has not, cost time and memory.

    For each, cuDNN's backward pass stores gradients of all queries in float32. On an H100,
    4 rows of 4,096 tokens, 12 heads of 128, 4 segments per row: forward and backward 3.1 ms
    and 12.6 GiB of temporaries with room for 129, 0.9 ms and 1.1 GiB with room for 9.
    """
    return chosen(backend, head_dim, dtype) == "cudnn"


def segment_bytes(
    tokens: int, num_heads: float, head_dim: int, max_segments: int
) -> float:
    """Bytes that a backward pass works in where `pays_for_segments`: a gradient of all
    queries for each segment that a row might have, and for its padding."""
    return 4 * tokens * num_heads * head_dim * (max_segments + 1)


def _plain(q, k, v, segment_ids, split=(), window=0):
    b, t, _, c = q.shape
    at = jnp.arange(k.shape[1])
    query = chunked_attention.part(at[None], t, split)[0]
    of_query = chunked_attention.part(segment_ids, t, split)
    same = of_query[:, :, None] == segment_ids[:, None, :]
    mask = same & (query[:, None] >= at[None])[None]
    if window:
        mask &= (query[:, None] < at[None] + window)[None]
    grouped = q.reshape(b, t, k.shape[2], -1, c)
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    logits = c**-0.5 * dot("btkgc,bskc->bkgts", grouped, k)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], logits, -1e30))
    out = dot("bkgts,bskc->btkgc", weights.astype(v.dtype), v)
    return out.reshape(q.shape).astype(q.dtype)


def _splash(q, k, v, segment_ids, split=(), window=0, interpret=False):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    t, parts = q.shape[1], k.shape[1] // q.shape[1]
    q, k, v, segment_ids = _in_blocks(q, k, v, segment_ids)
    _, padded, h, c = q.shape
    # Larger blocks do more work per read; 512 keep within the memory of every TPU.
    block = next(b for b in (512, 256, _BLOCK) if padded % b == 0)
    sides = [f"block_{x}" for x in ("q", "kv", "q_dkv", "kv_dkv", "q_dq", "kv_dq")]
    shape = (k.shape[1],) * 2
    mask = splash.CausalMask(shape)
    if window:  # so many before a token, none after it
        mask = splash.LocalMask(shape, (window - 1, 0), 0)
    run = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * h),
        block_sizes=splash.BlockSizes(**dict.fromkeys(sides, block)),
        residual_checkpoint_name=chunked_attention.SAVED,
        head_shards=1,
        q_seq_shards=parts,
        interpret=interpret,
    )
    if split:
        # What the kernel knows of the mask, whose queries are the second dimension, and
        # the numbers of the queries themselves.
        i = jax.lax.axis_index(split)
        mine = lambda x: jnp.split(x, parts, axis=min(1, x.ndim - 1))
        run = jax.tree.map(lambda x: jnp.stack(mine(x))[i], run)
    heads_first = (jnp.swapaxes(x, 1, 2) for x in (q * c**-0.5, k, v))
    of_query = chunked_attention.part(segment_ids, padded, split)
    segments = splash.SegmentIds(of_query, segment_ids)
    out = jax.vmap(run)(*heads_first, segments)
    return jnp.swapaxes(out, 1, 2)[:, :t]


def _triton(q, k, v, segment_ids, interpret=False):
    with warnings.catch_warnings():  # deprecated in JAX 0.12, and nothing in its place
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu import attention as kernel

    t = q.shape[1]
    q, k, v, segment_ids = _in_blocks(q, k, v, segment_ids)
    k, v = _with_heads(q.shape[2], k, v)
    # A block of queries and two each of keys and values share the memory of a
    # multiprocessor, 99 KiB on consumer cards: 80 KiB at most.
    block = min(_BLOCK, 2**14 // (q.shape[3] * q.dtype.itemsize))
    sizes = kernel.BlockSizes.get_default()
    sizes = dataclasses.replace(sizes, block_q=block, block_k=block)
    # By position: custom_vjp takes what is static by number.
    static = (q.shape[-1] ** -0.5, True, sizes, "triton", None, 2, None, interpret)
    attend = _with_names(lambda *args: kernel.mha(*args, *static))
    return attend(q, k, v, segment_ids)[:, :t]


def _cudnn(q, k, v, segment_ids, max_segments, window=0):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    if q.dtype.itemsize != 2:
        raise ValueError(
            f"cudnn attention computes in 16 bits, not in {q.dtype}; choose "
            "--config.attention=triton or --config.dtype=bfloat16"
        )
    # One head of keys per head of queries: with fewer, JAX before 0.11.2 multiplies the
    # offsets of keys and values by the heads of the queries.
    k, v = _with_heads(q.shape[2], k, v)

    def attend(q, k, v, length, offset):
        mask, scale = cudnn.MaskType.PADDING_CAUSAL, q.shape[-1] ** -0.5
        extents = (None, None, length, length, offset, offset)  # no bias, no mask
        return cudnn.dot_product_attention(
            *(q, k, v, *extents),
            scale=scale,
            mask_type=mask,
            qkv_layout="BTNH",
            sliding_window_length=window or None,  # with the token itself, as ours
        )

    extents = segment_extents(segment_ids, max_segments)
    return _with_names(attend)(q, k, v, *extents)


def segment_extents(
    segment_ids: Int[Array, "b t"], max_segments: int
) -> tuple[Int[Array, "b s"], Int[Array, "b s1"]]:
    """Lengths of the segments of each row, and where each begins, as cuDNN takes them.

    Padding is a segment too. Entries that are not used are -1, the last of the starts
    always: JAX joins those that are not -1 over all rows, so that one too many in a row
    would shift those of all later rows.
    """
    t = segment_ids.shape[1]
    is_first = jnp.diff(segment_ids, prepend=-1) != 0
    # One more than may be: the end of the last.
    find = functools.partial(jnp.flatnonzero, size=max_segments, fill_value=t)
    first = jax.vmap(find)(is_first).astype(jnp.int32)
    first = jnp.pad(first, ((0, 0), (0, 1)), constant_values=t)
    is_used = first < t
    length = jnp.where(is_used[:, :-1], jnp.diff(first), -1)
    return length, jnp.where(is_used, first, -1)


def _with_names(kernel: Callable[..., Array]) -> Callable[..., Array]:
    """A kernel whose residuals bear the name that rematerialisation keeps them by."""

    def forward(*args):
        out, backward = jax.vjp(kernel, *args)
        named = checkpoint_name(out, chunked_attention.SAVED)

        def name(x):
            if x is out:  # once, not a second copy
                return named
            is_given = any(x is y for y in args)
            return x if is_given else checkpoint_name(x, chunked_attention.SAVED)

        return named, jax.tree.map(name, backward)

    attend = jax.custom_vjp(kernel)
    attend.defvjp(forward, lambda backward, d_out: backward(d_out))
    return attend


def _in_blocks(*args: Array) -> tuple[Array, ...]:
    return tuple(chunked_attention.pad(x, _BLOCK) for x in args)


def _with_heads(num: int, k: Array, v: Array) -> tuple[Array, Array]:
    copies = num // k.shape[2]
    return jnp.repeat(k, copies, axis=2), jnp.repeat(v, copies, axis=2)


_BACKENDS: dict[str, Callable[[Array, Array, Array, Array], Array]] = {
    "plain": _plain,
    "chunked": chunked_attention.attend,
    "splash": _splash,
    "splash_interpret": functools.partial(_splash, interpret=True),
    "triton": _triton,
    "triton_interpret": functools.partial(_triton, interpret=True),
    "cudnn": _cudnn,
}
BACKENDS = tuple(_BACKENDS)
# Those that attend from a part of a row to the whole of it.
_OF_PARTS = ("plain", "chunked", "splash", "splash_interpret")

"""Trajectories -> packed rows, and tokens -> trajectories; letters are those of `batch.py`."""

import bisect
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from pfjax.batch import PACKED, PackedBatch, PackShape, Placement
from pfjax.targets import Array


def max_microbatches(
    num_trajectories: int, max_length: int, microbatch_size: int, pack_length: int
) -> int:
    """Micro-batches that always suffice for trajectories of at most `max_length`.

    `pack` opens a row only when a trajectory fits none of the open ones, so every
    closed row holds at least `pack_length // max_length` of them.
    """
    per_row = pack_length // max_length
    return -(-num_trajectories // (per_row * microbatch_size))


def segments_per_row(pack_length: int, max_length: int) -> int:
    """N: trajectories per row at most. Rows of very short ones end partly empty."""
    return max(pack_length // max_length, min(pack_length // 8, 128))


def trajectories(
    sequences: Iterable[Any], prompt_lengths: Any
) -> tuple[list[Int[np.ndarray, "_"]], Int[np.ndarray, "s"]]:
    """Token ids of sequences, and how many of each are prompt, as `pack` takes them.

    Raises:
      ValueError: for what holds anything but whole numbers of 32 bits, or not one length per
        sequence.
    """
    out = []
    for i, sequence in enumerate(sequences):
        ids = np.asarray(sequence)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            said = f"{sequence!r:.100} is not a list of token ids"
            raise ValueError(f"sequence {i}: {said}")
        out.append(ids.astype(np.int32))
        if (is_cut := out[-1] != ids).any():
            raise ValueError(
                f"sequence {i} holds token id {ids[is_cut][0]}: no model has"
            )
    starts = np.asarray(prompt_lengths)
    if starts.ndim != 1:
        raise ValueError(
            f"prompt_lengths must be a number for each sequence, got {prompt_lengths!r:.100}"
        )
    if starts.shape != (len(out),):
        raise ValueError(f"{len(out)} sequences but {starts.size} prompt_lengths")
    if starts.size and starts.dtype.kind not in "iu":
        raise ValueError(
            f"prompt_lengths must be whole numbers, got {prompt_lengths!r:.100}"
        )
    return out, starts.astype(np.int64)


def pack(
    sequences: list[Int[np.ndarray, "_"]],
    prompt_lengths: Int[np.ndarray, "s"],
    shape: PackShape,
    *,
    psi: Float[np.ndarray, "s"] | float = 0.0,
    prompt_index: Int[np.ndarray, "s"] | int = 0,
) -> tuple[PackedBatch, Placement, int]:
    """Packs trajectories by best fit, longest first.

    Args:
      sequences: prompt followed by response, token ids, one array per trajectory.
      prompt_lengths: tokens of each that are prompt, at least 1.
      shape: of the result; all of it is padding past the third value returned.
      psi: format term of each trajectory.
      prompt_index: prompt of each trajectory.

    Returns:
      The batch `[M, B, ...]`; where each trajectory went; and the number of
      micro-batches that hold any.

    Raises:
      ValueError: if a trajectory is longer than a row or lacks a prompt or a
        response, or if not all of them fit.
    """
    lengths = np.array([len(s) for s in sequences], np.int64)
    _check(lengths, prompt_lengths, shape.pack_length)
    row, segment, start = best_fit(lengths, shape.pack_length, shape.max_segments)
    placement = Placement(row, segment, start, prompt_lengths, lengths - prompt_lengths)
    used = -(-int(row.max(initial=-1) + 1) // shape.microbatch_size)
    if used > shape.num_microbatches:
        raise ValueError(
            f"{len(sequences)} trajectories of {lengths.sum()} tokens need {used} "
            f"micro-batches of {shape.microbatch_size} x {shape.pack_length} tokens "
            f"(at most {shape.max_segments} trajectories per row), but "
            f"only {shape.num_microbatches} were given; make them larger "
            "(microbatch_size, pack_length; for pfjax.pack its shape)"
        )
    batch = PackedBatch(*(np.full(shape.of(d), pad, t) for d, t, pad in PACKED[:8]))
    tokens, positions, segment_ids, is_response = (x.ravel() for x in batch[:4])
    places = zip(row * shape.pack_length + start, segment, prompt_lengths, strict=True)
    for sequence, (first, number, length) in zip(sequences, places, strict=True):
        end = first + len(sequence)
        tokens[first:end] = sequence
        positions[first:end] = np.arange(len(sequence))
        segment_ids[first:end] = number + 1
        is_response[first + length : end] = True
    at = (*divmod(row, shape.microbatch_size), segment)
    batch.length[at] = placement.length
    batch.is_real[at] = True
    batch.prompt_index[at] = prompt_index
    batch.psi[at] = psi
    return batch, placement, used


def trim_segments(batch: PackedBatch, placement: Placement) -> PackedBatch:
    """Drops trajectories per row that no row holds, down to the least of a few sizes.

    For attention that pays for each that there might be (`attention.pays_for_segments`).
    """
    most = int(placement.segment.max(initial=0)) + 1
    size = next((n for n in (8, 32) if most <= n), None)  # a program each
    is_cut = lambda x, dims: x is not None and dims.endswith("n")
    fields = zip(batch, PACKED, strict=True)
    return PackedBatch(*(x[..., :size] if is_cut(x, d) else x for x, (d, *_) in fields))


def _check(lengths: np.ndarray, prompt_lengths: np.ndarray, pack_length: int) -> None:
    if len(lengths) and lengths.max() > pack_length:
        i = int(lengths.argmax())
        said = f"trajectory {i} has {lengths[i]} tokens"
        raise ValueError(f"{said} but a row holds {pack_length}")
    bad = np.flatnonzero((prompt_lengths < 1) | (prompt_lengths >= lengths))
    if len(bad):
        i = int(bad[0])
        raise ValueError(
            f"trajectory {i} has {lengths[i]} tokens of which {prompt_lengths[i]} are "
            "prompt; it needs at least one of prompt and one of response"
        )


def best_fit(
    lengths: Int[np.ndarray, "s"], pack_length: int, max_segments: int
) -> tuple[Int[np.ndarray, "s"], Int[np.ndarray, "s"], Int[np.ndarray, "s"]]:
    """Places sequences in rows, the longest first, each where it leaves the least room.

    Returns the row of each, its number in that row, and the token it begins at.
    """
    row, segment, start = (np.zeros(len(lengths), np.int64) for _ in range(3))
    # Rows with room, by it: free tokens and the row in one number, which sort as pairs.
    open_rows: list[int] = []
    held: list[int] = []  # trajectories in each row
    order = np.argsort(-lengths, kind="stable")
    for i, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        at = bisect.bisect_left(open_rows, length << 32)
        if at == len(open_rows):
            free, r = pack_length, len(held)
            held.append(0)
        else:
            free, r = divmod(open_rows.pop(at), 1 << 32)
        row[i], segment[i], start[i] = r, held[r], pack_length - free
        held[r] += 1
        if held[r] < max_segments:
            bisect.insort(open_rows, (free - length) << 32 | r)
    return row, segment, start


def pack_prompts(
    prompts: list[list[int]], pack_length: int
) -> tuple[Int[np.ndarray, "b t"], Int[np.ndarray, "b t"], Int[np.ndarray, "b t"]]:
    """Prompts end to end in as few rows as best fit finds; empty ones take no room.

    Returns tokens, positions, and segment ids: 0 is padding, i + 1 the i-th prompt.
    """
    some = [i for i, prompt in enumerate(prompts) if prompt]
    lengths = np.array([len(prompts[i]) for i in some], np.int64)
    rows, _, starts = best_fit(lengths, pack_length, pack_length)
    shape = (int(rows.max(initial=0)) + 1, pack_length)
    tokens, positions, segment_ids = (np.zeros(shape, np.int32) for _ in range(3))
    for i, row, start, length in zip(some, rows, starts, lengths, strict=True):
        at = (row, slice(start, start + length))
        tokens[at], positions[at] = prompts[i], np.arange(length)
        segment_ids[at] = i + 1
    return tokens, positions, segment_ids


def segment_sum(
    x: Shaped[Array, "b t *d"], segment_ids: Int[Array, "b t"], max_segments: int
) -> Shaped[Array, "b n *d"]:
    """Sums the tokens of each trajectory, in float32.

    Args:
      x: a value, or a vector, per token. Tokens to be left out must be 0 already.
      segment_ids: 0 for padding (left out), 1..N for a trajectory.
      max_segments: N.
    """
    # A product with the one-hot membership runs on the matrix unit and has a
    # cheap gradient; a scatter does neither on TPU.
    member = segment_ids[:, :, None] == jnp.arange(1, max_segments + 1)[None, None, :]
    member, x = member.astype(jnp.float32), x.astype(jnp.float32)
    return jnp.einsum("btn,bt...->bn...", member, x, precision="highest")


def response_sum(x: Float[Array, "b t"], batch: PackedBatch) -> Float[Array, "b n"]:
    """Sums values of tokens over the response of each sequence of a packed batch.

    Raises:
      ValueError: if `x` has another shape than the tokens, or `batch` is none.

    >>> import pfjax
    >>> batch = pfjax.pack([[2, 10, 3, 4]], [1])
    >>> response_sum(np.ones((1, 64), np.float32), batch)[0, :2]
    Array([3., 0.], dtype=float32)
    """
    check_batch(batch)
    if np.shape(x) != np.shape(batch.is_response):
        raise ValueError(
            f"values of shape {np.shape(x)} for tokens of shape {np.shape(batch.is_response)}"
        )
    kept = jnp.where(batch.is_response, x, 0.0)
    return segment_sum(kept, batch.segment_ids, batch.length.shape[-1])


def check_batch(batch: Any) -> None:
    """Raises ValueError for what is no packed batch."""
    if missing := [x for x in PackedBatch._fields[:5] if not hasattr(batch, x)]:
        raise ValueError(
            f"batch must be what pfjax.pack or pfjax.pack_rollout returns, got a "
            f"{type(batch).__name__} without {', '.join(missing)}"
        )


def prompt_mask(batch: PackedBatch) -> Bool[Array, "b t"]:
    """Whether a token belongs to a prompt."""
    return (batch.segment_ids > 0) & ~batch.is_response


def to_segments(
    values: Shaped[np.ndarray, "s"], placement: Placement, shape: tuple[int, int, int]
) -> Shaped[np.ndarray, "m b n"]:
    """Puts values of trajectories where `pack` put these; 0 elsewhere."""
    out = np.zeros((shape[0] * shape[1], shape[2]), values.dtype)
    out[placement.row, placement.segment] = values
    return out.reshape(shape)


def from_segments(x: Array, placement: Placement) -> np.ndarray:
    """Brings `[*m, B, N]` values back into the order of the trajectories, `[S]`."""
    x = np.asarray(x).reshape(-1, x.shape[-1])
    return x[placement.row, placement.segment]


def unpack_responses(x: Array, placement: Placement) -> list[np.ndarray]:
    """Takes the values of each trajectory's response tokens out of `[*m, B, T]`."""
    x = np.asarray(x).reshape(-1, x.shape[-1])
    first = placement.start + placement.prompt_length
    places = zip(placement.row, first, placement.length, strict=True)
    return [x[row, at : at + length] for row, at, length in places]

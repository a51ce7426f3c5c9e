"""Trajectories -> rows of a fixed shape, and tokens -> trajectories again."""

import bisect
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

Array = jax.Array | np.ndarray


class PackedBatch(NamedTuple):
    """Trajectories (a prompt and its response) laid end to end in rows.

    `*m` is empty, or the micro-batches. A trajectory never straddles two rows.
    """

    tokens: Array  # int32 [*m, B, T]
    positions: Array  # int32 [*m, B, T], restarted at 0 in each trajectory
    segment_ids: Array  # int32 [*m, B, T], 0 is padding, 1..N a trajectory
    is_response: Array  # bool [*m, B, T]
    length: Array  # int32 [*m, B, N], response tokens, stop token included
    psi: Array  # float32 [*m, B, N], format term in nats a token
    prompt_index: Array  # int32 [*m, B, N], which prompt of the step; -1 padding
    is_real: Array  # bool [*m, B, N]


class Placement(NamedTuple):
    """Where `pack` put each of the S trajectories it was given."""

    row: np.ndarray  # int [S], index into the M * B rows
    slot: np.ndarray  # int [S], index into the N slots of the row
    start: np.ndarray  # int [S], token of the row where its prompt begins


class Rollout(NamedTuple):
    """G responses to each of P prompts, padded to R tokens."""

    tokens: np.ndarray  # int32 [P, G, R]; past `lengths` the content is undefined
    lengths: np.ndarray  # int32 [P, G], tokens drawn, stop token included
    log_probs: np.ndarray  # float32 [P, G, R], full vocabulary at temperature 1
    finished: np.ndarray  # bool [P, G], whether a stop token was drawn
    slot_steps: int  # slots times steps computed; tokens / slot_steps did work


class OldScores(NamedTuple):
    """What is known of a packed batch before the policy is updated on it."""

    log_p_base: Array  # float32 [*m, B, T] token log-probs of the frozen base
    log_p_old: Array | None = None  # the same of the policy that drew it
    is_on_policy: Array | None = None  # bool [*m], the policy is the one that drew:
    # log_p_old is not read. None: it always is, and log_p_old is None
    log_z: Array | None = None  # float32 [*m, B, N] group estimate; None: use the head
    advantage: Array | None = None  # float32 [*m, B, N] group-normalised reward
    log_stop_base: Array | None = None  # float32 [*m, B, T] the base's log-prob of
    # stopping in the place of each token


def max_micro_batches(
    num_trajectories: int, max_length: int, rows: int, row_length: int
) -> int:
    """Micro-batches that always suffice for trajectories of at most `max_length`.

    `pack` opens a row only when a trajectory fits none of the open ones, so every
    closed row holds at least `row_length // max_length` of them.
    """
    per_row = row_length // max_length
    return -(-num_trajectories // (per_row * rows))


# Trajectories a row may hold, where they are not all that short.
_MOST_SLOTS = 128


def slots_per_row(row_length: int, max_length: int) -> int:
    """N: trajectories a row may hold. Rows of very short ones end partly empty."""
    return max(row_length // max_length, min(row_length // 8, _MOST_SLOTS))


def pack(
    sequences: list[Int[np.ndarray, "_"]],
    prompt_lengths: Int[np.ndarray, "s"],
    *,
    rows: int,
    row_length: int,
    slots: int,
    micro_batches: int,
    psi: Float[np.ndarray, "s"] | None = None,
    prompt_index: Int[np.ndarray, "s"] | None = None,
) -> tuple[PackedBatch, Placement, int]:
    """Packs trajectories by best fit, longest first.

    Args:
      sequences: prompt followed by response, token ids, one array a trajectory.
      prompt_lengths: tokens of each that are prompt, at least 1.
      rows: B, rows a micro-batch.
      row_length: T.
      slots: N, the most trajectories a row may hold.
      micro_batches: M, the size of the result; all of it padding past the third
        value returned.
      psi: format term of each trajectory; 0 when not given.
      prompt_index: prompt of each trajectory; 0 when not given.

    Returns:
      The batch `[M, B, ...]`; where each trajectory went; and the number of
      micro-batches that hold any.

    Raises:
      ValueError: if a trajectory is longer than a row or lacks a prompt or a
        response, or if all do not fit.
    """
    lengths = np.array([len(s) for s in sequences], np.int64)
    _check(lengths, prompt_lengths, row_length)
    psi = np.zeros(len(sequences), np.float32) if psi is None else psi
    if prompt_index is None:
        prompt_index = np.zeros(len(sequences), np.int32)
    placement = best_fit(lengths, row_length, slots)
    used = -(-int(placement.row.max(initial=-1) + 1) // rows)
    if used > micro_batches:
        raise ValueError(
            f"{len(sequences)} trajectories of {lengths.sum()} tokens need {used} "
            f"micro-batches of {rows} x {row_length} tokens, but only {micro_batches} "
            "were given; raise row_length or rows"
        )
    bt, bn = (micro_batches * rows, row_length), (micro_batches * rows, slots)
    batch = PackedBatch(
        tokens=np.zeros(bt, np.int32),
        positions=np.zeros(bt, np.int32),
        segment_ids=np.zeros(bt, np.int32),
        is_response=np.zeros(bt, bool),
        length=np.zeros(bn, np.int32),
        psi=np.zeros(bn, np.float32),
        prompt_index=np.full(bn, -1, np.int32),
        is_real=np.zeros(bn, bool),
    )
    tokens, positions, segment_ids, is_response = (x.ravel() for x in batch[:4])
    first = placement.row * row_length + placement.start
    upto = np.arange(row_length, dtype=np.int32)
    places = zip(first.tolist(), placement.slot.tolist(), strict=True)
    for sequence, length, (at, slot) in zip(
        sequences, prompt_lengths, places, strict=True
    ):
        end = at + len(sequence)
        tokens[at:end] = sequence
        positions[at:end] = upto[: len(sequence)]
        segment_ids[at:end] = slot + 1
        is_response[at + length : end] = True
    at = (placement.row, placement.slot)
    batch.length[at] = lengths - prompt_lengths
    batch.psi[at] = psi
    batch.prompt_index[at] = prompt_index
    batch.is_real[at] = True
    split = [x.reshape(micro_batches, rows, -1) for x in batch]
    return PackedBatch(*split), placement, used


def _check(lengths: np.ndarray, prompt_lengths: np.ndarray, row_length: int) -> None:
    if len(lengths) and lengths.max() > row_length:
        i = int(lengths.argmax())
        raise ValueError(
            f"trajectory {i} has {lengths[i]} tokens but a row holds {row_length}"
        )
    bad = np.flatnonzero((prompt_lengths < 1) | (prompt_lengths >= lengths))
    if len(bad):
        i = int(bad[0])
        raise ValueError(
            f"trajectory {i} has {lengths[i]} tokens of which {prompt_lengths[i]} are "
            "prompt; it needs at least one of prompt and one of response"
        )


def best_fit(lengths: Int[np.ndarray, "s"], row_length: int, slots: int) -> Placement:
    """Rows for sequences, the longest first, each where it leaves the least room."""
    row, slot, start = (np.zeros(len(lengths), np.int64) for _ in range(3))
    # Rows with room, by it: free tokens and the row in one number, which sort as pairs.
    open_rows: list[int] = []
    held: list[int] = []  # trajectories in each row
    order = np.argsort(-lengths, kind="stable")
    for i, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        at = bisect.bisect_left(open_rows, length << 32)
        if at == len(open_rows):
            free, r = row_length, len(held)
            held.append(0)
        else:
            free, r = divmod(open_rows.pop(at), 1 << 32)
        row[i], slot[i], start[i] = r, held[r], row_length - free
        held[r] += 1
        if held[r] < slots:
            bisect.insort(open_rows, (free - length) << 32 | r)
    return Placement(row, slot, start)


def pack_prompts(
    prompts: list[list[int]], row_length: int
) -> tuple[Int[np.ndarray, "b t"], Int[np.ndarray, "b t"], Int[np.ndarray, "b t"]]:
    """Prompts end to end in as few rows as best fit finds; empty ones take no room.

    Returns:
      Tokens, positions, and segment ids: 0 is padding, i + 1 the i-th prompt.
    """
    some = [i for i, prompt in enumerate(prompts) if prompt]
    lengths = np.array([len(prompts[i]) for i in some], np.int64)
    placement = best_fit(lengths, row_length, row_length)
    shape = (int(placement.row.max(initial=0)) + 1, row_length)
    tokens, positions, segment_ids = (np.zeros(shape, np.int32) for _ in range(3))
    for i, row, start in zip(some, placement.row, placement.start, strict=True):
        at = (row, slice(start, start + len(prompts[i])))
        tokens[at] = prompts[i]
        positions[at] = np.arange(len(prompts[i]))
        segment_ids[at] = i + 1
    return tokens, positions, segment_ids


def segment_sum(
    x: Shaped[Array, "b t *d"], segment_ids: Int[Array, "b t"], slots: int
) -> Shaped[Array, "b n *d"]:
    """Sums the tokens of each trajectory, in float32.

    Args:
      x: a value, or a vector, a token. Tokens to be left out must be 0 already.
      segment_ids: 0 for padding (left out), 1..slots for a trajectory.
      slots: N.
    """
    # A product with the one-hot membership runs on the matrix unit and has a
    # cheap gradient; a scatter does neither on TPU.
    member = segment_ids[:, :, None] == jnp.arange(1, slots + 1)[None, None, :]
    return jnp.einsum(
        "btn,bt...->bn...",
        member.astype(jnp.float32),
        x.astype(jnp.float32),
        precision="highest",
    )


def response_sum(x: Float[Array, "b t"], batch: PackedBatch) -> Float[Array, "b n"]:
    """Sums values of tokens over the response of each trajectory."""
    kept = jnp.where(batch.is_response, x, 0.0)
    return segment_sum(kept, batch.segment_ids, batch.length.shape[-1])


def prompt_mask(batch: PackedBatch) -> Bool[Array, "b t"]:
    """Whether a token belongs to a prompt."""
    return (batch.segment_ids > 0) & ~batch.is_response


def fill_slots(
    values: Float[np.ndarray, "s"], placement: Placement, shape: tuple[int, int, int]
) -> Float[np.ndarray, "m b n"]:
    """Values of trajectories where `pack` put them, 0 elsewhere."""
    out = np.zeros((shape[0] * shape[1], shape[2]), np.float32)
    out[placement.row, placement.slot] = values
    return out.reshape(shape)


def unpack_slots(x: Array, placement: Placement) -> np.ndarray:
    """`[*m, B, N]` values back in the order of the trajectories, `[S]`."""
    x = np.asarray(x)
    return x.reshape(-1, x.shape[-1])[placement.row, placement.slot]


def unpack_responses(
    x: Array, placement: Placement, prompt_lengths: np.ndarray, lengths: np.ndarray
) -> list[np.ndarray]:
    """`[*m, B, T]` values of the response tokens of each trajectory."""
    x = np.asarray(x)
    x = x.reshape(-1, x.shape[-1])
    first = placement.start + prompt_lengths
    return [
        x[r, s : s + n] for r, s, n in zip(placement.row, first, lengths, strict=True)
    ]

"""Log-probs of given tokens from hidden states, without the logits of a batch."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from pfjax import packing
from pfjax.policy import model
from pfjax.types import Array, PackedBatch

# Tokens whose logits exist at once. 512 x 151,936 float32 are 0.3 GB.
CHUNK = 512
# Rows that `score` runs at once.
SCORE_ROWS = 8


def token_log_probs(
    hidden: Float[Array, "b t d"],
    head: Float[Array, "v d"],
    targets: Int[Array, "b t"],
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """log p of each target under the full vocabulary at temperature 1, float32.

    Args:
      hidden: states from which each target is predicted.
      head: output projection; cast to the type of `hidden`.
      targets: token ids.

    Returns:
      Log-probs (gradients flow to `hidden` and `head`) and the entropy of each
      predicting distribution in nats (no gradient).
    """
    head = head.astype(hidden.dtype)
    b, t, _ = hidden.shape
    chunk = min(t, max(1, CHUNK // b))
    pad = -t % chunk
    steps = (t + pad) // chunk

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(b, steps, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def body(_, inputs):
        return None, log_softmax_at(logits(inputs[0], head), inputs[1])

    _, out = jax.lax.scan(body, None, (split(hidden), split(targets)))
    log_p, entropy = (jnp.moveaxis(x, 0, 1).reshape(b, -1)[:, :t] for x in out)
    return log_p, jax.lax.stop_gradient(entropy)


def logits(
    hidden: Float[Array, "*b d"], head: Float[Array, "v d"]
) -> Float[Array, "*b v"]:
    """Unnormalised log-probs in float32."""
    return jnp.einsum(
        "...d,vd->...v",
        hidden,
        head.astype(hidden.dtype),
        preferred_element_type=jnp.float32,
    )


def log_softmax_at(
    logits: Float[Array, "*b v"], targets: Int[Array, "*b"]
) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    """Log-prob of each target and the entropy of its distribution."""
    log_p = jax.nn.log_softmax(logits)
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    return jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0], entropy


def packed_log_probs(
    config: model.ModelConfig,
    params: model.Params,
    batch: PackedBatch,
    remat: bool = False,
) -> tuple[Float[Array, "b t"], Float[Array, "b t"], Float[Array, "b t d"]]:
    """Log-prob of every token of packed rows given those before it in its segment.

    Returns:
      Log-probs and entropies, `[B, T]`, meaningful where `batch.is_response`; and
      the hidden states.
    """
    hidden, _ = model.forward_packed(
        config, params, batch.tokens, batch.positions, batch.segment_ids, remat
    )
    # A token is predicted from the state of the one before it. A response never
    # opens a segment, so the first of a row, predicted from zeros, is never used.
    before = jnp.pad(hidden[:, :-1], ((0, 0), (1, 0), (0, 0)))
    log_p, entropy = token_log_probs(before, model.head_weight(params), batch.tokens)
    return log_p, entropy, hidden


@functools.partial(jax.jit, static_argnames="config")
def _score(config: model.ModelConfig, params: model.Params, batch: PackedBatch):
    return packed_log_probs(config, params, batch)[0]


def score(
    policy: model.Policy,
    sequences: list[list[int]],
    prompt_lengths: Sequence[int] | np.ndarray,
) -> list[np.ndarray]:
    """Log-probs of the response tokens of each sequence.

    Sequences are packed into rows, so that different lengths cost no padding.

    Args:
      policy: the model.
      sequences: prompt and response together, token ids.
      prompt_lengths: tokens of each sequence that are prompt, at least 1.

    Returns:
      One float32 array a sequence, one value in nats a response token: under the
      full vocabulary, at temperature 1.

    Raises:
      ValueError: if a sequence lacks a prompt or a response, or is longer than the
        model's positions.

    >>> import pfjax
    >>> policy = pfjax.load("pfjax/toy")
    >>> [x.shape for x in score(policy, [[2, 10, 3, 4], [2, 3, 4, 5, 6]], [3, 2])]
    [(1,), (3,)]
    """
    lengths = np.array([len(s) for s in sequences], np.int64)
    longest = int(lengths.max(initial=0))
    if longest > policy.config.max_positions:
        raise ValueError(
            f"a sequence has {longest} tokens, the model {policy.config.max_positions} "
            "positions"
        )
    # Powers of two: few programs to compile for sequences of any length.
    row_length = max(64, 1 << (longest - 1).bit_length()) if longest else 64
    starts = np.asarray(prompt_lengths, np.int64)
    batch, placement, used = packing.pack(
        [np.asarray(s, np.int32) for s in sequences],
        starts,
        rows=SCORE_ROWS,
        row_length=row_length,
        slots=packing.slots_per_row(row_length, row_length),
        micro_batches=packing.max_micro_batches(
            max(len(sequences), 1), row_length, SCORE_ROWS, row_length
        ),
    )
    parts = [
        _score(policy.config, policy.params, PackedBatch(*(x[i] for x in batch)))
        for i in range(used)
    ]
    if not parts:
        return []
    log_p = np.stack([np.asarray(p) for p in parts])
    return packing.unpack_responses(log_p, placement, starts, lengths - starts)

"""What a policy says of given tokens, in packed rows or in lists of sequences."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from pfjax import packing, targets
from pfjax.batch import PackedBatch, PackShape
from pfjax.infra import numerics, sharding
from pfjax.model import attention, dial, log_probs, lora, transformer
from pfjax.model.config import ModelConfig
from pfjax.targets import Array

# Rows that `score` runs at once, or more, for each device to have one.
SCORE_ROWS = 8


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
    return *log_probs.token_log_probs(
        before, head, batch.tokens, batch.is_response
    ), hidden


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
    stops = jax.nn.logsumexp(
        log_probs.logits(before, head[jnp.array(stop_ids)]), axis=-1
    )
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
    mean = log_probs.logits(before, head.astype(jnp.float32).mean(axis=0)[None])[..., 0]
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
    precise = {"preferred_element_type": jnp.float32}
    return jnp.einsum("btd,btd->bt", before, words, **precise) - log_p


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
    if isinstance(temperature, str) or not temperature > 0:
        raise ValueError(f"the temperature must be positive, got {temperature!r}")
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


@numerics.as_promised()
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
    mesh = sharding.current_mesh()
    ways = 1 if mesh.empty else sharding.batch_ways(mesh)
    rows = -(-SCORE_ROWS // ways) * ways
    most = -(-len(arrays) // rows)
    segments = packing.segments_per_row(pack_length, pack_length)
    shape = PackShape(most, rows, pack_length, segments)
    batch, placement, used = packing.pack(arrays, starts, shape)
    if attention.pays_for_segments(c.attention, c.head_dim, c.dtype):
        batch = packing.trim_segments(batch, placement)
    part = lambda i: jax.tree.map(lambda x: x[i], batch)
    # One after the other: with several under way, devices of a CPU may wait in the exchange
    # of one for those that wait in another's, as each holds a thread.
    log_p = [sharding.fetch(_score(c, params, part(i), *how)) for i in range(used)]
    return packing.unpack_responses(np.stack(log_p), placement)

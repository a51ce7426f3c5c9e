"""The records that cross modules.

Letters of dimensions: B rows, T tokens per row, N trajectories per row, M micro-batches,
P prompts, G samples per prompt, S trajectories, R response tokens, D model width, H query
heads, K key/value heads, C head width, F feed-forward width, V vocabulary, L layers.
Arrays are NumPy on the host and jax.Array on devices; shapes are the same.
"""

from typing import Any, NamedTuple

import numpy as np


class PackedBatch(NamedTuple):
    """Trajectories (a prompt and its response) laid end to end in rows, and their scores.

    A trajectory never straddles two rows. Shapes, types and padding of the fields are in
    `PACKED`; inside a micro-batch they lack M. The scores, `log_p_base` and on, are what is
    known before the policy is updated; None where not asked for.
    """

    tokens: Any
    positions: Any  # restarted at 0 in each trajectory
    segment_ids: Any  # 0 is padding, 1..N a trajectory
    is_response: Any
    length: Any  # response tokens, stop token included
    psi: Any  # format term, in nats per token
    prompt_index: Any  # which prompt of the step
    is_real: Any  # whether there is a trajectory
    log_p_base: Any = None  # token log-probs of the frozen base
    log_p_old: Any = None  # those of the behaviour policy
    # Whether the policy is the behaviour policy: log_p_old is not read. None: it always is.
    is_on_policy: Any = None
    log_z: Any = None  # group estimate; None: use the head
    reward: Any = None  # as the loss takes it: normalised in groups, or as it is
    log_stop_base: Any = None  # the base's log-prob of stopping in the place of a token
    dropout_seed: Any = None  # what of the adapters' inputs is dropped; None: nothing
    choices: Any = None  # recorded experts of a token, of all layers; None: chosen anew
    alpha: Any = None  # power of the base, where each prompt has its own
    log_p_rare: Any = None  # log p_0 of the rare tokens, summed; None: none is rare


# Dimensions, type and padding of each field: zeros, shapes and shardings come from here.
PACKED = PackedBatch(
    tokens=("mbt", "int32", 0),
    positions=("mbt", "int32", 0),
    segment_ids=("mbt", "int32", 0),
    is_response=("mbt", "bool", 0),
    length=("mbn", "int32", 0),
    psi=("mbn", "float32", 0),
    prompt_index=("mbn", "int32", -1),
    is_real=("mbn", "bool", 0),
    log_p_base=("mbt", "float32", 0),
    log_p_old=("mbt", "float32", 0),
    is_on_policy=("m", "bool", 0),
    log_z=("mbn", "float32", 0),
    reward=("mbn", "float32", 0),
    log_stop_base=("mbt", "float32", 0),
    dropout_seed=("mbn", "uint32", 0),
    choices=("mbtc", "uint8", 255),  # `experts.UNKNOWN`
    alpha=("mbn", "float32", 0),
    log_p_rare=("mbn", "float32", 0),
)
SCORES = PackedBatch._fields[8:]


class PackShape(NamedTuple):
    """Dimensions of a packed batch, fixed so that a step compiles once."""

    num_microbatches: int  # M
    microbatch_size: int  # B
    pack_length: int  # T
    max_segments: int  # N
    num_choices: int = 0  # C, of experts

    def of(self, dims: str) -> tuple[int, ...]:
        """Sizes of dimensions by their letters."""
        return tuple(self["mbtnc".index(x)] for x in dims)


class Placement(NamedTuple):
    """Where `pack` put each of the S trajectories it was given."""

    row: np.ndarray  # int [S], index into the M * B rows
    segment: np.ndarray  # int [S], index into the N trajectories of the row
    start: np.ndarray  # int [S], token of the row where its prompt begins
    prompt_length: np.ndarray  # int [S]
    length: np.ndarray  # int [S], tokens of its response


class Rollout(NamedTuple):
    """G responses to each of P prompts, padded to R tokens."""

    tokens: np.ndarray  # int32 [P, G, R]; past `lengths` the content is undefined
    lengths: np.ndarray  # int32 [P, G], tokens drawn, stop token included
    log_probs: np.ndarray  # float32 [P, G, R], full vocabulary at temperature 1
    finished: np.ndarray  # bool [P, G], whether a stop token was drawn
    slot_steps: int  # slots times steps; tokens / slot_steps is the useful fraction
    num_own: int | None = None  # of G, first: drawn by the policy; None: all; may be 0
    num_base: int = 0  # those after: drawn by the frozen base
    # uint8 [P, G, R, C]: the experts, of all layers, of the token that each was drawn from.
    choices: np.ndarray | None = None
    # Of a `Stream` alone. int32 [P, G, R]: steps before the weights that drew each token;
    # and tokens drawn in the slot_steps, of these and of other responses.
    weights_step: np.ndarray | None = None
    num_drawn: int | None = None
    alpha: np.ndarray | None = None  # float32 [P], where each prompt has its own
    # Of `pfjax.rollout` alone. Texts [P][G] are without special tokens, and None where there
    # is no tokenizer; prompts [P] are token ids.
    texts: list[list[str]] | None = None
    prompts: list[list[int]] | None = None

    @property
    def is_own(self) -> np.ndarray:
        """Which of the S responses the policy has drawn."""
        own = self._sample.max() + 1 if self.num_own is None else self.num_own
        return self._sample < own

    @property
    def is_base(self) -> np.ndarray:
        """Which of the S responses the base has drawn."""
        own = self.num_own or 0
        return (self._sample >= own) & (self._sample < own + self.num_base)

    @property
    def _sample(self) -> np.ndarray:
        prompts, samples = self.lengths.shape
        return np.tile(np.arange(samples), prompts)


class RolloutBatch(NamedTuple):
    """The S = P * G trajectories of a step, prompt by prompt, and their rewards."""

    prompts: list[list[int]]  # P
    rollout: Rollout
    responses: list[np.ndarray]  # S, cut to their lengths
    texts: list[str]  # S
    psi: np.ndarray  # float32 [S], format term
    reward: np.ndarray  # float32 [S]; zeros if the objective has none


class Minibatch(NamedTuple):
    """The trajectories of one update: packed, on the mesh, and scored."""

    batch: PackedBatch
    num_microbatches: Any  # int32 scalar; the micro-batches after them are padding
    placement: Placement
    reward: np.ndarray  # float32 [S]
    is_own: np.ndarray  # bool [S], whether the policy has drawn it
    # Token log-probs [M, B, T] of the policy before the update; None: the update's own.
    log_p: Any = None


class TrajectoryStats(NamedTuple):
    """Per-trajectory statistics of an update, `[*m, B, N]` or `[S]`.

    Sums run over the tokens that enter the loss: all of the response, or those whose ratio
    pi / pi_old is within the clip range (`mask_clipped_tokens`). Objectives read the fields
    up to `mean_length`, where gradients flow as said; metrics read all.
    """

    log_pf: Any  # sum of log pi; gradient
    log_p_base: Any  # sum of log p_0
    log_z: Any  # per token or per response, as the target has it; gradient
    num_loss_tokens: Any  # tokens in the sums
    psi: Any  # format term, in nats per token
    reward: Any  # as the loss takes it: normalised in groups, or as it is
    weight: Any  # importance weight of the sequence
    log_ratio: Any  # sum of log(pi / pi_old); gradient
    capped: Any  # sum of min(pi / pi_old, clip_high); gradient
    floored: Any  # sum of max(pi / pi_old, clip_low); gradient
    kl: Any  # sum of p_0/pi - log(p_0/pi) - 1; gradient
    prefix_variance: Any  # of the residuals of prefixes; gradient
    mean_length: Any  # tokens of a response, on average over those of the update
    entropy: Any  # sum over the whole response
    length: Any  # tokens of the whole response
    prompt_index: Any
    loss: Any = None  # this and the residual are filled in last
    residual: Any = None
    alpha: Any = None  # power of the base, where each prompt has its own
    log_p_rare: Any = None  # log p_0 of the rare tokens, summed; None: none is rare

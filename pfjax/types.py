"""What crosses borders between modules, and the letters of dimensions.

B rows, T tokens a row, N trajectories a row, M micro-batches, P prompts,
G samples a prompt, R response tokens, D model width, H query heads, K key/value
heads, C head width, F feed-forward width, V vocabulary, L layers.

Arrays are NumPy on the host and jax.Array on devices; shapes are the same.
NamedTuple fields are not checked on construction, functions that take them are.
"""

from typing import NamedTuple

import jax
import numpy as np

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
    row_steps: int  # slots times steps computed; tokens / row_steps did work


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

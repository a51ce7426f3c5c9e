"""The log Z' head: reads the prompt only, starts at its calibration."""

import jax
import jax.numpy as jnp
import numpy as np

from pfjax.batch import Minibatch, PackShape
from pfjax.model import transformer
from pfjax.objectives import ObjectiveConfig
from pfjax.packing import from_segments, pack, prompt_mask, to_segments
from pfjax.trainer import minibatch
from pfjax.trainer.log_z import apply_head, init_head


def _batch(rng):
    sequences = [rng.integers(0, 16, size=n) for n in (9, 14, 5, 11)]
    batch, placement, _ = pack(
        sequences, np.array([3, 4, 2, 6]), PackShape(1, 2, 24, 3)
    )
    return batch, placement


def _only(batch):
    return jax.tree.map(lambda x: x[0], batch)


def test_starts_where_the_first_mean_residual_is_zero(rng):
    batch, placement = _batch(rng)
    head = init_head(16, jax.random.key(0))
    hidden = jnp.array(rng.normal(size=(2, 24, 16)), jnp.float32)
    assert (apply_head(head, hidden, _only(batch)) == 0).all()
    log_p = np.where(batch.is_response, np.float32(-0.25), np.float32(np.nan))
    own = np.ones(4, bool)
    m = Minibatch(batch._replace(log_p_base=log_p), jnp.int32(1), placement, None, own)
    # Responses of 6, 10, 3 and 5 tokens, 6 on average. Of whole sequences at alpha 2 each
    # leaves (1 - 2) (-0.25) |y|, so 1.5 on average; per token 0.25.
    for name, want in (("tb_traj", -1.5), ("tb_token", -0.25)):
        start = minibatch.init_log_z(head, [m, m], ObjectiveConfig(name, alpha=2.0))
        log_z = apply_head(start, hidden, _only(batch))
        np.testing.assert_allclose(from_segments(log_z, placement), want, rtol=1e-6)


def test_starts_at_log_z_of_every_alpha_where_each_token_is_as_likely(rng):
    batch, placement = _batch(rng)
    alpha = np.array([0.5, 4.0, 1.0, 2.0], np.float32)
    log_p = np.where(batch.is_response, np.float32(-0.25), np.float32(np.nan))
    of_segments = to_segments(alpha, placement, batch.length.shape)
    batch = batch._replace(alpha=of_segments, log_p_base=log_p)
    m = Minibatch(batch, jnp.int32(1), placement, None, np.ones(4, bool))
    ends = (0.25, 8.0)
    head = init_head(16, jax.random.key(0), ends)
    start = minibatch.init_log_z(head, [m, m], ObjectiveConfig("tb_token"), ends)
    log_z = apply_head(start, jnp.zeros((2, 24, 16)), _only(batch), ends)
    # sum p^alpha e^(-log Z' |y|) is 1 at log Z' = (alpha - 1) log p.
    want = (alpha - 1) * -0.25
    np.testing.assert_allclose(from_segments(log_z, placement), want, rtol=1e-5)


def test_follows_a_target_that_moves_as_log_z_does(rng):
    batch, placement = _batch(rng)
    head = init_head(16, jax.random.key(0))
    hidden = jnp.array(rng.normal(size=(2, 24, 16)), jnp.float32)
    # Of responses of 6, 10, 3 and 5 tokens only the second has another log p_0 than 0: -5.
    _, row, segment = np.argwhere(batch.length == 10)[0]
    is_second = batch.segment_ids[0, row] == segment + 1
    log_p = np.where(batch.is_response, np.float32(0), np.float32(np.nan))
    log_p[0, row, is_second & batch.is_response[0, row]] = -0.5
    # The last, of 5 tokens, is not the policy's.
    own = np.array([True, True, True, False])
    m = Minibatch(batch._replace(log_p_base=log_p), jnp.int32(1), placement, None, own)
    # As alpha goes from 2 to 5 log R changes by -15: -15/3 per response, -15/19 per token.
    for name, want in (("tb_traj", -15 / 3), ("tb_token", -15 / 19)):
        before, now = (ObjectiveConfig(name, alpha=a) for a in (2.0, 5.0))
        moved = minibatch.follow_target(head, [m, m], before, now)
        log_z = apply_head(moved, hidden, _only(batch))
        np.testing.assert_allclose(from_segments(log_z, placement), want, rtol=1e-6)


def test_sees_every_prompt_token_and_no_response_token(rng, tiny_policy):
    batch = _only(_batch(rng)[0])
    head = init_head(16, jax.random.key(0))
    # Not ones: the outputs of a LayerNorm sum to zero, and so would their gradients.
    kernel = head["out"]["kernel"]
    head["out"]["kernel"] = jnp.arange(float(kernel.size)).reshape(kernel.shape)

    def total(hidden):
        log_z = apply_head(head, hidden, batch)
        return jnp.sum(jnp.where(batch.is_real, log_z * jnp.arange(1.0, 4)[None], 0))

    hidden, _ = transformer.forward_packed(
        *tiny_policy, batch.tokens, batch.positions, batch.segment_ids
    )
    size = np.abs(jax.grad(total)(hidden)).sum(-1)
    mask = np.asarray(prompt_mask(batch))
    assert size[mask].min() > 1e-2 and not size[~mask].any()

"""The log Z' head: reads the prompt only, starts at its calibration."""

import jax
import jax.numpy as jnp
import numpy as np

from pfjax.batch import pack, prompt_mask, unpack_slots
from pfjax.model import transformer
from pfjax.trainer.log_z import apply_head, calibrate_head, init_head


def _batch(rng):
    sequences = [rng.integers(0, 16, size=n) for n in (9, 14, 5, 11)]
    batch, placement, _ = pack(
        sequences, np.array([3, 4, 2, 6]), rows=2, row_length=24, slots=3,
        micro_batches=1,
    )  # fmt: skip
    return jax.tree.map(lambda x: x[0], batch), placement


def test_starts_at_minus_the_calibrated_residual(rng):
    batch, placement = _batch(rng)
    head = init_head(16, jax.random.key(0))
    hidden = jnp.array(rng.normal(size=(2, 24, 16)), jnp.float32)
    assert (apply_head(head, hidden, batch) == 0).all()
    log_z = apply_head(calibrate_head(head, 0.75), hidden, batch)
    np.testing.assert_allclose(unpack_slots(log_z, placement), -0.75)


def test_sees_every_prompt_token_and_no_response_token(rng, tiny_policy):
    batch, _ = _batch(rng)
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

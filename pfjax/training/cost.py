"""What an update and a rollout cost, and what devices can do.

FLOPs count products only, each multiplication and addition as one, of real tokens:
neither padding nor what is computed again counts. Attention is causal, within a
sequence; the head is applied to responses only.
"""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from pfjax.policy import model
from pfjax.policy.model import ModelConfig


class Chip(NamedTuple):
    """One device, as JAX counts them; peaks by the vendors, in units a second."""

    kinds: tuple[str, ...]  # JAX's `device_kind`, or the beginning of it
    flops: float  # dense bfloat16
    memory: float  # bytes; of TPUs, what a program may use
    bandwidth: float  # bytes, of that memory
    links: float  # bytes sent to other devices of its slice or node, all links together


GIB = 2**30
CHIPS = {
    "v4": Chip(("TPU v4",), 275e12, 30.75 * GIB, 1.228e12, 300e9),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197e12, 15.75 * GIB, 0.819e12, 200e9),
    "v5p": Chip(("TPU v5", "TPU v5p"), 459e12, 95.73 * GIB, 2.765e12, 600e9),
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), 918e12, 31.24 * GIB, 1.638e12, 400e9),
    # Half a chip.
    "tpu7x": Chip(("TPU7x", "TPU v7x"), 1153.5e12, 94.74 * GIB, 3.69e12, 300e9),
    "a100": Chip(("NVIDIA A100-SXM4-80GB",), 312e12, 80e9, 2.039e12, 300e9),
    "h100": Chip(("NVIDIA H100 80GB HBM3",), 989e12, 80e9, 3.35e12, 450e9),
    "h200": Chip(("NVIDIA H200",), 989e12, 141e9, 4.8e12, 450e9),
    "b200": Chip(("NVIDIA B200",), 2250e12, 180e9, 8.0e12, 900e9),
}


def chip_of(device_kind: str) -> Chip | None:
    """What is known of a device by its `device_kind`; None when nothing is."""
    known = {kind: chip for chip in CHIPS.values() for kind in chip.kinds}
    fits = [kind for kind in known if device_kind.startswith(kind)]
    return known[max(fits, key=len)] if fits else None


def weights_a_token(config: ModelConfig) -> int:
    """Weights of the layers that each token is multiplied with."""
    blocks = model.abstract_params(config)["blocks"]
    names = [n for n in blocks if n.startswith("w")]  # projections, adapters too
    return sum(blocks[n].size for n in names)


def forward_flops(
    config: ModelConfig, lengths: Int[np.ndarray, "s"], predicted: Int[np.ndarray, "s"]
) -> float:
    """Of a pass over sequences, logits of `predicted` tokens of each included."""
    lengths = lengths.astype(np.float64)
    pairs = (lengths * (lengths + 1) / 2).sum()
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * pairs
    head = 2 * config.vocab_size * config.embed_dim * float(predicted.sum())
    return 2 * weights_a_token(config) * lengths.sum() + attention + head


def update_flops(
    config: ModelConfig, lengths: Int[np.ndarray, "s"], prompts: Int[np.ndarray, "s"]
) -> float:
    """Of the base's log-probs, the policy's, and their gradient, twice as much.

    With adapters the gradient of the weights beside them is not computed.

    Args:
      config: of the policy.
      lengths: of trajectories, prompts included.
      prompts: lengths of their prompts.
    """
    forward = forward_flops(config, lengths, lengths - prompts)
    if not config.lora_rank:
        return 4 * forward
    frozen = sum(
        x.size
        for name, x in model.abstract_params(config)["blocks"].items()
        if name in model.PROJECTIONS
    ) * float(lengths.sum())
    head = config.vocab_size * config.embed_dim * float((lengths - prompts).sum())
    return 4 * forward - 2 * (frozen + head)


def mfu(flops: float, seconds: float) -> float | None:
    """Share of the peak of all devices; None where it is not known."""
    chip = chip_of(jax.devices()[0].device_kind)
    if chip is None:
        return None
    return flops / seconds / (chip.flops * jax.device_count())

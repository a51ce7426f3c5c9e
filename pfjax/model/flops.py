"""FLOPs of a pass over sequences and of an update.

Only matrix products of real tokens count, a multiplication and an addition as two:
neither padding nor rematerialisation. The head is applied to responses only.
"""

import numpy as np
from jaxtyping import Float, Int

from pfjax.model import delta, transformer
from pfjax.model.config import ModelConfig


def weights_per_token(config: ModelConfig) -> int:
    """Weights of the layers that each token is multiplied with, adapters included."""
    return sum(_weights(config).values())


def all_weights(config: ModelConfig) -> int:
    """The same, of all experts."""
    return sum(_weights(config, of_all_experts=True).values())


def expert_weights(config: ModelConfig) -> int:
    """Those among them that are of experts."""
    if not config.experts:
        return 0
    of_all = _weights(config, of_all_experts=True)
    return sum(of_all[name] for name in transformer.of_experts(config))


def _weights(config: ModelConfig, of_all_experts: bool = False) -> dict[str, int]:
    """Of each parameter of the layers."""
    blocks = transformer.abstract_params(config)["blocks"]
    sizes = {name: x.size for name, x in blocks.items() if name.startswith("w")}
    if config.experts and not of_all_experts:
        num, used = config.experts.num_experts, config.experts.per_token
        of_experts = transformer.of_experts(config)
        sizes |= {name: sizes[name] // num * used for name in of_experts}
    return sizes


def forward_flops(
    config: ModelConfig, lengths: Int[np.ndarray, "s"], predicted: Int[np.ndarray, "s"]
) -> float:
    """FLOPs of a pass over sequences, with logits of `predicted` tokens of each."""
    lengths = lengths.astype(np.float64)
    windows = [kind.window for kind in config.layer_kinds]
    pairs = sum(_pairs(lengths, w) for w in windows if w is not None)
    mixing = 4 * config.num_heads * config.head_dim * pairs
    if num := windows.count(None):
        mixing += num * delta.token_flops(config.delta) * lengths.sum()
    head = 2 * config.vocab_size * config.embed_dim * float(predicted.sum())
    return 2 * weights_per_token(config) * lengths.sum() + mixing + head


def _pairs(lengths: Float[np.ndarray, "s"], window: int) -> float:
    """Pairs of a token and one that it attends to, in a layer."""
    # The first tokens attend to all before them, later ones to as many as the window has.
    first = np.minimum(lengths, window) if window else lengths
    return (first * (first + 1) / 2 + (lengths - first) * first).sum()


def update_flops(
    config: ModelConfig, lengths: Int[np.ndarray, "s"], prompts: Int[np.ndarray, "s"]
) -> float:
    """FLOPs of the base's log-probs, the policy's, and their gradient.

    The gradient costs twice a pass; with adapters that of frozen weights is spared.

    Args:
      lengths: of trajectories, prompts included.
      prompts: lengths of their prompts.
    """
    forward = forward_flops(config, lengths, lengths - prompts)
    if not config.lora_rank:
        return 4 * forward
    adapters = {f"{name}_{x}" for name in config.adapted for x in "ab"}
    frozen = sum(n for name, n in _weights(config).items() if name not in adapters)
    frozen *= float(lengths.sum())
    head = config.vocab_size * config.embed_dim * float((lengths - prompts).sum())
    return 4 * forward - 2 * (frozen + head)

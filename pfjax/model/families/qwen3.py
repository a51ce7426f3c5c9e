"""Qwen3: queries and keys are normalised per head.

References:
  arXiv 2505.09388.
"""

import dataclasses

from pfjax.model import layers
from pfjax.model.families import qwen2
from pfjax.model.layers import Norm


class Block(layers.Block):
    norms = layers.Block.norms | {
        "q_norm": Norm("c", "self_attn.q_norm"),
        "k_norm": Norm("c", "self_attn.k_norm"),
    }

    @staticmethod
    def biased(config):
        return ("wq", "wk", "wv", "wo") if config.attention_bias else ()


@dataclasses.dataclass(frozen=True)
class Config(qwen2.Config):
    model_type, architecture, block = "qwen3", "Qwen3ForCausalLM", Block
    json_defaults = qwen2.Config.json_defaults | {"head_dim": 128}
    json_implied = {"qkv_bias": False, "use_qk_norm": True}

    attention_bias: bool = False

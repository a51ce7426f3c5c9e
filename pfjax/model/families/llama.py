"""Llama 2 and 3, and the many that are built like them.

References:
  arXiv 2307.09288 and 2407.21783.
"""

import dataclasses

from pfjax.model import layers
from pfjax.model.config import ModelConfig


class Block(layers.Block):
    @staticmethod
    def biased(config):
        attention = ("wq", "wk", "wv", "wo") if config.attention_bias else ()
        return attention + (("w_gate", "w_up", "w_down") if config.mlp_bias else ())


@dataclasses.dataclass(frozen=True)
class Config(ModelConfig):
    model_type, architecture, block = "llama", "LlamaForCausalLM", Block

    attention_bias: bool = False
    mlp_bias: bool = False

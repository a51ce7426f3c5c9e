"""OLMo 2: norms after attention and MLP in the place of those before, and of all queries
and keys of a token together.

References:
  arXiv 2501.00656.
"""

import dataclasses

from pfjax.model import layers
from pfjax.model.config import ModelConfig
from pfjax.model.layers import Norm


class Block(layers.Block):
    norms = {
        "attn_norm": Norm("d", "post_attention_layernorm"),
        "mlp_norm": Norm("d", "post_feedforward_layernorm"),
        "q_norm": Norm("hc", "self_attn.q_norm"),
        "k_norm": Norm("kc", "self_attn.k_norm"),
    }

    @staticmethod
    def biased(config):
        return ("wq", "wk", "wv", "wo") if config.attention_bias else ()

    def __call__(self, x, layer):
        y, kv = self.attention(x, layer)
        x = x + self.norm(y, "attn_norm")
        return x + self.norm(self.mlp(x, layer), "mlp_norm"), kv


@dataclasses.dataclass(frozen=True)
class Config(ModelConfig):
    model_type, architecture, block = "olmo2", "Olmo2ForCausalLM", Block

    attention_bias: bool = False

    def norm(self, x, scale):
        return layers.rms_norm_float32(x, scale, self.norm_eps)

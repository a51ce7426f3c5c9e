"""Seed-OSS: Llama with biases of queries, keys and values, and perhaps of outputs.

References:
  https://huggingface.co/ByteDance-Seed/Seed-OSS-36B-Base
"""

import dataclasses

from pfjax.model.families import llama


class Block(llama.Block):
    @staticmethod
    def biased(config):
        has = (
            *("wq", "wk", "wv") * config.attention_bias,
            *("wo",) * config.attention_out_bias,
        )
        return has + ("w_gate", "w_up", "w_down") * config.mlp_bias


@dataclasses.dataclass(frozen=True)
class Config(llama.Config):
    model_type, architecture, block = "seed_oss", "SeedOssForCausalLM", Block
    json_defaults = {"head_dim": 128, "attention_bias": True}
    json_fields = ("residual_dropout",)  # of training, like `attention_dropout`

    attention_bias: bool = True
    attention_out_bias: bool = False

"""Gemma 3, the language model: five layers with a window to one without, norms on both sides.

References:
  arXiv 2503.19786.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from pfjax.model import layers, rope
from pfjax.model.config import ModelConfig, Wrapper
from pfjax.model.layers import Norm


class Block(layers.Block):
    norms = {
        "attn_norm": Norm("d", "input_layernorm"),
        "attn_post_norm": Norm("d", "post_attention_layernorm"),
        "mlp_norm": Norm("d", "pre_feedforward_layernorm"),
        "mlp_post_norm": Norm("d", "post_feedforward_layernorm"),
        "q_norm": Norm("c", "self_attn.q_norm"),
        "k_norm": Norm("c", "self_attn.k_norm"),
    }

    @staticmethod
    def biased(config):
        return ("wq", "wk", "wv", "wo") if config.attention_bias else ()

    def __call__(self, x, layer):
        y, kv = self.attention(self.norm(x, "attn_norm"), layer)
        x = x + self.norm(y, "attn_post_norm")
        y = self.mlp(self.norm(x, "mlp_norm"), layer)
        return x + self.norm(y, "mlp_post_norm"), kv

    def prepare(self, x, which):
        c, x = self.config, super().prepare(x, which)
        # The back ends divide by the root of the head's width.
        scale = (c.head_dim / c.query_pre_attn_scalar) ** 0.5
        if which == "k" or scale == 1.0:
            return x
        # In float32: rounded to bfloat16, that of the 27B is 0.2 % off.
        return (x.astype(jnp.float32) * scale).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Config(ModelConfig):
    model_type, architecture, block = "gemma3_text", "Gemma3ForCausalLM", Block
    activation = staticmethod(functools.partial(jax.nn.gelu, approximate=True))
    norm_init = staticmethod(nnx.initializers.zeros)
    json_constants = {"hidden_activation": "gelu_pytorch_tanh"}
    # The larger models' configs leave out whatever is as here.
    json_defaults = {
        "head_dim": 256,
        "max_position_embeddings": 131_072,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_local_base_freq": 1e4,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "tie_word_embeddings": True,
        "vocab_size": 262_208,
    }
    json_fields = ("layer_types", "rope_local_base_freq", "sliding_window_pattern")
    wrapper = Wrapper(
        "gemma3",
        "Gemma3ForConditionalGeneration",
        (
            "boi_token_index",
            "eoi_token_index",
            "image_token_index",
            "mm_tokens_per_image",
            "vision_config",
        ),
    )

    attention_bias: bool = False
    query_pre_attn_scalar: int = 256  # attention divides by its root

    @classmethod
    def is_other(cls, json, layer):
        return (layer + 1) % json["sliding_window_pattern"] != 0

    @classmethod
    def read_ropes(cls, json):
        local_theta = float(json["rope_local_base_freq"])
        return rope.from_json_by_type(json, theta=1e6, local_theta=local_theta)

    def norm(self, x, scale):
        # Checkpoints hold what is added to one.
        scale = 1.0 + scale.astype(jnp.float32)
        return layers.rms_norm_float32(x, scale, self.norm_eps)

    def scale_embeddings(self, x):
        return x * jnp.asarray(self.embed_dim**0.5, x.dtype)

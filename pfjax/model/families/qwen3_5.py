"""Qwen3.5, the language model: three layers of Gated DeltaNet to one of attention with a gate.

References:
  arXiv 2412.06464 (Gated DeltaNet); the Qwen3.5 release.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from pfjax.model import delta, layers, rope
from pfjax.model.config import FULL, LINEAR, ModelConfig, Wrapper
from pfjax.model.layers import Norm, Projection

_ATTENTION = ("wq", "wk", "wv", "wo")


class Block(layers.Block):
    projections = {
        name: x._replace(layer_type=FULL) if name in _ATTENTION else x
        for name, x in layers.PROJECTIONS.items()
    } | {
        # Of each head its queries, and a gate as wide.
        "wq": Projection("d", "hg", "self_attn.q_proj", FULL),
        "w_mixed": Projection("d", "m", "linear_attn.in_proj_qkv", LINEAR),
        "w_z": Projection("d", "vw", "linear_attn.in_proj_z", LINEAR),
        "w_beta": Projection("d", "v", "linear_attn.in_proj_b", LINEAR),
        "w_decay": Projection("d", "v", "linear_attn.in_proj_a", LINEAR),
        "w_out": Projection("vw", "d", "linear_attn.out_proj", LINEAR),
    }
    norms = layers.Block.norms | {
        "q_norm": Norm("c", "self_attn.q_norm", FULL),
        "k_norm": Norm("c", "self_attn.k_norm", FULL),
    }
    dims = layers.Block.dims | {
        "g": ("gated_head_dim", None),
        "m": ("conv_dim", None),
        "v": ("linear_num_value_heads", "heads"),
        "w": ("linear_value_head_dim", None),
        "1": ("conv_groups", None),
        "t": ("linear_conv_kernel_dim", None),
    }

    @staticmethod
    def biased(config):
        return _ATTENTION if config.attention_bias else ()

    def __init__(self, config, rngs, layer_type=""):
        super().__init__(config, rngs, layer_type)
        ones, spread = nnx.initializers.ones, nnx.initializers.uniform(math.log(16.0))
        mean = nnx.initializers.normal(config.linear_conv_kernel_dim**-0.5)
        for name, letters, init, tensor, num_read in (
            ("kernel", "m1t", mean, "conv1d.weight", None),
            ("log_rate", "v", spread, "A_log", 0),
            ("step_bias", "v", ones, "dt_bias", 0),
            ("out_norm", "w", ones, "norm.weight", 0),
        ):
            how = (f"linear_attn.{tensor}", LINEAR, num_read)
            self.declare(rngs, name, letters, init, *how)

    def __call__(self, x, layer):
        y, kv = self.norm(x, "attn_norm"), None
        if self.layer_type == LINEAR:
            x = x + self.recurrence(y, layer)
        else:
            y, kv = self.attention(y, layer)
            x = x + y
        return x + self.mlp(self.norm(x, "mlp_norm"), layer), kv

    def attention(self, x, layer):
        q, gate = jnp.split(self.project(x, "wq", layer), 2, axis=-1)
        k, v = (self.project(x, name, layer) for name in ("wk", "wv"))
        q, k = (
            layer.rotate(self.norm(q, "q_norm")),
            layer.rotate(self.norm(k, "k_norm")),
        )
        out = layer.attend(q, k, v) * jax.nn.sigmoid(gate)
        return self.project(out, "wo", layer), (k, v)

    def recurrence(self, x, layer):
        mixed, z, beta, decay = (
            self.project(x, name, layer)
            for name in ("w_mixed", "w_z", "w_beta", "w_decay")
        )
        # Parameters are of the computation's type, in which rollouts have them too.
        of = lambda name: getattr(self, name)[...].astype(x.dtype)
        float32 = lambda name: layers.rank_of(x, of(name).astype(jnp.float32))
        step = jax.nn.softplus(decay.astype(jnp.float32) + float32("step_bias"))
        log_decay = -jnp.exp(float32("log_rate")) * step
        beta = jax.nn.sigmoid(beta).astype(jnp.float32)
        out = layer.recur(delta.Inputs(mixed, log_decay, beta, of("kernel")[:, 0]))
        out = layers.rms_norm(out, of("out_norm"), self.config.norm_eps)
        out = out * jax.nn.silu(z.astype(jnp.float32))
        return self.project(out.astype(x.dtype), "w_out", layer)


@dataclasses.dataclass(frozen=True)
class Config(ModelConfig):
    model_type, architecture, block = "qwen3_5_text", "Qwen3_5ForCausalLM", Block
    norm_init = staticmethod(nnx.initializers.zeros)
    other_type = LINEAR
    json_constants = ModelConfig.json_constants | {
        "attn_output_gate": True,
        "output_gate_type": "swish",
    }
    json_defaults = {
        "full_attention_interval": 4,
        "head_dim": 256,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
    }
    json_fields = ("layer_types", "full_attention_interval", "partial_rotary_factor")
    wrapper = Wrapper(
        "qwen3_5",
        "Qwen3_5ForConditionalGeneration",
        (
            "image_token_id",
            "video_token_id",
            "vision_config",
            "vision_end_token_id",
            "vision_start_token_id",
        ),
    )

    attention_bias: bool = False
    linear_conv_kernel_dim: int = 4
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_num_key_heads: int = 16
    linear_num_value_heads: int = 32

    def __post_init__(self):
        if self.linear_num_value_heads % self.linear_num_key_heads:
            raise ValueError(
                f"sets linear_num_key_heads={self.linear_num_key_heads}, which must divide "
                f"linear_num_value_heads {self.linear_num_value_heads}"
            )

    @property
    def delta(self):
        return delta.Sizes(
            self.linear_num_key_heads,
            self.linear_key_head_dim,
            self.linear_num_value_heads,
            self.linear_value_head_dim,
            self.linear_conv_kernel_dim,
        )

    gated_head_dim = property(lambda self: 2 * self.head_dim)
    conv_dim = property(lambda self: self.delta.conv_dim)
    conv_groups = 1  # inputs of a channel

    @classmethod
    def is_other(cls, json, layer):
        return (layer + 1) % json["full_attention_interval"] != 0

    @classmethod
    def read_ropes(cls, json):
        p = json.get("rope_parameters") or json.get("rope_scaling") or {}
        part, plain = json.get("partial_rotary_factor"), p
        if isinstance(p, dict):
            part = p.get("partial_rotary_factor", part)
            # Where the parts of an image are; text has one position.
            own = ("mrope_interleaved", "mrope_section", "partial_rotary_factor")
            plain = {name: x for name, x in p.items() if name not in own}
        part = 0.25 if part is None else part
        width = json["head_dim"] or json["hidden_size"] // json["num_attention_heads"]
        is_number = isinstance(part, int | float) and not isinstance(part, bool)
        is_part = is_number and 0 < part <= 1
        if not is_part or int(width * part) % 2 or width * part < 2:
            raise ValueError(
                f"sets partial_rotary_factor={part!r}: an even number of dimensions must turn"
            )
        found = rope.from_json(json | {"rope_parameters": plain, "rope_scaling": None})
        return {"rope": dataclasses.replace(found, rotated=float(part))}

    def norm(self, x, scale):
        # Checkpoints hold what is added to one.
        scale = 1.0 + scale.astype(jnp.float32)
        return layers.rms_norm_float32(x, scale, self.norm_eps)

"""Qwen3-MoE: Qwen3 with experts in the place of each MLP.

References:
  arXiv 2505.09388.
"""

import dataclasses

from flax import nnx

from pfjax.model import experts
from pfjax.model.config import ModelConfig
from pfjax.model.families import qwen3


class Block(qwen3.Block):
    projections = {
        name: x._replace(module=x.module.replace("mlp.", "mlp.experts.*."))
        for name, x in qwen3.Block.projections.items()
    }
    dims = qwen3.Block.dims | {
        "e": ("num_experts", "experts"),
        "f": ("moe_intermediate_size", "mlp"),
    }

    def __init__(self, config, rngs, layer_type=""):
        super().__init__(config, rngs, layer_type)
        init = nnx.initializers.normal(config.embed_dim**-0.5)
        self.declare(rngs, "w_router", "de", init, "mlp.gate.weight", num_read=1)

    def mlp(self, x, layer):
        c = self.config

        def weight(name):
            w = getattr(self, f"w_{name}")[...].astype(x.dtype)
            return w * (c.lora_alpha / c.lora_rank) if name.endswith("_b") else w

        names = (k for k in experts.Weights._fields if hasattr(self, f"w_{k}"))
        weights = experts.Weights(**{k: weight(k) for k in names})
        return experts.apply(c.experts, x, weights, c.activation, layer.choose)


@dataclasses.dataclass(frozen=True)
class Config(ModelConfig):
    model_type, architecture, block = "qwen3_moe", "Qwen3MoeForCausalLM", Block
    json_implied = qwen3.Config.json_implied | {"shared_expert_intermediate_size": 0}
    json_constants = ModelConfig.json_constants | {
        "decoder_sparse_step": 1,  # every layer has experts
        "use_sliding_window": False,  # of all layers, or not, by version of transformers
    }
    json_defaults = {"num_key_value_heads": 4}
    json_aliases = {"num_local_experts": "num_experts"}
    # Of the loss of pretraining, which balances experts, and of windows.
    json_fields = ("router_aux_loss_coef", "max_window_layers")

    attention_bias: bool = False
    moe_intermediate_size: int = 768  # of each expert; `mlp_dim` is not used
    norm_topk_prob: bool = False
    num_experts: int = 128
    num_experts_per_tok: int = 8

    def __post_init__(self):
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"sets num_experts_per_tok={self.num_experts_per_tok}, of "
                f"num_experts={self.num_experts}"
            )

    @property
    def experts(self):
        return experts.Routing(
            self.num_experts,
            self.moe_intermediate_size,
            self.num_experts_per_tok,
            self.norm_topk_prob,
        )

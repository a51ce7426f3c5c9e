"""A small config of each family, whose windows and ropes bite within a few tokens."""

import dataclasses
import importlib

import jax

from pfjax.model import lora, rope, transformer
from pfjax.model.config import FULL, LINEAR, SLIDING, ModelConfig

# Qwen 2 is that of most tests; Llama is Mistral without windows, OLMo 2 is OLMo 3 so.
NAMES = (
    "gemma3", "mistral", "olmo3", "qwen3", "qwen3_5", "qwen3_moe", "seed_oss", "smollm3",
)  # fmt: skip


ALL = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


def adapted(
    policy: transformer.Policy, targets: str, by: float = 0.2
) -> transformer.Policy:
    """A policy with adapters that have moved (B is not zero)."""
    config = dataclasses.replace(
        policy.config,
        lora_rank=3,
        lora_alpha=6.0,
        lora_targets=lora.projections(targets),
    )
    adapters = lora.init_params(config, jax.random.key(0))
    leaves, tree = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [
        x + by * jax.random.normal(k, x.shape)
        for x, k in zip(leaves, keys, strict=True)
    ]
    adapters = jax.tree.unflatten(tree, moved)
    return transformer.Policy(config, lora.join(policy.params, adapters))


def config_of(name: str, like: ModelConfig, window: int) -> ModelConfig:
    """A config of the sizes of another, of two layers."""
    fields = [x.name for x in dataclasses.fields(ModelConfig)]
    given = {x: getattr(like, x) for x in fields}
    if name in ("gemma3", "mistral", "olmo3"):
        last = SLIDING if name == "mistral" else FULL
        given |= {"layer_types": (SLIDING, last), "sliding_window": window}
    if name == "qwen3_5":
        given |= {"layer_types": (LINEAR, FULL), "linear_num_key_heads": 2}
        given |= {"linear_num_value_heads": 4, "linear_key_head_dim": 4}
        given |= {"linear_value_head_dim": 6}
    if name in ("gemma3", "olmo3"):
        given["local_rope"] = rope.RopeConfig(theta=100.0)
    if name == "gemma3":
        given["query_pre_attn_scalar"] = 4
    if name == "qwen3_moe":
        sizes = {"num_experts": 4, "num_experts_per_tok": 2}
        given |= sizes | {"moe_intermediate_size": 16, "norm_topk_prob": True}
    if name == "smollm3":
        given["no_rope_layers"] = (1, 0)
    return importlib.import_module(f"pfjax.model.families.{name}").Config(**given)

"""Low-rank adapters: a small trained part beside a frozen base.

Policy and base share one copy of the weights. An adapter of a projection W adds
`(alpha / rank) A B` to it; B starts at zero, so that training starts at the base.

References:
  Hu et al., arXiv 2106.09685.
"""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp

from pfjax.batch import Array
from pfjax.infra import storage
from pfjax.model import transformer, weights
from pfjax.model.transformer import ModelConfig, Params, Policy


def select(tree: Params) -> Params:
    """The adapters of a tree of parameters (or of shapes)."""
    names = [f"{name}_{x}" for name in transformer.PROJECTIONS for x in "ab"]
    return {"blocks": {name: tree["blocks"][name] for name in names}}


def join(frozen: Params, trained: Params) -> Params:
    """The parameters of the policy from the frozen and the trained ones."""
    blocks = {**frozen.get("blocks", {}), **trained["blocks"]}
    return {**frozen, **trained, "blocks": blocks}


def init_params(config: ModelConfig, key: Array) -> Params:
    """Adapters for a config with a `lora_rank`: A random, B zero, in float32."""
    out = {}
    shapes = select(transformer.abstract_params(config))["blocks"]
    for name, x in sorted(shapes.items()):
        key, used = jax.random.split(key)
        fan_in = x.size // (x.shape[0] * config.lora_rank)
        draw = jax.random.normal(used, x.shape) * fan_in**-0.5
        out[name] = draw if name.endswith("_a") else jnp.zeros(x.shape)
    return {"blocks": out}


def merge(policy: Policy) -> Policy:
    """The same policy without adapters: they are added to the weights, in float32."""
    config, params = policy
    if not config.lora_rank:
        return policy
    scale = config.lora_alpha / config.lora_rank
    blocks = dict(params["blocks"])
    for name, (read, written) in transformer.PROJECTIONS.items():
        a, b = (blocks.pop(f"{name}_{x}") for x in "ab")
        shapes = f"l{read}r,lr{written}->l{read}{written}"
        delta = scale * jnp.einsum(shapes, a, b, precision="highest")
        blocks[name] = blocks[name].astype(jnp.float32) + delta
    config = dataclasses.replace(config, lora_rank=0, lora_alpha=0.0)
    return Policy(config, {**params, "blocks": blocks})


def save_peft(policy: Policy, out_dir: str | os.PathLike, base: str) -> None:
    """Writes the adapters as a folder that `peft` loads onto `base`."""
    config = policy.config
    adapter = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [x.partition(".")[2] for x in weights.MODULES.values()],
        "inference_mode": True,
    }
    with storage.local_folder(out_dir) as out:
        trained, dtype = select(policy.params), jnp.dtype("float32")
        names = {"stem": "adapter_model", "prefix": "base_model.model."}
        weights.write_tensors(trained, out, dtype, **names)
        if jax.process_index() == 0:
            text = json.dumps(adapter, indent=2) + "\n"
            (out / "adapter_config.json").write_text(text)

r"""Qwen3 30B A3B."""

import ml_collections

import pfjax


def get_config() -> ml_collections.ConfigDict:
    c = pfjax.recipe("reasoning")
    c.model = "Qwen/Qwen3-30B-A3B"
    c.alpha = 2.0
    c.data.chat_template_kwargs = '{"enable_thinking": false}'
    c.mesh.tensor = 4
    c.lora.rank = 16
    c.optim.learning_rate = 5e-5
    return c

"""Qwen2 and Qwen2.5: biases of queries, keys and values.

References:
  arXiv 2407.10671 and 2412.15115.
"""

import dataclasses

from pfjax.model import layers
from pfjax.model.config import ModelConfig


class Block(layers.Block):
    @staticmethod
    def biased(config: ModelConfig) -> tuple[str, ...]:
        return ("wq", "wk", "wv")


@dataclasses.dataclass(frozen=True)
class Config(ModelConfig):
    model_type, architecture, block = "qwen2", "Qwen2ForCausalLM", Block
    json_defaults = {"max_window_layers": 28, "sliding_window": 4096}
    json_implied = {"qkv_bias": True}
    # The biases are always there, whatever `attention_bias` says.
    json_fields = (
        "attention_bias",
        "layer_types",
        "max_window_layers",
        "use_sliding_window",
    )

    @classmethod
    def is_other(cls, json, layer):
        is_on = json.get("use_sliding_window") and json["sliding_window"] is not None
        return bool(is_on) and layer >= json["max_window_layers"]

    def to_json(self):
        return {"use_sliding_window": bool(self.layer_types)} | super().to_json()

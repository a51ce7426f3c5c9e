"""Mistral: Llama without biases; its first models attend to a window in every layer.

References:
  arXiv 2310.06825.
"""

import dataclasses

from pfjax.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Config(ModelConfig):
    model_type, architecture = "mistral", "MistralForCausalLM"
    json_defaults = {"sliding_window": 4096}

    @classmethod
    def is_other(cls, json, layer):
        return json["sliding_window"] is not None

    def to_json(self):
        window = self.sliding_window or self.max_positions
        return {"sliding_window": window if self.layer_types else None}

"""OLMo 3: OLMo 2 with windows in three of four layers; only the others stretch their rope.

References:
  https://allenai.org/papers/olmo3.
"""

import dataclasses

from pfjax.model import rope
from pfjax.model.families import olmo2


@dataclasses.dataclass(frozen=True)
class Config(olmo2.Config):
    model_type, architecture = "olmo3", "Olmo3ForCausalLM"
    json_defaults = {"sliding_window": 4096}
    json_fields = ("layer_types",)

    @classmethod
    def is_other(cls, json, layer):
        return (layer + 1) % 4 != 0

    @classmethod
    def read_ropes(cls, json):
        if not json.get("rope_parameters") and json.get("rope_theta", 5e5) != 5e5:
            raise ValueError(
                f"sets rope_theta={json['rope_theta']!r}: of layers with a window too, or "
                "not, by the version of transformers; give rope_parameters for each type"
            )
        return rope.from_json_by_type(json, theta=5e5, local_theta=5e5)

"""SmolLM3: Llama of which every fourth layer is not told positions.

References:
  https://huggingface.co/blog/smollm3; Yang et al., arXiv 2501.18795 (layers without rope).
"""

import dataclasses

from pfjax.model import rope
from pfjax.model.families import llama


@dataclasses.dataclass(frozen=True)
class Config(llama.Config):
    model_type, architecture = "smollm3", "SmolLM3ForCausalLM"
    json_defaults = {"no_rope_layer_interval": 4, "tie_word_embeddings": True}
    json_fields = ("layer_types", "max_window_layers", "use_sliding_window")

    no_rope_layers: tuple[int, ...] = ()  # 0 for each layer without rope
    no_rope_layer_interval: int = 4  # without that list, every fourth

    @classmethod
    def read_ropes(cls, json):
        listed = json.get("no_rope_layers") or []
        is_list = isinstance(listed, list) and set(map(repr, listed)) <= {"0", "1"}
        if not is_list or len(listed) not in (0, json["num_hidden_layers"]):
            raise ValueError(
                f"sets no_rope_layers={listed!r}: must be 0 or 1 per layer"
            )
        return {"rope": rope.from_json(json, theta=2e6)}

    @classmethod
    def is_other(cls, json, layer):
        is_on = json.get("use_sliding_window") and json.get("sliding_window")
        rules = json.get("no_rope_layers"), json["no_rope_layer_interval"]
        return bool(is_on) and not _has_rope(layer, *rules)

    @property
    def layer_kinds(self):
        rules = self.no_rope_layers, self.no_rope_layer_interval
        return tuple(
            kind if _has_rope(i, *rules) else kind._replace(rope=None)
            for i, kind in enumerate(super().layer_kinds)
        )

    def to_json(self):
        # transformers follows the interval where there is no list, not where it is empty.
        listed = {k: v for k, v in super().to_json().items() if v != ()}
        return {"use_sliding_window": bool(self.layer_types)} | listed


def _has_rope(layer, listed, interval):
    return bool(listed[layer] if listed else (layer + 1) % interval)

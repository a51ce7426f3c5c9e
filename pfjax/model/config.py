"""What a model is, beside its parameters."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
from flax import nnx

from pfjax.batch import Array
from pfjax.model import layers, rope
from pfjax.model.rope import RopeConfig

# Of `layer_types` in config.json.
FULL, SLIDING = "full_attention", "sliding_attention"


class LayerKind(NamedTuple):
    """What layers of one model may differ in, their parameters being alike."""

    window: int  # tokens that each attends to at most, itself included; 0 for all
    rope: RopeConfig | None  # None: attention is not told positions


class Wrapper(NamedTuple):
    """A kind of checkpoint around a language model, by its config.json."""

    model_type: str
    architecture: str
    fields: tuple[str, ...]  # of what is around the language model


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What decides the function computed from the parameters, and where it stops.

    Families of models are subclasses, see `pfjax.model.families`: with the fields that
    only they have, their block, and whatever they compute differently.
    """

    # `model_type` and `architectures` of Hugging Face's config.json.
    model_type: ClassVar[str]
    architecture: ClassVar[str]
    block: ClassVar[type[layers.Block]] = layers.Block
    activation: ClassVar[Callable[[Array], Array]] = staticmethod(jax.nn.silu)
    norm_init: ClassVar[Callable[..., Array]] = staticmethod(nnx.initializers.ones)
    # What transformers takes for fields of config.json that are not there.
    json_defaults: ClassVar[dict[str, Any]] = {}
    # The field of config.json for the activation, and its only value.
    hidden_act: ClassVar[tuple[str, str]] = ("hidden_act", "silu")
    # Fields of config.json that are read beside those with fields of their names here.
    json_fields: ClassVar[tuple[str, ...]] = ()
    # The kind of checkpoint that holds such a model and reads images too.
    wrapper: ClassVar[Wrapper | None] = None

    vocab_size: int  # V, rows of the embedding, padding of the checkpoint included
    embed_dim: int  # D
    num_layers: int  # L
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # C
    mlp_dim: int  # F
    rope: RopeConfig
    norm_eps: float
    tied_embeddings: bool
    max_positions: int
    stop_ids: tuple[int, ...]
    layer_types: tuple[str, ...] = ()  # FULL or SLIDING, of each layer; () for all FULL
    sliding_window: int = 0  # of those that are SLIDING, see `LayerKind`
    local_rope: RopeConfig | None = None  # theirs, where it is another
    lora_rank: int = 0  # of adapters; 0 for none
    lora_alpha: float = 0.0  # their output is scaled by lora_alpha / lora_rank
    lora_targets: tuple[str, ...] = tuple(layers.PROJECTIONS)  # that have them
    dtype: str = "float32"  # of the computation
    attention: str = "auto"  # back end over packed rows, see `attention.BACKENDS`
    # Gives the tokenizer, which takes seconds to import; None where there is none.
    load_tokenizer: Callable[[], Any] | None = dataclasses.field(
        default=None, compare=False, repr=False
    )

    def has_adapter(self, projection: str) -> bool:
        return self.lora_rank > 0 and projection in self.lora_targets

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """Of each layer, in order."""
        types = self.layer_types or (FULL,) * self.num_layers
        kinds = {
            FULL: LayerKind(0, self.rope),
            SLIDING: LayerKind(self.sliding_window, self.local_rope or self.rope),
        }
        return tuple(kinds[x] for x in types)

    @property
    def windows(self) -> tuple[int, ...]:
        """The windows that there are, each once; 0 for none."""
        return tuple(dict.fromkeys(kind.window for kind in self.layer_kinds))

    def norm(self, x: Array, scale: Array) -> Array:
        """The norm of hidden states, over the dimensions of `scale`."""
        return layers.rms_norm(x, scale, self.norm_eps)

    def scale_embeddings(self, x: Array) -> Array:
        """What enters the first layer, from rows of the embedding."""
        return x

    @classmethod
    def own_fields(cls) -> tuple[str, ...]:
        """The fields that a family adds; those of config.json have the same names."""
        shared = {field.name for field in dataclasses.fields(ModelConfig)}
        names = (field.name for field in dataclasses.fields(cls))
        return tuple(name for name in names if name not in shared)

    @classmethod
    def read_ropes(cls, json: dict[str, Any]) -> dict[str, RopeConfig]:
        """The fields that are ropes, from a config.json; ValueError for what is not
        supported, "sets field=value: ..."."""
        return {"rope": rope.from_json(json)}

    @classmethod
    def is_sliding(cls, json: dict[str, Any], layer: int) -> bool:
        """Whether a layer has a window, by a config.json without `layer_types`."""
        return False

    def to_json(self) -> dict[str, Any]:
        """What this family has in config.json that others have not."""
        return {name: getattr(self, name) for name in self.own_fields()}

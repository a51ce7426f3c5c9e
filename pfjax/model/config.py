"""What a model is, beside its parameters."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
from flax import nnx

from pfjax.model import delta, dial, experts, layers, rope
from pfjax.model.rope import RopeConfig
from pfjax.targets import Array

# Of `layer_types` in config.json.
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"


class LayerKind(NamedTuple):
    """What the layers of one model may differ in."""

    # Tokens that each attends to at most, itself included; 0 for all. None for layers that
    # keep a state instead, see `delta`.
    window: int | None
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
    # Other names of its fields -> those that are read here.
    json_aliases: ClassVar[dict[str, str]] = {}
    # Fields of config.json that have one value, if any; the activation first.
    json_constants: ClassVar[dict[str, Any]] = {"hidden_act": "silu"}
    # Fields that only other implementations have -> what the family does anyway.
    json_implied: ClassVar[dict[str, Any]] = {}
    # The type of `layer_types` that layers have which are not FULL.
    other_type: ClassVar[str] = SLIDING
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
    # FULL, SLIDING or LINEAR, of each layer; () for all FULL.
    layer_types: tuple[str, ...] = ()
    sliding_window: int = 0  # of those that are SLIDING, see `LayerKind`
    local_rope: RopeConfig | None = None  # theirs, where it is another
    lora_rank: int = 0  # of adapters; 0 for none
    lora_alpha: float = 0.0  # their output is scaled by lora_alpha / lora_rank
    lora_targets: tuple[str, ...] = ()  # projections; () for all but those of experts
    # Ends of the range of alpha that the adapters' scales are functions of, see `dial`.
    alpha_range: tuple[float, ...] = ()
    dtype: str = "float32"  # of the computation
    attention: str = "auto"  # back end over packed rows, see `attention.BACKENDS`
    # Whether responses are scored with the experts that the sampler chose.
    replays_experts: bool = False
    # Gives the tokenizer, which takes seconds to import; None where there is none.
    load_tokenizer: Callable[[], Any] | None = dataclasses.field(
        default=None, compare=False, repr=False
    )

    @property
    def dial_terms(self) -> int:
        """Coefficients of each scale of the adapters, if they depend on alpha."""
        return dial.TERMS if self.alpha_range else 0

    @property
    def adapted(self) -> tuple[str, ...]:
        """The projections that have adapters."""
        own = self.block.projections if self.lora_rank else {}
        # To peft the experts are no linear layers.
        targets = self.lora_targets or [k for k, x in own.items() if not x.stacked]
        return tuple(name for name in own if name in targets)

    def layers_of_type(self, layer_type: str) -> tuple[int, ...]:
        """Numbers of the layers of one type of `layer_types`; "" for all."""
        types = self.layer_types or (FULL,) * self.num_layers
        return tuple(i for i, x in enumerate(types) if layer_type in ("", x))

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """Of each layer, in order."""
        types = self.layer_types or (FULL,) * self.num_layers
        kinds = {
            FULL: LayerKind(0, self.rope),
            SLIDING: LayerKind(self.sliding_window, self.local_rope or self.rope),
            LINEAR: LayerKind(None, self.rope),
        }
        return tuple(kinds[x] for x in types)

    @property
    def windows(self) -> tuple[int, ...]:
        """The windows that there are, each once; 0 for none."""
        found = dict.fromkeys(kind.window for kind in self.layer_kinds)
        return tuple(window for window in found if window is not None)

    @property
    def delta(self) -> delta.Sizes | None:
        """Sizes of the layers that keep a state, where there are some."""
        return None

    @property
    def experts(self) -> experts.Routing | None:
        """How tokens choose experts, where layers have some."""
        return None

    @property
    def num_choices(self) -> int:
        """Numbers of experts that are recorded of a token: of all layers."""
        is_asked = self.experts is not None and self.replays_experts
        return self.num_layers * self.experts.per_token if is_asked else 0

    @property
    def period(self) -> tuple[str, ...]:
        """The shortest run of layers after which the parameters that they have repeat: for
        each the type by which its parameters are told, "" where all layers have the same."""
        parts = (*self.block.projections.values(), *self.block.norms.values())
        own = {part.layer_type for part in parts}
        types = self.layer_types or (FULL,) * self.num_layers
        types = tuple(x if x in own else "" for x in types)
        sizes = (n for n in range(1, len(types) + 1) if len(types) % n == 0)
        return next(types[:n] for n in sizes if types[:n] * (len(types) // n) == types)

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
    def is_other(cls, json: dict[str, Any], layer: int) -> bool:
        """Whether a layer is of `other_type`, by a config.json without `layer_types`."""
        return False

    def to_json(self) -> dict[str, Any]:
        """What this family has in config.json that others have not."""
        return {name: getattr(self, name) for name in self.own_fields()}

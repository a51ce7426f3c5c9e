"""The network: a decoder-only transformer whose one forward scores and decodes.

Layers are stacked along a leading axis L and scanned. Parameters keep their own type
(float32 masters when training) and are cast to the compute type where they are used.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from pfjax.batch import Array
from pfjax.infra import sharding
from pfjax.model import attention, rope
from pfjax.model.chunked_attention import SAVED
from pfjax.model.rope import RopeConfig

Params = dict[str, Any]
KeyValue = tuple[Array, Array]
# (an adapter's input, layer, projection) -> the same, thinned.
Thin = Callable[[Array, Array, str], Array]
# (q, k, v, this layer's part of the cache) -> attention output, shaped like q.
Attend = Callable[[Array, Array, Array, Any], Array]

# Logical axes of the states of packed rows.
HIDDEN = ("batch", "tokens", None)

# Projection -> letters of the dimensions it reads and writes, see `_DIMS`.
PROJECTIONS = {
    "wq": ("d", "hc"),
    "wk": ("d", "kc"),
    "wv": ("d", "kc"),
    "wo": ("hc", "d"),
    "w_gate": ("d", "f"),
    "w_up": ("d", "f"),
    "w_down": ("f", "d"),
}


class LayerKind(NamedTuple):
    """What distinguishes a layer from the others."""

    window: int  # tokens that a layer attends to at most, its own included; 0 for all
    rope: RopeConfig | None  # None: positions are not told


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What decides the function computed from the parameters, and where it stops."""

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
    family: str = "qwen2"  # `model_type` of Hugging Face; decides nothing here
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # queries and keys normalised over the head, before RoPE
    lora_rank: int = 0  # of adapters; 0 for none
    lora_alpha: float = 0.0  # their output is scaled by lora_alpha / lora_rank
    lora_targets: tuple[str, ...] = tuple(PROJECTIONS)  # that have them
    dtype: str = "float32"  # of the computation
    attention: str = "auto"  # back end over packed rows, see `attention.BACKENDS`
    # Gives the tokenizer, which takes seconds to import; None where there is none.
    load_tokenizer: Callable[[], Any] | None = dataclasses.field(
        default=None, compare=False, repr=False
    )

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """One per layer."""
        return (LayerKind(0, self.rope),) * self.num_layers

    def has_adapter(self, projection: str) -> bool:
        return self.lora_rank > 0 and projection in self.lora_targets


_policies = jax.checkpoint_policies
_attention = _policies.save_only_these_names(SAVED)
_dots = _policies.dots_with_no_batch_dims_saveable
# What the backward pass finds stored of a layer, beside its input; the rest it computes
# again. "attention" spares the part that grows with the row, for 2 D a token and layer;
# "dots" all products with weights, for some 10 D.
REMAT = {
    "full": _policies.nothing_saveable,
    "attention": _attention,
    "dots": _policies.save_from_both_policies(_dots, _attention),
    "none": _policies.everything_saveable,
}


class Policy(NamedTuple):
    """A language model: what `pfjax.load` returns.

    To JAX it is the tree of its parameters, so that functions of it can be jitted and
    differentiated, and optax updates it.

    >>> import pfjax
    >>> pfjax.load("pfjax/toy")
    Policy(qwen2, 3 layers of width 64, 0.14 M parameters in float32, 1 cpu device)
    """

    config: ModelConfig
    params: Params

    @property
    def tokenizer(self) -> Any:
        """The tokenizer (of `transformers`), loaded when first asked for; None without."""
        load = self.config.load_tokenizer
        return None if load is None else load()

    def __repr__(self) -> str:
        c, leaves = self.config, jax.tree.leaves(self.params)
        size = sum(getattr(x, "size", 0) for x in leaves)
        number = f"{size / 1e9:.2f} B" if size >= 1e9 else f"{size / 1e6:.2f} M"
        types = ", ".join(sorted({str(getattr(x, "dtype", type(x))) for x in leaves}))
        lora = f", LoRA rank {c.lora_rank}" if c.lora_rank else ""
        # While it is traced, and of shapes, no devices are known.
        placed = all(
            isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
            for x in leaves
        )
        devices = {d for x in leaves for d in x.devices()} if placed else set()
        kind = next(iter(devices)).platform if devices else ""
        where = f", {len(devices)} {kind} device{'s' * (len(devices) > 1)}"
        return (
            f"Policy({c.family}, {c.num_layers} layers of width {c.embed_dim}{lora}, "
            f"{number} parameters in {types}{where if devices else ''})"
        )


jax.tree_util.register_pytree_with_keys(
    Policy,
    lambda policy: (((jax.tree_util.GetAttrKey("params"), policy.params),), policy[0]),
    lambda config, children: Policy(config, *children),
)


# Letter of a dimension -> field of the config that sizes it, and its logical axis.
_DIMS = {
    "d": ("embed_dim", "embed"),
    "h": ("num_heads", "heads"),
    "k": ("num_kv_heads", "kv_heads"),
    "c": ("head_dim", "head_dim"),
    "f": ("mlp_dim", "mlp"),
    "r": ("lora_rank", None),
}


class Blocks(nnx.Module):
    """The parameters of all layers; called on one layer's slice of them."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        ones, zeros = nnx.initializers.ones, nnx.initializers.zeros
        into = nnx.initializers.normal(c.embed_dim**-0.5)
        # Two additions per layer: keeps the residual stream's scale at the start.
        back = nnx.initializers.normal((2 * c.num_layers * c.embed_dim) ** -0.5)

        def param(letters, init):
            shape = (c.num_layers, *(getattr(c, _DIMS[x][0]) for x in letters))
            axes = ("layers", *(_DIMS[x][1] for x in letters))
            return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes)

        self.config = c
        for name, (read, written) in PROJECTIONS.items():
            init = back if written == "d" else into
            setattr(self, name, param(read + written, init))
            if c.has_adapter(name):
                setattr(self, f"{name}_a", param(read + "r", into))
                setattr(self, f"{name}_b", param("r" + written, zeros))
        self.attn_norm, self.mlp_norm = param("d", ones), param("d", ones)
        if c.qk_norm:
            self.q_norm, self.k_norm = param("c", ones), param("c", ones)
        biased = ["wq", "wk", "wv"] if c.qkv_bias else []
        biased += ["wo"] if c.output_bias else []
        biased += ["w_gate", "w_up", "w_down"] if c.mlp_bias else []
        for name in biased:
            setattr(self, bias_of(name), param(PROJECTIONS[name][1], zeros))

    def __call__(self, x, angles, attend, cache, thin=lambda y, name: y):
        c = self.config

        def product(y, name, read, written):
            weight = getattr(self, name)[...].astype(x.dtype)
            # Tokens of all rows as one dimension: on CPU twice as fast.
            flat = y.reshape(-1, *weight.shape[: len(read)])
            out = jnp.einsum(f"n{read},{read}{written}->n{written}", flat, weight)
            return out.reshape(*y.shape[:2], *out.shape[1:])

        def project(y, name):
            read, written = PROJECTIONS[name]
            out = product(y, name, read, written)
            if c.has_adapter(name):
                inner = product(thin(y, name), f"{name}_a", read, "r")
                adapted = product(inner, f"{name}_b", "r", written)
                out = out + adapted * (c.lora_alpha / c.lora_rank)
            bias = getattr(self, bias_of(name), None)
            if bias is not None:
                out = out + _rank_of(out, bias[...].astype(x.dtype))
            return out

        y = rms_norm(x, self.attn_norm[...], c.norm_eps)
        q, k, v = (project(y, name) for name in ("wq", "wk", "wv"))
        if c.qk_norm:
            q = rms_norm(q, self.q_norm[...], c.norm_eps)
            k = rms_norm(k, self.k_norm[...], c.norm_eps)
        q, k = rope.rotate(q, *angles), rope.rotate(k, *angles)
        x = x + project(attend(q, k, v, cache), "wo")
        y = rms_norm(x, self.mlp_norm[...], c.norm_eps)
        gate = jax.nn.silu(project(y, "w_gate"))
        x = x + project(gate * project(y, "w_up"), "w_down")
        return x, (k, v)


def bias_of(name: str) -> str:
    """The parameter that is the bias of a projection: "bq" of "wq"."""
    return name.replace("w", "b", 1)


class Transformer(nnx.Module):
    """Tokens to final hidden states; logits are left to `log_probs.py`."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(c.embed_dim**-0.5)

        def table(*axes):
            shape = (c.vocab_size, c.embed_dim)
            return nnx.Param(normal(rngs.params(), shape, jnp.float32), axes=axes)

        self.config = c
        # A tied table is also the head, whose vocabulary must stay split in place.
        self.embed = table(*(("vocab", None) if c.tied_embeddings else (None, "embed")))
        self.blocks = Blocks(c, rngs)
        self.final_norm = nnx.Param(jnp.ones(c.embed_dim), axes=(None,))
        if not c.tied_embeddings:
            self.head = table("vocab", None)

    def __call__(self, tokens, positions, attend, cache, remat, thin):
        c = self.config
        # Looked up in a table split along D, where a tied one is not: of one split along
        # V every device would compute the rows of all. And cast after: the gradients of
        # a frequent token are summed in float32.
        table = sharding.constrain(self.embed[...], None, "embed")
        x = sharding.constrain(table[tokens].astype(c.dtype), *HIDDEN)
        angles = rope.angles(c.rope, c.head_dim, positions)
        graphdef, layers = nnx.split(self.blocks)

        def layer(x, inputs):
            params, cache, index = inputs
            args = (x, angles, attend, cache)
            if thin is not None:
                args += (lambda y, name: thin(y, index, name),)
            x, kv = nnx.merge(graphdef, params)(*args)
            return sharding.constrain(x, *HIDDEN), kv

        if remat != "none":
            # Inside of a scan nothing can be merged with what is recomputed.
            layer = jax.checkpoint(layer, prevent_cse=False, policy=REMAT[remat])
        x, kv = jax.lax.scan(layer, x, (layers, cache, jnp.arange(c.num_layers)))
        return rms_norm(x, self.final_norm[...], c.norm_eps), kv


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Root-mean-square norm over the last axis, in float32."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    # Rounded before scaling, as the checkpoints were trained (transformers).
    return y.astype(x.dtype) * _rank_of(x, scale.astype(x.dtype))


def _rank_of(x: Array, weight: Array) -> Array:
    return weight.reshape((1,) * (x.ndim - weight.ndim) + weight.shape)


@functools.lru_cache(maxsize=64)
def _abstract(config: ModelConfig, kind: type = Transformer) -> tuple[Any, Any]:
    return nnx.split(nnx.eval_shape(lambda: kind(config, nnx.Rngs(0))))


def abstract_params(config: ModelConfig) -> Params:
    """The tree of parameters as shapes and types, nothing allocated."""
    return nnx.to_pure_dict(_abstract(config)[1])


def logical_axes(config: ModelConfig) -> Params:
    """The tree of parameters with the logical axes of each (see `sharding.RULES`)."""
    axes_of = lambda v: v.get_metadata("axes")
    is_variable = lambda x: isinstance(x, nnx.Variable)
    state = _abstract(config)[1]
    return nnx.to_pure_dict(jax.tree.map(axes_of, state, is_leaf=is_variable))


def init_params(config: ModelConfig, key: Array) -> Params:
    """Random parameters in float32."""
    return nnx.to_pure_dict(nnx.state(Transformer(config, nnx.Rngs(params=key))))


def apply(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    attend: Attend,
    cache: Any = None,
    remat: str = "none",
    thin: Thin | None = None,
) -> tuple[Float[Array, "b t d"], KeyValue]:
    """Hidden states after the final norm, and the keys and values of all layers.

    Args:
      positions: position of each token in its own sequence.
      attend: how a layer attends, see `Attend`.
      cache: a tree of arrays with leading axis L, a slice of which each layer's
        `attend` receives.
      remat: what the backward pass finds stored, a name in `REMAT`.
      thin: drops some of what adapters read, see `lora.dropout`.
    """
    module = nnx.merge(_abstract(config)[0], params)
    return module(tokens, positions, attend, cache, remat, thin)


def forward_packed(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    segment_ids: Int[Array, "b t"],
    remat: str = "none",
    max_segments: int | None = None,
    thin: Thin | None = None,
) -> tuple[Float[Array, "b t d"], KeyValue]:
    """`apply` with causal attention inside each segment of packed rows."""
    within = (segment_ids, config.attention, max_segments)
    attend = lambda q, k, v, _: attention.packed_attention(q, k, v, *within)
    how = {"remat": remat, "thin": thin}
    return apply(config, params, tokens, positions, attend, **how)


def check_tokens(config: ModelConfig, sequences: Sequence[Sequence[int]]) -> None:
    """Raises ValueError for a token id that the model does not have: JAX would read
    another's embedding without a word."""
    for i, ids in enumerate(sequences):
        ends = (min(ids, default=0), max(ids, default=0))
        wrong = [t for t in ends if not 0 <= t < config.vocab_size]
        if wrong:
            raise ValueError(
                f"sequence {i} holds token id {wrong[0]}, the model has 0 to "
                f"{config.vocab_size - 1}: is this its tokenizer?"
            )


def apply_layers(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    attend: Attend,
) -> Float[Array, "b t d"]:
    """`apply` for a list of layers in the place of `blocks` (see `decode.weights`); `attend`
    receives a layer's index as cache."""
    x = sharding.constrain(params["embed"][tokens], "batch", None, None)
    angles = rope.angles(config.rope, config.head_dim, positions)
    graphdef, _ = _abstract(config, Blocks)
    for i, layer in enumerate(params["layers"]):
        x, _ = nnx.merge(graphdef, layer)(x, angles, attend, i)
        x = sharding.constrain(x, "batch", None, None)
    return rms_norm(x, params["final_norm"], config.norm_eps)


def head_weight(params: Params) -> Float[Array, "v d"]:
    """The output projection: its own matrix, or the embedding when tied."""
    return params["head"] if "head" in params else params["embed"]

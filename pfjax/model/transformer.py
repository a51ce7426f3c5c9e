"""The network: a decoder-only transformer whose one forward scores and decodes.

Layers are stacked along a leading axis L and scanned. Parameters keep their own type
(float32 masters when training) and are cast to the compute type where they are used.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Float, Int, UInt8

from pfjax.infra import sharding
from pfjax.model import attention, delta, experts, layers, rope
from pfjax.model.chunked_attention import SAVED
from pfjax.model.config import ModelConfig
from pfjax.model.layers import KeyValue
from pfjax.targets import Array

Params = dict[str, Any]
# (an adapter's input, layer, projection) -> the same, thinned.
Thin = Callable[[Array, Array, str], Array]
# (q, k, v, this layer's part of the cache, its window) -> attention output, shaped like q.
Attend = Callable[[Array, Array, Array, Any, int], Array]
Recur = Callable[[delta.Inputs], Array]  # the outputs of a layer that keeps a state

# Logical axes of the states of packed rows.
HIDDEN = ("batch", "tokens", None)


# Tensors in Hugging Face's files.
EMBED_TENSOR, HEAD_TENSOR = "model.embed_tokens.weight", "lm_head.weight"


_policies = jax.checkpoint_policies
_attention = _policies.save_only_these_names(SAVED)
_dots = _policies.dots_with_no_batch_dims_saveable
# What the backward pass finds stored of a layer, beside its input; the rest it computes
# again. "attention" spares the part that grows with the row, for 2 D a token and layer;
# "dots" all products with weights but experts', for some 10 D.
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
        if c.alpha_range:
            lora += " for alpha from {:g} to {:g}".format(*c.alpha_range)
        # While it is traced, and of shapes, no devices are known.
        placed = all(
            isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
            for x in leaves
        )
        devices = {d for x in leaves for d in x.devices()} if placed else set()
        kind = next(iter(devices)).platform if devices else ""
        where = f", {len(devices)} {kind} device{'s' * (len(devices) > 1)}"
        return (
            f"Policy({c.model_type}, {c.num_layers} layers of width {c.embed_dim}{lora}, "
            f"{number} parameters in {types}{where if devices else ''})"
        )


jax.tree_util.register_pytree_with_keys(
    Policy,
    lambda policy: (((jax.tree_util.GetAttrKey("params"), policy.params),), policy[0]),
    lambda config, children: Policy(config, *children),
)


class Transformer(nnx.Module):
    """Tokens to final hidden states; logits are left to `log_probs.py`."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(c.embed_dim**-0.5)

        def table(tensor, *axes):
            value = normal(rngs.params(), (c.vocab_size, c.embed_dim), jnp.float32)
            return nnx.Param(value, axes=axes, tensor=tensor, only="", num_read=0)

        self.config = c
        # A tied table is also the head, whose vocabulary must stay split in place.
        axes = ("vocab", None) if c.tied_embeddings else (None, "embed")
        self.embed = table(EMBED_TENSOR, *axes)
        self.blocks = c.block(c, rngs)
        scale = c.norm_init(jax.random.key(0), (c.embed_dim,), jnp.float32)
        named = {"tensor": "model.norm.weight", "only": "", "num_read": 0}
        self.final_norm = nnx.Param(scale, axes=(None,), **named)
        if not c.tied_embeddings:
            self.head = table(HEAD_TENSOR, "vocab", None)

    def __call__(
        self, tokens, positions, attend, recur, cache, remat, thin, choices, dial
    ):
        c = self.config
        # Looked up in a table split along D, where a tied one is not: of one split along
        # V every device would compute the rows of all. And cast after: the gradients of
        # a frequent token are summed in float32.
        table = sharding.constrain(self.embed[...], None, "embed")
        x = c.scale_embeddings(table[tokens].astype(c.dtype))
        x = sharding.constrain(x, *HIDDEN)
        rotate_for = _rotations(c, positions)
        period, stacked = c.period, nnx.to_pure_dict(nnx.state(self.blocks))

        def layer(x, params, cache, index, layer_type, choices):
            given = layers.Layer(
                rotate_for(index),
                _attention_of(c, attend, index, cache),
                lambda y, name: y if thin is None else thin(y, index, name),
                recur,
                None if choices is None else experts.replayed(c.experts, choices),
                dial,
            )
            x, kv = nnx.merge(_block(c, layer_type), params)(x, given)
            return sharding.constrain(x, *HIDDEN), kv

        if remat != "none":
            # Inside of a scan nothing can be merged with what is recomputed.
            how = {"prevent_cse": False, "policy": REMAT[remat], "static_argnums": 4}
            layer = jax.checkpoint(layer, **how)

        def of_period(x, inputs):
            params, cache, number, choices = inputs
            if len(period) == 1:
                return layer(x, params, cache, number, *period, choices)
            for i, layer_type in enumerate(period):
                own = of_layer(c, params, i)
                number_of = number * len(period) + i
                chosen = None if choices is None else choices[i]
                x, _ = layer(x, own, cache, number_of, layer_type, chosen)
            return x, None

        num = c.num_layers // len(period)
        if len(period) > 1:
            split = lambda y: y.reshape(num, -1, *y.shape[1:])
            stacked, choices = jax.tree.map(split, (stacked, choices))
        inputs = (stacked, cache, jnp.arange(num), choices)
        x, kv = lax.scan(of_period, x, inputs)
        return c.norm(x, self.final_norm[...]), kv


def _rotations(c: ModelConfig, positions: Array) -> Callable[[Array], Any]:
    """Layer -> what rotates its queries and keys; its number is known only when the
    program runs."""
    ropes = tuple(dict.fromkeys(kind.rope for kind in c.layer_kinds))
    angles = [rope.angles(x, c.head_dim, positions) for x in ropes]
    if len(ropes) == 1:
        return lambda layer: lambda x: rope.rotate(x, *angles[0])
    which = jnp.array([ropes.index(kind.rope) for kind in c.layer_kinds])
    cos, sin = (jnp.stack(x) for x in zip(*angles, strict=True))
    of_layer = lambda layer: (cos[which[layer]], sin[which[layer]])
    return lambda layer: lambda x: rope.rotate(x, *of_layer(layer))


def _attention_of(c: ModelConfig, attend: Attend, layer: Array, cache: Any) -> Any:
    """How a layer attends; its number is known only when the program runs."""
    if len(c.windows) <= 1:
        return lambda q, k, v: attend(q, k, v, cache, *c.windows)
    # Kernels are compiled for their window: one each, and the one of the layer runs.
    ways = [
        lambda q, k, v, cache, window=window: attend(q, k, v, cache, window)
        for window in c.windows
    ]
    which = jnp.array([c.windows.index(kind.window) for kind in c.layer_kinds])
    return lambda q, k, v: lax.switch(which[layer], ways, q, k, v, cache)


@functools.lru_cache(maxsize=64)
def _abstract(config: ModelConfig) -> tuple[Any, Any]:
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))


@functools.lru_cache(maxsize=64)
def _block(config: ModelConfig, layer_type: str) -> Any:
    """What makes a block of a layer's parameters."""
    make = lambda: config.block(config, nnx.Rngs(0), layer_type)
    return nnx.split(nnx.eval_shape(make))[0]


def of_layer(config: ModelConfig, stacked: Params, layer: int) -> Params:
    """The parameters of a layer from those of all (or of one period)."""
    known, found = tensors(config), {}
    for name, x in stacked.items():
        held = known[name].layers
        if layer in held:
            found[name] = x[held.index(layer)]
    return found


def abstract_params(config: ModelConfig) -> Params:
    """The tree of parameters as shapes and types, nothing allocated."""
    return nnx.to_pure_dict(_abstract(config)[1])


def logical_axes(config: ModelConfig) -> Params:
    """The tree of parameters with the logical axes of each (see `sharding.RULES`)."""
    axes_of = lambda v: v.get_metadata("axes")
    is_variable = lambda x: isinstance(x, nnx.Variable)
    state = _abstract(config)[1]
    return nnx.to_pure_dict(jax.tree.map(axes_of, state, is_leaf=is_variable))


class Tensor(NamedTuple):
    """Where a parameter is in Hugging Face's files."""

    name: str  # of a layer's, below `model.layers.<i>.`; "*" is the number of an expert
    # Leading dimensions that are inputs, stored last there; None for one stored as it is.
    num_read: int | None
    layers: tuple[int, ...]  # that have it


def tensors(config: ModelConfig) -> dict[str, Tensor]:
    """Of each parameter."""

    def of(v):
        name, num_read, only = map(v.get_metadata, ("tensor", "num_read", "only"))
        return Tensor(name, num_read, config.layers_of_type(only))

    return {path[-1]: of(v) for path, v in nnx.to_flat_state(_abstract(config)[1])}


def of_experts(config: ModelConfig) -> tuple[str, ...]:
    """The parameters of layers of which each expert has its own."""
    return tuple(name for name, x in tensors(config).items() if "*" in x.name)


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
    recur: Recur | None = None,
    choices: UInt8[Array, "l b t k"] | None = None,
    dial: Float[Array, "b t p"] | None = None,
) -> tuple[Float[Array, "b t d"], KeyValue | None]:
    """Hidden states after the final norm, and the keys and values of all layers where all
    have some.

    Args:
      positions: position of each token in its own sequence.
      attend: how a layer attends, see `Attend`.
      recur: how a layer that keeps a state does.
      cache: a tree of arrays with leading axis L, a slice of which each layer's
        `attend` receives.
      remat: what the backward pass finds stored, a name in `REMAT`.
      thin: drops some of what adapters read, see `lora.dropout`.
      choices: the experts of each token, see `experts.replayed`.
      dial: of policies for every alpha, see `dial.features`.

    Raises:
      ValueError: for such a policy without it.
    """
    _check_dial(config, dial)
    module = nnx.merge(_abstract(config)[0], params)
    return module(tokens, positions, attend, recur, cache, remat, thin, choices, dial)


def _check_dial(config: ModelConfig, dial: Any) -> None:
    if config.alpha_range and dial is None:
        low, high = config.alpha_range
        raise ValueError(
            f"the policy is one for every alpha from {low:g} to {high:g}: say which, or take "
            "it at one, pfjax.at_alpha(policy, 2.0)"
        )


def forward_packed(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    segment_ids: Int[Array, "b t"],
    remat: str = "none",
    max_segments: int | None = None,
    thin: Thin | None = None,
    choices: UInt8[Array, "b t c"] | None = None,
    dial: Float[Array, "b t p"] | None = None,
) -> tuple[Float[Array, "b t d"], KeyValue | None]:
    """`apply` with causal attention inside each segment of packed rows, and states that
    begin anew with each; `choices` are of all layers, one after the other."""
    if choices is not None:
        by_layer = choices.reshape(*tokens.shape, config.num_layers, -1)
        choices = jnp.moveaxis(by_layer, 2, 0)
    within = (segment_ids, config.attention, max_segments)
    attend = lambda q, k, v, _, window: attention.packed_attention(
        q, k, v, *within, window
    )
    recur = lambda x: delta.packed(config.delta, x, segment_ids)
    how = {"remat": remat, "thin": thin, "recur": recur, "choices": choices}
    return apply(config, params, tokens, positions, attend, dial=dial, **how)


def as_policy(policy: Any) -> Policy:
    """A policy, which may have been unpacked. Raises ValueError for anything else."""
    if isinstance(policy, tuple) and len(policy) == 2:
        return Policy(*policy)
    raise ValueError(f"policy must be what pfjax.load returns, got {policy!r:.100}")


def check_tokens(
    config: ModelConfig, sequences: Sequence[Sequence[int] | np.ndarray]
) -> None:
    """Raises ValueError for a token id that the model does not have: JAX would read
    another's embedding without a word."""
    for i, ids in enumerate(sequences):
        ends = (int(np.min(ids)), int(np.max(ids))) if len(ids) else ()
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
    attend: Callable[[Array, Array, Array, int], Array],
    recur: Callable[[delta.Inputs, int], Array] | None = None,
    choose: Callable[[Array], Array] | None = None,
    dial: Float[Array, "b t p"] | None = None,
) -> Float[Array, "b t d"]:
    """`apply` for a list of layers in the place of `blocks` (see `unstack.weights`); `attend`
    and `recur` are told the number of the layer; `choose` chooses experts."""
    _check_dial(config, dial)
    x = config.scale_embeddings(params["embed"][tokens])
    x = sharding.constrain(x, "batch", None, None)
    ropes = {kind.rope for kind in config.layer_kinds}
    angles = {x: rope.angles(x, config.head_dim, positions) for x in ropes}
    period = config.period
    for i, layer in enumerate(params["layers"]):
        kind = config.layer_kinds[i]
        given = layers.Layer(
            lambda x, kind=kind: rope.rotate(x, *angles[kind.rope]),
            lambda q, k, v, i=i: attend(q, k, v, i),
            lambda y, name: y,
            lambda x, i=i: recur(x, i),
            choose,
            dial,
        )
        graphdef = _block(config, period[i % len(period)])
        x, _ = nnx.merge(graphdef, layer)(x, given)
        x = sharding.constrain(x, "batch", None, None)
    return config.norm(x, params["final_norm"])


def head_weight(params: Params) -> Float[Array, "v d"]:
    """The output projection: its own matrix, or the embedding when tied."""
    return params["head"] if "head" in params else params["embed"]

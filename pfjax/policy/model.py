"""The network: a decoder-only transformer whose one forward scores and decodes.

Layers are stacked along a leading axis L and scanned, so compile time does not
grow with depth. Parameters keep their own type (float32 masters when training)
and are cast to the compute type where they are used.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from pfjax import sharding
from pfjax.policy import attention, rope
from pfjax.policy.rope import RopeConfig
from pfjax.types import Array

Params = dict[str, Any]
KeyValue = tuple[Array, Array]
# (q, k, v, this layer's part of the cache) -> attention output, shaped like q.
Attend = Callable[[Array, Array, Array, Any], Array]


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
    dtype: str = "float32"  # of the computation


class Policy(NamedTuple):
    """A language model: what `pfjax.load` returns."""

    config: ModelConfig
    params: Params


class Blocks(nnx.Module):
    """The parameters of all layers; called on one layer's slice of them."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        d, h, k, w, f = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim, c.mlp_dim
        heads, kv_heads = ("heads", "head_dim"), ("kv_heads", "head_dim")

        def param(shape, axes, init):
            shape, axes = (c.num_layers, *shape), ("layers", *axes)
            return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes)

        ones, zeros = nnx.initializers.ones, nnx.initializers.zeros
        into = nnx.initializers.normal(d**-0.5)
        # Two additions a layer: keeps the residual stream's scale at the start.
        back = nnx.initializers.normal((2 * c.num_layers * d) ** -0.5)
        self.config = c
        self.attn_norm = param((d,), (None,), ones)
        self.wq = param((d, h, w), ("embed", *heads), into)
        self.wk = param((d, k, w), ("embed", *kv_heads), into)
        self.wv = param((d, k, w), ("embed", *kv_heads), into)
        if c.qkv_bias:
            self.bq = param((h, w), heads, zeros)
            self.bk = param((k, w), kv_heads, zeros)
            self.bv = param((k, w), kv_heads, zeros)
        if c.qk_norm:
            self.q_norm = param((w,), (None,), ones)
            self.k_norm = param((w,), (None,), ones)
        self.wo = param((h, w, d), (*heads, "embed"), back)
        if c.output_bias:
            self.bo = param((d,), (None,), zeros)
        self.mlp_norm = param((d,), (None,), ones)
        self.w_gate = param((d, f), ("embed", "mlp"), into)
        self.w_up = param((d, f), ("embed", "mlp"), into)
        self.w_down = param((f, d), ("mlp", "embed"), back)
        if c.mlp_bias:
            self.b_gate = param((f,), ("mlp",), zeros)
            self.b_up = param((f,), ("mlp",), zeros)
            self.b_down = param((d,), (None,), zeros)

    def __call__(
        self, x: Array, angles: KeyValue, attend: Attend, cache: Any
    ) -> tuple[Array, KeyValue]:
        c = self.config

        def linear(shapes, y, weight, bias):
            out = jnp.einsum(shapes, y, weight[...].astype(x.dtype))
            if bias is None:
                return out
            return out + _rank_of(out, bias[...].astype(x.dtype))

        def of(name):
            return getattr(self, name, None)

        y = rms_norm(x, self.attn_norm[...], c.norm_eps)
        q = linear("...d,dhc->...hc", y, self.wq, of("bq"))
        k = linear("...d,dkc->...kc", y, self.wk, of("bk"))
        v = linear("...d,dkc->...kc", y, self.wv, of("bv"))
        if c.qk_norm:
            q = rms_norm(q, self.q_norm[...], c.norm_eps)
            k = rms_norm(k, self.k_norm[...], c.norm_eps)
        q, k = rope.rotate(q, *angles), rope.rotate(k, *angles)
        out = attend(q, k, v, cache)
        x = x + linear("...hc,hcd->...d", out, self.wo, of("bo"))
        y = rms_norm(x, self.mlp_norm[...], c.norm_eps)
        gate = jax.nn.silu(linear("...d,df->...f", y, self.w_gate, of("b_gate")))
        y = gate * linear("...d,df->...f", y, self.w_up, of("b_up"))
        x = x + linear("...f,fd->...d", y, self.w_down, of("b_down"))
        return sharding.constrain(x, "batch", None, None), (k, v)


class Transformer(nnx.Module):
    """Tokens to final hidden states; logits are left to `logprobs.py`."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        v, d = c.vocab_size, c.embed_dim
        normal = nnx.initializers.normal(d**-0.5)
        self.config = c
        # A tied table is also the head, whose vocabulary must stay split in place.
        axes = ("vocab", None) if c.tied_embeddings else (None, "embed")
        self.embed = nnx.Param(normal(rngs.params(), (v, d), jnp.float32), axes=axes)
        self.blocks = Blocks(c, rngs)
        self.final_norm = nnx.Param(jnp.ones(d), axes=(None,))
        if not c.tied_embeddings:
            self.head = nnx.Param(
                normal(rngs.params(), (v, d), jnp.float32), axes=("vocab", None)
            )

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t"],
        attend: Attend,
        cache: Any = None,
        remat: bool = False,
    ) -> tuple[Float[Array, "b t d"], KeyValue]:
        c = self.config
        x = self.embed[...].astype(c.dtype)[tokens]
        x = sharding.constrain(x, "batch", None, None)
        angles = rope.angles(c.rope, c.head_dim, positions)
        graphdef, layers = nnx.split(self.blocks)

        def layer(x, inputs):
            params, cache = inputs
            return nnx.merge(graphdef, params)(x, angles, attend, cache)

        layer = jax.checkpoint(layer) if remat else layer
        x, kv = jax.lax.scan(layer, x, (layers, cache))
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
def _abstract(config: ModelConfig) -> tuple[Any, nnx.State]:
    module = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0)))
    return nnx.split(module)


def abstract_params(config: ModelConfig) -> Params:
    """The tree of parameters as shapes and types, nothing allocated."""
    return nnx.to_pure_dict(_abstract(config)[1])


def logical_axes(config: ModelConfig) -> Params:
    """The tree of parameters with the logical axes of each (see `sharding.RULES`)."""
    state = _abstract(config)[1]
    is_variable = lambda x: isinstance(x, nnx.Variable)
    axes = jax.tree.map(lambda v: v.get_metadata("axes"), state, is_leaf=is_variable)
    return nnx.to_pure_dict(axes)


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
    remat: bool = False,
) -> tuple[Float[Array, "b t d"], KeyValue]:
    """Hidden states after the final norm, and the keys and values of all layers.

    Args:
      tokens: token ids.
      positions: position of each token in its own sequence.
      attend: how a layer attends, see `Attend`.
      cache: a tree of arrays with leading axis L, a slice of which each layer's
        `attend` receives.
      remat: recompute layers in the backward pass instead of storing them.
    """
    module = nnx.merge(_abstract(config)[0], params)
    return module(tokens, positions, attend, cache, remat)


def forward_packed(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    segment_ids: Int[Array, "b t"],
    remat: bool = False,
) -> tuple[Float[Array, "b t d"], KeyValue]:
    """`apply` with causal attention inside each segment of packed rows."""

    def attend(q, k, v, cache):
        del cache
        return attention.packed_attention(q, k, v, segment_ids)

    return apply(config, params, tokens, positions, attend, remat=remat)


def head_weight(params: Params) -> Float[Array, "v d"]:
    """The output projection: its own matrix, or the embedding when tied."""
    return params["head"] if "head" in params else params["embed"]

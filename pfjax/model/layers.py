"""What the layers of every family are made of: projections, norms, attention, MLP.

A family's block declares its biases and norms and puts these parts in its order. Each
parameter is declared with its dimensions, which decide how it is split over a mesh, and
the name of its tensor in Hugging Face's files.
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import lax

from pfjax.model import delta
from pfjax.targets import Array

KeyValue = tuple[Array, Array]


class Projection(NamedTuple):
    read: str  # letters of the dimensions it reads, see `Block.dims`
    written: str  # and of those it writes
    # Its name in Hugging Face's layer; "*" is the number of an expert, each of which has
    # its own.
    module: str
    layer_type: str = ""  # of the layers that have it; "" for all

    @property
    def stacked(self) -> str:
        """Letter of the dimension that its matrices are stacked along: experts, or ""."""
        return "e" if "*" in self.module else ""


PROJECTIONS = {
    "wq": Projection("d", "hc", "self_attn.q_proj"),
    "wk": Projection("d", "kc", "self_attn.k_proj"),
    "wv": Projection("d", "kc", "self_attn.v_proj"),
    "wo": Projection("hc", "d", "self_attn.o_proj"),
    "w_gate": Projection("d", "f", "mlp.gate_proj"),
    "w_up": Projection("d", "f", "mlp.up_proj"),
    "w_down": Projection("f", "d", "mlp.down_proj"),
}


class Norm(NamedTuple):
    dims: str  # letters of the dimensions it is over
    module: str  # its name in Hugging Face's layer
    layer_type: str = ""  # of the layers that have it; "" for all


class Layer(NamedTuple):
    """What a block is called with beside the hidden states."""

    rotate: Callable[[Array], Array]  # queries or keys to their positions
    attend: Callable[[Array, Array, Array], Array]  # of queries, keys and values
    thin: Callable[[Array, str], Array]  # an adapter's input, see `transformer.Thin`
    recur: Callable[[delta.Inputs], Array]  # of layers with a state, see `delta`
    choose: Callable[[Array], Array] | None = None  # experts, see `experts.apply`
    dial: Array | None = None  # features of each token's alpha, see `dial`


class Block(nnx.Module):
    """The parameters of all layers, called on one layer's slice of them.

    As it stands that of Llama: norms before attention and before the MLP, the rest is
    added to the residual stream.
    """

    projections: ClassVar[dict[str, Projection]] = PROJECTIONS
    # Letter of a dimension -> field of the config that sizes it, and its logical axis.
    dims: ClassVar[dict[str, tuple[str, str | None]]] = {
        "d": ("embed_dim", "embed"),
        "h": ("num_heads", "heads"),
        "k": ("num_kv_heads", "kv_heads"),
        "c": ("head_dim", "head_dim"),
        "f": ("mlp_dim", "mlp"),
        "r": ("lora_rank", None),
        "p": ("dial_terms", None),
    }
    norms: ClassVar[dict[str, Norm]] = {
        "attn_norm": Norm("d", "input_layernorm"),
        "mlp_norm": Norm("d", "post_attention_layernorm"),
    }

    @staticmethod
    def biased(config: Any) -> tuple[str, ...]:
        """The projections that have a bias."""
        return ()

    def __init__(self, config: Any, rngs: nnx.Rngs, layer_type: str = ""):
        """Parameters of all layers, or only those that layers of one type have."""
        c = self.config = config
        self.layer_type = layer_type
        declare = functools.partial(self.declare, rngs)
        zeros = nnx.initializers.zeros
        into = nnx.initializers.normal(c.embed_dim**-0.5)
        # Two additions per layer: keeps the residual stream's scale at the start.
        back = nnx.initializers.normal((2 * c.num_layers * c.embed_dim) ** -0.5)
        for name, x in self.projections.items():
            e, (read, written, module, only) = x.stacked, x
            init = back if written == "d" else into
            matrix = functools.partial(declare, only=only, num_read=len(read))
            matrix(name, e + read + written, init, f"{module}.weight")
            if name in c.adapted:  # named as peft does
                matrix(f"{name}_a", e + read + "r", into, f"{module}.lora_A.weight")
                matrix = functools.partial(matrix, num_read=1)
                matrix(f"{name}_b", e + "r" + written, zeros, f"{module}.lora_B.weight")
                if c.alpha_range:
                    scales = f"{module}.lora_scale"
                    declare(f"{name}_s", "pr", into, scales, only, num_read=None)
        for name, (letters, module, only) in self.norms.items():
            declare(name, letters, c.norm_init, f"{module}.weight", only)
        for name in self.biased(c):
            _, written, module, only = self.projections[name]
            declare(_bias_of(name), written, zeros, f"{module}.bias", only)

    def declare(
        self,
        rngs: nnx.Rngs,
        name: str,
        letters: str,
        init: Callable[..., Array],
        tensor: str,
        only: str = "",
        num_read: int | None = 0,
    ) -> None:
        """Makes a parameter, stacked over the layers that have it.

        Args:
          letters: of its dimensions.
          tensor: its name in Hugging Face's layer.
          only: type of the layers that have it; "" for all.
          num_read: leading dimensions that are inputs, which HF stores last; None for
            one of several dimensions that it stores as they are. Not counted is a first
            one of experts, for whose number the tensor's name has a "*".
        """
        c = self.config
        num = len(c.layers_of_type(only))
        if num == 0 or (self.layer_type and only not in ("", self.layer_type)):
            return
        shape = (num, *(getattr(c, self.dims[x][0]) for x in letters))
        axes = ("layers", *(self.dims[x][1] for x in letters))
        value = init(rngs.params(), shape, jnp.float32)
        said = {"axes": axes, "tensor": tensor, "only": only, "num_read": num_read}
        setattr(self, name, nnx.Param(value, **said))

    def __call__(self, x: Array, layer: Layer) -> tuple[Array, KeyValue]:
        """The residual stream after this layer, and its keys and values."""
        y, kv = self.attention(self.norm(x, "attn_norm"), layer)
        x = x + y
        return x + self.mlp(self.norm(x, "mlp_norm"), layer), kv

    def attention(self, x: Array, layer: Layer) -> tuple[Array, KeyValue]:
        q, k, v = (self.project(x, name, layer) for name in ("wq", "wk", "wv"))
        q, k = layer.rotate(self.prepare(q, "q")), layer.rotate(self.prepare(k, "k"))
        return self.project(layer.attend(q, k, v), "wo", layer), (k, v)

    def prepare(self, x: Array, which: str) -> Array:
        """Queries ("q") or keys ("k"), before they are rotated."""
        name = f"{which}_norm"
        return self.norm(x, name) if name in self.norms else x

    def mlp(self, x: Array, layer: Layer) -> Array:
        gate = self.config.activation(self.project(x, "w_gate", layer))
        return self.project(gate * self.project(x, "w_up", layer), "w_down", layer)

    def norm(self, x: Array, name: str) -> Array:
        return self.config.norm(x, getattr(self, name)[...])

    def project(self, x: Array, name: str, layer: Layer) -> Array:
        """A projection with its adapter and its bias, where it has them."""
        c, (read, written, *_) = self.config, self.projections[name]
        out = self._product(x, name, read, written)
        if name in c.adapted:
            inner = self._product(layer.thin(x, name), f"{name}_a", read, "r")
            if c.alpha_range:
                scales = getattr(self, f"{name}_s")[...].astype(x.dtype)
                scales = jnp.matmul(layer.dial, scales, precision="highest")
                inner = inner * scales.astype(x.dtype)
            adapted = self._product(inner, f"{name}_b", "r", written)
            out = out + adapted * (c.lora_alpha / c.lora_rank)
        bias = getattr(self, _bias_of(name), None)
        return out if bias is None else out + rank_of(out, bias[...].astype(x.dtype))

    def _product(self, x: Array, name: str, read: str, written: str) -> Array:
        weight = getattr(self, name)[...].astype(x.dtype)
        # Tokens of all rows as one dimension: on CPU twice as fast.
        flat = x.reshape(-1, *weight.shape[: len(read)])
        out = jnp.einsum(f"n{read},{read}{written}->n{written}", flat, weight)
        return out.reshape(*x.shape[:2], *out.shape[1:])


def _bias_of(name: str) -> str:
    """The parameter that is the bias of a projection: "bq" of "wq"."""
    return name.replace("w", "b", 1)


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Root-mean-square norm over the dimensions of `scale`, in float32, as in Llama.

    Rounded to the type of `x` before it is scaled, as the checkpoints were trained.
    """
    return _normalised(x, scale, eps).astype(x.dtype) * rank_of(
        x, scale.astype(x.dtype)
    )


def rms_norm_float32(x: Array, scale: Array, eps: float) -> Array:
    """`rms_norm`, rounded after it is scaled."""
    y = _normalised(x, scale, eps)
    return (y * rank_of(y, scale.astype(jnp.float32))).astype(x.dtype)


def _normalised(x: Array, scale: Array, eps: float) -> Array:
    y, axes = x.astype(jnp.float32), tuple(range(-scale.ndim, 0))
    return y * lax.rsqrt(jnp.mean(y * y, axis=axes, keepdims=True) + eps)


def rank_of(x: Array, weight: Array) -> Array:
    """`weight` with leading dimensions of one, to the rank of `x`."""
    return weight.reshape((1,) * (x.ndim - weight.ndim) + weight.shape)

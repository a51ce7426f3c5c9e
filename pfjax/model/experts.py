"""Mixtures of experts: each token passes through the MLPs of a few of many.

Tokens are sorted by expert and multiplied group by group, however many each expert gets:
there is no capacity, and none is dropped. Experts are split over devices as RULES says;
each device computes what its own add to the tokens of all that share them, and these are
summed. Devices along "expert" have different tokens, which go to all of them, rather than
the experts' matrices.

References:
  Shazeer et al., arXiv 1701.06538; Gale et al., arXiv 2211.15841 (products by group).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int, UInt8

from pfjax.infra import hardware, shard_map, sharding
from pfjax.model import grouped_matmul_gpu
from pfjax.targets import Array


class Routing(NamedTuple):
    """How a token chooses its experts."""

    num_experts: int
    width: int  # F, of each
    per_token: int  # experts that each token passes through
    is_normalised: bool  # whether their weights sum to one


# Of a token whose experts were not recorded. Numbers of experts are recorded as uint8.
UNKNOWN = 255


class Weights(NamedTuple):
    """The matrices of one layer, or of the experts that a device has."""

    router: Float[Array, "d e"]
    gate: Float[Array, "e d f"]
    up: Float[Array, "e d f"]
    down: Float[Array, "e f d"]
    # Of adapters, where there are some: to each matrix the product of two is added.
    gate_a: Float[Array, "e d r"] | None = None
    gate_b: Float[Array, "e r f"] | None = None
    up_a: Float[Array, "e d r"] | None = None
    up_b: Float[Array, "e r f"] | None = None
    down_a: Float[Array, "e f r"] | None = None
    down_b: Float[Array, "e r d"] | None = None


# Of the blocks of the kernel for gradients of matrices.
_ROWS, _COLUMNS = 128, 512

_HIDDEN = ("batch", "tokens", None)
_AXES = {
    "gate": ("experts", "embed", None),
    "up": ("experts", "embed", None),
    "down": ("experts", None, "embed"),
    "gate_a": ("experts", "embed", None),
    "gate_b": ("experts", None, None),
    "up_a": ("experts", "embed", None),
    "up_b": ("experts", None, None),
    "down_a": ("experts", None, None),
    "down_b": ("experts", None, "embed"),
}


def apply(
    routing: Routing,
    x: Float[Array, "b t d"],
    weights: Weights,
    activation: Callable[[Array], Array],
    choose: Callable[[Array], Array] | None = None,
) -> Float[Array, "b t d"]:
    """The weighted sum of what a token's experts make of it.

    Args:
      choose: the experts `[B, T, k]` of each token from the probabilities `[B, T, E]` of
        all; `likeliest` if not given.
    """
    probs, chosen = route(routing, x, weights.router, choose)
    over = sharding.axes_of("experts")
    # Axes along which devices have different tokens, and the same.
    apart = tuple(a for a in over if a in sharding.axes_of("batch"))
    alike = tuple(a for a in over if a not in apart)
    # Gathered by hand, so that their gradients are summed where they are kept.
    gathered = tuple(a for a in sharding.axes_of("embed") if a not in over)
    axes = {k: x for k, x in _AXES.items() if getattr(weights, k) is not None}

    def whole(x, axes):
        if not gathered or "embed" not in axes:
            return x
        return lax.all_gather(x, gathered, axis=axes.index("embed"), tiled=True)

    def of_device(x, probs, chosen, *matrices):
        matrices = map(whole, matrices, axes.values())
        w = weights._replace(**dict(zip(axes, matrices, strict=True)))
        flat, probs, chosen = (y.reshape(-1, y.shape[-1]) for y in (x, probs, chosen))
        first = lax.axis_index(over) * w.gate.shape[0] if over else 0
        of = lambda x, probs, chosen: mix(x, probs, chosen - first, w, activation)
        if apart:
            # One device's tokens at a time: an expert may be chosen by all of them.
            blocks = lax.all_gather((flat, probs, chosen), apart)
            out = lax.map(jax.checkpoint(lambda block: of(*block)), blocks)
            out = lax.psum_scatter(out, apart)
        else:
            out = of(flat, probs, chosen)
        out = lax.psum(out, alike) if alike else out
        return out.astype(x.dtype).reshape(x.shape)

    run = shard_map.by_device(of_device, (*[_HIDDEN] * 3, *axes.values()), _HIDDEN)
    return run(x, probs, chosen, *(getattr(weights, name) for name in axes))


def route(
    routing: Routing,
    x: Float[Array, "b t d"],
    router: Float[Array, "d e"],
    choose: Callable[[Array], Array] | None = None,
) -> tuple[Float[Array, "b t k"], Int[Array, "b t k"]]:
    """The experts of each token and their weights in its sum, in float32.

    In bfloat16 many experts would be equally likely, and which are chosen would depend on
    how the products were summed.
    """
    float32 = {"preferred_element_type": jnp.float32, "precision": "highest"}
    logits = jnp.einsum("btd,de->bte", x, router, **float32)
    probs = jax.nn.softmax(logits, axis=-1)
    chosen = choose(probs) if choose else likeliest(routing, probs)
    probs = jnp.take_along_axis(probs, chosen, axis=-1)
    if routing.is_normalised:
        probs = probs / probs.sum(axis=-1, keepdims=True)
    return probs, chosen


def likeliest(routing: Routing, probs: Float[Array, "b t e"]) -> Int[Array, "b t k"]:
    """The experts that a token passes through."""
    best = lambda x: lax.top_k(x, routing.per_token)[1]
    return shard_map.by_device(best, (_HIDDEN,), _HIDDEN)(lax.stop_gradient(probs))


def replayed(
    routing: Routing, recorded: UInt8[Array, "b t k"]
) -> Callable[[Array], Array]:
    """Chooses what is recorded, and the likeliest where that is `UNKNOWN`."""

    def choose(probs):
        is_known = recorded != UNKNOWN
        chosen = recorded.astype(jnp.int32)
        return jnp.where(is_known, chosen, likeliest(routing, probs))

    return choose


def mix(
    x: Float[Array, "n d"],
    probs: Float[Array, "n k"],
    chosen: Int[Array, "n k"],
    weights: Weights,
    activation: Callable[[Array], Array],
) -> Float[Array, "n d"]:
    """The weighted sum over the experts that are here, in float32.

    Args:
      chosen: numbers of experts; those that are not among the `weights` add nothing.
    """
    n, k = chosen.shape
    num = weights.gate.shape[0]
    flat = chosen.reshape(-1)
    flat = jnp.where((flat >= 0) & (flat < num), flat, num)  # others come last
    order = jnp.argsort(flat)
    inverse = jnp.argsort(order)
    sizes = (flat[:, None] == jnp.arange(num)[None]).sum(axis=0, dtype=jnp.int32)
    # What lies behind the last group is undefined, and so is its gradient.
    is_here = (jnp.arange(n * k) < sizes.sum())[:, None]
    rows = jnp.where(is_here, _take(k, x, order, inverse), 0)
    times = functools.partial(_adapted_product, weights=weights, sizes=sizes)
    inner = activation(times(rows, "gate")) * times(rows, "up")
    out = jnp.where(is_here, times(inner, "down"), 0)
    out = _take(1, out, inverse, order).reshape(n, k, -1).astype(jnp.float32)
    return (probs[..., None] * out).sum(axis=1)


def _adapted_product(
    rows: Float[Array, "m i"], name: str, weights: Weights, sizes: Int[Array, "e"]
) -> Float[Array, "m o"]:
    """Each group of rows times its matrix, and its adapter's output where it has one."""
    out = _product(rows, getattr(weights, name), sizes)
    a, b = (getattr(weights, f"{name}_{x}") for x in "ab")
    if a is None:
        return out
    # To a rank that kernels take: otherwise all rows are multiplied with every expert's.
    more = (0, -a.shape[2] % grouped_matmul_gpu.LEAST)
    a, b = jnp.pad(a, ((0, 0), (0, 0), more)), jnp.pad(b, ((0, 0), more, (0, 0)))
    return out + _product(_product(rows, a, sizes), b, sizes)


@jax.custom_vjp
def _product(
    rows: Float[Array, "m i"], matrices: Float[Array, "e i o"], sizes: Int[Array, "e"]
) -> Float[Array, "m o"]:
    """Each group of rows times its matrix."""
    return _grouped(rows, matrices, sizes)


def _product_forward(rows, matrices, sizes):
    return _product(rows, matrices, sizes), (rows, matrices, sizes)


def _product_backward(saved, g):
    rows, matrices, sizes = saved
    of_rows = _grouped(g, matrices.swapaxes(1, 2), sizes)
    return of_rows, _gradient(rows, g, sizes), None


_product.defvjp(_product_forward, _product_backward)


def _grouped(
    rows: Float[Array, "m i"], matrices: Float[Array, "e i o"], sizes: Int[Array, "e"]
) -> Float[Array, "m o"]:
    has_kernel = hardware.runs_triton(*sharding.platform())
    if has_kernel and grouped_matmul_gpu.fits(*matrices.shape[1:]):
        return grouped_matmul_gpu.product(rows, matrices, sizes)
    return lax.ragged_dot(rows, matrices, sizes)


def _gradient(
    rows: Float[Array, "m i"], g: Float[Array, "m o"], sizes: Int[Array, "e"]
) -> Float[Array, "e i o"]:
    """The product of each group of rows and its gradients."""
    platform, kind = sharding.platform()
    if platform == "tpu":
        return _gradient_kernel(rows, g, sizes)
    has_kernel = hardware.runs_triton(platform, kind)
    if has_kernel and grouped_matmul_gpu.fits(rows.shape[1], g.shape[1]):
        return grouped_matmul_gpu.gradient(rows, g, sizes)
    over_rows = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
    return lax.ragged_dot_general(rows, g, sizes, over_rows)


def _gradient_kernel(rows, g, sizes, interpret=False):
    """The same on TPUs, where XLA multiplies the rows of all groups for each of them."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    # Stacks of matrices of a few columns would be padded to 128 of them.
    if g.shape[1] < min(rows.shape[1], _ROWS):
        return _gradient_kernel(g, rows, sizes, interpret).swapaxes(1, 2)
    pad = lambda x: jnp.pad(x, ((0, -len(x) % _ROWS), (0, 0)))
    tiles = (_ROWS, min(rows.shape[1], _COLUMNS), min(g.shape[1], _COLUMNS))
    how = {"preferred_element_type": g.dtype, "tiling": tiles, "interpret": interpret}
    return tgmm(pad(rows).T, pad(g), sizes, **how)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _take(k: int, x: Array, order: Array, inverse: Array) -> Array:
    """Rows of `x`, each repeated `k` times, in another order.

    Its gradient is taken in the inverse order: as a scatter it would be slow, and on some
    devices not the same each time.
    """
    return x[order // k]


def _take_forward(k, x, order, inverse):
    return _take(k, x, order, inverse), inverse


def _take_backward(k, inverse, g):
    return g[inverse].reshape(-1, k, g.shape[-1]).sum(axis=1), None, None


_take.defvjp(_take_forward, _take_backward)

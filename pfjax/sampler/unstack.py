"""The weights as decoding reads them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jaxtyping import Int

from pfjax.infra import sharding
from pfjax.model import transformer
from pfjax.model.config import ModelConfig
from pfjax.model.transformer import Params
from pfjax.targets import Array


def weights(
    config: ModelConfig, params: Params, run: Callable[..., Any] | None = None
) -> Params:
    """The parameters that decoding reads for every token: in the computation's type, whole
    on every part of the batch, and a list of layers, since a scan over stacked ones would
    copy each out of the stack first.

    One program per layer: devices that exchange parts of a matrix may have to put all of it
    together, and of a stack that would take as much memory as the model.

    Args:
      run: called with a jitted function and its arguments; calls it by default.
    """
    run = run or (lambda f, *args, **static: f(*args, **static))
    others, blocks = dict(params), params["blocks"]
    del others["blocks"]
    held = {k: x.layers for k, x in transformer.tensors(config).items() if k in blocks}
    layers = []
    for i in range(config.num_layers):
        at = {k: np.int32(x.index(i)) for k, x in held.items() if i in x}
        layers.append(run(_layer, {k: blocks[k] for k in at}, at, config=config))
    return {**run(_others, others, config=config), "layers": layers}


@functools.partial(jax.jit, static_argnames="config")
def _layer(
    blocks: Params, at: dict[str, Int[Array, ""]], *, config: ModelConfig
) -> Params:
    axes = transformer.logical_axes(config)["blocks"]
    of_layer = {k: x[at[k]].astype(config.dtype) for k, x in blocks.items()}
    return _whole(of_layer, {name: axes[name][1:] for name in blocks})


@functools.partial(jax.jit, static_argnames="config")
def _others(params: Params, *, config: ModelConfig) -> Params:
    axes = transformer.logical_axes(config)
    cast = jax.tree.map(lambda x: x.astype(config.dtype), params)
    return _whole(cast, {name: axes[name] for name in params})


def _whole(params: Params, axes: Params) -> Params:
    """Places parameters on every part of the batch, split over "tensor" alone."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return params
    where = sharding.rollout_shardings(mesh, axes, params)
    return lax.with_sharding_constraint(params, where)

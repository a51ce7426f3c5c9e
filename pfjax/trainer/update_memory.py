"""Estimates what a pass over packed rows needs, and how many rows a device has room for."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from pfjax.infra import hardware, sharding
from pfjax.infra.sharding import AnyMesh
from pfjax.model import attention, delta, flops, log_probs
from pfjax.model.config import ModelConfig

# Fraction of the free memory that is counted on: compiled programs need up to 1.3 times
# the estimate.
_FRACTION = 0.75
# Tokens of a micro-batch on one device from which on more save little traffic.
_MOST_TOKENS = 32_768
# Micro-batches of the longest update, at least: the last is half empty on average.
_LEAST_MICROBATCHES = 16
# Responses per row that room is kept for, where attention pays for them.
_SEGMENTS = 32


def pass_bytes(
    model: ModelConfig,
    mesh: Mapping[str, int],
    tokens: int,
    remat: str = "",
    param_bytes: int = 0,
) -> int:
    """Bytes on one device at the peak of a pass over a micro-batch, beside its arguments.

    Args:
      mesh: sizes of its axes.
      tokens: of the micro-batch, on this device.
      remat: rematerialisation of the backward pass; "" where there is none.
      param_bytes: of the trained parameters that the device holds.
    """
    # Widths are in numbers of 2 bytes.
    tensor = mesh["tensor"]
    parts = mesh["fsdp"] * mesh["expert"] * mesh["context"]
    heads = model.num_heads * model.head_dim / tensor
    kv = key_value_width(model, mesh)
    inner, rows = model.mlp_dim / tensor, 0
    if model.experts:
        # Those that one device has may be chosen by all tokens.
        inner = model.experts.per_token * model.experts.width
        rows = model.experts.per_token * model.embed_dim
    # Keys and values of the whole row are here while a layer attends.
    whole = mesh["context"] * kv
    layer = 4 * model.embed_dim + 4 * heads + kv + whole + 4 * inner + 4 * rows
    states = 2 * delta.pass_floats(model.delta) if model.delta else 0
    layer += states
    chunk = min(log_probs.CHUNK, tokens) * parts
    logits = 4 * chunk * model.vocab_size / (parts * tensor)
    logits += 2 * chunk * model.embed_dim
    hidden = 8 * tokens * model.embed_dim
    if mesh["expert"] > 1:
        # The states of the tokens of all, in 2 bytes, and what experts add, in 4.
        hidden += 6 * mesh["expert"] * tokens * model.embed_dim
    if not remat:
        return int(tokens * layer + logits + hidden)  # half a layer at once
    # What the forward pass keeps of each layer for the backward pass.
    kept = {
        "full": model.embed_dim,
        "attention": model.embed_dim + heads,
        "dots": 3 * model.embed_dim + 2 * heads + kv + (0 if rows else 2 * inner),
        "none": 8 * model.embed_dim
        + 4 * heads
        + 2 * kv
        + 5 * inner
        + 4 * rows
        + states,
    }[remat]
    if any(model.block.projections[x].stacked for x in model.adapted):
        layer += 2 * rows  # gradients that adapters of experts send back
    # A layer's values and their gradients; its weights and those of the next.
    layer = 4 * tokens * layer + 4 * sum(weight_bytes(model, mesh)) / model.num_layers
    gradients = 2 * param_bytes  # their sum, and those of one micro-batch
    kept = 2 * tokens * model.num_layers * kept
    return int(layer + kept + gradients + 2 * logits + hidden)


def weight_bytes(model: ModelConfig, mesh: Mapping[str, int]) -> tuple[float, float]:
    """Bytes, in bfloat16, of the layers' weights that a device computes with: of experts,
    and of all else."""
    of_experts = flops.expert_weights(model)
    others = flops.all_weights(model) - of_experts
    per_device = 2 / mesh["tensor"]
    return per_device * of_experts / mesh["expert"], per_device * others


def of_update(fns: Any, mesh: Mesh, remat: str) -> int:
    """Bytes that updates may need on one device, beside what stays.

    Args:
      fns: `train_fns.TrainFns`.
    """
    rows = fns.shape.microbatch_size // sharding.batch_ways(mesh)
    tokens = rows * fns.shape.pack_length // mesh.shape["context"]
    param_bytes = sharding.part_bytes(fns.state.params)
    need = pass_bytes(fns.model, mesh.shape, tokens, remat, param_bytes)
    return int(need / _FRACTION)


def key_value_width(model: ModelConfig, mesh: Mapping[str, int]) -> float:
    """Numbers of the keys and values of one token that a device holds, per layer."""
    heads = model.num_kv_heads / min(mesh["tensor"], model.num_kv_heads)
    return 2 * heads * model.head_dim


def rows_that_fit(
    model: ModelConfig,
    mesh: AnyMesh,
    *,
    pack_length: int,
    most: int,
    remat: str,
    param_bytes: int,
    resident_bytes: int,
) -> int:
    """Rows per micro-batch on each device, a power of two.

    Weights are gathered and gradients reduced once per micro-batch, so that more rows send
    less. One row on devices whose memory nobody has stated, such as CPUs.

    Args:
      most: rows on each device in the longest update.
      resident_bytes: of a device, taken by what stays: parameters, moments, the base.
    """
    with jax.sharding.use_abstract_mesh(getattr(mesh, "abstract_mesh", mesh)):
        chip = hardware.chip_of(sharding.platform()[1])
        how = (model.attention, model.head_dim, model.dtype)
        pays = attention.pays_for_segments(*how)
    if chip is None:
        return 1
    free = _FRACTION * (hardware.usable_memory(chip) - resident_bytes)

    def is_good(rows: int) -> bool:
        tokens = rows * pack_length // mesh.shape["context"]
        need = pass_bytes(model, mesh.shape, tokens, remat, param_bytes)
        if pays:
            heads = model.num_heads / mesh.shape["tensor"]
            need += attention.segment_bytes(tokens, heads, model.head_dim, _SEGMENTS)
        is_short = tokens <= _MOST_TOKENS and rows * _LEAST_MICROBATCHES <= most
        return is_short and need <= free

    rows = 1
    while is_good(2 * rows):
        rows *= 2
    return rows

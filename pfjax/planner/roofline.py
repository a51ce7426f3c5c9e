"""What a step asks of a device, from shapes: bytes it holds and moves, FLOPs, links."""

import math
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from pfjax.infra import sharding
from pfjax.model import flops, log_probs, transformer
from pfjax.model.transformer import ModelConfig
from pfjax.planner import hlo
from pfjax.sampler import slots
from pfjax.trainer import setup


class Load(NamedTuple):
    """What a part of a step asks of one device."""

    flops: float
    moved: float  # bytes of its memory
    sent: dict[str, float]  # bytes over links, by mesh axes


def bytes_of(tree: Any) -> int:
    """Of one device's part."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize
        if x.sharding is not None
        else math.prod(x.shape) * np.dtype(x.dtype).itemsize
        for x in jax.tree.leaves(tree)
    )


def rollout_weight_bytes(config: ModelConfig, mesh: Mesh | AbstractMesh) -> int:
    """Of the copy that a rollout reads: whole but for "tensor"."""
    axes, shapes = transformer.logical_axes(config), transformer.abstract_params(config)
    where = sharding.tree_shardings(mesh, axes, shapes, without=("fsdp",))
    return bytes_of(setup.placed(shapes, where, config.dtype))


def _layer_bytes(config: ModelConfig, tensor: int) -> float:
    return 2 * flops.weights_a_token(config) / config.num_layers / tensor


def temporaries(
    config: ml_collections.FrozenConfigDict,
    made: setup.Programs,
    mesh: Mesh | AbstractMesh,
    is_update: bool,
) -> int:
    """Estimated peak of a pass over a micro-batch, beside its arguments.

    Widths of what lives for a token, in numbers of 2 bytes: compared with what the
    compiler says for TPUs in the tests.
    """
    c = made.step_config.model
    tensor = mesh.shape["tensor"]
    tokens = config.rows * config.row_length
    heads = c.num_heads * c.head_dim / tensor
    kv = 2 * c.num_kv_heads * c.head_dim / min(tensor, c.num_kv_heads)
    inner = c.mlp_dim / tensor
    stored = {
        "full": c.embed_dim,
        "attention": c.embed_dim + heads,
        "dots": 3 * c.embed_dim + 2 * heads + kv + 2 * inner,
        "none": 8 * c.embed_dim + 4 * heads + 2 * kv + 5 * inner,
    }
    layer = 4 * c.embed_dim + 4 * heads + 2 * kv + 4 * inner
    chunk = min(log_probs.CHUNK, tokens) * mesh.shape["fsdp"]
    vocab = c.vocab_size / (mesh.shape["fsdp"] * tensor)
    logits = 4 * chunk * vocab + 2 * chunk * c.embed_dim
    total = tokens * layer  # about half of it lives at once
    if is_update:
        # Values and their gradients, and the weights of a layer and of the next.
        total = 2 * (2 * tokens * layer + 2 * _layer_bytes(c, tensor))
        total += 2 * tokens * c.num_layers * stored[config.remat]
        total += 2 * bytes_of(made.state.params)  # the sum of gradients, and a new one
        logits *= 2
    return int(total + logits + 4 * 2 * tokens * c.embed_dim)


class Traffic:
    """FLOPs and bytes of a step at assumed lengths."""

    def __init__(
        self,
        config: ml_collections.FrozenConfigDict,
        made: setup.Programs,
        mesh: Mesh | AbstractMesh,
        plan: slots.Plan,
        response_tokens: int,
    ):
        self.config, self.made, self.mesh, self.plan = config, made, mesh, plan
        self.responses = config.prompts_per_step * config.samples_per_prompt
        self.response_tokens = response_tokens
        self.prompt_tokens = config.data.max_prompt_tokens // 4
        self.length = self.prompt_tokens + response_tokens
        tokens = self.responses * self.length
        # Rows are filled to 95 % or so.
        per_batch = 0.95 * made.rows * config.row_length
        self.micro_batches = max(1, math.ceil(tokens / per_batch))

    def loads(self, found: dict[str, list[hlo.Collective]] | None) -> dict[str, Load]:
        sent = {
            name: self._estimated(name)
            if found is None
            else self._sent(name, found[name])
            for name in ("rollout", "score", "update")
        }
        c, devices = self.made.step_config.model, self.mesh.size
        lengths = np.full(self.responses, self.length)
        predicted = np.full(self.responses, self.response_tokens)
        forward = flops.forward_flops(c, lengths, predicted)
        prompts = np.full(self.responses, self.prompt_tokens)
        update = flops.update_flops(c, lengths, prompts) - forward
        tensor = self.mesh.shape["tensor"]
        weights = rollout_weight_bytes(c, self.mesh)
        # A pass reads each layer's weights once a micro-batch, the backward pass twice.
        layers = self.micro_batches * c.num_layers * _layer_bytes(c, tensor)
        tokens = self.micro_batches * self.config.rows * self.config.row_length
        states = 2 * 20 * c.embed_dim * c.num_layers * tokens
        state = bytes_of(self.made.state)
        return {
            "rollout": Load(forward / devices, self._decoded(weights), sent["rollout"]),
            "score": Load(forward / devices, layers + states, sent["score"]),
            "update": Load(
                update / devices, 3 * (layers + states) + 2 * state, sent["update"]
            ),
        }

    @property
    def _steps(self) -> float:
        """Tokens that the busiest part of the batch decodes one after the other."""
        plan, config = self.plan, self.config
        samples = math.ceil(config.prompts_per_step / plan.dp_size)
        samples *= config.samples_per_prompt
        return max(
            samples * self.response_tokens / plan.slots,
            # The longest response is drawn alone at the end.
            float(min(3 * self.response_tokens, config.max_new_tokens)),
        )

    def _decoded(self, weights: int) -> float:
        """Bytes that decoding reads of a device's memory."""
        plan, g = self.plan, self.config.samples_per_prompt
        per_token = plan.cache_bytes / (
            plan.slots * plan.widths[-1] + plan.prefix_slots * plan.prompt_width
        )
        busy = self.responses / plan.dp_size * self.response_tokens / self._steps
        own = busy * self.response_tokens / 2
        prompts = min(plan.prefix_slots, math.ceil(busy / g)) * self.prompt_tokens
        return self._steps * (weights + per_token * (own + prompts))

    def _sent(self, name: str, found: list[hlo.Collective]) -> dict[str, float]:
        sent: dict[str, float] = {}
        for x in found:
            axes = "+".join(x.axes)
            sent[axes] = sent.get(axes, 0.0) + x.sent * x.times * self.runs(name, x)
        return sent

    def runs(self, name: str, x: hlo.Collective) -> float:
        """How often loops of unknown length run a collective: over micro-batches or
        tokens, then over chunks of log-probs."""
        share = self.response_tokens / self.length
        tokens = self.config.rows * self.config.row_length
        chunks = math.ceil(share * tokens / log_probs.CHUNK)
        outer = self._steps if name == "rollout" else self.micro_batches
        return float((1, outer, outer * chunks)[min(x.loops, 2)])

    def _estimated(self, name: str) -> dict[str, float]:
        c, shape = self.made.step_config.model, self.mesh.shape
        fsdp, tensor, data = shape["fsdp"], shape["tensor"], shape["data"]
        tokens = self.config.rows * self.config.row_length
        layers = c.num_layers * _layer_bytes(c, tensor)
        ring = lambda n: (n - 1) / n
        if name == "rollout":
            a_step = 2 * 2 * c.num_layers * self.plan.slots * c.embed_dim * 2
            return {"tensor": self._steps * a_step * ring(tensor)} if tensor > 1 else {}
        passes = 1 if name == "score" else 2
        sent = {
            "fsdp": self.micro_batches * passes * layers * ring(fsdp),
            "tensor": self.micro_batches
            * (1 if name == "score" else 3)
            * 2
            * 2
            * c.num_layers
            * tokens
            * c.embed_dim
            * 2
            * ring(tensor),
        }
        if name == "update":  # gradients, in float32
            sent["fsdp"] += self.micro_batches * 2 * layers * ring(fsdp)
            sent["data"] = self.micro_batches * 2 * 2 * layers / fsdp * ring(data)
        return {axis: x for axis, x in sent.items() if x}

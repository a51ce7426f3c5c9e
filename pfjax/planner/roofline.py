"""The least time that each phase of a step can take, by a roofline.

The phases are rollout, score (the base's log-probs) and update. Each is bound by the
slowest of three: its FLOPs, the bytes that a device moves in its memory, and those that
it sends to others, at the peaks that the vendor states.
"""

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from pfjax.infra import hardware
from pfjax.model import flops, log_probs
from pfjax.model.config import ModelConfig
from pfjax.planner import hlo
from pfjax.sampler import slots
from pfjax.trainer import update_memory


@dataclasses.dataclass(frozen=True)
class Workload:
    """A step at assumed lengths. Bytes are those of one device."""

    model: ModelConfig  # of the policy
    mesh: Mapping[str, int]
    rollout_mesh: Mapping[str, int]
    plan: slots.Plan  # of the rollout
    num_prompts: int
    samples_per_prompt: int
    max_new_tokens: int
    prompt_tokens: int  # of each prompt
    response_tokens: int  # of each response
    micro_batch: int  # tokens of a micro-batch on each device
    remat: str
    weight_bytes: int  # of the copy that a rollout reads
    param_bytes: int  # of the trained parameters, in float32
    state_bytes: int  # of these and the optimizer's
    room: int  # prompts that rollouts hold at once
    is_apart: bool = False  # whether rollouts have devices of their own
    carries: bool = False  # whether responses that are not done go on in the next step
    sent_bytes: int = 0  # of weights, to each device that draws, where it is apart

    def mesh_of(self, phase: str) -> Mapping[str, int]:
        return self.rollout_mesh if phase == "rollout" else self.mesh

    @property
    def responses(self) -> int:
        """Responses per step."""
        return self.num_prompts * self.samples_per_prompt

    @property
    def micro_batches(self) -> int:
        """Micro-batches that the responses of a step fill."""
        tokens = self.responses * (self.prompt_tokens + self.response_tokens)
        ways = math.prod(self.mesh.values()) // self.mesh["tensor"]
        # Packing fills rows to 95 % or so.
        return max(1, math.ceil(tokens / (0.95 * self.micro_batch * ways)))

    @property
    def decode_steps(self) -> float:
        """Tokens that the busiest part of the batch decodes one after the other."""
        prompts = math.ceil(self.num_prompts / self.plan.dp_size)
        tokens = prompts * self.samples_per_prompt * self.response_tokens
        if self.carries:
            return tokens / self.plan.slots
        # The longest response is decoded alone at the end.
        longest = min(3 * self.response_tokens, self.max_new_tokens)
        return max(tokens / self.plan.slots, float(longest))

    @property
    def layer_bytes(self) -> float:
        """Bytes of the weights of all layers that a device computes with."""
        return sum(update_memory.weight_bytes(self.model, self.mesh))


class Sent(NamedTuple):
    """What one device sends in one phase of one step."""

    kind: str  # of the collective; "" of an estimate
    axes: str  # mesh axes, joined by "+"
    gb: float
    largest: str  # array of one collective


def sent(w: Workload, phase: str, found: Iterable[hlo.Collective]) -> list[Sent]:
    """Sums up the collectives of a compiled phase by kind and axes."""
    response_tokens = w.micro_batch * w.response_tokens
    response_tokens /= w.prompt_tokens + w.response_tokens
    chunks = math.ceil(response_tokens / log_probs.CHUNK)
    # Loops whose length only the running program knows: over tokens or micro-batches, and
    # within them over chunks of log-probs.
    outer = w.decode_steps if phase == "rollout" else w.micro_batches
    repeats = (1, outer, outer * chunks)
    alike = defaultdict(list)
    for x in found:
        alike[x.kind, "+".join(x.axes)].append(x)
    rows = []
    for kind_and_axes, group in alike.items():
        total = sum(x.sent * x.times * repeats[min(x.loops, 2)] for x in group)
        largest = max(group, key=lambda x: x.sent)
        array = f"{largest.dtype}[{','.join(map(str, largest.shape))}]"
        rows.append(Sent(*kind_and_axes, total / 1e9, array))
    return rows


def bounds(
    w: Workload, sent: Mapping[str, list[Sent]], chip: hardware.Chip
) -> dict[str, dict[str, Any]]:
    """PFLOPs of all devices and the least seconds of each phase, given what it sends."""
    prompts = np.full(w.responses, w.prompt_tokens)
    predicted = np.full(w.responses, w.response_tokens)
    forward = flops.forward_flops(w.model, prompts + predicted, predicted)
    update = flops.update_flops(w.model, prompts + predicted, prompts) - forward
    # A pass reads all weights of the layers once per micro-batch, and moves some 20
    # arrays as wide as the residual stream per layer; the backward pass twice as much.
    hidden = 2 * 20 * w.model.embed_dim * w.model.num_layers * w.micro_batch
    moved = w.micro_batches * (w.layer_bytes + hidden)
    out = {}
    for phase, num_flops, num_bytes in (
        ("rollout", forward, _decoded_bytes(w)),
        ("score", forward, moved),
        ("update", update, 3 * moved + 2 * w.state_bytes),
    ):
        seconds = {
            "compute": num_flops / math.prod(w.mesh_of(phase).values()) / chip.flops,
            "memory": num_bytes / chip.bandwidth,
            "links": sum(
                _seconds_on_links(x, w.mesh_of(phase), chip) for x in sent[phase]
            ),
        }
        out[phase] = {
            "pflop": num_flops / 1e15,
            "seconds": max(seconds.values()),
            "bound_by": max(seconds, key=seconds.get),
            "seconds_by": seconds,
        }
    return out


def _seconds_on_links(x: Sent, mesh: Mapping[str, int], chip: hardware.Chip) -> float:
    """Seconds of a collective in rings, as slow as the slowest link on the way.

    Between nodes, which have a port per device, as many rings run beside each other as a
    node has devices of the group. Axes further in have the nearer devices.
    """
    num_bytes, here, group, stride = 1e9 * x.gb, 1, 1, 1
    for axis, size in reversed(mesh.items()):
        if axis in x.axes.split("+"):
            here *= min(size, max(1, chip.node // stride))
            group *= size
        stride *= size
    between = num_bytes / here / chip.network if here < group else 0.0
    return max(num_bytes / chip.links, between)


def _decoded_bytes(w: Workload) -> float:
    """Bytes that decoding reads: at each token the weights and what caches hold."""
    plan = w.plan
    busy = w.responses / plan.dp_size * w.response_tokens / w.decode_steps
    # Samples of a prompt share its cache.
    prompts = min(plan.prefix_slots, math.ceil(busy / w.samples_per_prompt))
    # On average a response is half done.
    drawn = np.arange(w.response_tokens) + 0.5
    tokens = 0.0
    for window, layers in Counter(plan.windows).items():
        if window is None:
            continue
        reach = window or np.inf
        own = np.minimum(drawn, reach).mean()
        of_prompt = np.clip(reach - drawn, 0, w.prompt_tokens).mean()
        tokens += layers * (busy * own + prompts * of_prompt)
    # Those of slots and of prompts are read, and those of slots written.
    states = 3 * busy * plan.state_bytes
    return w.decode_steps * (w.weight_bytes + plan.token_bytes * tokens + states)

"""Estimates where no compiler for the devices is installed.

Only what a compiled program would say: temporaries and what is sent. All else follows
from shapes in either case. The tests compare them with the compiler for TPUs.
"""

import math

from pfjax.infra import shard_map
from pfjax.planner.roofline import Sent, Workload
from pfjax.trainer import update_memory


def temporaries(w: Workload) -> dict[str, dict[str, int]]:
    """Bytes that each phase needs on one device, beside its arguments."""
    found = {
        # Logits, their noise, and their sum, float32.
        "rollout": w.plan.slots * w.model.vocab_size * 12,
        "score": update_memory.pass_bytes(w.model, w.mesh, w.micro_batch),
        "update": update_memory.pass_bytes(
            w.model, w.mesh, w.micro_batch, w.remat, w.param_bytes
        ),
    }
    return {phase: {"temporaries": x} for phase, x in found.items()}


def sent(w: Workload) -> dict[str, list[Sent]]:
    """What one device sends in each phase, by mesh axis, in rings."""
    fraction = {axis: (n - 1) / n for axis, n in w.mesh.items()}
    # Two all-reduces per layer of the hidden states of one token, each sent twice.
    sums_of_token = 2 * 2 * 2 * w.model.num_layers * w.model.embed_dim
    summed = sums_of_token * fraction["tensor"]
    drawn = sums_of_token * (1 - 1 / w.rollout_mesh["tensor"])
    # Weights are gathered once in a forward pass and again in the backward pass, and
    # their gradients summed in float32: between copies of the weights once per update.
    over = [axis for axis in ("fsdp", "expert", "context") if w.mesh[axis] > 1]
    of_experts, others = update_memory.weight_bytes(w.model, w.mesh)
    parts = math.prod(w.mesh[axis] for axis in over)
    gathered = others * (1 - 1 / parts)
    gathered += of_experts * (1 - w.mesh["expert"] / parts)
    gathered *= w.micro_batches
    sums = 1 if shard_map.has_copies(w.mesh) else w.micro_batches
    tokens = w.micro_batches * w.micro_batch
    # So are the keys and values of those who share a row.
    width = update_memory.key_value_width(w.model, w.mesh)
    shared = 2 * tokens * w.model.num_layers * width * (w.mesh["context"] - 1)
    # The states of tokens go to those who share experts, in 2 bytes, and come back in 4;
    # they go again in the backward pass, as do gradients both ways, in 2.
    states = tokens * w.model.num_layers * w.model.embed_dim * (w.mesh["expert"] - 1)
    estimated = {
        "rollout": [("tensor", w.decode_steps * w.plan.slots * drawn)],
        "score": [
            ("+".join(over), gathered),
            ("tensor", tokens * summed),
            ("context", shared),
            ("expert", (2 + 4) * states),
        ],
        "update": [
            ("+".join(over), (2 + 2) * gathered),
            ("tensor", 3 * tokens * summed),
            ("context", (2 + 2) * shared),
            ("expert", (2 + 4 + 2 + 2 + 2) * states),
            ("data", 2 * sums * w.param_bytes * fraction["data"]),
        ],
    }
    row = lambda axis, x: Sent("", axis, x / 1e9, "(estimated)")
    rows = lambda sizes: [row(*x) for x in sizes if x[1]]
    return {phase: rows(sizes) for phase, sizes in estimated.items()}

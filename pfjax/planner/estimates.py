"""Estimates where no compiler for the devices is installed.

Only what a compiled program would say: temporaries and what is sent. All else follows
from shapes in either case. The tests compare them with the compiler for TPUs.
"""

from pfjax.model import log_probs
from pfjax.planner.roofline import Sent, Workload


def temporaries(w: Workload) -> dict[str, dict[str, int]]:
    """Bytes that each phase needs on one device, beside its arguments."""
    found = {
        # Logits, their noise, and their sum, float32.
        "rollout": w.plan.slots * w.model.vocab_size * 12,
        "score": _pass_bytes(w, is_update=False),
        "update": _pass_bytes(w, is_update=True),
    }
    return {phase: {"temporaries": x} for phase, x in found.items()}


def _pass_bytes(w: Workload, is_update: bool) -> int:
    """Peak of a pass over a micro-batch. Widths are in numbers of 2 bytes."""
    c, tensor, fsdp = w.model, w.mesh["tensor"], w.mesh["fsdp"]
    heads = c.num_heads * c.head_dim / tensor
    kv = 2 * c.num_kv_heads * c.head_dim / min(tensor, c.num_kv_heads)
    inner = c.mlp_dim / tensor
    layer = 4 * c.embed_dim + 4 * heads + 2 * kv + 4 * inner
    chunk = min(log_probs.CHUNK, w.micro_batch) * fsdp
    logits = 4 * chunk * c.vocab_size / (fsdp * tensor) + 2 * chunk * c.embed_dim
    hidden = 8 * w.micro_batch * c.embed_dim
    if not is_update:
        return int(w.micro_batch * layer + logits + hidden)  # half a layer at once
    # What the forward pass keeps of each layer for the backward pass.
    kept = {
        "full": c.embed_dim,
        "attention": c.embed_dim + heads,
        "dots": 3 * c.embed_dim + 2 * heads + kv + 2 * inner,
        "none": 8 * c.embed_dim + 4 * heads + 2 * kv + 5 * inner,
    }[w.remat]
    # A layer's values and their gradients; its weights and those of the next.
    layer = 4 * w.micro_batch * layer + 4 * w.layer_bytes / c.num_layers
    gradients = 2 * w.param_bytes  # their sum, and those of one micro-batch
    kept = 2 * w.micro_batch * c.num_layers * kept
    return int(layer + kept + gradients + 2 * logits + hidden)


def sent(w: Workload) -> dict[str, list[Sent]]:
    """What one device sends in each phase, by mesh axis, in rings."""
    fraction = {axis: (n - 1) / n for axis, n in w.mesh.items()}
    # Two all-reduces per layer of the hidden states of one token, each sent twice.
    summed = 2 * 2 * 2 * w.model.num_layers * w.model.embed_dim * fraction["tensor"]
    # Weights are gathered once in a forward pass and again in the backward pass, and
    # their gradients summed in float32.
    gathered = w.micro_batches * w.layer_bytes
    tokens = w.micro_batches * w.micro_batch
    estimated = {
        "rollout": {"tensor": w.decode_steps * w.plan.slots * summed},
        "score": {"fsdp": gathered * fraction["fsdp"], "tensor": tokens * summed},
        "update": {
            "fsdp": (2 + 2) * gathered * fraction["fsdp"],
            "tensor": 3 * tokens * summed,
            "data": 2 * 2 * gathered / w.mesh["fsdp"] * fraction["data"],
        },
    }
    row = lambda axis, x: Sent("", axis, x / 1e9, "(estimated)")
    rows = lambda sizes: [row(*x) for x in sizes.items() if x[1]]
    return {phase: rows(sizes) for phase, sizes in estimated.items()}

r"""Qwen3 30B A3B, sharpened for reasoning at alpha = 2, by adapters on attention.

Each layer has 128 experts, and a token passes through 8 of them. Not in the paper; alpha is the
one it uses for Llama-3.2-3B-Instruct. Thinking is off: with it
responses outgrow the 3,072 tokens that they may have here.

Hardware: not run yet. `pfjax plan` (assuming 1,024 tokens per response), peak memory per device and
    shortest possible step, compiled: h100:8 49.6 GiB of 72.8 and 25 s; v5p:2x2x2 59.0 GiB of
    95.7 and 27 s. v5e:4x4 with --config.mesh.tensor=8 fits (14.4 GiB of 15.75) but is of
    little use: 12 responses at once, 946 s; with --config.rollout_tensor=16 too, 576 s (estimated).
    h100:1 does not fit: two copies of the weights are 57 GiB each; h200:1 with
    --config.mesh.tensor=1 does (estimated, 121 GiB of 128.6 and 594 s).
Result: not run.
Command: pfjax train --config=qwen3_30b_a3b --workdir=runs/qwen3_30b_a3b
"""

import ml_collections

import pfjax


def get_config() -> ml_collections.ConfigDict:
    c = pfjax.recipe("reasoning")
    c.model = "Qwen/Qwen3-30B-A3B"
    c.alpha = 2.0
    c.data.chat_template_kwargs = '{"enable_thinking": false}'
    c.mesh.tensor = 4  # a rollout's copy of the weights is split over these alone
    c.lora.rank = 16
    c.optim.learning_rate = 5e-5  # chosen
    return c

r"""Qwen3.5 0.8B, sharpened for reasoning at alpha = 2: three of four layers keep a state.

Not in the paper; alpha is the one it uses for Llama-3.2-3B-Instruct. Of the checkpoint,
which also reads images, only the language model is trained and exported.

Hardware: not run yet. `pfjax plan` (assuming 1,024 tokens per response), peak memory per device and
    shortest possible step, all compiled: h100:1 48.6 GiB of 72.8 and 29.8 s; h100:8 25.2 GiB
    and 4.9 s; v5e:4x4 7.0 GiB of 15.75 and 13.4 s; v5p:2x2x2 25.8 GiB of 95.7 and 6.9 s. The
    config.json shipped for these plans has the sizes of the model's card.
Result: not run.
Command: pfjax train --config=qwen3_5_0_8b --workdir=runs/qwen3_5_0_8b
"""

import ml_collections

import pfjax


def get_config() -> ml_collections.ConfigDict:
    c = pfjax.recipe("reasoning")
    c.model = "Qwen/Qwen3.5-0.8B"
    c.alpha = 2.0
    return c

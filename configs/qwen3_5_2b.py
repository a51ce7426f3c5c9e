r"""Qwen3.5 2B, sharpened for reasoning at alpha = 2: three of four layers keep a state.

The recipe of Qwen3.5 0.8B with another model.

Hardware: not run yet. `pfjax plan` (assuming 1,024 tokens per response), peak memory per device and
    shortest possible step, all compiled: h100:1 56.4 GiB of 72.8 and 43.3 s; h100:8 34.4 GiB
    and 8.4 s; v5e:4x4 11.4 GiB of 15.75 and 25.4 s; v5p:2x2x2 35.2 GiB of 95.7 and 12.5 s. The
    config.json shipped for these plans has the sizes of the model's card.
Result: not run.
Command: pfjax train --config=qwen3_5_2b --workdir=runs/qwen3_5_2b
"""

import ml_collections

import pfjax


def get_config() -> ml_collections.ConfigDict:
    c = pfjax.recipe("qwen3_5_0_8b")
    c.model = "Qwen/Qwen3.5-2B"
    return c

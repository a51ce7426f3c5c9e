r"""Qwen3.5 0.8B, sharpened for reasoning at alpha = 2: three layers of four keep a state.

Not in the paper; alpha is the one it uses for Llama-3.2-3B-Instruct. Of the checkpoint,
which reads images too, the language model is trained and exported.

Hardware: not run yet. `pfjax plan` (assuming 1,024 tokens per response), peak memory per device and
    least seconds per step: h100:1 (estimated) 45.8 GiB of 72.8 and 29.6 s; h100:8 (estimated)
    32.3 GiB and 4.9 s; v5e:4x4 (compiled) 7.0 GiB of 15.75 and 13.4 s. The config.json that
    ships for these plans is put together from what other projects say of the model.
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

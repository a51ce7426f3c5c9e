r"""Qwen3.5 0.8B, sharpened for reasoning at alpha = 2: three layers of four keep a state.

Not in the paper; alpha is the one it uses for Llama-3.2-3B-Instruct. Of the checkpoint,
which reads images too, the language model is trained and exported.

Hardware: not run yet.
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

r"""Gemma 3 1B, instruction-tuned, sharpened for reasoning at alpha = 2.

Not in the paper; alpha as its other instruction-tuned model has it.

Hardware: not run yet; `pfjax plan --config=gemma3_1b_it --topology=v5e:4x4` says what it takes.
Result: not run.
Command: pfjax train --config=gemma3_1b_it --workdir=runs/gemma3_1b_it
"""

import ml_collections

import pfjax


def get_config() -> ml_collections.ConfigDict:
    c = pfjax.recipe("reasoning")
    c.model = "google/gemma-3-1b-it"
    c.alpha = 2.0
    return c

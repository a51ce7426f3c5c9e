r"""Gemma 3 1B, instruction-tuned, sharpened for reasoning at alpha = 2.

Not in the paper; alpha is the one it uses for Llama-3.2-3B-Instruct.

Hardware: not run yet. `pfjax plan` (assuming 1,024 tokens per response), peak memory per device and
    shortest possible step, all compiled: h100:1 39.4 GiB of 72.8 and 15.4 s; h100:8 7.6 GiB and
    3.5 s; v5e:4x4 5.5 GiB of 15.75 and 11.6 s; v5p:2x2x2 10.7 GiB of 95.7 and 5.5 s. Sliding windows keep the caches of 1,024 responses to 25 GB
    on one card; full attention would take 85.
Result: not run.
Weights: gated on the Hugging Face hub; accept the licence there first.
Command: pfjax train --config=gemma3_1b_it --workdir=runs/gemma3_1b_it
"""

import ml_collections

import pfjax


def get_config() -> ml_collections.ConfigDict:
    c = pfjax.recipe("reasoning")
    c.model = "google/gemma-3-1b-it"
    c.alpha = 2.0
    return c

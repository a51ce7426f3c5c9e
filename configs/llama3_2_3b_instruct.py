r"""Llama-3.2-3B-Instruct, sharpened for reasoning at alpha = 2.

Hardware: not run yet; 8 x H100/H200 or v5p-16 should hold it (estimate).
Result: not run. Paper, mean of six benchmarks at avg@16: base 17.12, PowerFlow 22.88.
Command: pfjax train --config=llama3_2_3b_instruct --workdir=runs/llama3_2_3b_instruct
"""

import ml_collections

import pfjax


def get_config() -> ml_collections.ConfigDict:
    c = pfjax.recipe("reasoning")
    c.model = "meta-llama/Llama-3.2-3B-Instruct"
    c.alpha = 2.0
    return c

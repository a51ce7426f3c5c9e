r"""Qwen2.5-Math-1.5B, sharpened for reasoning at alpha = 4.

Hardware: not run yet; 4 x H100/H200 or v5p-8 should hold it (estimate).
Result: not run. Paper, mean of six benchmarks at avg@16: base 20.87, PowerFlow 34.30.
Command: pfjax train --config=qwen2_5_math_1_5b --workdir=runs/qwen2_5_math_1_5b
"""

import ml_collections

import pfjax


def get_config() -> ml_collections.ConfigDict:
    c = pfjax.recipe("reasoning")
    c.model = "Qwen/Qwen2.5-Math-1.5B"
    c.alpha = 4.0
    return c

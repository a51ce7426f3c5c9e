r"""Qwen2.5-Math-7B, sharpened for reasoning at alpha = 4.

Hardware: not run yet; 8 x H100/H200 or v5p-32 should hold it (estimate).
Result: not run. Paper, mean of six benchmarks at avg@16: base 24.95, PowerFlow 42.17.
Command: pfjax train --config=qwen2_5_math_7b --workdir=runs/qwen2_5_math_7b
"""

import ml_collections

import pfjax


def get_config() -> ml_collections.ConfigDict:
    c = pfjax.recipe("reasoning")
    c.model = "Qwen/Qwen2.5-Math-7B"
    c.alpha = 4.0
    return c

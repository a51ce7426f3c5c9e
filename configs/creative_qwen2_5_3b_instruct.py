r"""Qwen2.5-3B-Instruct, flattened for creative writing at alpha = 0.5.

Hardware: not run yet; 8 x H100/H200 or v5p-16 should hold it (estimate).
Result: not run. Paper, read off its figure, instruct to PowerFlow: quality .565 to .576, diversity .208 to .251.
Command: pfjax train --config=creative_qwen2_5_3b_instruct \
    --workdir=runs/creative_qwen2_5_3b_instruct --config.data.train=prompts.jsonl
"""

import ml_collections

import pfjax


def get_config() -> ml_collections.ConfigDict:
    c = pfjax.recipe("creative")
    c.model = "Qwen/Qwen2.5-3B-Instruct"
    return c

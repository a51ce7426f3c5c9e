r"""Qwen2.5-7B-Instruct, flattened for creative writing at alpha = 0.5.

Hardware: not run yet; 8 x H100/H200 or v5p-32 should hold it (estimate).
Result: not run. Paper, read off its figure, instruct to PowerFlow: quality .615 to .654, diversity .190 to .217.
Command: pfjax train --config=creative_qwen2_5_7b_instruct \
    --workdir=runs/creative_qwen2_5_7b_instruct --config.data.train=prompts.jsonl
"""

import ml_collections

import pfjax


def get_config() -> ml_collections.ConfigDict:
    c = pfjax.recipe("creative")
    c.model = "Qwen/Qwen2.5-7B-Instruct"
    return c

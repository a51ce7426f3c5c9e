r"""Qwen2.5-1.5B-Instruct, flattened for creative writing at alpha = 0.5.

Hardware: not run yet; 4 x H100/H200 or v5p-8 should hold it (estimate).
Result: not run. Paper, read off its figure, instruct to PowerFlow: quality .495 to .514, diversity .229 to .331.
Command: pfjax train --config=creative_qwen2_5_1_5b_instruct \
    --workdir=runs/creative_qwen2_5_1_5b_instruct --config.data.train=prompts.jsonl
"""

import ml_collections

import pfjax


def get_config() -> ml_collections.ConfigDict:
    c = pfjax.recipe("creative")
    c.model = "Qwen/Qwen2.5-1.5B-Instruct"
    return c

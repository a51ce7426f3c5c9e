r"""OLMo 2 1B Instruct, whose training data is known, sharpened for reasoning at alpha = 2.

Not in the paper; alpha as its other instruction-tuned model has it. Prompt and response
take all of the model's 4,096 positions.

Hardware: not run yet; `pfjax plan --config=olmo2_1b_instruct --topology=v5e:4x4` says what it takes.
Result: not run.
Command: pfjax train --config=olmo2_1b_instruct --workdir=runs/olmo2_1b_instruct
"""

import ml_collections

import pfjax


def get_config() -> ml_collections.ConfigDict:
    c = pfjax.recipe("reasoning")
    c.model = "allenai/OLMo-2-0425-1B-Instruct"
    c.alpha = 2.0
    return c

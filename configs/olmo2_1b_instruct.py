r"""OLMo 2 1B Instruct, whose training data is known, sharpened for reasoning at alpha = 2.

Not in the paper; alpha is the one it uses for Llama-3.2-3B-Instruct. Prompt and response
together fill the model's 4,096 positions.

Hardware: not run yet. `pfjax plan` (assuming 1,024 tokens per response), peak memory per device and
    shortest possible step, all compiled: h100:1 47.3 GiB of 72.8 and 49 s; h100:8 41.8 GiB and
    7.1 s; v5e:4x4 10.7 GiB of 15.75 and 24.7 s; v5p:2x2x2 54.3 GiB of 95.7 and 10.2 s. Its 16 key/value heads make caches large: one card holds
    64 samples at once.
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

r"""What the creative recipes share; choose one of them.

The base is the instruct model and there is no format term. The paper's 300 prompts for
poems, stories and jokes are not published: bring a file of prompts.
"""

import ml_collections

from pfjax.trainer import settings


def get_config() -> ml_collections.ConfigDict:
    c = settings.default_config()
    # The paper flattens all tokens; eta_cutoff leaves rare ones out (docs/limits.md).
    c.alpha = 0.5
    c.format_penalty = 0.0
    c.data.train = "prompts.jsonl"
    c.data.eval = ""
    c.data.max_prompt_tokens = 512  # chosen
    c.max_new_tokens = 1024  # chosen: prompts ask for about 250 words
    c.num_steps = 200  # chosen
    c.prompts_per_step = 32  # chosen
    c.samples_per_prompt = 16  # chosen
    c.optim.learning_rate = 1e-6  # chosen: as for reasoning
    c.pack_length = 2048  # chosen
    return c

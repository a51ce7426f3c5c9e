r"""What the reasoning recipes share; choose one of them, or set `model` and `alpha`.

Settings are the paper's (arXiv 2603.18363) where it gives them, else those of the
trainer it reports using; a value known from neither is marked "chosen".
"""

import ml_collections

from pfjax.trainer import settings


def get_config() -> ml_collections.ConfigDict:
    c = settings.default_config()
    # 18,000 filtered queries in the paper; the filter is not published, so all of them.
    c.data.train = "AI-MO/NuminaMath-CoT"
    c.data.eval = "HuggingFaceH4/MATH-500:test"
    c.data.suffix = (
        " Let's think step by step and output the final answer within \\boxed{}."
    )
    c.data.max_prompt_tokens = 1024
    c.max_new_tokens = 3072
    c.num_steps = 520  # chosen: where the paper's curves end
    c.prompts_per_step = 32  # chosen
    c.samples_per_prompt = 32  # chosen
    c.optim.learning_rate = 1e-6
    c.optim.weight_decay = 0.1
    c.optim.clip_norm = 1.0
    c.pack_length = 4096
    c.eval_every = 40
    c.eval_samples = 16
    return c

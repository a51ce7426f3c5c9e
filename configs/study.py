r"""A method of the study, here on the toy task: configs/study.py:METHOD.

Hardware: 1 CPU core, 2 GB. Takes about a minute.
Result: docs/study/README.md
Command: bash launch/local.sh --study
    (a single run: pfjax train --config=study:grpo --workdir=runs/grpo)
"""

import ml_collections

import pfjax


def get_config(method: str = "powerflow") -> ml_collections.ConfigDict:
    c = pfjax.recipe("smoke")
    c.objective = method
    c.behavior.base = 0.0  # so that all objectives may be compared
    c.updates_per_rollout, c.residual_clip = 1, 0.0
    # Answers are there for those that read them: grpo and flowrl.
    c.data.train = "pfjax/toy/train_answered.jsonl"
    c.optim.learning_rate, c.optim.log_z_learning_rate = 3e-4, 1e-2
    c.eval_every = 50
    c.checkpoint_every = 200
    c.keep_best = 0
    c.microbatch_size = 16
    c.match_prompts = 0  # the study lists all responses instead
    c.health_checks.action = "off"  # collapse is what is looked for
    c.update_from_flattened_dict(SETTINGS.get(method, {}))
    return c.lock()


_OFTEN = {"updates_per_rollout": 4, "optim.clip_norm": 0.5}
_HALF = {"behavior.base": 0.5, **_OFTEN}
_SHARPEN = {"objective": "powerflow", **_HALF, "residual_clip": 0.3}
_ENTROPY = {
    "objective": "grpo",
    "advantage": "group_mean",
    "loss_aggregation": "constant",
}
# For powerflow, tb_traj, self_distillation, grpo and empo what the search found best, or
# what is within its error of that (docs/study/README.md); the others were not searched.
# `residual_clip` was not either (docs/study/full.md).
SETTINGS: dict[str, dict[str, float | str]] = {
    "powerflow": _SHARPEN,
    "own_samples": {"objective": "powerflow"},
    "flatten_back": _SHARPEN,
    "tb_traj": _HALF,
    "grpo": {"optim.learning_rate": 1e-3},
    "empo": {"optim.learning_rate": 1e-4, "optim.schedule": "constant"},
    "subtb": _HALF,
    "flowrl": {"beta": 15.0},
    "intuitor": {"reward_kl": 0.1},
    "self_distillation": {
        "objective": "sft",
        **_OFTEN,
        "behavior.base": 1.0,
        "behavior.base_temperature": 0.25,  # 1 / alpha
    },
    "power_distillation": {"objective": "sft", "behavior.from_file": 1.0},
    "best_of_distillation": {"objective": "sft", "behavior.from_file": 1.0},
    "entropy_sequence": {**_ENTROPY, "reward": "sequence_log_prob"},
    "entropy_token": {**_ENTROPY, "reward": "negative_entropy"},
    "random": {"objective": "grpo", "reward": "random"},
    "alpha_0.5": {"objective": "powerflow", **_HALF, "updates_per_rollout": 1},
    "alpha_2": _SHARPEN,
    "alpha_8": _SHARPEN,
}

r"""One run of the study on the toy task: configs/study.py:OBJECTIVE.

Hardware: 1 CPU core, 2 GB. Takes about a minute.
Result: docs/study/README.md
Command: bash launch/local.sh --study
    (a single run: pfjax train --config=study:grpo --workdir=runs/grpo)
"""

import ml_collections

import pfjax


def get_config(objective: str = "powerflow") -> ml_collections.ConfigDict:
    c = pfjax.recipe("smoke")
    c.objective = objective
    # Answers are there for those that read them: grpo and flowrl.
    c.data.train = "pfjax/toy/train_answered.jsonl"
    c.num_steps, c.prompts_per_step = 200, 32
    c.behavior.base = 0.0  # so that all objectives may be compared
    c.optim.schedule = "constant"
    c.eval_every = 25
    c.eval_samples = 16
    c.checkpoint_every = 200
    c.keep_best = 0
    c.health_checks.action = "off"  # collapse is what is looked for
    c.update_from_flattened_dict(SETTINGS.get(objective, {}))
    return c.lock()


# What a search of eight trials for each found best: docs/study/search.json.
SETTINGS: dict[str, dict[str, float | str]] = {
    "powerflow": {
        "optim.learning_rate": 3e-4,
        "optim.clip_norm": 0.05,
        "log_z": "group",
    },
    "tb_traj": {
        "optim.learning_rate": 3e-4,
        "optim.clip_norm": 0.05,
        "optim.log_z_learning_rate": 0.03,
    },
    "tb_token": {"optim.learning_rate": 1e-3, "optim.clip_norm": 0.05},
    "rl_traj": {"optim.learning_rate": 1.73e-4, "optim.clip_norm": 0.05},
    "rl_token": {"optim.learning_rate": 3e-4, "optim.clip_norm": 0.05},
    "subtb": {"optim.learning_rate": 5.77e-5, "optim.clip_norm": 1.0},
    "flowrl": {"beta": 15.0, "optim.learning_rate": 1e-3, "optim.clip_norm": 1.0},
    "grpo": {"optim.learning_rate": 3e-4, "optim.clip_norm": 0.05},
    "ttrl": {"optim.learning_rate": 3e-4, "optim.clip_norm": 0.05},
    "empo": {"optim.learning_rate": 3e-4, "optim.clip_norm": 0.05},
    "intuitor": {
        "optim.learning_rate": 1e-4,
        "optim.clip_norm": 0.05,
        "reward_kl": 0.1,
    },
}

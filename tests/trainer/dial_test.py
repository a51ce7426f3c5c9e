"""One policy for every alpha: against the exact targets of a model whose responses are
listed, its base, and itself at one alpha."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pfjax
from configs import default
from pfjax.batch import PackShape, pack
from pfjax.infra import dataset_io
from pfjax.model import dial, hf, log_probs, lora
from pfjax.model.transformer import Policy
from pfjax.sampler import engine
from pfjax.trainer import loop
from tests.conftest import (
    all_responses,
    length_aware_target,
    power_target,
    total_variation,
    use_one_device,
)

PROMPT = "a b"
RANGE = (0.25, 8.0)
RESPONSES = all_responses(vocab=4, stop=1, max_tokens=3)
LENGTH = np.array([len(y) for y in RESPONSES])


@pytest.fixture
def config(enumerable_folder, tmp_path, monkeypatch):
    use_one_device(monkeypatch)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": PROMPT, "answer": "1"}) + "\n")
    c = default.get_config()
    c.model, c.data.train, c.data.eval = str(enumerable_folder), str(prompts), ""
    c.alpha_range, c.alpha, c.lora.rank, c.format_penalty = "0.25,8", 2.0, 8, 0.0
    c.prompts_per_step, c.samples_per_prompt, c.max_new_tokens = 8, 16, 3
    c.microbatch_size, c.pack_length, c.dtype = 64, 64, "float32"
    c.mesh.data, c.mesh.fsdp = 1, 1
    c.optim.learning_rate, c.optim.log_z_learning_rate = 3e-3, 3e-2
    c.optim.weight_decay = 0.0
    c.num_steps, c.checkpoint_every, c.log_every = 4, 2, 1000
    c.health_checks.action, c.match_prompts = "off", 0
    return c


@pytest.fixture
def policy(tiny_policy) -> Policy:
    """Random weights, adapters and scales, for every alpha."""
    fields = {"lora_rank": 4, "lora_alpha": 8.0, "alpha_range": RANGE}
    model = dataclasses.replace(tiny_policy.config, **fields)
    adapters = lora.init_params(model, jax.random.key(2))
    noise = lambda k, x: x + 0.2 * jax.random.normal(k, x.shape)
    keys = jax.random.split(jax.random.key(3), len(adapters["blocks"]))
    blocks = {n: noise(k, x) for k, (n, x) in zip(keys, adapters["blocks"].items())}
    return Policy(model, lora.join(tiny_policy.params, {"blocks": blocks}))


def log_density(policy) -> np.ndarray:
    """log p of every response to the prompt."""
    scores = log_probs.score(policy, [[2, 3, *y] for y in RESPONSES], [2] * len(RESPONSES))
    return np.array([x.sum() for x in scores])


def try_training(config, folder):
    loop.train_and_evaluate(config, str(folder))
    base = log_density(hf.load(config.model))
    whole = pfjax.load(folder / "dial")
    out = {}
    for alpha in (0.25, 0.4, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0, 8.0):
        found = np.exp(log_density(pfjax.at_alpha(whole, alpha)))
        if config.objective == "tb_traj":
            target, _ = power_target(base, alpha)
        else:
            target, _ = length_aware_target(base, LENGTH, alpha)
        out[alpha] = total_variation(found, target)
    return out

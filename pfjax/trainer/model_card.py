"""README of an exported model."""

from typing import Any


def model_card(config: dict[str, Any], history: list[dict[str, Any]]) -> str:
    """What it is, how it was made, what was measured."""
    model, alpha = config["model"], f"alpha {config['alpha']:g}"
    steps = history[-1]["step"] if history else 0
    prompts, samples = config["prompts_per_step"], config["samples_per_prompt"]
    card = f"""---
base_model: {model}
library_name: transformers
tags: [powerflow, pfjax]
---

# {model} toward its power distribution, {alpha}

Fine-tuned without labels with [PowerFlow](https://arxiv.org/abs/2603.18363)
by pfjax.

- base model: {model}
- objective: {config["objective"]}, {alpha}
- data: {config["data"]["train"]}
- steps: {steps} of {prompts} prompts x {samples} samples, seed {config["seed"]}
"""
    evaluated = [row for row in history if any(k.startswith("eval/") for k in row)]
    if evaluated:
        first, last = evaluated[0], evaluated[-1]
        card += f"""- evaluated on: {config["data"]["eval"]}

| metric | step {first["step"]} | step {last["step"]} |
|---|---|---|
"""
        for key in (k for k in first if k.startswith("eval/")):
            name = key.removeprefix("eval/")
            card += f"| {name} | {first[key]:.3f} | {last[key]:.3f} |\n"
    return card

"""README of an exported model."""

from typing import Any


def model_card(config: dict[str, Any], history: list[dict[str, Any]]) -> str:
    """README of an exported model: what it is, how it was made, what was measured."""
    evaluated = [row for row in history if any(k.startswith("eval/") for k in row)]
    steps = history[-1]["step"] if history else 0
    batch = (
        f"{config['prompts_per_step']} prompts x {config['samples_per_prompt']} samples"
    )
    lines = [
        "---",
        f"base_model: {config['model']}",
        "library_name: transformers",
        "tags: [powerflow, pfjax]",
        "---",
        "",
        f"# {config['model']} toward its power distribution, alpha {config['alpha']:g}",
        "",
        "Fine-tuned without labels with [PowerFlow](https://arxiv.org/abs/2603.18363)",
        "by pfjax.",
        "",
        f"- base model: {config['model']}",
        f"- objective: {config['objective']}, alpha {config['alpha']:g}",
        f"- data: {config['data']['train']}",
        f"- steps: {steps} of {batch}, seed {config['seed']}",
    ]
    if evaluated:
        first, last = evaluated[0], evaluated[-1]
        lines += [
            f"- evaluated on: {config['data']['eval']}",
            "",
            f"| metric | step {first['step']} | step {last['step']} |",
            "|---|---|---|",
        ]
        lines += [
            f"| {k.removeprefix('eval/')} | {first[k]:.3f} | {last[k]:.3f} |"
            for k in first
            if k.startswith("eval/")
        ]
    return "\n".join(lines) + "\n"

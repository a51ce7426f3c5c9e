"""The user's mistakes, found before anything heavy starts; and the run's folder."""

import difflib
import importlib.metadata
import json
import operator
from typing import Any

import jax
import ml_collections
from etils import epath

from pfjax import objectives
from pfjax.model import attention, transformer
from pfjax.trainer import checkpoint

# A run may be continued with these changed: they do not touch what is computed (a
# mesh does, by rounding only).
MAY_CHANGE = (
    "num_steps",
    "eval_every",
    "eval_samples",
    "log_every",
    "checkpoint_every",
    "wandb_project",
    "mesh",
    "rollout_slots",
    "eval_sampling",
    "profile_steps",
    "keep_best",
    "best_metric",
    "guards",
)
_POSITIVE = (
    "alpha",
    "num_steps",
    "prompts_per_step",
    "samples_per_prompt",
    "max_new_tokens",
    "temperature",
    "updates_per_rollout",
    "rows",
    "row_length",
    "eval_every",
    "eval_samples",
    "log_every",
    "checkpoint_every",
    "guards.patience",
    "guards.step_seconds",
)


_WHY_NOT_GREEDY = (
    "; training needs draws from the whole distribution, greedy decoding is for "
    "evaluation: --config.eval_sampling.temperature=0"
)


def check_config(c: ml_collections.FrozenConfigDict) -> None:
    """Raises ValueError for values that cannot be meant."""
    for name in _POSITIVE:
        value = operator.attrgetter(name)(c)
        if not value > 0:
            why = _WHY_NOT_GREEDY if name == "temperature" else ""
            raise ValueError(f"--config.{name}={value}: must be positive{why}")
    choices = {
        "objective": sorted(objectives.OBJECTIVES),
        "log_z": ["group", "head"],
        "dtype": ["bfloat16", "float32"],
        "attention": ["auto", *attention.BACKENDS],
        "remat": list(transformer.REMAT),
        "base_memory": ["device", "host"],
        "optim.mu_dtype": ["bfloat16", "float32"],
        "guards.action": ["off", "stop", "warn"],
    }
    for name, allowed in choices.items():
        value = operator.attrgetter(name)(c)
        if value not in allowed:
            near = difflib.get_close_matches(str(value), allowed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"--config.{name}={value}: must be one of {allowed}{hint}")
    source = objectives.log_z_of(c.objective, c.log_z)
    reward = objectives.OBJECTIVES[c.objective].reward
    if (source == "group" or reward) and c.samples_per_prompt < 2:
        raise ValueError(
            f"--config.objective={c.objective} with --config.log_z={c.log_z} averages "
            "over the samples of a prompt: samples_per_prompt must be at least 2, got "
            f"{c.samples_per_prompt}"
        )
    steps = c.profile_steps
    if len(steps) != 2 or not 0 <= steps[0] <= steps[1]:
        raise ValueError(
            f"--config.profile_steps={steps}: must be the first step to trace and the "
            "first after it, as in (10, 13)"
        )
    if c.lora.rank and c.base_memory == "host":
        raise ValueError(
            "--config.base_memory=host: with adapters the base is the policy's own "
            "weights and has to stay on the devices"
        )
    if c.lora.rank < 0:
        raise ValueError(f"--config.lora.rank={c.lora.rank}: must not be negative")
    if c.updates_per_rollout > c.prompts_per_step:
        raise ValueError(
            f"--config.updates_per_rollout={c.updates_per_rollout} exceeds "
            f"prompts_per_step={c.prompts_per_step}"
        )


def check_answers(
    c: ml_collections.FrozenConfigDict, answers: list[str | None]
) -> None:
    """Raises ValueError if the objective grades answers and the prompts have none."""
    missing = sum(a is None for a in answers)
    if objectives.OBJECTIVES[c.objective].reward == "correct" and missing:
        free = [k for k, o in objectives.OBJECTIVES.items() if o.reward != "correct"]
        raise ValueError(
            f"--config.objective={c.objective} grades responses, but {missing} of "
            f"{len(answers)} prompts of {c.data.train} have no answer; objectives that "
            f"need none: {', '.join(free)}"
        )


def check_lengths(
    c: ml_collections.FrozenConfigDict, longest_prompt: int, max_positions: int
) -> None:
    """Raises ValueError if a trajectory could exceed a row or the model."""
    need = longest_prompt + c.max_new_tokens
    parts = f"longest prompt {longest_prompt} + max_new_tokens {c.max_new_tokens}"
    if need > c.row_length:
        raise ValueError(
            f"--config.row_length={c.row_length} is too short for {parts} = {need}"
        )
    if need > max_positions:
        raise ValueError(
            f"{parts} = {need} exceeds the model's {max_positions} positions; lower "
            "--config.max_new_tokens or --config.data.max_prompt_tokens"
        )


def check_workdir(c: ml_collections.FrozenConfigDict, folder: epath.Path) -> None:
    """Raises ValueError if the folder holds a run with another config."""
    path = folder / "config.json"
    has_steps = any((folder / "checkpoints").glob("[0-9]*"))
    if not (path.exists() and has_steps):  # nothing that would be continued
        return
    old = what_decides(json.loads(path.read_text())["config"])
    changed = checkpoint.differences(old, what_decides(json.loads(c.to_json())))
    if changed:
        shown = "\n  ".join(changed)
        raise ValueError(
            f"{folder} holds a run with another config:\n  {shown}\n"
            "choose another --workdir, or restore these values to continue it"
        )


def what_decides(config: dict[str, Any]) -> dict[str, Any]:
    """The values of a config that a continued run must not change, by name."""
    flat = _flatten(config)
    return {k: v for k, v in flat.items() if k.split(".")[0] not in MAY_CHANGE}


def write_config(c: ml_collections.FrozenConfigDict, folder: epath.Path) -> None:
    """Writes `config.json`: every value, and the versions that computed with it."""
    packages = ("pfjax", "jax", "flax", "optax", "orbax-checkpoint", "transformers")
    versions = {p: importlib.metadata.version(p) for p in packages}
    versions["backend"] = jax.devices()[0].device_kind
    out = {"config": json.loads(c.to_json()), "versions": versions}
    tmp = folder / ".config.json.tmp"
    tmp.write_text(json.dumps(out, indent=2) + "\n")
    tmp.replace(folder / "config.json")


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            out |= _flatten(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = value
    return out

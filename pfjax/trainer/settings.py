"""Every setting of a run, declared once: its default, what it means, what it may be, and
whether a run may be continued with another value.

`configs/default.py` makes the config from here, recipes change what differs, `check`
refuses invalid values. A setting that an older run did not know has its default there.
Values that the paper leaves open are marked "chosen". Loaded while flags are read, before
JAX: imports nothing heavy.
"""

import dataclasses
import difflib
import importlib.metadata
import json
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict, FrozenConfigDict

from pfjax.infra import storage
from pfjax.sampler.options import TokenFilters


def _names(module: str, table: str) -> Callable[[], list[str]]:
    """The keys of a table of a module that is loaded when they are asked for."""
    return lambda: list(getattr(importlib.import_module(module), table))


class Setting(NamedTuple):
    default: Any
    about: str
    choices: tuple[str, ...] | Callable[[], Iterable[str]] | None = None
    is_positive: bool = False
    may_change: bool = False  # when a run is continued


_DTYPES = ("bfloat16", "float32")
_ATTENTION = lambda: ["auto", *_names("pfjax.model.attention", "BACKENDS")()]


def _positive(default: Any, about: str) -> Setting:
    return Setting(default, about, is_positive=True)


# Fixed when a run is continued, so that it ends with the same bits.
_DECIDING: dict[str, Setting] = {
    # What is trained.
    "model": Setting("pfjax/toy", "Hugging Face folder or hub id; pfjax/toy: built in"),
    "objective": Setting(
        "powerflow", "see pfjax/objectives.py", _names("pfjax.objectives", "OBJECTIVES")
    ),
    "alpha": _positive(4.0, "> 1 sharpens, < 1 flattens"),
    "format_penalty": Setting(-0.5, r"psi without a \boxed{}, nats per token; 0: off"),
    "log_z": Setting(
        "head",
        "head learns log Z' from the prompt, group averages its samples; rl_traj and "
        "rl_token always average, subtb and rewards of answers have none",
        ("head", "group"),
    ),
    # Prompts: .jsonl or .parquet file, hub name[:split], or pfjax/toy/<file>.
    "data.train": Setting("pfjax/toy/train.jsonl", "prompts to train on"),
    "data.eval": Setting("pfjax/toy/eval.jsonl", 'held out; "" for no evaluation'),
    "data.target": Setting(
        "", "samples by pfjax.sample --method=smc, for bounds (eval/elbo, eval/eubo)"
    ),
    "data.chat_template_kwargs": Setting(
        "", 'arguments of the chat template, JSON: {"enable_thinking": false}'
    ),
    "data.suffix": Setting("", "added to the last message of each prompt, as it is"),
    "data.max_prompt_tokens": Setting(1024, "longer prompts are skipped"),
    # A step: two batch numbers; the rest follows from them.
    "prompts_per_step": _positive(32, "prompts per rollout (chosen)"),
    "samples_per_prompt": _positive(32, "samples of each (chosen)"),
    "max_new_tokens": _positive(3072, "a response is cut there"),
    "temperature": _positive(1.0, "of sampling in training"),
    "updates_per_rollout": _positive(1, "minibatches per step; 1 is exactly on policy"),
    "seed": Setting(0, "of everything random"),
    # Ratios pi / pi_old, when updates_per_rollout > 1: of sequences (balance, EMPO) or of
    # tokens (GRPO and its kin).
    "clip_low": Setting(0.8, "ratios are clipped to [clip_low, clip_high]"),
    "clip_high": Setting(1.28, "see clip_low"),
    "mask_clipped_tokens": Setting(
        False, "as the paper's trainer: leave tokens out whose ratio is outside"
    ),
    # Baselines only.
    "flowrl_beta": Setting(15.0, "of the advantage in FlowRL's target"),
    "reward_kl": Setting(0.0, "of KL to the base per token: grpo and its kin, empo"),
    "optim.learning_rate": Setting(1e-6, "of the policy, constant after the warm-up"),
    "optim.log_z_learning_rate": Setting(1e-3, "nats log Z' moves per step (chosen)"),
    "optim.warmup_steps": Setting(0, "steps of linear warm-up"),
    "optim.weight_decay": Setting(0.1, "of matrices"),
    "optim.clip_norm": Setting(1.0, "of the gradient, each group on its own"),
    "optim.mu_dtype": Setting(
        "float32", "Adam's first moment; bfloat16 saves a sixth of the state", _DTYPES
    ),
    # Low-rank adapters instead of all weights; policy and base then share theirs.
    "lora.rank": Setting(0, "0 trains all weights"),
    "lora.alpha": Setting(32.0, "chosen; adapters are scaled by alpha / rank"),
    # Shape of the packed micro-batches, on each of the mesh.data * mesh.fsdp shards.
    "microbatch_size": _positive(1, "rows per micro-batch on each data-parallel shard"),
    "pack_length": _positive(4096, "tokens per row; holds any prompt and response"),
    "dtype": Setting("bfloat16", "of the computation; weights are float32", _DTYPES),
    "offload_ref": Setting(False, "frozen base in host memory between its passes"),
    "attention": Setting(
        "auto", "back end over packed rows; see pfjax/model/attention.py", _ATTENTION
    ),
    "remat": Setting(
        "full",
        "rematerialisation in the backward pass: all of a layer (full), all but attention "
        "(attention), all but products with weights (dots), none",
        _names("pfjax.model.transformer", "REMAT"),
    ),
}

# What a run may be continued with another value of.
_FREE: dict[str, Setting] = {
    "num_steps": _positive(500, "steps in all"),
    "rollout_slots": Setting(0, "samples decoded at once; 0: as many as memory holds"),
    # Devices; one may be -1, which takes what is left. A mesh moves results by rounding
    # only.
    "mesh.data": Setting(1, "whole copies of the weights"),
    "mesh.fsdp": Setting(-1, "devices that weights are split over"),
    "mesh.tensor": Setting(1, "devices that share each matrix"),
    # Evaluation, at step 0, every eval_every steps, and after the last.
    "eval_every": _positive(40, "steps between evaluations"),
    "eval_samples": _positive(16, "k of avg@k"),
    "eval_sampling.temperature": Setting(1.0, "0 is greedy"),
    **{
        f"eval_sampling.{x.name}": Setting(x.default, x.metadata["help"])
        for x in dataclasses.fields(TokenFilters)
    },
    "eval_sampling.stop_strings": Setting((), "texts that end a response"),
    # Prompts are fingerprinted as encoded, so that another time is noticed.
    "data.clock": Setting(
        "", 'time that chat templates are told, ISO 8601; "" for that of the start'
    ),
    # Records.
    "log_every": _positive(1, "steps between lines when stderr is no terminal"),
    "checkpoint_every": _positive(40, "steps between checkpoints"),
    "keep_best": Setting(1, "checkpoints kept beside the latest two: the best"),
    "best_metric": Setting("eval/avg", "metric to maximise, without its @k"),
    "profile_steps": Setting((0, 0), "traced by JAX's profiler: first, first after"),
    "wandb_project": Setting("", 'needs the extra wandb; "" for none'),
    # What is watched during a run. A loss that is not finite always stops it.
    "health_checks.action": Setting(
        "stop", "when one of these has lasted", ("stop", "warn", "off")
    ),
    "health_checks.patience": _positive(10, "steps that a symptom must last"),
    "health_checks.length_floor": Setting(0.25, "mean length, a part of the start's"),
    "health_checks.truncated_ceiling": Setting(0.99, "fraction of responses cut"),
    "health_checks.rollout_kl": Setting(0.05, "sampler to scorer, nats per token"),
    "health_checks.step_seconds": _positive(3600.0, "then a stuck step tells where"),
}

SETTINGS = _DECIDING | {k: s._replace(may_change=True) for k, s in _FREE.items()}


def default_config() -> ConfigDict:
    """A config of all defaults, locked."""
    tree: dict[str, Any] = {}
    for name, setting in SETTINGS.items():
        group, _, last = name.rpartition(".")
        at = tree.setdefault(group, {}) if group else tree
        at[last] = setting.default
    return ConfigDict(tree).lock()


_WHY_NOT_GREEDY = (
    "; training needs samples of the whole distribution, greedy decoding is for "
    "evaluation: --config.eval_sampling.temperature=0"
)


def check(c: FrozenConfigDict) -> None:
    """Raises ValueError for invalid values."""
    for name, setting in SETTINGS.items():
        value, choices = operator.attrgetter(name)(c), setting.choices
        if setting.is_positive and not value > 0:
            why = _WHY_NOT_GREEDY if name == "temperature" else ""
            raise ValueError(f"--config.{name}={value}: must be positive{why}")
        allowed = sorted(choices() if callable(choices) else choices or [value])
        if value not in allowed:
            near = difflib.get_close_matches(str(value), allowed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"--config.{name}={value}: must be one of {allowed}{hint}")
    steps = c.profile_steps
    if len(steps) != 2 or not 0 <= steps[0] <= steps[1]:
        raise ValueError(
            f"--config.profile_steps={steps}: must be the first step to trace and the first "
            "after it, as in (10, 13)"
        )
    if c.lora.rank and c.offload_ref:
        raise ValueError(
            "--config.offload_ref=True: with adapters the base is the policy's own weights "
            "and has to stay on the devices"
        )
    if c.lora.rank < 0:
        raise ValueError(f"--config.lora.rank={c.lora.rank}: must not be negative")
    if c.updates_per_rollout > c.prompts_per_step:
        raise ValueError(
            f"--config.updates_per_rollout={c.updates_per_rollout} exceeds "
            f"prompts_per_step={c.prompts_per_step}"
        )
    from pfjax.objectives import ObjectiveConfig

    objective = ObjectiveConfig(c.objective, log_z=c.log_z)
    has_groups = objective.log_z_source == "group" or objective.kind.reward
    if has_groups and c.samples_per_prompt < 2:
        raise ValueError(
            f"--config.objective={c.objective} with --config.log_z={c.log_z} averages over "
            "the samples of a prompt: samples_per_prompt must be at least 2, got "
            f"{c.samples_per_prompt}"
        )


def check_answers(c: FrozenConfigDict, answers: list[str | None]) -> None:
    """Raises ValueError if the objective grades answers and the prompts have none."""
    from pfjax.objectives import OBJECTIVES

    missing = answers.count(None)
    free = [k for k, o in OBJECTIVES.items() if o.reward != "correct"]
    if c.objective not in free and missing > 0:
        raise ValueError(
            f"--config.objective={c.objective} grades responses, but {missing} of "
            f"{len(answers)} prompts of {c.data.train} have no answer; objectives that "
            f"need none: {', '.join(free)}"
        )


def check_lengths(c: FrozenConfigDict, longest_prompt: int, max_positions: int) -> None:
    """Raises ValueError if a trajectory could exceed a row or the model."""
    need = longest_prompt + c.max_new_tokens
    new = f"max_new_tokens {c.max_new_tokens}"
    total = f"longest prompt {longest_prompt} + {new} = {need}"
    if need > c.pack_length:
        text = f"--config.pack_length={c.pack_length} is too short for {total}"
        raise ValueError(text)
    if need > max_positions:
        raise ValueError(
            f"{total} exceeds the model's {max_positions} positions; lower "
            "--config.max_new_tokens or --config.data.max_prompt_tokens"
        )


class OtherRun(ValueError):
    """A folder belongs to another model or config."""


def check_workdir(c: FrozenConfigDict, folder: epath.Path) -> None:
    """Raises OtherRun if the folder holds a run with another config."""
    path = folder / "config.json"
    if not path.exists() or not any((folder / "checkpoints").glob("[0-9]*")):
        return  # nothing that would be continued
    old, new = json.loads(path.read_text())["config"], json.loads(c.to_json())
    said = f"{folder} holds a run with another config"
    check_same(said, identity(old), identity(new))


def with_clock(c: FrozenConfigDict, folder: epath.Path) -> FrozenConfigDict:
    """The config with the time that the chat template of its model is told, if it asks:
    that of a run found in the folder, else now. All processes have to call it."""
    from pfjax.infra import distributed
    from pfjax.model import tokenizer

    if c.data.clock or not tokenizer.asks_for_time(c.model):
        return c
    path = folder / "config.json"
    old = json.loads(path.read_text())["config"] if path.exists() else {}
    clock = old.get("data", {}).get("clock", "") or tokenizer.now()
    out = ConfigDict(c)
    out.data.clock = distributed.text_from_first(clock)
    return FrozenConfigDict(out)


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """The values of a `config.json`, by name, that a continued run must not change."""
    from flax import traverse_util

    flat = traverse_util.flatten_dict(config, sep=".")
    free = {name for name, setting in SETTINGS.items() if setting.may_change}
    return {name: value for name, value in flat.items() if name not in free}


def check_same(what: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raises OtherRun with what differs between two identities."""
    if different := differences(old, new):
        shown = "\n  ".join(different)
        raise OtherRun(
            f"{what}:\n  {shown}\n"
            "choose another --workdir, or restore these values to continue it"
        )


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`name: old -> new` of what differs; a setting that is absent has its default, and of
    other things an older run may know less."""
    default = {k: s.default for k, s in SETTINGS.items()}
    names = sorted(old.keys() | (new.keys() & default.keys()))
    value = lambda values, k: values.get(k, default.get(k, "(absent)"))
    pairs = [(k, value(old, k), value(new, k)) for k in names]
    return [f"{k}: {a} -> {b}" for k, a, b in pairs if a != b]


def write_config(c: FrozenConfigDict, folder: epath.Path) -> None:
    """Writes `config.json`: every value, and the versions that computed with it."""
    import jax

    import pfjax

    packages = ("jax", "flax", "optax", "orbax-checkpoint", "transformers")
    versions = {
        "pfjax": pfjax.__version__,  # known without being installed
        **{p: importlib.metadata.version(p) for p in packages},
        "backend": jax.devices()[0].device_kind,
    }
    out = {"config": json.loads(c.to_json()), "versions": versions}
    storage.write_text(folder / "config.json", json.dumps(out, indent=2) + "\n")

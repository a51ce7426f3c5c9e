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
import importlib.util
import json
import math
import operator
import pathlib
import traceback
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict, FrozenConfigDict

from pfjax.infra import storage
from pfjax.sampler.options import TokenFilters, token_filters


def _names(module: str, table: str) -> Callable[[], list[str]]:
    """The keys of a table of a module that is loaded when they are asked for."""
    return lambda: list(getattr(importlib.import_module(module), table))


class Setting(NamedTuple):
    """A value, what it means, and what it may be: a number has bounds."""

    default: Any
    about: str
    choices: tuple[str, ...] | Callable[[], Iterable[str]] | None = None
    at_least: Real | None = None
    above: Real | None = None
    at_most: Real | None = None
    may_change: bool = False  # when a run is continued

    def bounds(self) -> str:
        """What a number may be, in words: "positive", "at least 0, at most 1"."""
        if (self.above, self.at_most) == (0, None):
            return "positive"
        limits = {
            "at least": self.at_least,
            "above": self.above,
            "at most": self.at_most,
        }
        return ", ".join(f"{k} {v:g}" for k, v in limits.items() if v is not None)

    def allows(self, number: Real) -> bool:
        """Whether a number is finite and within the bounds."""
        return (
            math.isfinite(number)
            and (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
        )


_DTYPES = ("bfloat16", "float32")
_ATTENTION = lambda: ["auto", *_names("pfjax.model.attention", "BACKENDS")()]


def _positive(default: Any, about: str) -> Setting:
    return Setting(default, about, above=0)


def _not_negative(default: Any, about: str, at_most: Real | None = None) -> Setting:
    return Setting(default, about, at_least=0, at_most=at_most)


# Fixed when a run is continued, so that it ends with the same bits.
_DECIDING: dict[str, Setting] = {
    # What is trained.
    "model": Setting(
        "pfjax/toy",
        "base model: Hugging Face folder or hub id; pfjax/toy ships with pfjax",
    ),
    "base": Setting(
        "",
        'checkpoint whose power is the target, of the same tokenizer; "" for that of model',
    ),
    "objective": Setting(
        "powerflow",
        "what is trained; formulas are in pfjax/objectives.py",
        _names("pfjax.objectives", "OBJECTIVES"),
    ),
    "alpha": _positive(
        4.0, "power of the base distribution: > 1 sharpens, < 1 flattens"
    ),
    "beta": _not_negative(
        0.0, "weight of the reward in the target p_0^alpha e^{beta r}, in nats"
    ),
    "reward": Setting(
        "",
        "accuracy, majority, cluster, self_certainty, format, length, compiles_python, or "
        "a function FILE.py:NAME; several with weights: 'accuracy, 0.1 * mine.py:brief'; "
        '"" for the objective\'s own',
    ),
    "reward_per": Setting(
        "response",
        "whether beta r counts once per response or per token, in length-aware targets",
        ("response", "token"),
    ),
    "divergence": _not_negative(
        1.0,
        "order of the loss of the balance: 1 squares the residual (reverse KL), 0 covers "
        "modes (forward KL)",
    ),
    "format_penalty": Setting(
        -0.5,
        r"psi of a response without \boxed{}, nats per token; 0 turns it off",
        at_most=0,
    ),
    "log_z": Setting(
        "head",
        "head learns log Z' from the prompt, group averages its samples; rl_traj and "
        "rl_token always average, subtb and rewards of answers have none",
        ("head", "group"),
    ),
    # Prompts: .jsonl or .parquet file, hub name[:split], or pfjax/toy/<file>.
    "data.train": Setting(
        "pfjax/toy/train.jsonl",
        "prompts to train on: a file, a hub name[:split], or pfjax/toy/<file>",
    ),
    "data.prompt_field": Setting(
        "",
        "column of the prompts, in the files that have it; else prompt, problem, question",
    ),
    "data.answer_field": Setting(
        "", "column of the answers, in the files that have it; else answer and its kin"
    ),
    "data.target": Setting(
        "",
        "samples from pfjax sample --method=smc, for the bounds eval/elbo and eval/eubo",
    ),
    "data.chat_template_kwargs": Setting(
        "", 'arguments of the chat template, JSON: {"enable_thinking": false}'
    ),
    "data.suffix": Setting("", "text appended to the last message of each prompt"),
    "data.max_prompt_tokens": _positive(1024, "prompts longer than this are skipped"),
    # A step: two batch numbers; the rest follows from them.
    "prompts_per_step": _positive(32, "prompts per rollout (chosen)"),
    "samples_per_prompt": _positive(32, "samples per prompt (chosen)"),
    "max_new_tokens": _positive(3072, "most tokens of a response; it is cut there"),
    "temperature": _positive(1.0, "sampling temperature in training"),
    "updates_per_rollout": _positive(
        1, "minibatches per rollout, an update each; 1 is exactly on policy"
    ),
    "seed": _not_negative(0, "seed of everything random"),
    # Ratios pi / pi_old, when updates_per_rollout > 1: of sequences (balance, EMPO) or of
    # tokens (GRPO and its kin).
    "clip_low": _not_negative(
        0.8, "importance ratios are clipped to [clip_low, clip_high]"
    ),
    "clip_high": _positive(1.28, "upper end of the clip range, see clip_low"),
    "mask_clipped_tokens": Setting(
        False,
        "leave out tokens whose ratio is outside the clip range, as the paper's trainer",
    ),
    # Baselines only.
    "reward_kl": _not_negative(
        0.0, "coefficient of the KL to the base per token: grpo and its kin, empo"
    ),
    "optim.learning_rate": _not_negative(
        1e-6, "learning rate of the policy, after the warm-up", at_most=1
    ),
    "optim.schedule": Setting(
        "constant",
        "learning rate of the policy after the warm-up; cosine and linear reach 0 after "
        "num_steps, which a continued run must then not change",
        ("constant", "cosine", "linear"),
    ),
    "optim.log_z_learning_rate": _not_negative(
        1e-3, "learning rate of log Z', in nats per step (chosen)"
    ),
    "optim.warmup_steps": _not_negative(0, "steps of linear warm-up"),
    "optim.weight_decay": _not_negative(0.1, "AdamW's weight decay, of matrices only"),
    "optim.clip_norm": _positive(
        1.0, "largest norm of the gradient: policy and log Z' head apart"
    ),
    "optim.mu_dtype": Setting(
        "float32",
        "type of Adam's first moment; bfloat16 saves a sixth of the state",
        _DTYPES,
    ),
    # Low-rank adapters instead of all weights; policy and base then share theirs.
    "lora.rank": _not_negative(0, "rank of low-rank adapters; 0 trains all weights"),
    "lora.alpha": _positive(32.0, "adapters are scaled by alpha / rank (chosen)"),
    "lora.targets": Setting(
        "all-linear",
        "projections with adapters, by peft's names: q_proj,k_proj,v_proj,o_proj,"
        "gate_proj,up_proj,down_proj or some of them",
    ),
    "lora.dropout": Setting(
        0.0,
        "fraction of the adapters' inputs dropped in updates, never in sampling: guards "
        "few prompts against overfitting, but the policy ends near the target, not at it",
        at_least=0,
        at_most=0.9,
    ),
    "lora.init_from": Setting(
        "",
        "adapter to start from, a folder or hub id in peft's format, which decides rank, "
        "alpha and targets; the base, and so the target, stays the model without it",
    ),
    # Shape of the packed micro-batches, on each of the mesh.data * mesh.fsdp shards.
    "microbatch_size": _positive(1, "rows per micro-batch on each data-parallel shard"),
    "pack_length": _positive(4096, "tokens per row; holds any prompt and response"),
    "dtype": Setting(
        "bfloat16", "type of the computation; trained weights are float32", _DTYPES
    ),
    "offload_ref": Setting(
        False, "keep the frozen base in host memory between its passes"
    ),
    "attention": Setting(
        "auto",
        "attention back end over packed rows, see pfjax/model/attention.py",
        _ATTENTION,
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
    "num_steps": _positive(500, "training steps in all"),
    "reward_seconds": _positive(10.0, "wall time of a reward function per response"),
    "reward_workers": _positive(1, "processes per reward function"),
    "rollout_slots": _not_negative(
        0, "samples decoded at once; 0 means as many as memory holds"
    ),
    # Devices; one may be -1, which takes what is left. A mesh moves results by rounding
    # only.
    "mesh.data": Setting(
        1,
        "devices that hold whole copies of the weights; -1: what is left",
        at_least=-1,
    ),
    "mesh.fsdp": Setting(
        -1, "devices that weights are split over; -1: what is left", at_least=-1
    ),
    "mesh.tensor": Setting(
        1, "devices that share each matrix; -1: what is left", at_least=-1
    ),
    # Evaluation, at step 0, every eval_every steps, and after the last.
    "eval_every": _positive(40, "steps between evaluations"),
    "eval_samples": _positive(16, "samples per prompt in evaluations, the k of avg@k"),
    "eval_sampling.temperature": _not_negative(
        1.0, "sampling temperature in evaluations; 0 is greedy"
    ),
    **{
        f"eval_sampling.{x.name}": Setting(x.default, x.metadata["help"])
        for x in dataclasses.fields(TokenFilters)
    },
    "eval_sampling.stop_strings": Setting((), "texts that end a response"),
    "data.eval": Setting(
        "pfjax/toy/eval.jsonl",
        "prompts of evaluations, held out: a file, a hub name, a benchmark such as "
        'math500, or several with commas between; "" for none',
    ),
    # Prompts are fingerprinted as encoded, so that another time is noticed.
    "data.clock": Setting(
        "", 'time that chat templates are told, ISO 8601; "" for that of the start'
    ),
    # Records.
    "log_every": _positive(1, "steps between lines when stderr is no terminal"),
    "checkpoint_every": _positive(40, "steps between checkpoints"),
    "keep_best": _not_negative(1, "best checkpoints kept beside the latest two"),
    "best_metric": Setting(
        "eval/avg",
        "metric whose best checkpoint is kept, with or without its @k; of several sets "
        "their mean, or that of one: eval/math500/avg",
    ),
    "profile_steps": Setting(
        (0, 0), "steps traced by JAX's profiler: (first, first after); (0, 0) for none"
    ),
    "wandb_project": Setting("", 'Weights & Biases project (extra wandb); "" for none'),
    # What is watched during a run. A loss that is not finite always stops it.
    "health_checks.action": Setting(
        "stop",
        "what is done when one of these symptoms has lasted",
        ("stop", "warn", "off"),
    ),
    "health_checks.patience": _positive(10, "steps that a symptom must last"),
    "health_checks.length_floor": _not_negative(
        0.25, "least mean length, as a fraction of the start's", at_most=1
    ),
    "health_checks.truncated_ceiling": _not_negative(
        0.99, "largest fraction of responses cut at max_new_tokens", at_most=1
    ),
    "health_checks.rollout_kl": _not_negative(
        0.05, "largest KL from sampler to scorer, nats per token"
    ),
    "health_checks.step_seconds": _positive(
        3600.0, "seconds after which a step that hangs prints its stacks"
    ),
}

SETTINGS = _DECIDING | {k: s._replace(may_change=True) for k, s in _FREE.items()}

EVAL_PROMPTS = (
    "prompts of the evaluation"  # in an identity; may change as `data.eval` may
)


# What other trainers call a setting, or people write for short.
_OTHER_NAMES = {
    "lr": "optim.learning_rate",
    "batch_size": "prompts_per_step",
    "train_batch_size": "prompts_per_step",
    "num_generations": "samples_per_prompt",
    "group_size": "samples_per_prompt",
    "max_completion_length": "max_new_tokens",
    "max_response_length": "max_new_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "max_steps": "num_steps",
    "steps": "num_steps",
    "max_grad_norm": "optim.clip_norm",
    "save_steps": "checkpoint_every",
    "eval_steps": "eval_every",
    "dataset": "data.train",
    "psi": "format_penalty",
    "seq_len": "pack_length",
}


def nearest(name: str) -> str:
    """The setting that a name that is none may mean, "" for no idea.

    >>> nearest("optim.lr"), nearest("learning_rate"), nearest("alhpa")
    ('optim.learning_rate', 'optim.learning_rate', 'alpha')
    """
    last = name.rpartition(".")[2]
    by_last: dict[str, str] = {}
    for setting in reversed(SETTINGS):
        by_last[setting.rpartition(".")[2]] = setting
    known = by_last | {k: v for k, v in _OTHER_NAMES.items() if v in SETTINGS}
    if last in known:
        return known[last]
    near = difflib.get_close_matches(name, SETTINGS, n=1)
    near += [known[x] for x in difflib.get_close_matches(last, known, n=1)]
    return near[0] if near else ""


def default_config() -> ConfigDict:
    """A config of all defaults, locked."""
    tree: dict[str, Any] = {}
    for name, setting in SETTINGS.items():
        group, _, last = name.rpartition(".")
        at = tree.setdefault(group, {}) if group else tree
        at[last] = setting.default
    return ConfigDict(tree).lock()


def recipes() -> dict[str, pathlib.Path]:
    """The recipes that come with pfjax, by name."""
    package = pathlib.Path(__file__).parents[1]
    installed = (
        package / "configs"
    )  # of a wheel; a checkout has them beside the package
    folder = installed if installed.is_dir() else package.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("[a-z]*.py"))}


def recipe_path(name: str) -> str:
    """Where the recipe of a name lies; a path to a file of one's own as it is.

    Either may be followed by a colon and an argument for its `get_config`.

    Raises:
      ValueError: if it is neither a recipe nor a file, with the nearest name.
    """
    head, colon, argument = name.partition(":")
    stem, known = pathlib.Path(head).stem, recipes()
    if head in known:
        return f"{known[head]}{colon}{argument}"
    if pathlib.Path(head).is_file():
        return name
    near = difflib.get_close_matches(stem, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"recipes: {', '.join(known)}"
    raise ValueError(f"--config={name}: no such recipe and no such file; {hint}")


def recipe(name: str, **overrides: Any) -> ConfigDict:
    """The config of a recipe, by its name ("smoke") or the path of a file.

    Args:
      name: what `--config=` takes.
      **overrides: settings with other values, by the names that `--config.` takes; a name
        with a dot as in `**{"optim.learning_rate": 1e-4}`.

    Raises:
      ValueError: if there is no such recipe or setting, or a value is of another type.

    >>> config = recipe("smoke", alpha=2, **{"optim.learning_rate": 1e-4})
    >>> config.alpha, config.optim.learning_rate, config.samples_per_prompt
    (2.0, 0.0001, 8)
    """
    config = _recipe(name)
    for key, value in overrides.items():
        if key not in SETTINGS:
            inside = [x for x in SETTINGS if x.startswith(f"{key}.")]
            near = ", ".join(inside) or nearest(key)
            hint = f"; did you mean {near}?" if near else ""
            raise ValueError(f"there is no setting {key!r}{hint}")
        try:
            config.update_from_flattened_dict({key: value})
        except TypeError:
            kind = type(SETTINGS[key].default).__name__
            raise ValueError(f"{key}={value!r}: must be of type {kind}") from None
    return config


def _recipe(name: str) -> ConfigDict:
    path, _, argument = recipe_path(name).partition(":")
    spec = importlib.util.spec_from_file_location("pfjax_recipe", path)
    if spec is None:
        raise ValueError(f"--config={name}: a recipe is a .py file")
    module = importlib.util.module_from_spec(spec)
    config = None
    try:
        spec.loader.exec_module(module)
        if hasattr(module, "get_config"):
            config = module.get_config(*([argument] if argument else []))
    except Exception as error:  # whatever a recipe of one's own may raise
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if f.filename == path]
        where = f"{path}:{lines[-1]}" if lines else path
        text = " ".join(str(error).split())
        raise ValueError(f"{where}: {type(error).__name__}: {text}") from error
    if not isinstance(config, ConfigDict):
        raise ValueError(  # noqa: TRY004
            f"{path}: a recipe needs a function get_config() that returns a ConfigDict"
        )
    return config.lock()


_WHY_NOT_GREEDY = (
    "; training needs samples of the whole distribution, greedy decoding is for "
    "evaluation: --config.eval_sampling.temperature=0"
)


def check(c: FrozenConfigDict) -> None:
    """Raises ValueError for invalid values."""
    for name, setting in SETTINGS.items():
        value, choices = operator.attrgetter(name)(c), setting.choices
        if setting.bounds() and not setting.allows(value):
            why = _WHY_NOT_GREEDY if name == "temperature" else ""
            raise ValueError(
                f"--config.{name}={value}: must be {setting.bounds()}{why}"
            )
        allowed = sorted(choices() if callable(choices) else choices or [value])
        if value not in allowed:
            near = difflib.get_close_matches(str(value), allowed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"--config.{name}={value}: must be one of {allowed}{hint}")
    try:
        token_filters(c.eval_sampling.to_dict())
    except ValueError as error:
        raise ValueError(f"--config.eval_sampling.{error}") from None
    steps = c.profile_steps
    are_numbers = all(isinstance(x, int) for x in steps)
    if len(steps) != 2 or not are_numbers or not 0 <= steps[0] <= steps[1]:
        raise ValueError(
            f"--config.profile_steps={steps}: must be the first step to trace and the first "
            "after it, as in (10, 13)"
        )
    _check_adapters(c)
    if (c.lora.rank or c.lora.init_from) and c.base:
        raise ValueError(
            f"--config.base={c.base}: with adapters the base is the policy's own weights; "
            "leave them out"
        )
    if (c.lora.rank or c.lora.init_from) and c.offload_ref:
        raise ValueError(
            "--config.offload_ref=True: with adapters the base is the policy's own weights "
            "and has to stay on the devices"
        )
    if c.clip_low > c.clip_high:
        raise ValueError(
            f"--config.clip_low={c.clip_low} exceeds --config.clip_high={c.clip_high}"
        )
    if c.optim.schedule != "constant" and c.optim.warmup_steps > c.num_steps:
        raise ValueError(
            f"--config.optim.warmup_steps={c.optim.warmup_steps} exceeds "
            f"num_steps={c.num_steps}, where optim.schedule={c.optim.schedule} ends"
        )
    if c.updates_per_rollout > c.prompts_per_step:
        raise ValueError(
            f"--config.updates_per_rollout={c.updates_per_rollout} exceeds "
            f"prompts_per_step={c.prompts_per_step}"
        )
    from pfjax.objectives import ObjectiveConfig

    objective = ObjectiveConfig(c.objective, log_z=c.log_z, reward=c.reward)
    if c.temperature != 1 and not objective.is_balance:
        raise ValueError(
            f"--config.temperature={c.temperature}: the gradient of {c.objective} is that of "
            "samples of the policy itself, at temperature 1; objectives that may sample "
            "otherwise are those of balance, such as powerflow"
        )
    check_reward(c, objective)
    has_groups = objective.log_z_source == "group" or objective.kind.reward
    if has_groups and c.samples_per_prompt < 2:
        raise ValueError(
            f"--config.objective={c.objective} with --config.log_z={c.log_z} averages over "
            "the samples of a prompt: samples_per_prompt must be at least 2, got "
            f"{c.samples_per_prompt}"
        )


def _check_adapters(c: FrozenConfigDict) -> None:
    from pfjax.model import lora

    try:
        lora.projections(c.lora.targets)
    except ValueError as error:
        raise ValueError(f"--config.lora.targets={c.lora.targets}: {error}") from None
    for name in ("targets", "dropout"):
        value, default = c.lora[name], SETTINGS[f"lora.{name}"].default
        if value != default and not (c.lora.rank or c.lora.init_from):
            raise ValueError(
                f"--config.lora.{name}={value} without adapters: give their rank with "
                "--config.lora.rank=16, say"
            )


def with_adapter(c: FrozenConfigDict) -> FrozenConfigDict:
    """The config with rank, alpha and targets of the adapter that it starts from, if any.

    Raises:
      ValueError: if one of them was set to something else; defaults count as not set.
    """
    from pfjax.model import hf, lora

    if not c.lora.init_from:
        return c
    adapter = lora.read_peft(hf.resolve_adapter(c.lora.init_from))
    out = ConfigDict(c)
    is_all = adapter.targets == lora.ALL
    names = lora.ALL_LINEAR if is_all else ",".join(lora.target_names(adapter.targets))
    found = {"rank": adapter.rank, "alpha": adapter.alpha, "targets": names}
    for name, value in found.items():
        given, default = c.lora[name], SETTINGS[f"lora.{name}"].default
        is_same = given in (default, value)
        if name == "targets" and not is_same:
            is_same = lora.projections(given) == adapter.targets
        if not is_same:
            raise ValueError(
                f"--config.lora.{name}={given}, but the adapter {c.lora.init_from} has "
                f"{name} {value}: leave the setting out, it comes from the adapter"
            )
        out.lora[name] = value
    return FrozenConfigDict(out)


def check_reward(c: FrozenConfigDict, objective: Any) -> None:
    """Raises ValueError for a reward that there is not, or that nothing would come of."""
    from pfjax.tasks import rewards

    rewards.check(objective.reward_source)
    if c.reward and objective.kind.has_prefixes:
        raise ValueError(
            f"--config.objective={c.objective} weighs every prefix of a response, of which "
            "there is no reward"
        )
    if objective.is_tilted and not c.beta:
        paper = "; its paper has 15" if c.objective == "flowrl" else ""
        raise ValueError(
            f"--config.objective={c.objective} weighs the reward by beta: set "
            f"--config.beta above 0, in nats{paper}"
        )
    if c.beta and not objective.is_tilted:
        raise ValueError(
            f"--config.beta={c.beta} weighs a reward in the target: set --config.reward too"
            if not objective.reward_source
            else f"--config.beta={c.beta} has no effect on {c.objective}, which has no "
            "target"
        )


def check_answers(c: FrozenConfigDict, answers: list[str | None]) -> None:
    """Raises ValueError if the objective grades answers and the prompts have none."""
    from pfjax.objectives import OBJECTIVES
    from pfjax.tasks import rewards

    missing = answers.count(None)
    free = [k for k, o in OBJECTIVES.items() if o.reward != "accuracy"]
    if not rewards.needs_answers(c.reward or OBJECTIVES[c.objective].reward):
        return
    if missing:
        who = f"reward={c.reward}" if c.reward else f"objective={c.objective}"
        raise ValueError(
            f"--config.{who} grades responses, but {missing} of "
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
    out = {name: value for name, value in flat.items() if name not in free}
    if out.get("optim.schedule", "constant") != "constant":
        out["optim.schedule"] += f" over num_steps={flat['num_steps']}"
    return out


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
    free = {EVAL_PROMPTS, *(k for k, s in SETTINGS.items() if s.may_change)}
    names = sorted((old.keys() | (new.keys() & default.keys())) - free)
    value = lambda values, k: values.get(k, default.get(k, "(absent)"))
    pairs = [(k, value(old, k), value(new, k)) for k in names]
    return [f"{k}: {a} -> {b}" for k, a, b in pairs if a != b]


def read_config(folder: epath.Path) -> FrozenConfigDict:
    """The config of a run; a setting that it did not know has its default.

    Raises:
      ValueError: if the folder holds no run, or one of another version of pfjax.
    """
    path = folder / "config.json"
    content = json.loads(path.read_text()) if path.is_file() else {}
    if "config" not in content:
        raise ValueError(f"{folder} holds no run: it has no config.json of one")
    from flax import traverse_util

    out = default_config()
    old = traverse_util.flatten_dict(content["config"], sep=".")
    if unknown := sorted(old.keys() - SETTINGS.keys()):
        version = content["versions"]["pfjax"]
        raise ValueError(
            f"{path} has settings that pfjax {_version()} does not know: "
            f"{', '.join(unknown)}; they are of pfjax {version}"
        )
    for name, value in old.items():
        is_tuple = isinstance(SETTINGS[name].default, tuple)
        out.update_from_flattened_dict({name: tuple(value) if is_tuple else value})
    return FrozenConfigDict(out)


def changed(c: FrozenConfigDict) -> dict[str, Any]:
    """The settings that have other values than their defaults, by name."""
    values = {name: operator.attrgetter(name)(c) for name in SETTINGS}
    return {k: v for k, v in values.items() if v != SETTINGS[k].default}


def _version() -> str:
    import pfjax

    return pfjax.__version__  # known without being installed


def write_config(c: FrozenConfigDict, folder: epath.Path) -> None:
    """Writes `config.json`: every value, and the versions that computed with it."""
    import jax

    packages = ("jax", "flax", "optax", "orbax-checkpoint", "transformers")
    versions = {
        "pfjax": _version(),
        **{p: importlib.metadata.version(p) for p in packages},
        "backend": jax.devices()[0].device_kind,
        "devices": str(jax.device_count()),
    }
    out = {"config": json.loads(c.to_json()), "versions": versions}
    storage.write_text(folder / "config.json", json.dumps(out, indent=2) + "\n")

"""Every setting of a run, declared once: its default, what it means, what it may be, and
whether a run may be continued with another value.

`configs/default.py` makes the config from here, recipes change what differs,
`config_checks` refuses invalid values. A setting that an older run did not know has its
default there. Values that the paper leaves open are marked "chosen". Loaded while flags are
read, before JAX: imports nothing heavy.
"""

import dataclasses
import difflib
import importlib.metadata
import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator
from numbers import Integral, Real
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from pfjax.sampler.options import LARGEST_SEED, TokenFilters


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
    may_be_own: bool = False  # a choice may be FILE.py:NAME too
    may_vary: bool = False  # by training step, see `schedules`

    def bounds(self) -> str:
        """What a number may be, in words: "positive", "at least 0, at most 1"."""
        if (self.above, self.at_most) == (0, None):
            return "positive"
        limits = {
            "at least": self.at_least,
            "above": self.above,
            "at most": self.at_most,
        }
        return ", ".join(f"{k} {v:.10g}" for k, v in limits.items() if v is not None)

    def refusal(self, number: Real) -> str:
        """What it must be instead, or nothing."""
        if not self.bounds() or self.allows(number):
            return ""
        return self.bounds() if math.isfinite(number) else "a finite number"

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
        "base model: Hugging Face folder, hub id (ID@REVISION pins it) or GGUF file; pfjax/toy "
        "ships with pfjax",
    ),
    "base": Setting(
        "",
        'checkpoint whose power is the target, of the same tokenizer; "" for that of model',
    ),
    "objective": Setting(
        "powerflow",
        "what is trained; formulas are in pfjax/objectives.py; or one of your own, "
        "FILE.py:NAME, an Objective or a loss",
        _names("pfjax.objectives", "OBJECTIVES"),
        may_be_own=True,
    ),
    "alpha": _positive(
        4.0, "power of the base distribution: > 1 sharpens, < 1 flattens"
    )._replace(may_vary=True),
    "alpha_range": Setting(
        "",
        "LOW,HIGH: trains one policy for every alpha between, by adapters (lora.rank) that "
        "leave the base as it is at 1; each prompt of a step has its own, log-uniform; "
        "alpha is then that of evaluations and of hf/",
    ),
    "eta_cutoff": _not_negative(
        0.0,
        "below alpha 1: tokens that the base gives less than eta_cutoff, and less than "
        "sqrt(eta_cutoff) e^(-entropy), keep the power 1, so that what is hardly ever right "
        "is not raised; 0: all tokens are flattened",
        at_most=1,
    ),
    "beta": _not_negative(
        0.0, "weight of the reward in the target p_0^alpha e^{beta r}, in nats"
    )._replace(may_vary=True),
    "schedules": Setting(
        "",
        "values by training step, instead of the settings' own: "
        "alpha:1@0,4@100,beta:0@1,2@50 takes alpha from 1 to 4 at step 100, linearly, "
        "and beta from 0 at step 1 to 2 at step 50",
    ),
    "reward": Setting(
        "",
        "accuracy, majority, cluster, self_certainty, sequence_log_prob, "
        "negative_entropy, random, format, length, compiles_python, "
        'regex:"PATTERN", judge:FILE.toml, reward_model:FOLDER, or a function '
        "FILE.py:NAME; several with weights: 'accuracy, 0.1 * mine.py:brief'; "
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
    "residual_clip": _not_negative(
        0.0,
        "nats per token beyond which the loss of a residual goes on as a straight line, so "
        "that single responses far off do not decide an update; 0: nowhere. With alpha_range "
        "times a prompt's alpha, if that is above 1. Of powerflow, tb_token, tb_traj and "
        "flowrl; others have no use of it",
    ),
    "format_penalty": Setting(
        -0.5,
        r"psi of a response without \boxed{}, nats per token; 0 turns it off",
        at_most=0,
    ),
    "format_term": Setting(
        "",
        "psi in the place of that rule, in nats per token: a function FILE.py:NAME or other "
        "terms, as of reward",
    ),
    "log_z": Setting(
        "head",
        "head learns log Z' from the prompt, group averages its samples; rl_traj and "
        "rl_token always average; subtb, sft, empo, grpo and its kin have none",
        ("head", "group"),
    ),
    # Prompts, of training and of evaluation: docs/how-to/data.md has what files may be like.
    "data.train": Setting(
        "pfjax/toy/train.jsonl",
        "prompts to train on: a file (gs:// too), a hub name[:config][:split], or "
        "pfjax/toy/<file>",
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
    "behavior.base": Setting(
        0.0,
        "fraction of each prompt's responses that the frozen base draws, for sft and for "
        "balance, which has the same optimum whoever draws, and learns what the policy no "
        "longer says",
        at_least=0,
        at_most=1,
        may_vary=True,
    ),
    "behavior.base_temperature": _positive(
        1.0, "sampling temperature of the base in training"
    ),
    "behavior.file": Setting(
        "",
        "responses to learn from, of pfjax sample, some to every training prompt: those of "
        "the target (--method=smc) show what neither policy nor base says",
    ),
    "behavior.from_file": Setting(
        0.25,
        "fraction of each prompt's responses that are taken from behavior.file",
        at_least=0,
        at_most=1,
        may_vary=True,
    ),
    "behavior.replay": Setting(
        0.0,
        "fraction of each prompt's responses that are taken from what the policy drew when "
        "the prompt came before, of which the newest samples_per_prompt are kept; it draws "
        "them anew where a prompt of the step comes for the first time",
        at_least=0,
        at_most=1,
        may_vary=True,
    ),
    "max_staleness": _not_negative(
        0,
        "steps that the weights which drew a token may be behind those it trains: then "
        "responses that are not done go on in later steps, and with mesh.rollout drawing and "
        "learning overlap; balance has the same optimum; 0 waits for all responses of a step",
    ),
    "updates_per_rollout": _positive(
        1,
        "minibatches that a rollout is split into by prompts, an update each; 1 is exactly "
        "on policy",
    ),
    "seed": _not_negative(0, "seed of everything random", at_most=LARGEST_SEED),
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
    "teacher_decay": Setting(
        0.0,
        "decay per update of an average of the policy's weights: the majority is then that "
        "of as many responses of this average; 0: of the policy's own",
        at_least=0,
        at_most=1,
    ),
    "advantage": Setting(
        "group",
        "what rewards become in grpo and its kin, empo: less their prompt's mean and over "
        "its standard deviation (group) or that of the step (batch), only less the mean "
        "(group_mean), or themselves (none)",
        ("group", "group_mean", "batch", "none"),
    ),
    "loss_aggregation": Setting(
        "response",
        "what the sum over a response's tokens is divided by in grpo and its kin, empo: its "
        "length (response), the mean length of the update (token), max_new_tokens (constant)",
        ("response", "token", "constant"),
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
        1e-3, "learning rate of log Z', in nats per update (chosen)"
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
        "gate_proj,up_proj,down_proj or some of them; Qwen3.5 has in_proj_qkv and others too",
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
    "replay_experts": Setting(
        False,
        "score the policy's samples with the experts that the sampler chose, in models that "
        "have experts: rounding makes both choose others for some tokens",
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
    "reward_seconds": _positive(
        10.0, "wall time of a reward function per response"
    )._replace(at_most=1e6),
    "reward_workers": _positive(1, "processes per reward function"),
    "rollout_slots": _not_negative(
        0, "samples decoded at once; 0 means as many as memory holds"
    ),
    "microbatch_size": _not_negative(
        0,
        "rows per micro-batch on each data-parallel shard, mesh.data * mesh.fsdp * "
        "mesh.expert of them; 0 means as many as memory holds, within reason",
    ),
    # Devices; one may be -1, which takes what is left. A mesh moves results by rounding
    # only.
    "mesh.data": Setting(
        0,
        "whole copies of the weights; 0: one per node of GPUs or slice of TPUs, or what is "
        "left if fsdp and tensor are given; -1: what is left",
        at_least=-1,
    ),
    "mesh.fsdp": Setting(
        -1, "devices that weights are split over; -1: what is left", at_least=-1
    ),
    "mesh.expert": Setting(
        1,
        "devices that share the experts of each layer, and all other weights as mesh.fsdp: "
        "their tokens are exchanged rather than the experts' weights; -1: what is left",
        at_least=-1,
    ),
    "mesh.context": Setting(
        1,
        "devices that share each packed row, and weights too, for rows too long for one; -1: "
        "what is left",
        at_least=-1,
    ),
    "mesh.tensor": Setting(
        1, "devices that share each matrix; -1: what is left", at_least=-1
    ),
    "mesh.rollout": _not_negative(
        0,
        "devices that draw responses while the others learn, equally many of each process; "
        "needs max_staleness",
    ),
    "rollout_tensor": _not_negative(
        0,
        "devices that share each matrix in rollouts, which read all weights for every token; "
        "0 for mesh.tensor",
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
    "match_prompts": _not_negative(
        64,
        "prompts that the match with the target is measured on at the end, by sixteen "
        "samples of policy and base each; 0 for none",
    ),
    # Records.
    "log_every": _positive(1, "steps between lines when stderr is no terminal"),
    "checkpoint_every": _positive(
        40, "steps between checkpoints; one is saved before each evaluation too"
    ),
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
    )._replace(at_most=1e9),  # more, and Python's timers overflow
}

SETTINGS = _DECIDING | {k: s._replace(may_change=True) for k, s in _FREE.items()}


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
    "scale_rewards": "advantage",
    "norm_adv_by_std_in_grpo": "advantage",
    "loss_type": "loss_aggregation",
    "loss_agg_mode": "loss_aggregation",
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
    return ConfigDict(_tree({k: s.default for k, s in SETTINGS.items()})).lock()


def _tree(values: dict[str, Any]) -> dict[str, Any]:
    """Values by dotted names, by groups."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        group, _, last = name.rpartition(".")
        at = tree.setdefault(group, {}) if group else tree
        at[last] = value
    return tree


def complete(config: ConfigDict) -> ConfigDict:
    """The config with defaults for what it lacks, changed in place and locked.

    Raises:
      ValueError: for what is no setting, or a value of another type.
    """
    given = dict(_flat(config.to_dict()))
    values = {k: s.default for k, s in SETTINGS.items()}
    for name, value in given.items():
        if name not in SETTINGS:
            near = nearest(name)
            hint = f"; did you mean {near}?" if near else ""
            raise ValueError(f"there is no setting {name!r}{hint}")
        default = SETTINGS[name].default
        kind = type(default)
        is_bool = isinstance(value, bool)  # a number to Python
        if not isinstance(value, _TAKES.get(kind, kind)) or is_bool != (kind is bool):
            raise ValueError(f"{name}={value!r}: must be of type {kind.__name__}")
        values[name] = kind(value)
    is_new = lambda k: type(given.get(k)) is not type(values[k])
    with config.unlocked(), config.ignore_type():
        config.update(_tree({k: v for k, v in values.items() if is_new(k)}))
    return config.lock()


_TAKES = {float: Real, int: Integral, tuple: (tuple, list)}  # what means the same


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value

"""Refuses configs that cannot be meant, before anything heavy starts."""

import difflib
import math
import operator
from typing import Any

from ml_collections import FrozenConfigDict

from pfjax.model.config import ModelConfig
from pfjax.objectives import OBJECTIVES, ObjectiveConfig
from pfjax.sampler.options import token_filters
from pfjax.trainer import objective_checks, schedules, settings
from pfjax.trainer.objective import of_config

_WHY_NOT_GREEDY = (
    "; training needs samples of the whole distribution, greedy decoding is for "
    "evaluation: --config.eval_sampling.temperature=0"
)


def check(c: FrozenConfigDict, own_objective: Any = None) -> None:
    """Raises ValueError for invalid values.

    Args:
      own_objective: see `objective.of_config`.
    """
    _check_each(c)
    try:
        token_filters(c.eval_sampling.to_dict())
    except ValueError as error:
        raise ValueError(f"--config.eval_sampling.{error}") from None
    strings = c.eval_sampling.stop_strings
    if not all(isinstance(x, str) and x for x in strings):
        raise ValueError(
            f"--config.eval_sampling.stop_strings={strings}: must be texts that are not "
            """empty, as in '("Question:",)'"""
        )
    steps = c.profile_steps
    are_numbers = all(isinstance(x, int) for x in steps)
    if len(steps) != 2 or not are_numbers or not 0 <= steps[0] <= steps[1]:
        raise ValueError(
            f"--config.profile_steps={steps}: must be the first step to trace and the first "
            "after it, as in (10, 13)"
        )
    if any(steps) and not range(max(steps[0], 1), min(steps[1], c.num_steps + 1)):
        raise ValueError(
            f"--config.profile_steps={steps}: none of these is a step of the run, which are "
            f"1 to num_steps={c.num_steps}"
        )
    _check_adapters(c)
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
    objective = of_config(c, own_objective)
    _check_read(c, objective)
    objective_checks.check_target(c, objective)
    _check_behavior(c, objective)
    _check_staleness(c, objective)
    objective_checks.check_loss(c, objective)
    _check_counts(c, _fractions(c))


def _check_each(c: FrozenConfigDict) -> None:
    """Raises ValueError for a value out of its bounds or none of its choices."""
    for name, setting in settings.SETTINGS.items():
        value, choices = operator.attrgetter(name)(c), setting.choices
        if wanted := setting.refusal(value):
            why = _WHY_NOT_GREEDY if name == "temperature" else ""
            raise ValueError(f"--config.{name}={value}: must be {wanted}{why}")
        if setting.may_be_own and ":" in value:
            continue
        allowed = sorted(choices() if callable(choices) else choices or [value])
        if value not in allowed:
            near = difflib.get_close_matches(str(value), allowed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"--config.{name}={value}: must be one of {allowed}{hint}")


def _check_adapters(c: FrozenConfigDict) -> None:
    from pfjax.model import lora

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
    try:
        lora.projections(c.lora.targets)
    except ValueError as error:
        raise ValueError(f"--config.lora.targets={c.lora.targets}: {error}") from None


_NO_ADAPTERS = "without adapters: give their rank with --config.lora.rank=16, say"
# Settings that nothing reads unless one of others is set, and what is said then. None that a
# recipe may set beside those others: they are turned off to try something else.
_READ_WITH = {
    "lora.alpha": (("lora.rank", "lora.init_from"), _NO_ADAPTERS),
    "lora.targets": (("lora.rank", "lora.init_from"), _NO_ADAPTERS),
    "lora.dropout": (("lora.rank", "lora.init_from"), _NO_ADAPTERS),
    "behavior.base_temperature": (
        ("behavior.base",),
        "has no effect without samples of the base: set --config.behavior.base=0.5, say",
    ),
    "behavior.from_file": (
        ("behavior.file",),
        "has no effect without a file: set --config.behavior.file",
    ),
    "reward_per": (("reward",), "has no effect without a reward: set --config.reward"),
}


def _check_read(c: FrozenConfigDict, objective: ObjectiveConfig) -> None:
    """Raises ValueError for settings that nothing reads without others."""
    by_step = schedules.parse(c.schedules)
    is_set = lambda name: operator.attrgetter(name)(c) or name in by_step
    for name, (others, said) in _READ_WITH.items():
        value = operator.attrgetter(name)(c)
        is_read = any(map(is_set, others))
        if name == "reward_per":
            is_read = objective.reward_source or objective.own
        if value != settings.SETTINGS[name].default and not is_read:
            raise ValueError(f"--config.{name}={value} {said}")


def _fractions(c: FrozenConfigDict) -> dict[str, float]:
    """What others than the policy draw of each prompt's responses, by setting."""
    fractions = {"base": c.behavior.base, "replay": c.behavior.replay}
    if c.behavior.file:
        fractions["from_file"] = c.behavior.from_file
    return {f"behavior.{k}": x for k, x in fractions.items()}


def _check_behavior(c: FrozenConfigDict, objective: ObjectiveConfig) -> None:
    """Raises ValueError for responses that the objective may not learn from."""
    by_step = schedules.parse(c.schedules)
    if not (objective.is_balance or objective.is_likelihood):
        _check_on_policy(c, by_step)
    _check_sum(_fractions(c), by_step, objective)
    if "behavior.from_file" in by_step and not c.behavior.file:
        raise ValueError(
            f"--config.schedules={c.schedules}: behavior.from_file has no effect without "
            "--config.behavior.file"
        )


def _check_staleness(c: FrozenConfigDict, objective: ObjectiveConfig) -> None:
    """Raises ValueError for responses that are older than may be."""
    if c.mesh.rollout and not c.max_staleness:
        raise ValueError(
            f"--config.mesh.rollout={c.mesh.rollout}: devices that draw while others learn "
            "draw by older weights: set --config.max_staleness=1, or more"
        )
    if not c.max_staleness:
        return
    said = f"--config.max_staleness={c.max_staleness}"
    others = c.behavior.base + (c.behavior.from_file if c.behavior.file else 0)
    if math.isclose(others, 1):
        raise ValueError(f"{said} has no effect: the policy itself draws no response")
    if not objective.is_balance:
        raise ValueError(
            f"{said}: the gradient of {c.objective} is that of samples of the policy as it is; "
            "objectives that may learn from older ones are those of balance, such as powerflow"
        )
    scheduled = [x for x in schedules.parse(c.schedules) if x.startswith("behavior.")]
    if c.behavior.replay or scheduled:
        name = (scheduled or ["behavior.replay"])[0]
        raise ValueError(
            f"{said}: {name} changes how many responses the policy draws from step to step, "
            "which must stay the same then; leave one of them out"
        )


def _check_on_policy(c: FrozenConfigDict, by_step: dict[str, Any]) -> None:
    """Raises ValueError for responses that are no samples of the policy itself."""
    if c.temperature != 1:
        raise ValueError(
            f"--config.temperature={c.temperature}: the gradient of {c.objective} is that of "
            "samples of the policy itself, at temperature 1; objectives that may sample "
            "otherwise are those of balance, such as powerflow"
        )
    for name in ("base", "file", "replay"):
        value = c.behavior[name]
        if value or f"behavior.{name}" in by_step:
            default = settings.SETTINGS[f"behavior.{name}"].default
            sft = "" if name == "replay" else ", and sft"
            raise ValueError(
                f"--config.behavior.{name}={value}: the gradient of {c.objective} is that of "
                f"samples of the policy itself (behavior.{name}={default!r}); objectives that "
                f"may learn from such samples are those of balance, such as powerflow{sft}"
            )


def _check_sum(
    fractions: dict[str, float], by_step: dict[str, Any], objective: ObjectiveConfig
) -> None:
    """Raises ValueError for fractions that leave the policy less than nothing, or
    something that it would imitate."""
    # Between their points schedules are linear.
    for step in {0}.union(*(dict(by_step.get(name, ())) for name in fractions)):
        at = {k: schedules.value(by_step, k, step, x) for k, x in fractions.items()}
        when = f" at step {step}" if by_step.keys() & fractions.keys() else ""
        others = sum(at.values()) - at["behavior.replay"]
        if objective.is_likelihood and others < 1 - 1e-6:
            raise ValueError(
                f"--config.objective={objective.name} learns nothing from samples of the policy "
                f"itself, new or replayed, which are part of the responses{when}: set "
                "--config.behavior.base=1, or --config.behavior.file and "
                "--config.behavior.from_file=1"
            )
        if sum(at.values()) > 1 + 1e-6:
            said = " + ".join(f"{name}={x:g}" for name, x in at.items() if x)
            raise ValueError(
                f"--config.{said} exceeds 1{when}: they are fractions of a prompt's responses, "
                "of which the policy draws the rest; lower one of them"
            )


def _check_counts(c: FrozenConfigDict, fractions: dict[str, float]) -> None:
    """Raises ValueError for a fraction of a prompt's responses that rounds to none, unless
    fractions vary by step."""
    from pfjax.trainer import behavior

    if schedules.parse(c.schedules).keys() & fractions.keys():
        return
    given = {(): []} if c.behavior.file else {}
    of_behavior = {k.rpartition(".")[2]: x for k, x in fractions.items()}
    mixture = behavior.Behavior(**of_behavior, given=given)
    _, *counts = mixture.counts(0, c.samples_per_prompt, has_earlier=True)
    by_name = zip(("base", "from_file", "replay"), counts, strict=True)
    for name, number in by_name:
        if of_behavior.get(name) and not number:
            raise ValueError(
                f"--config.behavior.{name}={of_behavior[name]:g} of "
                f"--config.samples_per_prompt={c.samples_per_prompt} is no response: give "
                f"more samples, or leave it out (--config.behavior.{name}=0)"
            )


def check_answers(
    c: FrozenConfigDict, answers: list[str | None], reward_source: str
) -> None:
    """Raises ValueError if the objective grades answers and the prompts have none."""
    from pfjax.tasks import rewards

    missing = answers.count(None)
    free = [k for k, o in OBJECTIVES.items() if o.reward != "accuracy"]
    if not rewards.needs_answers(reward_source):
        return
    if missing:
        who = f"reward={c.reward}" if c.reward else f"objective={c.objective}"
        cure = f"objectives that need none: {', '.join(free)}"
        if c.reward:
            cure = "give them (data.answer_field names their column), or another reward"
        raise ValueError(
            f"--config.{who} grades responses, but {missing} of "
            f"{len(answers)} prompts of {c.data.train} have no answer; {cure}"
        )


def check_rank(c: FrozenConfigDict, model: ModelConfig) -> None:
    """Raises ValueError for adapters of a rank above the sides of all matrices."""
    largest = max(model.embed_dim, model.mlp_dim, model.num_heads * model.head_dim)
    if c.lora.rank > largest:
        raise ValueError(
            f"--config.lora.rank={c.lora.rank}: the largest matrix of the model has a side of "
            f"{largest}"
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

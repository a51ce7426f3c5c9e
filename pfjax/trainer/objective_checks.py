"""Refuses settings of a target or a loss that nothing would come of."""

import dataclasses

from ml_collections import FrozenConfigDict

from pfjax.objectives import OBJECTIVES, ObjectiveConfig
from pfjax.trainer import schedules, settings


def check_target(c: FrozenConfigDict, objective: ObjectiveConfig) -> None:
    """Raises ValueError for powers that the objective has no target for."""
    _check_schedules(c, objective)
    _check_alpha_range(c, objective)
    _check_eta_cutoff(c, objective)


def check_loss(c: FrozenConfigDict, objective: ObjectiveConfig) -> None:
    """Raises ValueError for rewards and other settings that the loss does not read, or lacks."""
    _check_reward(c, objective)
    _check_kind_of_loss(c, objective)
    _check_likelihood(c, objective)
    needs_std = bool(objective.kind.reward) and c.advantage != "none"
    has_groups = objective.log_z_source == "group" or needs_std
    if has_groups and c.samples_per_prompt < 2:
        raise ValueError(
            f"--config.objective={c.objective} with --config.log_z={c.log_z} averages over "
            "the samples of a prompt: samples_per_prompt must be at least 2, got "
            f"{c.samples_per_prompt}"
        )


def _check_schedules(c: FrozenConfigDict, objective: ObjectiveConfig) -> None:
    """Raises ValueError for a schedule that says nothing of the objective."""
    if "alpha" not in schedules.parse(c.schedules):
        return
    with_alpha = lambda x: dataclasses.replace(objective, alpha=x).target
    if not objective.has_target or with_alpha(2.0) == with_alpha(3.0):
        why = f"whose target has alpha {objective.target.alpha:g}"
        why = why if objective.has_target else "which has no target"
        raise ValueError(
            f"--config.schedules={c.schedules}: alpha has no effect on {c.objective}, {why}"
        )


def _check_alpha_range(c: FrozenConfigDict, objective: ObjectiveConfig) -> None:
    """Raises ValueError unless one policy can be trained for every alpha of the range."""
    from pfjax.model import dial

    said = f"--config.alpha_range={c.alpha_range}"
    try:
        ends = dial.parse(c.alpha_range)
    except ValueError as error:
        raise ValueError(f"--config.alpha_range: {error}") from None
    if not ends:
        return
    if not ends[0] <= c.alpha <= ends[1]:
        raise ValueError(
            f"{said}: --config.alpha={c.alpha:g}, which is evaluated and exported, is not in it"
        )
    if not c.lora.rank or c.lora.init_from:
        raise ValueError(
            f"{said}: alpha enters by new adapters; give their rank with "
            "--config.lora.rank=16, say, and no lora.init_from"
        )
    target = objective.target
    others = dataclasses.replace(objective, alpha=2 * objective.alpha).target
    is_base_at_one = not target.log_sum and not objective.kind.has_prefixes
    if not objective.has_target or target == others or not is_base_at_one:
        raise ValueError(
            f"{said}: --config.objective={c.objective} has no target that it can train "
            "toward for each prompt's alpha; powerflow, tb_token, tb_traj and "
            "rl_traj have"
        )
    psi = c.format_term or (c.format_penalty and target.has_format)
    if psi or objective.is_tilted:
        what = "the reward" if objective.is_tilted else "the format term"
        raise ValueError(
            f"{said}: at alpha = 1 the policy is the base, which {what} would change; leave "
            "it out (--config.format_penalty=0)"
        )
    if "alpha" in schedules.parse(c.schedules):
        raise ValueError(
            f"{said}: each prompt has its own alpha; leave that of "
            f"--config.schedules={c.schedules} out"
        )


def _check_eta_cutoff(c: FrozenConfigDict, objective: ObjectiveConfig) -> None:
    """Raises ValueError for rare tokens of which nothing would come."""
    from pfjax.model import dial

    said = f"--config.eta_cutoff={c.eta_cutoff:g}"
    if not c.eta_cutoff:
        return
    others = dataclasses.replace(objective, alpha=2 * objective.alpha).target
    if not objective.has_target or objective.target == others:
        raise ValueError(
            f"{said} has no effect on {c.objective}, which has no power of the base to "
            "flatten: leave it out"
        )
    if objective.kind.has_prefixes or c.mask_clipped_tokens:
        kin = "powerflow, tb_token, tb_traj, rl_traj and rl_token"
        raise ValueError(f"{said}: {kin} know rare tokens, without mask_clipped_tokens")
    ends = dial.parse(c.alpha_range)
    varied = [value for _, value in schedules.parse(c.schedules).get("alpha", ())]
    if min([c.alpha, *ends, *varied]) >= 1:
        raise ValueError(
            f"{said} has no effect at alpha={c.alpha:g}: only powers below 1 raise what is "
            "rare; leave it out"
        )


def _check_reward(c: FrozenConfigDict, objective: ObjectiveConfig) -> None:
    """Raises ValueError for a reward that there is not, or that nothing would come of."""
    from pfjax.tasks import rewards

    rewards.check(objective.reward_source)
    if c.format_term:
        _check_format_term(c, objective)
    if c.reward and objective.kind.has_prefixes:
        raise ValueError(
            f"--config.objective={c.objective} weighs every prefix of a response, of which "
            "there is no reward"
        )
    found = rewards.not_of_response(c.reward)
    if found and objective.is_tilted and not objective.own:
        kin = [k for k in OBJECTIVES if ObjectiveConfig(k).has_advantages]
        raise ValueError(
            f"--config.reward={c.reward}: {found} is not of the response alone, so it makes "
            f"no target for {c.objective}; objectives that may follow it: {', '.join(kin)}"
        )
    has_schedule = "beta" in schedules.parse(c.schedules)
    has_beta = c.beta or has_schedule
    # A loss of one's own may read the reward itself.
    if objective.is_tilted and not has_beta and not objective.own:
        paper = "; its paper has 15" if c.objective == "flowrl" else ""
        raise ValueError(
            f"--config.objective={c.objective} weighs the reward by beta: set "
            f"--config.beta above 0, in nats{paper}"
        )
    if has_beta and not objective.is_tilted:
        given = f"schedules={c.schedules}: beta" if has_schedule else f"beta={c.beta}"
        raise ValueError(
            f"--config.{given} weighs a reward in the target: set --config.reward too"
            if not objective.reward_source
            else f"--config.{given} has no effect on {c.objective}, which has no target"
        )


def _check_format_term(c: FrozenConfigDict, objective: ObjectiveConfig) -> None:
    """Raises ValueError for a psi that there is not, or that nothing would come of."""
    from pfjax.tasks import rewards

    rewards.check_format_term(c.format_term)
    given, default = c.format_penalty, settings.SETTINGS["format_penalty"].default
    if given not in (0, default):
        raise ValueError(
            f"--config.format_term={c.format_term} takes the place of "
            f"--config.format_penalty={given}: set one of them"
        )
    if not objective.has_target or not getattr(objective.target, "has_format", True):
        raise ValueError(
            f"--config.format_term={c.format_term} has no effect on {c.objective}, whose "
            "target has no format term"
        )
    if c.data.target:
        raise ValueError(
            f"--config.data.target={c.data.target}: its bounds know no psi but that of "
            "--config.format_penalty"
        )


# Settings that only objectives with a property read, by this. `residual_clip` is not among
# them: recipes set it, and other objectives are tried from a recipe.
_READ_BY = {
    "has_advantages": ("advantage", "loss_aggregation", "reward_kl"),
    "has_residual_loss": ("divergence",),
}


def _check_kind_of_loss(c: FrozenConfigDict, objective: ObjectiveConfig) -> None:
    """Raises ValueError for settings of kinds of loss that nothing reads."""
    for reads, names in _READ_BY.items():
        kin = [k for k in OBJECTIVES if getattr(ObjectiveConfig(k), reads)]
        for name in () if getattr(objective, reads) or objective.own else names:
            if c[name] != settings.SETTINGS[name].default:
                raise ValueError(
                    f"--config.{name}={c[name]} has no effect on {c.objective}, leave it "
                    f"out; objectives that read it: {', '.join(kin)}"
                )
    from pfjax.tasks import rewards

    is_voted = rewards.has_majority(objective.reward_source)
    if c.teacher_decay and not (is_voted and objective.has_advantages):
        raise ValueError(
            f"--config.teacher_decay={c.teacher_decay}: the averaged policy votes for the "
            f"reward majority, which {c.objective} does not follow; ttrl does"
        )
    term = rewards.token_term(objective.reward_source)
    if c.advantage == "batch" and term and c.updates_per_rollout > 1:
        raise ValueError(
            f"--config.advantage=batch: {term.name} is known update by update, and "
            f"updates_per_rollout={c.updates_per_rollout} has several"
        )


def _check_likelihood(c: FrozenConfigDict, objective: ObjectiveConfig) -> None:
    """Raises ValueError for settings that a likelihood of given responses does not read."""
    for name in ("temperature", "reward", "mask_clipped_tokens"):
        if objective.is_likelihood and c[name] != settings.SETTINGS[name].default:
            raise ValueError(
                f"--config.{name}={c[name]} has no effect on {c.objective}, the likelihood of "
                "responses of the base (behavior.base_temperature) or a file: leave it out"
            )

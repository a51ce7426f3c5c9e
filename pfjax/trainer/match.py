"""How far a run's policy is from its target, at the end of the run: `match.json`."""

import collections
from collections.abc import Callable
from typing import Any

import numpy as np

from pfjax.evaluation import match
from pfjax.model.transformer import Policy
from pfjax.objectives import ObjectiveConfig
from pfjax.tasks import rewards
from pfjax.tasks.grading import Grader
from pfjax.trainer import behavior, diagnostics

SAMPLES = 16  # of the policy and of the base, to each prompt


def measure(
    policy: Policy,
    base: Callable[[], Policy],
    grader: Grader,
    *,
    prompts: list[list[int]],
    objective: ObjectiveConfig,
    compute_rewards: Callable,
    **how: Any,
) -> dict[str, Any]:
    """Draws from policy and base and estimates the match with the target.

    For alpha below 1 the base draws as many again, at temperature 1/alpha.

    Args:
      policy, base, grader: of the run, at its end.
      prompts: to answer.
      objective: its target is matched.
      compute_rewards: indices, rollout and grader -> `RolloutBatch`.
      **how: what `engine.rollout` takes.

    Returns:
      The estimates of `match.measure`; `num_prompts`, and `num_samples` to each of them of
      the policy, of the base, and of the base at `base_temperature` if that is not 1; of the
      responses, for policy and base (`base_...`), `repeats_across_prompts`, the fraction
      that another prompt got too; and `commonest_changed`: the fraction of prompts whose
      commonest response is another than the base's.
    """
    indices, target = list(range(len(prompts))), objective.target
    draw = lambda step, num, of: behavior.rollout(
        policy, base, prompts, step, indices, behavior=of, samples_per_prompt=num, **how
    )
    rollout = draw(0, 2 * SAMPLES, behavior.Behavior(base=0.5))
    temperature = max(1.0, 1 / target.alpha)
    if temperature > 1:
        hot = behavior.Behavior(base=1.0, base_temperature=temperature)
        rollout = behavior.join_samples(rollout, draw(1, SAMPLES, hot))
    num = rollout.lengths.shape[1]
    data = compute_rewards(indices, rollout, grader)
    reward = data.reward
    if objective.kind.reward:
        reward = rewards.advantages(reward, num, objective.advantage)
    how_scored = (temperature, objective.eta_cutoff)
    samples = match.score(policy, base(), prompts, data.responses, *how_scored)
    shape = samples.log_p.shape
    tilt = {"psi": data.psi.reshape(shape), "reward": reward.reshape(shape)}
    out = match.measure(samples._replace(**tilt), target)
    texts = np.array(data.texts, object).reshape(shape)
    own, others = texts[:, :SAMPLES], texts[:, SAMPLES : 2 * SAMPLES]
    pairs = zip(map(_commonest, own), map(_commonest, others), strict=True)
    return out | {
        "repeats_across_prompts": diagnostics.repeats_across_prompts(own),
        "base_repeats_across_prompts": diagnostics.repeats_across_prompts(others),
        "commonest_changed": float(np.mean([a != b for a, b in pairs])),
        "num_prompts": len(prompts),
        "num_samples": SAMPLES,
        "base_temperature": temperature,
    }


def _commonest(texts: np.ndarray) -> str:
    return collections.Counter(texts).most_common(1)[0][0]


def describe(found: dict[str, Any], alpha: float) -> str:
    """The estimates as a person reads them, and what they warn of."""
    error = lambda x: "" if x is None else f" ± {x:.3f}"  # one prompt has none
    value = lambda name: f"{found[name]:.3f}{error(found.get(f'{name}_se'))}"
    temperature = found["base_temperature"]
    hot = (
        "" if temperature == 1 else f", and of the base at temperature {temperature:g}"
    )
    lines = [
        (
            f"match with the target, of {found['num_prompts']} prompts x "
            f"{found['num_samples']} samples of the policy and of the base each{hot}:"
        ),
        f"  total variation {value('total_variation')}",
        (
            f"  KL(policy, target) {value('kl_policy_target')}, KL(target, policy) "
            f"{value('kl_target_policy')} nats per response"
        ),
        (
            f"  exponent {value('exponent')} over the base's mass, "
            f"{value('exponent_target')} over the target's; {alpha:g} is asked for"
        ),
    ]
    return "\n".join([*lines, *(f"warning: {x}" for x in warnings(found, alpha))])


_MORE = ". More steps, or more samples of the base (--config.behavior.base), mend that"


def warnings(found: dict[str, Any], alpha: float) -> list[str]:
    """What the estimates say against the match, in sentences."""
    out = []
    exponent, se = found["exponent"], found.get("exponent_se", 0.0)
    if abs(exponent - alpha) > 0.2 * alpha + 2 * se:
        out.append(
            f"the policy is the base to the power of {exponent:.2f} rather than {alpha:g}: "
            "what it seldom says is not where the target wants it"
            + (_MORE if alpha >= 1 else "")
        )
    if found["ess"] < 0.05:
        out.append(
            f"{found['ess']:.1%} of the samples carry the target: little of it is drawn, and "
            "these estimates are rough"
        )
    if alpha < 1 and found["total_variation"] > 0.3:
        out.append(
            "the policy is far from the target. Below alpha 1 much of a target is text that "
            "the base hardly ever says, unless rare tokens keep the power 1: "
            "--config.eta_cutoff=0.003, or less where that leaves good words out "
            "(docs/limits.md, Flattening)"
        )
    repeats = found["repeats_across_prompts"]
    if repeats > 0.5 and repeats > found["base_repeats_across_prompts"] + 0.3:
        out.append(
            f"{repeats:.0%} of the responses are given to other prompts too, of the base's "
            f"{found['base_repeats_across_prompts']:.0%}: the policy says one thing to all"
        )
    return out

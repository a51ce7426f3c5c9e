"""Who draws the responses that a step learns from: the policy, and the frozen base.

A balance objective has its minimum where the residual of every response is 0, whoever drew
the responses. The policy's own samples are where it matters most and say nothing of what it
has forgotten or never sharpened; samples of the base say that.
"""

import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from pfjax.batch import Rollout
from pfjax.model.transformer import Policy
from pfjax.sampler import engine
from pfjax.trainer import schedules


class Behavior(NamedTuple):
    """Fractions of each prompt's responses, and how they are drawn."""

    temperature: float = 1.0  # of the policy
    base: float = 0.0  # fraction that the frozen base draws
    base_temperature: float = 1.0
    # Schedules of these.
    by_step: Mapping[str, schedules.Points] = types.MappingProxyType({})

    def num_base(self, step: int, samples_per_prompt: int) -> int:
        """How many of a prompt's responses the base draws; the policy keeps at least one."""
        fraction = schedules.value(self.by_step, "behavior.base", step, self.base)
        return min(round(fraction * samples_per_prompt), samples_per_prompt - 1)


def rollout(
    policy: Policy,
    base: Callable[[], Policy],
    prompts: list[list[int]],
    step: int,
    prompt_ids: list[int],
    *,
    behavior: Behavior,
    samples_per_prompt: int,
    **how: Any,
) -> Rollout:
    """Draws the responses of a step, those of the policy first.

    Args:
      policy, base: who draws; if they differ in values alone, by the same programs.
      prompts, step, prompt_ids: see `engine.rollout`.
      behavior: how many each draws.
      samples_per_prompt: G, of all together.
      **how: what else `engine.rollout` takes.
    """
    own = samples_per_prompt - behavior.num_base(step, samples_per_prompt)
    how |= {"step": step, "prompt_ids": prompt_ids}
    how |= {"samples_per_prompt": samples_per_prompt}
    first, rest = range(own), range(own, samples_per_prompt)
    out = engine.rollout(
        policy, prompts, temperature=behavior.temperature, samples=first, **how
    )
    if rest:
        others = engine.rollout(
            base(), prompts, temperature=behavior.base_temperature, samples=rest, **how
        )
        out = _join(out, others)
    return out._replace(num_own=own)


def _join(a: Rollout, b: Rollout) -> Rollout:
    """The responses of both to each prompt."""
    of_both = lambda x, y: np.concatenate([x, y], axis=1)
    arrays = ("tokens", "lengths", "log_probs", "finished")
    joined = {x: of_both(getattr(a, x), getattr(b, x)) for x in arrays}
    return a._replace(**joined, slot_steps=a.slot_steps + b.slot_steps)

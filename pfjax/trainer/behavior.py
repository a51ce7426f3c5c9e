"""Where the responses of a step come from: the policy, now or earlier, the frozen base, a
file.

A balance objective has its minimum where the residual of every response is 0, whoever drew
the responses. The policy's own samples lie where it has its mass, and teach it nothing about
responses that it no longer gives; samples of the base do.
"""

import functools
import math
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from pfjax.batch import Rollout
from pfjax.model import dial, experts
from pfjax.model.transformer import Policy
from pfjax.sampler import engine
from pfjax.trainer import schedules

Given = Mapping[tuple[int, ...], list[np.ndarray]]  # responses by their prompts
_NONE: Mapping[Any, Any] = types.MappingProxyType({})


class Behavior(NamedTuple):
    """Fractions of each prompt's responses, and how they are drawn."""

    temperature: float = 1.0  # of the policy
    base: float = 0.0  # fraction that the frozen base draws
    base_temperature: float = 1.0
    from_file: float = 0.0  # fraction that is taken from `given`
    given: Given = _NONE
    replay: float = 0.0  # fraction that is taken from what the policy drew earlier
    by_step: Mapping[str, schedules.Points] = _NONE  # schedules of the fractions

    @property
    def replays(self) -> bool:
        """Whether any step does."""
        return bool(self.replay or "behavior.replay" in self.by_step)

    def counts(
        self, step: int, samples_per_prompt: int, has_earlier: bool = False
    ) -> tuple[int, int, int, int]:
        """How many of a prompt's responses are the policy's, the base's, given, and the
        policy's of earlier steps, which it draws anew without `has_earlier`. At least one is
        the policy's, unless the fractions of the others sum to 1."""
        wanted = {"base": self.base, "from_file": self.from_file if self.given else 0.0}
        wanted["replay"] = self.replay
        fractions = [
            schedules.value(self.by_step, f"behavior.{name}", step, default)
            for name, default in wanted.items()
        ]
        is_all = math.isclose(sum(fractions), 1)
        ends = np.rint(np.cumsum(fractions) * samples_per_prompt)
        ends = np.minimum(ends, samples_per_prompt - (not is_all)).astype(int)
        base, given, earlier = np.diff(ends, prepend=0).tolist()
        earlier *= has_earlier
        return samples_per_prompt - base - given - earlier, base, given, earlier


def rollout(
    policy: Policy,
    base: Callable[[], Policy],
    prompts: list[list[int]],
    step: int,
    prompt_ids: list[int],
    earlier: list[list[np.ndarray]] | None = None,
    *,
    behavior: Behavior,
    samples_per_prompt: int,
    max_new_tokens: int,
    seed: int,
    **how: Any,
) -> Rollout:
    """Draws the responses of a step, those of the policy first.

    Args:
      policy, base: who draws; if they differ in values alone, by the same programs.
      prompts, step, prompt_ids: see `engine.rollout`.
      earlier: what the policy drew to each prompt at earlier steps. If there is nothing to
        one of them, the policy draws what would be replayed, to all.
      behavior: how many each draws.
      samples_per_prompt: G, of all together.
      max_new_tokens, seed, **how: see `engine.rollout`.
    """
    has_earlier = earlier is not None and all(earlier)
    counts = behavior.counts(step, samples_per_prompt, has_earlier)
    own, others, *_ = counts
    how |= {"step": step, "prompt_ids": prompt_ids, "seed": seed}
    how |= {"samples_per_prompt": samples_per_prompt, "max_new_tokens": max_new_tokens}
    alpha = dial.draw(policy.config.alpha_range, seed, prompt_ids)
    how["alpha"] = alpha
    parts = []
    if own:
        more = {"temperature": behavior.temperature, "samples": range(own)}
        parts.append(engine.rollout(policy, prompts, **more, **how))
    if others:
        more = {"temperature": behavior.base_temperature}
        more |= {"samples": range(own, own + others)}
        parts.append(engine.rollout(base(), prompts, **more, **how))
    seeds = [(seed, step, i) for i in prompt_ids]
    others = (behavior.given, earlier)
    how = (max_new_tokens, policy.config.stop_ids)
    return join(parts, counts, prompts, seeds, *others, *how)._replace(alpha=alpha)


def join(
    drawn: list[Rollout],
    counts: tuple[int, int, int, int],
    prompts: list[list[int]],
    seeds: list[tuple[int, ...]],
    given: Given,
    earlier: list[list[np.ndarray]] | None,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
) -> Rollout:
    """The responses of a step, whoever they are of.

    Args:
      drawn: by the policy, then by the base, if these draw any.
      counts: see `Behavior.counts`.
      prompts, seeds: of each prompt, the seed of what is chosen.
      given, earlier: what there is to choose from, see `rollout`.
    """
    own, of_base, num_given, num_earlier = counts
    known = [given[tuple(p)] for p in prompts] if num_given else None
    parts = list(drawn)
    for responses, number in ((known, num_given), (earlier, num_earlier)):
        if number:
            pairs = zip(responses, seeds, strict=True)
            chosen = [_choose(of, number, seed) for of, seed in pairs]
            parts.append(_as_rollout(chosen, max_new_tokens, stop_ids))
    joined = functools.reduce(join_samples, parts)
    return joined._replace(num_own=own, num_base=of_base)


def _choose(
    responses: list[np.ndarray], number: int, seed: tuple[int, ...]
) -> list[np.ndarray]:
    """Some of them, each once where there are enough."""
    rng, n = np.random.default_rng(seed), len(responses)
    return [responses[i] for i in rng.choice(n, number, replace=n < number)]


def _as_rollout(
    responses: list[list[np.ndarray]], max_new_tokens: int, stop_ids: tuple[int, ...]
) -> Rollout:
    """Responses `[P][g]` that were not drawn now: of log-prob 0."""
    shape = (len(responses), len(responses[0]))
    tokens = np.zeros((*shape, max_new_tokens), np.int32)
    for at in np.ndindex(*shape):
        y = responses[at[0]][at[1]]
        tokens[at][: len(y)] = y
    return Rollout(
        tokens=tokens,
        lengths=np.array([[len(y) for y in of] for of in responses], np.int32),
        log_probs=np.zeros(tokens.shape, np.float32),
        finished=np.array([[y[-1] in stop_ids for y in of] for of in responses]),
        slot_steps=0,
    )


def join_samples(a: Rollout, b: Rollout) -> Rollout:
    """The responses of both to each prompt."""
    of_both = lambda x, y: np.concatenate([x, y], axis=1)
    arrays = ("tokens", "lengths", "log_probs", "finished")
    joined = {x: of_both(getattr(a, x), getattr(b, x)) for x in arrays}
    choices = a.choices
    if choices is not None:  # which are read of the policy's own samples only
        shape = (*b.lengths.shape, *choices.shape[2:])
        choices = of_both(choices, np.full(shape, experts.UNKNOWN, np.uint8))
    weights_step, num_drawn = a.weights_step, a.num_drawn
    if weights_step is not None:  # of the policy's, which come first
        none = np.full(b.tokens.shape, -1, np.int32)
        weights_step = of_both(weights_step, none)
        num_drawn += b.num_drawn or 0
    return a._replace(
        **joined,
        slot_steps=a.slot_steps + b.slot_steps,
        choices=choices,
        weights_step=weights_step,
        num_drawn=num_drawn,
    )

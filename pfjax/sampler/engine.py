"""Rollouts: G samples of each of P prompts, from the trainer's own forward.

A prompt is prefilled once and its keys and values are read by all of its samples.
`slots.py` decides the shapes, `scheduler.py` is the host's part, `decode.py` what runs
on the devices. The random number behind a token depends on (seed, step, prompt id,
sample, position) only, so that none of them changes what is drawn.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import jax
import numpy as np

from pfjax.batch import Rollout
from pfjax.infra import sharding
from pfjax.model.config import ModelConfig
from pfjax.model.transformer import Policy
from pfjax.sampler import options, slots, unstack
from pfjax.sampler.buffers import SamplerState, Settings
from pfjax.sampler.options import Capacity, StopConditions, TokenFilters
from pfjax.sampler.scheduler import Finished, Scheduler


@sharding.for_rollouts
def rollout(
    policy: Policy,
    prompts: list[list[int]],
    samples_per_prompt: int = 8,
    max_new_tokens: int = 512,
    temperature: float = 1.0,
    seed: int = 0,
    *,
    step: int = 0,
    prompt_ids: list[int] | None = None,
    token_filters: TokenFilters = options.NO_FILTERS,
    stop: StopConditions = options.NO_STOP,
    capacity: Capacity = options.ANY_CAPACITY,
    samples: range | None = None,
    on_finish: Callable[[list[Finished]], None] | None = None,
    alpha: Sequence[float] | np.ndarray | None = None,
) -> Rollout:
    """Draws responses.

    Args:
      policy: the model; under `jax.set_mesh` the prompts are split over all its
        devices but those along "tensor", over which the weights are.
      prompts: P lists of token ids, none empty.
      samples_per_prompt: G.
      max_new_tokens: R; a response that has not stopped by then is cut.
      temperature: of sampling; 0 takes the likeliest token (not for training).
        Recorded log-probs are at temperature 1 always.
      seed: with the same seed, step and prompt ids the samples are the same.
      step: training step, so that a prompt is answered anew when it returns.
      prompt_ids: P integers that stand for the prompts in the random numbers;
        their order in the list when not given.
      token_filters: of the distribution drawn from (not for training).
      stop: see `StopConditions`.
      capacity: see `Capacity`.
      samples: which of the G to draw, all by default: each is drawn as it would be among
        the others, by the same compiled programs.
      on_finish: called with the responses that have ended since the last call, while
        the devices go on (at the end only, with `max_total_tokens`).
      alpha: P of them, for a policy for every alpha (see `dial`).

    Returns:
      Host arrays; see `batch.Rollout`.

    Raises:
      ValueError: for an empty prompt, a negative temperature, a seed that JAX would take
        for another (negative, or of more than 32 bits), prompts wider than `prompt_width`,
        more positions than the model has, or a cache that does not fit in memory.

    >>> import pfjax
    >>> policy = pfjax.load("pfjax/toy")
    >>> pfjax.rollout(policy, [[3, 4]], samples_per_prompt=2, max_new_tokens=5).tokens.shape
    (1, 2, 5)
    """
    sizes = {"samples_per_prompt": samples_per_prompt, "max_new_tokens": max_new_tokens}
    width = _prompt_width(policy.config, prompts, capacity, **sizes)
    options.check_whole("seed", seed, 0, options.LARGEST_SEED)
    samples = range(samples_per_prompt) if samples is None else samples
    _check(temperature, token_filters, stop, len(prompts) * len(samples))
    _check_alpha(policy.config.alpha_range, alpha, len(prompts))
    if stop.max_total_tokens is None:  # which all of them share
        at_once = slots.prompts_at_once(policy.config, **sizes)
        if len(prompts) > at_once:
            how = {"step": step, "token_filters": token_filters, "stop": stop}
            how |= {"capacity": dataclasses.replace(capacity, prompt_width=width)}
            how |= {"temperature": temperature, "seed": seed, "samples": samples}
            ids = range(len(prompts)) if prompt_ids is None else prompt_ids
            of_each = (prompts, ids, alpha)
            return _by_groups(policy, at_once, of_each, on_finish, **sizes, **how)
    sizes |= dataclasses.asdict(capacity) | {"prompt_width": width}
    settings = Settings(
        config=policy.config,
        plan=slots.make_plan(policy, num_prompts=len(prompts), **sizes),
        samples_per_prompt=samples_per_prompt,
        stop_ids=policy.config.stop_ids if stop.stop_ids is None else stop.stop_ids,
        is_greedy=temperature == 0,
        token_filters=token_filters,
    )
    state = SamplerState(
        unstack.weights(policy.config, policy.params),
        jax.random.fold_in(jax.random.key(seed), step),
        np.float32(temperature or 1.0),
    )
    how = (max_new_tokens, stop, on_finish, samples)
    return Scheduler(settings, state, prompts, prompt_ids, *how, alpha=alpha).to_end()


def _by_groups(
    policy: Policy,
    at_once: int,
    of_each: tuple[Sequence | np.ndarray | None, ...],
    on_finish: Callable[[list[Finished]], None] | None,
    **how: Any,
) -> Rollout:
    """A rollout of more prompts than there is room for the responses to."""
    parts = []
    num_prompts = len(of_each[0])
    for start in range(0, num_prompts, at_once):
        group = slice(start, start + at_once)
        prompts, ids, alpha = (None if x is None else x[group] for x in of_each)

        def pass_on(found, start=start):
            on_finish([x._replace(prompt=start + x.prompt) for x in found])

        how |= {"prompt_ids": [*ids], "alpha": alpha}
        how |= {"on_finish": None if on_finish is None else pass_on}
        parts.append(rollout(policy, prompts, **how))
    join = lambda *x: np.concatenate(x) if np.ndim(x[0]) else sum(x)
    return jax.tree.map(join, *parts)


def _prompt_width(
    config: ModelConfig,
    prompts: list[list[int]],
    capacity: Capacity,
    samples_per_prompt: int,
    max_new_tokens: int,
) -> int:
    """Tokens that prompts have room for. Raises ValueError for sizes that will not do."""
    options.check_whole("samples_per_prompt", samples_per_prompt, 1)
    options.check_whole("max_new_tokens", max_new_tokens, 1)
    longest = int(slots.check_prompts(config, prompts, max_new_tokens).max())
    width = capacity.prompt_width or longest
    if longest > width:
        raise ValueError(f"a prompt has {longest} tokens, prompt_width is {width}")
    return width


def _check(
    temperature: float, filters: TokenFilters, stop: StopConditions, num_samples: int
) -> None:
    if not isinstance(temperature, Real) or not 0 <= temperature < math.inf:
        raise ValueError(
            f"temperature must not be negative, nor infinite, got {temperature!r}"
        )
    for name, given, kind in (
        ("token_filters", filters, TokenFilters),
        ("stop", stop, StopConditions),
    ):
        if not isinstance(given, kind):
            raise ValueError(  # noqa: TRY004
                f"{name} must be a pfjax.sampler.options.{kind.__name__}, got {given!r:.100}"
            )
    if stop.max_total_tokens is not None and stop.max_total_tokens < num_samples:
        raise ValueError(
            f"max_total_tokens={stop.max_total_tokens} is less than one token for each "
            f"of the {num_samples} responses"
        )


def _check_alpha(
    ends: tuple[float, ...],
    alpha: Sequence[float] | np.ndarray | None,
    num_prompts: int,
) -> None:
    """Raises ValueError unless each prompt of a policy for every alpha has one, and no other."""
    if alpha is None and not ends:
        return
    if not ends:
        raise ValueError(
            "alpha is for a policy trained for every alpha (alpha_range), which this is not"
        )
    if alpha is None or len(alpha) != num_prompts or not min(alpha) > 0:
        raise ValueError(
            f"the policy is one for every alpha from {ends[0]:g} to {ends[1]:g}: give one for "
            f"each of the {num_prompts} prompts, got {alpha}; or take the policy at one, "
            "pfjax.at_alpha(policy, 2.0)"
        )


def all_finished(rollout: Rollout) -> list[Finished]:
    """All responses of a rollout, as `on_finish` receives them."""
    return [
        Finished(
            prompt=q,
            sample=g,
            tokens=rollout.tokens[q, g, :n],
            log_probs=rollout.log_probs[q, g, :n],
            is_stopped=bool(rollout.finished[q, g]),
        )
        for (q, g), n in np.ndenumerate(rollout.lengths)
    ]

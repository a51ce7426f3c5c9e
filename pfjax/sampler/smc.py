"""Sequential Monte Carlo: samples of a target from one weighted population per prompt.

It draws from the same targets as `mcmc` does, and estimates what each sums to.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float, Int

from pfjax.batch import Rollout
from pfjax.model.transformer import Policy
from pfjax.sampler import chains
from pfjax.sampler.chains import Chains, Run
from pfjax.targets import Array, Target

# What random numbers beside those of tokens are for; `mcmc` has two before it.
_RESAMPLE = 2**31 - 3
_SHOWN = 8  # prompts that `describe` gives a line each


class Diagnostics(NamedTuple):
    """How well the populations stood for the target, one number per prompt."""

    log_sum: Float[Array, "p"]  # estimate: of the target's density, over all responses
    # Distinct particles of the first step that the samples descend from.
    ancestors: Int[Array, "p"]
    min_ess: Float[Array, "p"]  # effective sample size, least before any resampling
    final_ess: Float[Array, "p"]  # of the weights that the samples are drawn by


def sequential_monte_carlo(
    policy: Policy,
    prompts: list[list[int]],
    target: Target,
    samples_per_prompt: int = 8,
    max_new_tokens: int = 512,
    *,
    log_z: float = 0.0,
    reward: chains.Reward | None = None,
    temperature: float | None = None,
    particles: int = 64,
    ramp: int = 100,
    seed: int = 0,
    stop_ids: tuple[int, ...] | None = None,
) -> tuple[Rollout, Diagnostics]:
    r"""Draws responses to each prompt from a population of particles.

    Step t draws a token of every particle that has not ended, from the proposal q, and
    multiplies the weight of every particle by

    .. math:: \frac{\pi_t(y_{\le t})}{\pi_{t-1}(y_{<t})\, q(y_t)}

    where the density :math:`\pi_t` is the target's of the response as far as it goes,
    with a power that goes from 1 to alpha over `ramp` tokens. So particles that have
    ended are weighed again too, without a q; and the reward multiplies in when they end.
    Populations are resampled (systematically) when their effective size falls below
    half. The samples are drawn from the last one by weight: they are not independent,
    and as many as `particles` exhaust it.

    Args:
      particles: N per prompt; the bias falls as 1 / N.
      ramp: tokens over which the power grows; 1 for no ramp.
      temperature: of the proposal; 1 / alpha when not given.
      (the others): as in `mcmc.metropolis_hastings`.

    Returns:
      Host arrays, as `engine.rollout` does; and what shows how far to trust them.

    Raises:
      ValueError: for a target that cannot be drawn from, or prompts that do not fit.

    References:
      Power-SMC, arXiv 2602.10273.
    """
    what = (policy, prompts, particles, max_new_tokens, target, log_z)
    how = (reward, temperature, seed, stop_ids)
    return chains.draw(_evolve, (samples_per_prompt, ramp), *what, *how)


def is_degenerate(ancestors: Any, samples: int) -> Any:
    """Whether the samples begin alike because they descend from few particles, fewer than
    half of them, whatever the target is."""
    return 2 * ancestors < samples


def describe(rollout: Rollout, found: Diagnostics, particles: int, ramp: int) -> str:
    """The prompts of fewest ancestors, a line each, and a warning of those too few."""
    num, samples = rollout.lengths.shape
    lines = []
    for p in sorted(np.argsort(found.ancestors, kind="stable")[:_SHOWN].tolist()):
        drawn = zip(rollout.tokens[p], rollout.lengths[p], strict=True)
        distinct = len({tuple(y[:n].tolist()) for y, n in drawn})
        lines.append(
            f"prompt {p}: {samples} samples, {distinct} distinct, descend from "
            f"{found.ancestors[p]} of {particles} particles; effective sample size "
            f"{found.min_ess[p]:.1f} at least, {found.final_ess[p]:.1f} at the end"
        )
    if num > _SHOWN:
        lines.append(f"the other {num - _SHOWN} prompts have as many ancestors or more")
    if bad := int(is_degenerate(found.ancestors, samples).sum()):
        lines.append(
            f"warning: samples of {bad} of {num} prompts are degenerate, with fewer "
            f"ancestors than half of the samples: set more --particles (now {particles}), "
            f"another --ramp (now {ramp}) or --method=mh"
        )
    return "\n".join(lines)


class _Population(NamedTuple):
    """Particles, those of a prompt side by side."""

    y: Chains
    log_density: Float[Array, "s"]  # under the target of the last step
    log_w: Float[Array, "s"]
    evidence: Float[Array, "p"]  # what resampling took off the weights so far
    root: Int[Array, "s"]  # which particle of the first step each descends from
    min_ess: Float[Array, "p"]


def _evolve(
    run: Run, y: Chains, samples: int, ramp: int
) -> tuple[Chains, Int[Array, ""], Diagnostics]:
    """Draws all particles to their ends, and `samples` of each population."""
    num, n = len(run.tokens), run.spec.settings.samples_per_prompt
    power = lambda t: 1 + (run.spec.target.alpha - 1) * jnp.minimum(t / ramp, 1)

    def body(carry):
        t, population = carry
        return t + 1, _step(run, population, t, power(t + 1))

    empty = chains.log_density(run, y, power(0))
    root = jnp.tile(jnp.arange(n), num)
    start = _Population(y, empty, empty, jnp.zeros(num), root, jnp.full(num, float(n)))
    is_left = lambda carry: chains.is_open(run, carry[1].y).any()
    t, end = lax.while_loop(is_left, body, (jnp.int32(0), start))
    # All may have ended before the power had grown to alpha.
    log_w = end.log_w + chains.log_density(run, end.y) - end.log_density
    groups = log_w.reshape(num, n)
    total = jax.nn.logsumexp(groups, axis=1)
    offset = chains.uniform(run, _RESAMPLE, run.spec.max_new_tokens)
    source = _systematic(groups - total[:, None], offset, samples)
    y, root = _take((end.y._replace(cache=()), end.root), source, n)
    final_ess = _effective_size(groups)
    found = Diagnostics(
        log_sum=end.evidence + total - jnp.log(n),
        ancestors=_count_distinct(root.reshape(num, samples)),
        min_ess=jnp.minimum(end.min_ess, final_ess),
        final_ess=final_ess,
    )
    return y, t, found


def _step(run: Run, now: _Population, t: Int[Array, ""], alpha: Array) -> _Population:
    """Draws the token at index t, weighs all particles by the power `alpha` after it, and
    resamples where needed."""
    num, n = len(run.tokens), run.spec.settings.samples_per_prompt
    is_active = chains.is_open(run, now.y)
    y = chains.one_token(run, now.y, is_active, 0)
    log_density = chains.log_density(run, y, alpha)
    log_q = jnp.where(is_active, y.log_q[:, t], 0.0)
    groups = (now.log_w + log_density - now.log_density - log_q).reshape(num, n)
    total = jax.nn.logsumexp(groups, axis=1)
    size = _effective_size(groups)
    is_thin = size < n / 2
    offset = chains.uniform(run, _RESAMPLE, t)
    source = _systematic(groups - total[:, None], offset, n)
    source = jnp.where(is_thin[:, None], source, jnp.arange(n)[None])
    copy = lambda tree: _take(tree, source, n)
    drawn = (y, log_density, now.root)
    y, log_density, root = lax.cond(is_thin.any(), copy, lambda x: x, drawn)
    return _Population(
        y,
        log_density,
        log_w=jnp.where(is_thin[:, None], 0.0, groups).ravel(),
        evidence=now.evidence + jnp.where(is_thin, total - jnp.log(n), 0.0),
        root=root,
        min_ess=jnp.minimum(now.min_ess, size),
    )


def _take(tree: Any, source: Int[Array, "p m"], n: int) -> Any:
    """The members `source` of each population of n, of arrays `[p * n, ...]`."""
    index = (n * jnp.arange(len(source))[:, None] + source).ravel()
    return jax.tree.map(lambda x: x[index], tree)


def _effective_size(log_w: Float[Array, "p n"]) -> Float[Array, "p"]:
    total = jax.nn.logsumexp(log_w, axis=1)
    size = jnp.exp(2 * total - jax.nn.logsumexp(2 * log_w, axis=1))
    return jnp.minimum(size, log_w.shape[1])  # but for rounding


def _count_distinct(root: Int[Array, "p m"]) -> Int[Array, "p"]:
    root = jnp.sort(root, axis=1)
    return 1 + (root[:, 1:] != root[:, :-1]).sum(axis=1)


def _systematic(
    log_w: Float[Array, "p n"], offset: Float[Array, "p"], num: int
) -> Int[Array, "p m"]:
    """`num` members of each population by weight, with one random number for all."""
    places = (offset[:, None] + jnp.arange(num)[None]) / num
    upto = jnp.cumsum(jnp.exp(log_w), axis=1)
    upto = upto / upto[:, -1:]
    found = jax.vmap(lambda c, u: jnp.searchsorted(c, u, side="right"))(upto, places)
    return jnp.minimum(found, log_w.shape[1] - 1)

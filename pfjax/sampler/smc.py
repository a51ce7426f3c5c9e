"""Sequential Monte Carlo: samples of a target from one weighted population per prompt.

It draws from the same targets as `mcmc` does, and estimates what each sums to.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float, Int

from pfjax.batch import Array, Rollout
from pfjax.model.transformer import Policy
from pfjax.sampler import chains
from pfjax.sampler.chains import Chains, Run
from pfjax.targets import Target

# What random numbers beside those of tokens are for; `mcmc` has two before it.
_RESAMPLE = 2**31 - 3


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
) -> tuple[Rollout, np.ndarray]:
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
      Host arrays, as `engine.rollout` does; and `[P]` estimates of the log of the sum of
      the target's density over all responses.

    Raises:
      ValueError: for a target that cannot be drawn from, or prompts that do not fit.

    References:
      Power-SMC, arXiv 2602.10273.
    """
    what = (policy, prompts, particles, max_new_tokens, target, log_z)
    how = (reward, temperature, seed, stop_ids)
    return chains.draw(_evolve, (samples_per_prompt, ramp), *what, *how)


class _Population(NamedTuple):
    """Particles, those of a prompt side by side."""

    y: Chains
    log_density: Float[Array, "s"]  # under the target of the last step
    log_w: Float[Array, "s"]
    evidence: Float[Array, "p"]  # what resampling took off the weights so far


def _evolve(
    run: Run, y: Chains, samples: int, ramp: int
) -> tuple[Chains, Int[Array, ""], Float[Array, "p"]]:
    """Draws all particles to their ends, and `samples` of each population."""
    num, n = len(run.tokens), run.spec.settings.samples_per_prompt
    power = lambda t: 1 + (run.spec.target.alpha - 1) * jnp.minimum(t / ramp, 1)

    def body(carry):
        t, population = carry
        return t + 1, _step(run, population, t, power(t + 1))

    empty = chains.log_density(run, y, power(0))
    start = _Population(y, empty, empty, jnp.zeros(num))
    is_left = lambda carry: chains.is_open(run, carry[1].y).any()
    t, end = lax.while_loop(is_left, body, (jnp.int32(0), start))
    # All may have ended before the power had grown to alpha.
    log_w = end.log_w + chains.log_density(run, end.y) - end.log_density
    groups = log_w.reshape(num, n)
    total = jax.nn.logsumexp(groups, axis=1)
    offset = chains.uniform(run, _RESAMPLE, run.spec.max_new_tokens)
    source = _systematic(groups - total[:, None], offset, samples)
    index = (n * jnp.arange(num)[:, None] + source).ravel()
    y = jax.tree.map(lambda x: x[index], end.y._replace(cache=()))
    return y, t, end.evidence + total - jnp.log(n)


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
    size = jnp.exp(2 * total - jax.nn.logsumexp(2 * groups, axis=1))
    is_thin = size < n / 2
    offset = chains.uniform(run, _RESAMPLE, t)
    source = _systematic(groups - total[:, None], offset, n)
    source = jnp.where(is_thin[:, None], source, jnp.arange(n)[None])
    index = (n * jnp.arange(num)[:, None] + source).ravel()
    copy = lambda tree: jax.tree.map(lambda x: x[index], tree)
    y, log_density = lax.cond(is_thin.any(), copy, lambda x: x, (y, log_density))
    return _Population(
        y,
        log_density,
        log_w=jnp.where(is_thin[:, None], 0.0, groups).ravel(),
        evidence=now.evidence + jnp.where(is_thin, total - jnp.log(n), 0.0),
    )


def _systematic(
    log_w: Float[Array, "p n"], offset: Float[Array, "p"], num: int
) -> Int[Array, "p m"]:
    """`num` members of each population by weight, with one random number for all."""
    places = (offset[:, None] + jnp.arange(num)[None]) / num
    upto = jnp.cumsum(jnp.exp(log_w), axis=1)
    upto = upto / upto[:, -1:]
    found = jax.vmap(lambda c, u: jnp.searchsorted(c, u, side="right"))(upto, places)
    return jnp.minimum(found, log_w.shape[1] - 1)

r"""Metropolis-Hastings: samples of a target without training for it.

Any target of `pfjax.targets` can be drawn from: `Target(alpha, has_format=False)` is the one
that PowerFlow trains toward, :math:`p^\alpha e^{-\lambda|y|}` with
:math:`\lambda = \log Z'`, and with :math:`\lambda = 0` the power distribution of whole
responses. It costs many times what sampling does. (Sampling at temperature 1/alpha is
neither: it sharpens each token on its own.)
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from pfjax.batch import Rollout
from pfjax.model.transformer import Policy
from pfjax.sampler import chains
from pfjax.sampler.chains import Chains, Run
from pfjax.targets import Array, Target

# What random numbers beside those of tokens are for; `smc` has the next.
_PLACE, _TAKE = 2**31 - 1, 2**31 - 2


def metropolis_hastings(
    policy: Policy,
    prompts: list[list[int]],
    target: Target,
    samples_per_prompt: int = 8,
    max_new_tokens: int = 512,
    *,
    log_z: float = 0.0,
    reward: chains.Reward | None = None,
    temperature: float | None = None,
    blocks: int = 16,
    steps: int = 10,
    seed: int = 0,
    stop_ids: tuple[int, ...] | None = None,
) -> Rollout:
    r"""Draws each response as a Markov chain of its own.

    Responses grow by blocks. After each, `steps` times: a place `i` is drawn from all
    of the response, what follows is drawn anew up to the end of the block, and the new
    response y' taken with the probability min(1, a),

    .. math:: \log a = \log \pi^*(y') - \log \pi^*(y)
              + \log q(y_{\ge i}) - \log q(y'_{\ge i}) + \log|y| - \log|y'|

    with the target's density :math:`\pi^*` and the proposal q. The last two terms stand
    for the choice of `i`: without them, or with proposals cut to the present length,
    responses that ended early cannot grow at their due rate.

    A chain that has to change the way its response begins mixes slowly: on the toy
    model at alpha 4, 40 proposals leave a mean length of 20 where the target's is 10.7.

    Args:
      policy: the model.
      prompts: P lists of token ids.
      target: what to draw from, without a format term.
      samples_per_prompt: G chains.
      max_new_tokens: R.
      log_z: in nats per token, lambda; 0 for a target of whole sequences.
      reward: r(y), which the target's beta weighs, of tokens `[s, r]` (undefined past
        the length), lengths `[s]` and the numbers of their prompts `[s]`. It is traced
        by jit.
      temperature: of the proposal; 1 / alpha when not given.
      blocks: in which a response grows.
      steps: proposals after each.
      seed: of all random numbers.
      stop_ids: tokens that end a response; the config's when not given.

    Returns:
      Host arrays, as `engine.rollout` does; `slot_steps` counts all that was drawn.

    Raises:
      ValueError: for a target that cannot be drawn from, or prompts that do not fit.

    References:
      Karan and Du, arXiv 2510.14901, Algorithm 1; the acceptance is that of its text,
      for responses whose length may change.
    """
    what = (policy, prompts, samples_per_prompt, max_new_tokens, target, log_z)
    how = (reward, temperature, seed, stop_ids)
    return chains.draw(_grow, (blocks, steps), *what, *how)[0]


def _grow(
    run: Run, y: Chains, blocks: int, steps: int
) -> tuple[Chains, Int[Array, ""], tuple[()]]:
    """Grows the chains by blocks; also returns the steps it took, and nothing else."""

    def grow(block, carry):
        y, work = carry
        end = -(-(block + 1) * run.spec.max_new_tokens // blocks)
        number = block * (steps + 1)
        n, y = _extend(run, y, y.length, ~y.is_stopped, end, number)

        def step(k, carry):
            y, work = carry
            n, y = _step(run, y, end, number + 1 + k)
            return y, work + n

        return lax.fori_loop(0, steps, step, (y, work + n))

    y, work = lax.fori_loop(0, blocks, grow, (y, jnp.int32(0)))
    return y, work, ()


def _extend(
    run: Run,
    y: Chains,
    first: Int[Array, "s"],
    is_in: Bool[Array, "s"],
    end: Int[Array, ""],
    number: Int[Array, ""],
) -> tuple[Int[Array, ""], Chains]:
    """Cuts the responses `is_in` to `first` and draws them anew, up to `end`; also returns
    the steps it took."""
    length = jnp.where(is_in, first, y.length)
    y = y._replace(length=length, is_stopped=y.is_stopped & ~is_in)
    is_active = lambda y: is_in & ~y.is_stopped & (y.length < end)

    def body(carry):
        i, y = carry
        return i + 1, chains.one_token(run, y, is_active(y), number)

    return lax.while_loop(lambda c: is_active(c[1]).any(), body, (jnp.int32(0), y))


def _step(
    run: Run, y: Chains, end: Int[Array, ""], number: Int[Array, ""]
) -> tuple[Int[Array, ""], Chains]:
    """Proposes another response to every chain, which takes it or stays."""
    g = run.spec.settings.samples_per_prompt
    uniform = lambda name: chains.uniform(run, name, number, (g,)).ravel()
    first = (uniform(_PLACE) * y.length).astype(jnp.int32)
    first = jnp.minimum(first, y.length - 1)
    n, new = _extend(run, y, first, jnp.ones_like(y.is_stopped), end, number)

    def log_weight(y: Chains) -> Float[Array, "s"]:
        log_q = chains.sum_from(y.log_q, y, first)
        return chains.log_density(run, y) - log_q - jnp.log(y.length)

    takes = jnp.log(uniform(_TAKE)) < log_weight(new) - log_weight(y)

    def choose(a, b):
        return jnp.where(takes.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return n, jax.tree.map(choose, new, y)

r"""Samples of a model's power distribution without training it.

The target is :math:`p^\alpha e^{-\lambda|y|}`: with lambda = 0 the power distribution of
whole responses, with PowerFlow's log Z' as lambda the one that PowerFlow trains toward.
Both ways cost many times what sampling does. (Sampling at temperature 1/alpha is neither:
it sharpens each token on its own.)

A response that reaches `max_new_tokens` is cut there, and is an outcome like any other.
Every slot of `decode.py` holds one particle or chain; its cache is kept up to the token
from which it is drawn anew.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Float, Int

from pfjax.batch import Array, Rollout
from pfjax.infra import sharding
from pfjax.model.transformer import Policy
from pfjax.sampler import decode, filters, slots

# What random numbers beside those of tokens are for.
_PLACE, _TAKE, _RESAMPLE = (2**31 - i for i in (1, 2, 3))


class Target(NamedTuple):
    """What is drawn from, and the proposal: the model at a temperature."""

    alpha: Float[Array, ""]
    log_z: Float[Array, ""]  # lambda, nats a token
    temperature: Float[Array, ""]


class _Chains(NamedTuple):
    """A response a slot. Past `length` the content is undefined."""

    tokens: Int[Array, "s r"]
    log_p: Float[Array, "s r"]
    log_q: Float[Array, "s r"]  # of the proposal
    length: Int[Array, "s"]
    is_stopped: Bool[Array, "s"]
    cache: Any


class _Prompts(NamedTuple):
    """Prompts of one part of the batch, and what is drawn after each."""

    tokens: Int[Array, "p t"]
    length: Int[Array, "p"]
    prompt_id: Int[Array, "p"]


class _Shape(NamedTuple):
    """What programs are compiled for."""

    s: decode.Settings  # samples_per_prompt: particles or chains
    width: int  # of the caches of responses
    new: int  # R


def metropolis_hastings(
    policy: Policy,
    prompts: list[list[int]],
    samples_per_prompt: int = 8,
    max_new_tokens: int = 512,
    *,
    alpha: float,
    log_z: float = 0.0,
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

    .. math:: \log a = \alpha(\log p(y') - \log p(y)) - \lambda(|y'| - |y|)
              + \log q(y_{\ge i}) - \log q(y'_{\ge i}) + \log|y| - \log|y'|

    The last two terms stand for the choice of `i`: without them, or with proposals cut to
    the present length, responses that ended early cannot grow at their due rate.

    A chain that has to change the way its response begins mixes slowly: on the embedded
    model at alpha 4, 40 proposals leave a mean length of 20 where the target's is 10.7.

    Args:
      policy: the model.
      prompts: P lists of token ids.
      samples_per_prompt: G chains.
      max_new_tokens: R.
      alpha: the power.
      log_z: lambda, nats a token.
      temperature: of the proposal; 1 / alpha when not given.
      blocks: in which a response grows.
      steps: proposals after each.
      seed: of all draws.
      stop_ids: tokens that end a response; the config's when not given.

    Returns:
      Host arrays, as `engine.rollout` does; `row_steps` counts all tokens drawn for them.

    References:
      Karan and Du, arXiv 2510.14901, Algorithm 1; the acceptance is that of its text,
      for responses whose length may change.
    """

    def draw(shape, args, target, ids):
        program = functools.partial(_chains, shape=shape, blocks=blocks, steps=steps)
        return jax.jit(program)(*args, target, ids)

    return _in_groups(
        draw,
        policy,
        prompts,
        samples_per_prompt,
        samples_per_prompt,
        max_new_tokens,
        _target(alpha, log_z, temperature),
        seed,
        stop_ids,
    )[0]


def sequential_monte_carlo(
    policy: Policy,
    prompts: list[list[int]],
    samples_per_prompt: int = 8,
    max_new_tokens: int = 512,
    *,
    alpha: float,
    log_z: float = 0.0,
    temperature: float | None = None,
    particles: int = 64,
    ramp: int = 100,
    seed: int = 0,
    stop_ids: tuple[int, ...] | None = None,
) -> tuple[Rollout, np.ndarray]:
    r"""Draws responses of a prompt from one weighted population of particles.

    A token drawn from the proposal q multiplies its particle's weight by

    .. math:: p(y_t)^{\alpha_t}\, q(y_t)^{-1}\, p(y_{<t})^{\alpha_t - \alpha_{t-1}}\,
              e^{-\lambda}

    with alpha_t going from 1 to alpha over `ramp` tokens; the third factor is due to
    responses that have ended as well. Populations are resampled (systematically) when
    their effective size falls below half. The samples are drawn from the last one by
    weight: they are not independent, and as many as `particles` exhaust it.

    Args:
      particles: N a prompt; the bias falls as 1 / N.
      ramp: tokens over which the power grows; 1 for no ramp.
      temperature: of the proposal; 1 / alpha when not given.
      (the others): as in `metropolis_hastings`.

    Returns:
      Host arrays, as `engine.rollout` does; and `[P]` estimates of the log of the sum of
      :math:`p^\alpha e^{-\lambda|y|}` over all responses.

    References:
      Power-SMC, arXiv 2602.10273.
    """

    def draw(shape, args, target, ids):
        program = functools.partial(
            _particles, shape=shape, samples=samples_per_prompt, ramp=ramp
        )
        return jax.jit(program)(*args, target, ids)

    return _in_groups(
        draw,
        policy,
        prompts,
        samples_per_prompt,
        particles,
        max_new_tokens,
        _target(alpha, log_z, temperature),
        seed,
        stop_ids,
    )


def _target(alpha: float, log_z: float, temperature: float | None) -> Target:
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha}")
    if temperature is not None and not temperature > 0:
        raise ValueError(
            f"the proposal's temperature must be positive, got {temperature}"
        )
    one = lambda x: jnp.float32(x)
    return Target(one(alpha), one(log_z), one(temperature or 1 / alpha))


def _in_groups(
    draw: Any,
    policy: Policy,
    prompts: list[list[int]],
    samples: int,
    slots_per_prompt: int,
    max_new_tokens: int,
    target: Target,
    seed: int,
    stop_ids: tuple[int, ...] | None,
) -> tuple[Rollout, np.ndarray]:
    """Runs as many prompts at once as memory holds; one program for all."""
    longest = max((len(p) for p in prompts), default=0)
    if not min((len(p) for p in prompts), default=0):
        raise ValueError("prompts must not be empty")
    if longest + max_new_tokens > policy.config.max_positions:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the "
            f"model's {policy.config.max_positions} positions"
        )
    plan = slots.make_plan(
        policy,
        num_prompts=len(prompts),
        samples_per_prompt=slots_per_prompt,
        max_new_tokens=max_new_tokens,
        prompt_width=longest,
    )
    at_once = plan.parts * max(plan.slots // slots_per_prompt, 1)
    shape = _Shape(
        decode.Settings(
            config=policy.config,
            samples_per_prompt=slots_per_prompt,
            stop_ids=policy.config.stop_ids if stop_ids is None else stop_ids,
            truncation=filters.ALL_TOKENS,
            backend=plan.backend,
            cache_dtype=plan.cache_dtype,
        ),
        plan.widths[-1],
        max_new_tokens,
    )
    source = decode.Draw(
        decode.weights(policy.config, policy.params),
        jax.random.key(seed),
        target.temperature,
    )
    parts = []
    for first in range(0, len(prompts), at_once):
        ids = [min(first + i, len(prompts) - 1) for i in range(at_once)]
        tokens = np.zeros((at_once, plan.prompt_width), np.int32)
        for row, i in zip(tokens, ids, strict=True):
            row[: len(prompts[i])] = prompts[i]
        lengths = np.array([len(prompts[i]) for i in ids], np.int32)
        args = _Prompts(
            tokens, lengths, np.arange(first, first + at_once, dtype=np.int32)
        )
        found = jax.device_get(draw(shape, (source,), target, args))
        parts.append([x[: len(prompts) - first] for x in found])
    tokens, log_p, length, is_stopped, evidence, steps = (
        np.concatenate(x) for x in zip(*parts, strict=True)
    )
    out = Rollout(tokens, length, log_p, is_stopped, int(steps.sum()))
    return out, evidence


def _start(draw: decode.Draw, p: _Prompts, shape: _Shape) -> tuple[Any, _Chains]:
    """Prompts but their last tokens in caches; empty responses."""
    s, num = shape.s, len(p.length)
    count = num * s.samples_per_prompt
    positions = jnp.broadcast_to(jnp.arange(p.tokens.shape[1]), p.tokens.shape)
    is_cached = positions < p.length[:, None] - 1
    lane = jnp.where(is_cached, jnp.arange(num)[:, None], -1)
    cached = decode.prefill_local(
        draw,
        decode.Prompts(
            decode.empty_cache(s, num, p.tokens.shape[1]), jnp.zeros(num, jnp.int32)
        ),
        p.tokens,
        positions,
        is_cached.astype(jnp.int32),
        lane,
        p.length - 1,
        s=s,
    )
    empty = _Chains(
        tokens=jnp.zeros((count, shape.new), jnp.int32),
        log_p=jnp.zeros((count, shape.new)),
        log_q=jnp.zeros((count, shape.new)),
        length=jnp.zeros(count, jnp.int32),
        is_stopped=jnp.zeros(count, bool),
        cache=decode.empty_cache(s, count, shape.width),
    )
    return cached, empty


def _one_token(
    draw: decode.Draw,
    p: _Prompts,
    cached: decode.Prompts,
    y: _Chains,
    is_active: Bool[Array, "s"],
    number: Int[Array, ""],
    shape: _Shape,
) -> _Chains:
    """Draws the next token of the active responses; those that end are stopped.

    Args:
      number: of this draw, so that a place is drawn anew each time.
    """
    s, g = shape.s, shape.s.samples_per_prompt
    slot = jnp.arange(len(y.length), dtype=jnp.int32)
    prompt = slot // g
    # A response at rest runs its own last token again, which changes nothing.
    at = jnp.minimum(y.length, shape.width - 1)
    of_prompt = jnp.take_along_axis(p.tokens, p.length[:, None] - 1, axis=1)[:, 0]
    before = jnp.take_along_axis(y.tokens, jnp.maximum(at - 1, 0)[:, None], axis=1)
    running = decode.Slots(
        sample=slot,
        cell=slot,
        drawn=at,
        last=jnp.where(at > 0, before[:, 0], of_prompt[prompt]),
        begun=jnp.zeros(1, jnp.int32),
        row_steps=jnp.zeros(1, jnp.int32),
    )
    logits, cache = decode.forward(s, draw, cached, running, y.cache, g)
    log_p = jax.nn.log_softmax(logits)
    log_q = jax.nn.log_softmax(logits / draw.temperature)

    def sample(prompt_id, member, position, x):
        key = draw.key
        for n in (prompt_id, member, position, number):
            key = jax.random.fold_in(key, n)
        return jax.random.categorical(key, x).astype(jnp.int32)

    token = jax.vmap(sample)(p.prompt_id[prompt], slot % g, at, log_q)
    pick = lambda x: jnp.take_along_axis(x, token[:, None], axis=1)[:, 0]
    where = (slot, jnp.where(is_active, at, shape.new))  # at rest: out of bounds
    put = lambda x, new: x.at[where].set(new, mode="drop")
    stops = jnp.isin(token, jnp.array(s.stop_ids, jnp.int32))
    return _Chains(
        tokens=put(y.tokens, token),
        log_p=put(y.log_p, pick(log_p)),
        log_q=put(y.log_q, pick(log_q)),
        length=y.length + is_active,
        is_stopped=y.is_stopped | (stops & is_active),
        cache=cache,
    )


def _sum(x: Float[Array, "s r"], y: _Chains, first: Any = 0) -> Float[Array, "s"]:
    """Sums over the tokens of each response, from `first` on."""
    place = jnp.arange(x.shape[1])[None]
    first = jnp.broadcast_to(first, y.length.shape)
    inside = (place >= first[:, None]) & (place < y.length[:, None])
    return jnp.where(inside, x, 0.0).sum(axis=1)


def _chains(
    draw: decode.Draw,
    target: Target,
    prompts: _Prompts,
    *,
    shape: _Shape,
    blocks: int,
    steps: int,
) -> tuple[Array, ...]:
    def local(draw, target, p):
        cached, y = _start(draw, p, shape)
        g = shape.s.samples_per_prompt

        def extend(y, first, is_in, end, number):
            """The responses `is_in`, cut to `first` and drawn anew up to `end`."""
            y = y._replace(
                length=jnp.where(is_in, first, y.length),
                is_stopped=y.is_stopped & ~is_in,
            )
            is_open = lambda y: is_in & ~y.is_stopped & (y.length < end)

            def body(carry):
                i, y = carry
                return i + 1, _one_token(draw, p, cached, y, is_open(y), number, shape)

            return lax.while_loop(
                lambda c: is_open(c[1]).any(), body, (jnp.int32(0), y)
            )

        def uniform(name, number):
            key = jax.random.fold_in(jax.random.fold_in(draw.key, name), number)
            of_prompt = jax.vmap(lambda i: jax.random.fold_in(key, i))(p.prompt_id)
            return jax.vmap(lambda k: jax.random.uniform(k, (g,)))(of_prompt).ravel()

        def propose(k, carry, end, block):
            y, work = carry
            number = 1 + block * (steps + 1) + k
            first = (uniform(_PLACE, number) * y.length).astype(jnp.int32)
            first = jnp.minimum(first, y.length - 1)
            n, new = extend(y, first, jnp.ones_like(y.is_stopped), end, number)
            log_a = (
                target.alpha * (_sum(new.log_p, new, first) - _sum(y.log_p, y, first))
                - target.log_z * (new.length - y.length)
                + _sum(y.log_q, y, first)
                - _sum(new.log_q, new, first)
                + jnp.log(y.length)
                - jnp.log(new.length)
            )
            takes = jnp.log(uniform(_TAKE, number)) < log_a

            def choose(a, b):
                return jnp.where(takes.reshape(-1, *[1] * (a.ndim - 1)), a, b)

            return jax.tree.map(choose, new, y), work + n

        def grow(block, carry):
            y, work = carry
            end = -(-(block + 1) * shape.new // blocks)
            n, y = extend(y, y.length, ~y.is_stopped, end, block * (steps + 1))
            step = functools.partial(propose, end=end, block=block)
            return lax.fori_loop(0, steps, step, (y, work + n))

        y, work = lax.fori_loop(0, blocks, grow, (y, jnp.int32(0)))
        return _results(y, work, jnp.zeros(len(p.length)), g)

    return sharding.over_batch(local, 2)(draw, target, prompts)


def _particles(
    draw: decode.Draw,
    target: Target,
    prompts: _Prompts,
    *,
    shape: _Shape,
    samples: int,
    ramp: int,
) -> tuple[Array, ...]:
    n = shape.s.samples_per_prompt

    def power(t):
        return 1 + (target.alpha - 1) * jnp.minimum(t / ramp, 1)

    def local(draw, target, p):
        cached, y = _start(draw, p, shape)
        num = len(p.length)

        def uniform(t):
            key = jax.random.fold_in(jax.random.fold_in(draw.key, _RESAMPLE), t)
            return jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(
                p.prompt_id
            )

        def is_open(y):
            return ~y.is_stopped & (y.length < shape.new)

        def body(carry):
            t, y, log_w, evidence = carry
            active, before = is_open(y), _sum(y.log_p, y)
            y = _one_token(draw, p, cached, y, active, jnp.int32(0), shape)
            at = jnp.minimum(t, shape.new - 1)
            now, last = power(t + 1), power(t)
            drawn = now * y.log_p[:, at] - y.log_q[:, at] - target.log_z
            log_w += (now - last) * before + jnp.where(active, drawn, 0.0)
            groups = log_w.reshape(num, n)
            total = jax.nn.logsumexp(groups, axis=1)
            size = jnp.exp(2 * total - jax.nn.logsumexp(2 * groups, axis=1))
            is_thin = size < n / 2
            source = _systematic(groups - total[:, None], uniform(t), n)
            source = jnp.where(is_thin[:, None], source, jnp.arange(n)[None])
            index = (n * jnp.arange(num)[:, None] + source).ravel()
            copy = lambda y: jax.tree.map(lambda x: x[index], y)
            y = lax.cond(is_thin.any(), copy, lambda y: y, y)
            evidence += jnp.where(is_thin, total - jnp.log(n), 0.0)
            log_w = jnp.where(is_thin[:, None], 0.0, groups).ravel()
            return t + 1, y, log_w, evidence

        zero = jnp.zeros(num * n)
        start = (jnp.int32(0), y, zero, jnp.zeros(num))
        t, y, log_w, evidence = lax.while_loop(
            lambda carry: is_open(carry[1]).any(), body, start
        )
        # All may have ended before the power had grown to alpha.
        groups = log_w + (target.alpha - power(t)) * _sum(y.log_p, y)
        groups = groups.reshape(num, n)
        total = jax.nn.logsumexp(groups, axis=1)
        source = _systematic(groups - total[:, None], uniform(shape.new), samples)
        index = (n * jnp.arange(num)[:, None] + source).ravel()
        y = jax.tree.map(lambda x: x[index], y._replace(cache=()))
        return _results(y, t, evidence + total - jnp.log(n), samples)

    return sharding.over_batch(local, 2)(draw, target, prompts)


def _systematic(
    log_w: Float[Array, "p n"], offset: Float[Array, "p"], num: int
) -> Int[Array, "p m"]:
    """`num` members of each population by weight, with one random number for all."""
    places = (offset[:, None] + jnp.arange(num)[None]) / num
    upto = jnp.cumsum(jnp.exp(log_w), axis=1)
    upto = upto / upto[:, -1:]
    found = jax.vmap(lambda c, u: jnp.searchsorted(c, u, side="right"))(upto, places)
    return jnp.minimum(found, log_w.shape[1] - 1)


def _results(
    y: _Chains, steps: Int[Array, ""], evidence: Float[Array, "p"], samples: int
) -> tuple[Array, ...]:
    """Tokens, log-probs, lengths, ends `[P, G, ...]`; evidence and slot-steps `[P]`."""
    num = len(evidence)
    split = lambda x: x.reshape(num, samples, *x.shape[1:])
    work = jnp.full(num, steps * samples, jnp.int32)
    return (
        *(split(x) for x in (y.tokens, y.log_p, y.length, y.is_stopped)),
        evidence,
        work,
    )

"""Trajectory-balance losses for autoregressive policies, as pure functions.

A prompt `q` and a response `y` (its stop token included) of `|y|` tokens make a trajectory.
Its log-probabilities are sums over the response's tokens, under the full vocabulary at
temperature 1. A token tree gives every state a single parent, so the backward policy of
the GFlowNet is 1 and does not appear.

All functions take arrays of any common shape `[*n]`, one entry per trajectory, and return
the same shape: use `masked_mean`. `log_z` may also be a scalar. Only `log_pf` and `log_z`
receive gradients. Every loss is of one residual, `targets.residual`, most its square, and is
computed in float32 where arrays have fewer bits or hold integers. Entries that a mask leaves
out may be any numbers below 1e15 in size: larger ones overflow, and JAX's gradient is then NaN
(0 times infinity), whatever the mask says. This module and `targets` need jax alone, to be imported by,
or copied into, any trainer.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pfjax import targets


def trajectory_balance(
    log_pf: jax.Array, log_reward: jax.Array, log_z: jax.Array
) -> jax.Array:
    r"""Trajectory balance: its minimum is the distribution proportional to reward.

    .. math:: L = (\log Z + \log\pi(y|q) - \log R(q, y))^2

    With ``log_reward = alpha * log p_base`` the optimum is the base's alpha-power. There
    is no factor 1/2, and `log_z` is the log normaliser of whole sequences. The residual,
    a sum over tokens, grows with length: mode-seeking on it favours short responses.

    Args:
      log_pf: `[*n]` log pi(y|q) in nats; gradient flows.
      log_reward: `[*n]` log R(q, y); no gradient.
      log_z: `[*n]` or scalar log Z(q); gradient flows.

    Returns:
      `[*n]` squared residuals, not reduced.

    Raises:
      ValueError: if two arguments have different shapes (scalars excepted).

    References:
      Malkin et al., arXiv 2201.13259, Eq. 14; PowerFlow, arXiv 2603.18363, Eq. 5.

    >>> trajectory_balance(jnp.array([-3.0]), jnp.array([-4.0]), jnp.array(0.5))
    Array([2.25], dtype=float32)
    """
    log_pf, log_reward, log_z = _arrays(
        log_pf=log_pf, log_reward=log_reward, log_z=log_z
    )
    return targets.residual(log_pf, lax.stop_gradient(log_reward), log_z) ** 2


def length_aware_trajectory_balance(
    log_pf: jax.Array, log_reward: jax.Array, log_z: jax.Array, length: jax.Array
) -> jax.Array:
    r"""Trajectory balance per token, with the partition function Z'(q)^|y|.

    .. math:: L = (\log Z'(q) + (\log\pi(y|q) - \log R(q, y)) / |y|)^2

    The optimum is :math:`R(q,y)\, e^{-\lambda_q |y|}` with :math:`\lambda_q = \log
    Z'(q)` the root of :math:`\sum_y R(q,y)\, e^{-\lambda_q |y|} = 1`. Unlike in
    trajectory balance, an error `c` of `log_z` is no harmless baseline: it
    adds :math:`2c\,\nabla E[1/|y|]`, a reward on length; so calibrate it first.

    Args:
      log_pf: `[*n]` log pi(y|q) in nats, summed over tokens; gradient flows.
      log_reward: `[*n]` log R(q, y), summed over tokens; no gradient.
      log_z: `[*n]` or scalar log Z'(q) in nats per token; gradient flows.
      length: `[*n]` |y|, stop token included; less than 1 (padding) counts as 1, to stay finite.

    Returns:
      `[*n]` squared residuals, not reduced.

    Raises:
      ValueError: if two arguments have different shapes (scalars excepted).

    References:
      PowerFlow, arXiv 2603.18363, section 3.

    >>> length_aware_trajectory_balance(
    ...     jnp.array([-3.0]), jnp.array([-4.0]), jnp.array(0.5), jnp.array([2]))
    Array([1.], dtype=float32)
    """
    log_pf, log_reward, log_z, length = _arrays(
        log_pf=log_pf, log_reward=log_reward, log_z=log_z, length=length
    )
    log_reward, length = lax.stop_gradient((log_reward, length))
    return targets.residual(log_pf, log_reward, log_z, length) ** 2


def powerflow(
    log_pf: jax.Array,
    log_p_base: jax.Array,
    log_z: jax.Array,
    length: jax.Array,
    *,
    alpha: jax.Array | float,
    psi: jax.Array | float = 0.0,
    weight: jax.Array | float = 1.0,
    log_p_rare: jax.Array | float = 0.0,
) -> jax.Array:
    r"""The PowerFlow loss: length-aware balance towards the base's alpha-power.

    .. math:: L = w\,\big(\log Z'(q) + \tfrac{1}{|y|}\log\pi(y|q)
              - \alpha\,[\tfrac{1}{|y|}\log p_0(y|q) + \psi(y)]\big)^2

    `psi` sits inside the bracket and is a value per token: at alpha = 4 a psi of
    -0.5 adds +2 to the residual, whatever the length. There is no KL or entropy
    term; matching the distribution is the regularisation.

    Args:
      log_pf: `[*n]` log pi(y|q) in nats, summed over tokens; gradient flows.
      log_p_base: `[*n]` log p_0(y|q), the frozen base, summed; no gradient.
      log_z: `[*n]` or scalar log Z'(q) in nats per token; gradient flows.
      length: `[*n]` |y|, the number of tokens in the two sums; 0 for padding.
      alpha: `[*n]` or scalar power; above 1 sharpens, below 1 flattens; must be positive.
      psi: `[*n]` or scalar format term in nats per token; no gradient.
      weight: `[*n]` or scalar importance weight w; no gradient.
      log_p_rare: `[*n]` or scalar, what of `log_p_base` is of rare tokens (`targets.rare`),
        which below alpha = 1 keep the power 1; no gradient.

    Returns:
      `[*n]` losses, not reduced.

    Raises:
      ValueError: if `alpha` is not positive (where it is not traced) or two shapes differ.

    References:
      PowerFlow, arXiv 2603.18363, Eq. 10.

    >>> powerflow(jnp.array([-3.0]), jnp.array([-2.0]), jnp.array(-1.0),
    ...           jnp.array([2]), alpha=4.0)
    Array([2.25], dtype=float32)
    """
    _check_positive("alpha", alpha)
    log_pf, log_p_base, log_z, length, alpha, psi, weight, log_p_rare = _arrays(
        log_pf=log_pf,
        log_p_base=log_p_base,
        log_z=log_z,
        length=length,
        alpha=alpha,
        psi=psi,
        weight=weight,
        log_p_rare=log_p_rare,
    )
    log_reward = targets.Target(alpha).log_reward(
        log_p_base, length, psi, log_p_rare=log_p_rare
    )
    loss = length_aware_trajectory_balance(log_pf, log_reward, log_z, length)
    return lax.stop_gradient(weight) * loss


def divergence(
    residual: jax.Array,
    order: jax.Array | float = 1.0,
    clip: jax.Array | float | None = None,
) -> jax.Array:
    r"""A loss of the residual whose on-policy gradient is that of an alpha-divergence.

    .. math:: L_a(\delta) = \frac{2}{1 - a}\Big(\delta + \frac{e^{-(1-a)\delta} - 1}{1 - a}\Big),
              \qquad L_1(\delta) = \delta^2

    With the residual of whole sequences and samples of the policy the gradient is twice
    that of the Amari divergence of order a: the reverse KL(pi || p) for a = 1, the squared
    residual; the forward KL(p || pi) for a = 0, which covers modes and punishes a response
    that is too unlikely exponentially; Hellinger's for a = 1/2. Every order has its one
    minimum where the residual is 0, so on or off policy the optimum is the same.

    Beyond `clip` the loss goes on as a straight line; for a = 1 it is Huber's. This does not
    move the optimum, but what is said of gradients above holds within `clip` only. The slope of
    a square grows with the residual, so that a single response several nats per token away can
    outweigh all others of an update.

    Args:
      residual: `[*n]` from `targets.residual`; gradient flows.
      order: scalar a; exponents are cut at 20, beyond which the loss goes on as a straight line.
      clip: `[*n]` or scalar, in the units of the residual, positive; nowhere if not given.

    Returns:
      `[*n]` losses, not reduced.

    Raises:
      ValueError: if `order` is no number; if `clip` is not positive, where it is not traced,
        or of another shape.

    References:
      Fawkes and Hartford, arXiv 2605.15417; Huber, Robust Estimation of a Location
      Parameter, 1964.

    >>> divergence(jnp.array([0.5, -0.5]), order=1.0)
    Array([0.25, 0.25], dtype=float32)
    >>> divergence(jnp.array([0.5, -3.0]), clip=1.0)
    Array([0.25, 5.  ], dtype=float32)
    >>> print(f"{divergence(jnp.array(0.5), 0.0):.3f} {divergence(jnp.array(-0.5), 0.0):.3f}")
    0.213 0.297
    """
    if not isinstance(order, int | float) and not hasattr(order, "ndim"):
        raise ValueError(f"order must be a number, got {order!r}")
    if clip is not None:
        _check_positive("clip", clip)
        residual, clip = _arrays(residual=residual, clip=lax.stop_gradient(clip))
        inner = jnp.clip(residual, -clip, clip)
        one = jnp.ones_like(inner)
        value, slope = jax.jvp(lambda x: divergence(x, order), (inner,), (one,))
        return value + slope * (residual - inner)
    (residual,) = _arrays(residual=residual)
    if isinstance(order, (int, float)) and order == 1:
        return residual**2
    # With x = (a - 1) delta it is delta^2 times 2 (e^x - 1 - x) / x^2, whose terms all but
    # cancel where x is small: there by its series.
    x = (order - 1) * residual
    is_small = jnp.abs(x) < 0.5
    small, large = jnp.where(is_small, x, 0.0), jnp.where(is_small, 1.0, x)
    series = sum(small**k * (2 / math.factorial(k + 2)) for k in range(10))
    series = jnp.where(is_small, residual, 0.0) ** 2 * series
    edge = jnp.minimum(large, 20.0)
    exp = jnp.exp(edge) * (1 + large - edge)
    slope = jnp.where(is_small, 1.0, 1 - order)
    whole = 2 / slope * (jnp.where(is_small, 0.0, residual) + (exp - 1) / slope)
    return jnp.where(is_small, series, whole)


def importance_weight(
    log_pf: jax.Array, log_pf_old: jax.Array, *, low: float = 0.8, high: float = 1.28
) -> jax.Array:
    r"""Clipped sequence ratio pi / pi_old as a constant.

    .. math:: w = \mathrm{clip}(\pi(y|q) / \pi_{old}(y|q),\ low,\ high)

    The ratio is a product over all tokens, not a mean: for responses of 1,000 tokens a
    mean drift of 2.5e-4 nats per token already reaches a clamp.

    Args:
      log_pf: `[*n]` log pi(y|q) of the policy being trained; no gradient.
      log_pf_old: `[*n]` the same under the policy that drew y; no gradient.
      low, high: the clamps, 1 - eps_low and 1 + eps_high (static).

    Returns:
      `[*n]` weights between `low` and `high`.

    Raises:
      ValueError: if the shapes differ or not 0 < low <= 1 <= high.

    References:
      PowerFlow, arXiv 2603.18363, Eq. 10, with the clamps of its trainer.

    >>> importance_weight(jnp.array([-1.0, -1.0, -2.0]), jnp.array([-1.0, -2.0, -1.0]))
    Array([1.  , 1.28, 0.8 ], dtype=float32)
    """
    if low is None or high is None or not 0 < low <= 1 <= high:
        raise ValueError(f"need 0 < low <= 1 <= high, got low={low}, high={high}")
    log_pf, log_pf_old = _arrays(log_pf=log_pf, log_pf_old=log_pf_old)
    # Clipping before exp: the same value, and no overflow to inf far off policy.
    log_ratio = lax.stop_gradient(log_pf - log_pf_old)
    log_ratio = jnp.clip(log_ratio, jnp.log(low), jnp.log(high))
    return jnp.clip(jnp.exp(log_ratio), low, high)


def group_log_z(
    log_pf: jax.Array,
    log_reward: jax.Array,
    length: jax.Array,
    group: jax.Array,
    num_groups: int,
) -> jax.Array:
    r"""log Z' from the samples of each prompt: what makes their mean residual 0.

    .. math:: \log Z'_q = -\frac{1}{n}\sum_{i \in q}
              \frac{\log\pi(y_i|q) - \log R(q, y_i)}{|y_i|}

    It replaces a learned log Z' and has the same fixed point. Pass
    ``length=1`` everywhere to estimate the log Z of plain trajectory balance.

    Args:
      log_pf: `[*n]` log pi(y|q) in nats; there is no gradient.
      log_reward: `[*n]` log R(q, y), for PowerFlow ``alpha (log p_0 + psi |y|)``.
      length: `[*n]` |y|.
      group: `[*n]` integer id of the prompt, 0 .. num_groups - 1; other values
        mark padding and are left out of every mean. Where each device or micro-batch has
        a part of the arrays, a group must lie within one.
      num_groups: number of prompts (static). Memory is proportional to it, times n.

    Returns:
      `[*n]` the estimate of each trajectory's group; 0 for padding.

    Raises:
      ValueError: if two shapes differ, or `group` holds no whole numbers.

    References:
      VarGrad, arXiv 2010.10436; used for language models in arXiv 2503.18929.

    >>> group_log_z(jnp.array([-2.0, -4.0]), jnp.array([-4.0, -8.0]),
    ...             jnp.array([1, 2]), jnp.array([0, 0]), 1)
    Array([-2., -2.], dtype=float32)
    """
    group = jnp.asarray(group)
    if not jnp.issubdtype(group.dtype, jnp.integer):
        raise ValueError(f"group must be whole numbers, got {group.dtype}")
    args = _arrays(log_pf=log_pf, log_reward=log_reward, length=length, group=group)
    log_pf, log_reward, length, _ = jnp.broadcast_arrays(*args)
    group = jnp.broadcast_to(group, log_pf.shape)[..., None]
    # Compared rather than indexed: a scatter over devices is refused on meshes of
    # explicit axes, which `jax.make_mesh` makes.
    is_in = group == jnp.arange(num_groups).reshape((1,) * log_pf.ndim + (-1,))
    per_token = targets.residual(log_pf, log_reward, 0.0, length)[..., None]
    of_group = functools.partial(jnp.sum, axis=range(log_pf.ndim), keepdims=True)
    total = of_group(jnp.where(is_in, per_token, 0.0))
    mean = total / jnp.maximum(of_group(is_in.astype(total.dtype)), 1.0)
    estimate = jnp.sum(jnp.where(is_in, -mean, 0.0), axis=-1)
    return lax.stop_gradient(estimate)


def masked_mean(x: jax.Array, where: jax.Array) -> jax.Array:
    """Mean of the entries of `x` that `where` keeps; 0 when it keeps none.

    What is masked out may be anything, NaN included, in value and in the gradient of `x`; a
    function that `x` is the value of may still make NaN of that gradient's 0.

    Args:
      x: `[*n]` values; gradient flows through kept entries.
      where: `[*n]` booleans; of numbers, those that are not 0.

    Returns:
      A scalar.

    Raises:
      ValueError: if the shapes differ.

    >>> masked_mean(jnp.array([1.0, jnp.nan, 3.0]), jnp.array([True, False, True]))
    Array(2., dtype=float32)
    """
    (x,), where = _arrays(x=x), jnp.asarray(where).astype(bool)
    if x.shape != where.shape:
        raise ValueError(f"x has shape {x.shape} but where has shape {where.shape}")
    total = jnp.sum(jnp.where(where, x, 0))
    return total / jnp.maximum(jnp.sum(where), 1).astype(total.dtype)


def _arrays(**given: Any) -> list[jax.Array]:
    """As arrays of one type, float32 at least; raises ValueError if two differ in shape, or
    for a mask in the place of lengths."""
    arrays = {name: jnp.asarray(x) for name, x in given.items()}
    targets.check_shapes(**arrays)
    if "length" in arrays and arrays["length"].dtype == bool:
        raise ValueError("length must be numbers of tokens, got booleans")
    # Python's numbers take the type of the arrays.
    is_wide = lambda x: x.dtype in (jnp.float32, jnp.float64) and not x.weak_type
    wide = [x for x in arrays.values() if is_wide(x)]
    dtype = jnp.result_type(*wide) if wide else jnp.float32
    return [x.astype(dtype) for x in arrays.values()]


def _check_positive(name: str, x: Any) -> None:
    """Raises for what is not positive, where its value is known."""
    if isinstance(x, jax.core.Tracer):
        return
    array = np.asarray(x)
    is_positive = array.dtype.kind not in "OSU" and np.all(array.astype(float) > 0)
    if not is_positive:
        raise ValueError(f"{name} must be positive, got {x!r}")

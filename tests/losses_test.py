"""The losses: numbers by hand, gradients, and the distributions that minimise them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pfjax import losses, targets
from tests.conftest import (
    all_responses,
    length_aware_target,
    power_target,
    total_variation,
)

# Three trajectories. m = log_pf / length = -1, -0.5, -2; m0 = -1.5, -0.5, -1.
LOG_PF = jnp.array([-2.0, -2.0, -2.0])
LOG_P_BASE = jnp.array([-3.0, -2.0, -1.0])
LENGTH = jnp.array([2, 4, 1])


def test_trajectory_balance_by_hand():
    # 0.5 + (-2) - 2 * (-3, -2, -1) = 4.5, 2.5, 0.5.
    loss = losses.trajectory_balance(LOG_PF, 2 * LOG_P_BASE, jnp.float32(0.5))
    np.testing.assert_allclose(loss, [20.25, 6.25, 0.25], rtol=1e-6)


def test_length_aware_trajectory_balance_by_hand():
    # 0.5 + (-2 + 6) / 2 = 2.5;  0.5 + (-2 + 4) / 4 = 1;  0.5 + (-2 + 2) / 1 = 0.5.
    loss = losses.length_aware_trajectory_balance(
        LOG_PF, 2 * LOG_P_BASE, jnp.float32(0.5), LENGTH
    )
    np.testing.assert_allclose(loss, [6.25, 1.0, 0.25], rtol=1e-6)


def test_powerflow_by_hand():
    # alpha 4, log Z' -1, psi (0, -0.5, 0):
    #   -1 - 1   - 4 (-1.5)       =  4
    #   -1 - 0.5 - 4 (-0.5 - 0.5) =  2.5
    #   -1 - 2   - 4 (-1)         =  1
    # squared, times weights (1, 2, 0.5): 16, 12.5, 0.5.
    loss = losses.powerflow(
        LOG_PF,
        LOG_P_BASE,
        jnp.array([-1.0, -1.0, -1.0]),
        LENGTH,
        alpha=4.0,
        psi=jnp.array([0.0, -0.5, 0.0]),
        weight=jnp.array([1.0, 2.0, 0.5]),
    )
    np.testing.assert_allclose(loss, [16.0, 12.5, 0.5], rtol=1e-6)


def test_importance_weight_by_hand():
    old = jnp.array([-2.0, -2.1, -9.0, 5.0, -1e6])
    new = jnp.array([-2.0, -2.0, -2.0, -2.0, 0.0])
    weight = losses.importance_weight(new, old)
    np.testing.assert_allclose(weight, [1.0, np.exp(0.1), 1.28, 0.8, 1.28], rtol=1e-6)
    assert weight[0] == 1.0


def test_group_log_z_makes_each_group_balance_on_average():
    # Residuals at log Z = 0: group 0 has 2 and 0.5, group 1 has -0.5.
    log_reward = 2 * LOG_P_BASE - jnp.array([0.0, 0.0, -0.5])
    group = jnp.array([0, 0, 1])
    log_z = losses.group_log_z(LOG_PF, log_reward, LENGTH, group, 2)
    np.testing.assert_allclose(log_z, [-1.25, -1.25, 0.5], rtol=1e-6)
    padded = losses.group_log_z(
        jnp.append(LOG_PF, jnp.nan),
        jnp.append(log_reward, 1.0),
        jnp.append(LENGTH, 0),
        jnp.append(group, -1),
        2,
    )
    np.testing.assert_array_equal(padded, jnp.append(log_z, 0.0))


def test_masked_mean_ignores_nan_in_value_and_gradient():
    x, where = jnp.array([1.0, jnp.nan, 4.0]), jnp.array([True, False, True])
    assert losses.masked_mean(x, where) == 2.5
    grad = jax.grad(losses.masked_mean)(x, where)
    np.testing.assert_array_equal(grad, [0.5, 0.0, 0.5])
    assert losses.masked_mean(x, jnp.zeros(3, bool)) == 0.0


@pytest.mark.parametrize("name", ["tb", "latb", "powerflow"])
def test_gradients_match_finite_differences(name):
    with jax.enable_x64(True):
        args = {
            "log_pf": jnp.asarray(np.array(LOG_PF, np.float64)),
            "log_z": jnp.array([0.3, -0.2, 0.1], jnp.float64),
        }
        base = jnp.asarray(np.array(LOG_P_BASE, np.float64))

        def loss(log_pf, log_z):
            out = {
                "tb": lambda: losses.trajectory_balance(log_pf, 2 * base, log_z),
                "latb": lambda: losses.length_aware_trajectory_balance(
                    log_pf, 2 * base, log_z, LENGTH
                ),
                "powerflow": lambda: losses.powerflow(
                    log_pf, base, log_z, LENGTH, alpha=4.0, psi=-0.5, weight=1.1
                ),
            }[name]()
            return out.sum()

        for wrt in list(args):
            grad = jax.grad(lambda x, wrt=wrt: loss(**{**args, wrt: x}))(args[wrt])
            for i in range(3):
                step = 1e-6 * jnp.eye(3)[i]
                up = loss(**{**args, wrt: args[wrt] + step})
                down = loss(**{**args, wrt: args[wrt] - step})
                np.testing.assert_allclose(grad[i], (up - down) / 2e-6, rtol=1e-6)


def test_only_policy_and_log_z_receive_gradients():
    def loss(base, psi, weight, old):
        w = weight * losses.importance_weight(LOG_PF + old, old)
        return losses.powerflow(
            LOG_PF, base, jnp.float32(0.5), LENGTH, alpha=4.0, psi=psi, weight=w
        ).sum()

    grads = jax.grad(loss, argnums=(0, 1, 2, 3))(
        LOG_P_BASE, jnp.zeros(3), jnp.ones(3), jnp.zeros(3)
    )
    assert all((g == 0).all() for g in grads)
    grad = jax.grad(
        lambda x: losses.group_log_z(x, LOG_P_BASE, LENGTH, jnp.zeros(3, int), 1).sum()
    )(LOG_PF)
    assert (grad == 0).all()
    of_length = lambda x: losses.powerflow(LOG_PF, LOG_P_BASE, 0.5, x, alpha=4.0).sum()
    assert (jax.grad(of_length)(LENGTH.astype(float)) == 0).all()


def test_base_policy_at_alpha_one_has_no_loss_and_no_gradient():
    value, grad = jax.value_and_grad(
        lambda x: losses.powerflow(x, LOG_PF, jnp.float32(0.0), LENGTH, alpha=1.0).sum()
    )(LOG_PF)
    assert value == 0 and (grad == 0).all()


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="alpha must be positive, got 0"):
        losses.powerflow(LOG_PF, LOG_P_BASE, jnp.float32(0), LENGTH, alpha=0.0)
    with pytest.raises(ValueError, match=r"log_reward': \(3, 1\)"):
        losses.trajectory_balance(LOG_PF, LOG_P_BASE[:, None], jnp.float32(0))
    with pytest.raises(ValueError, match=r"psi': \(2,\)"):
        losses.powerflow(
            LOG_PF, LOG_P_BASE, jnp.float32(0), LENGTH, alpha=4.0, psi=jnp.zeros(2)
        )
    with pytest.raises(ValueError, match=r"log_p_base': \(3,\), 'log_z': \(3, 1\)"):
        losses.powerflow(LOG_PF, LOG_P_BASE, jnp.zeros((3, 1)), LENGTH, alpha=4.0)
    with pytest.raises(ValueError, match=r"clip': \(3, 1\)"):
        losses.divergence(LOG_PF, clip=jnp.ones((3, 1)))
    with pytest.raises(ValueError, match="length must be numbers of tokens"):
        losses.powerflow(LOG_PF, LOG_P_BASE, -1.0, LENGTH > 0, alpha=4.0)
    with pytest.raises(ValueError, match="group must be whole numbers, got float32"):
        losses.group_log_z(LOG_PF, LOG_P_BASE, LENGTH, jnp.zeros(3), 1)
    for order in ("kl", None):
        with pytest.raises(ValueError, match=f"order must be a number, got {order!r}"):
            losses.divergence(LOG_PF, order)
    with pytest.raises(ValueError, match="need 0 < low <= 1 <= high, got low=None"):
        losses.importance_weight(LOG_PF, LOG_PF, low=None)


class TabularModel:
    """A language model that is a table: one row of logits for each prefix."""

    def __init__(self, rng: np.random.Generator):
        self.responses = all_responses(vocab=3, stop=0, max_tokens=4)
        prefixes = sorted({tuple(y[:t]) for y in self.responses for t in range(len(y))})
        row = {prefix: i for i, prefix in enumerate(prefixes)}
        steps = [
            [(row[tuple(y[:t])], y[t], 1.0) for t in range(len(y))]
            + [(0, 0, 0.0)] * (4 - len(y))
            for y in self.responses
        ]
        self.row, self.token, self.mask = (
            jnp.array(x) for x in np.moveaxis(steps, 2, 0)
        )
        self.row, self.token = self.row.astype(int), self.token.astype(int)
        self.length = self.mask.sum(axis=1).astype(int)
        self.logits = jnp.array(rng.normal(size=(len(prefixes), 3)), jnp.float32)

    def log_p(self, logits):
        token_log_p = jax.nn.log_softmax(logits)[self.row, self.token]
        return (token_log_p * self.mask).sum(axis=1)


# A tenth does for most models, not for all: rare responses are slow.
NUM_STEPS = 30_000


def minimise(loss_fn, start):
    """The parameters that Adam ends at, its rate going to 0."""
    optimizer = optax.adam(optax.schedules.cosine_decay_schedule(0.1, NUM_STEPS))

    def update(carry, _):
        params, opt_state = carry
        updates, opt_state = optimizer.update(jax.grad(loss_fn)(params), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    carry = (start, optimizer.init(start))
    return jax.lax.scan(update, carry, None, length=NUM_STEPS)[0][0]


@pytest.mark.parametrize("log_z_kind", ["learned", "group"])
@pytest.mark.parametrize("alpha", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("is_length_aware", [False, True])
def test_minimising_reaches_the_exact_target(rng, is_length_aware, alpha, log_z_kind):
    lm = TabularModel(rng)
    log_p_base = lm.log_p(lm.logits)
    length = lm.length if is_length_aware else jnp.ones_like(lm.length)
    log_reward = alpha * log_p_base

    def loss_fn(params):
        log_pf = lm.log_p(params["logits"])
        log_z = params["log_z"]
        if log_z_kind == "group":
            group = jnp.zeros_like(length)
            log_z = losses.group_log_z(log_pf, log_reward, length, group, 1)
        loss = losses.length_aware_trajectory_balance(log_pf, log_reward, log_z, length)
        if not is_length_aware and log_z_kind == "learned":
            loss = losses.trajectory_balance(log_pf, log_reward, log_z)
        return loss.mean()

    params = minimise(loss_fn, {"logits": lm.logits, "log_z": jnp.float32(0)})
    reached = np.exp(lm.log_p(params["logits"]))
    if is_length_aware:
        target, log_z = length_aware_target(log_p_base, lm.length, alpha)
    else:
        target, log_z = power_target(log_p_base, alpha)
    other = (
        power_target
        if is_length_aware
        else lambda p, a: length_aware_target(p, lm.length, a)
    )
    assert total_variation(reached, target) < 0.02
    # Not for want of difference: the base and the other loss's target are far.
    assert total_variation(np.exp(log_p_base), target) > 0.05
    assert total_variation(other(log_p_base, alpha)[0], target) > 0.02
    if log_z_kind == "learned":
        assert params["log_z"] == pytest.approx(log_z, abs=0.02)


@pytest.mark.parametrize("order", [0.0, 0.5, 1.0, 2.0])
def test_the_gradient_on_policy_is_that_of_the_divergence(rng, order):
    """Exact sums over all responses; twice the Amari divergence of the order."""
    lm = TabularModel(rng)
    target, log_z = power_target(lm.log_p(lm.logits), 2.0)
    log_target = jnp.log(jnp.asarray(target, jnp.float32))
    logits = jnp.asarray(rng.normal(size=lm.logits.shape), jnp.float32)

    def loss(logits):
        log_pf = lm.log_p(logits)
        weight = jax.lax.stop_gradient(jnp.exp(log_pf))
        residual = targets.residual(log_pf, log_target + log_z, log_z)
        return (weight * losses.divergence(residual, order)).sum()

    def amari(logits):
        log_pf = lm.log_p(logits)
        ratio = log_target - log_pf
        if order == 1:
            return (jnp.exp(log_pf) * -ratio).sum()
        if order == 0:
            return (jnp.exp(log_target) * ratio).sum()
        sums = (jnp.exp(log_pf + (1 - order) * ratio)).sum()
        return (sums - 1) / (order * (order - 1))

    got, want = jax.grad(loss)(logits), 2 * jax.grad(amari)(logits)
    np.testing.assert_allclose(got, want, atol=2e-5, rtol=1e-4)


def test_balance_has_the_same_optimum_at_any_temperature_of_sampling(rng):
    """A policy gradient does not: of the base it pushes tokens that no reward asks for."""
    lm = TabularModel(rng)
    base = lm.log_p(lm.logits)

    def drawn(logits):
        return jax.lax.stop_gradient(jnp.exp(lm.log_p(logits / 0.6)))

    def balance(params):
        log_pf = lm.log_p(params["logits"])
        loss = losses.length_aware_trajectory_balance(
            log_pf, 2.0 * base, params["log_z"], lm.length
        )
        return (drawn(params["logits"]) * loss).sum()

    found = minimise(balance, {"logits": lm.logits, "log_z": jnp.float32(0)})
    reached = np.exp(lm.log_p(found["logits"]))
    assert total_variation(reached, length_aware_target(base, lm.length, 2.0)[0]) < 0.02

    def policy_gradient(logits, weight):  # of a reward that is 1 for all
        return -(weight * lm.log_p(logits)).sum()

    push = jax.grad(policy_gradient)
    assert np.abs(push(lm.logits, jnp.exp(base))).max() < 1e-6
    assert np.abs(push(lm.logits, drawn(lm.logits))).max() > 0.01


@pytest.mark.parametrize("order", [0.0, 0.5, 1.0])
def test_beyond_the_clip_the_loss_goes_on_as_a_straight_line(order):
    """From the value and slope that it has there, on either side."""
    x = jnp.array([-9.0, -2.0, -0.3, 0.0, 0.4, 2.0, 9.0])
    loss = jax.vmap(jax.value_and_grad(lambda x: losses.divergence(x, order, 0.5)))
    whole = jax.vmap(jax.value_and_grad(lambda x: losses.divergence(x, order)))
    (value, slope), (want, want_slope) = loss(x), whole(jnp.clip(x, -0.5, 0.5))
    np.testing.assert_allclose(slope, want_slope, atol=1e-6)
    beyond = x - jnp.clip(x, -0.5, 0.5)
    np.testing.assert_allclose(value, want + want_slope * beyond, atol=1e-5)
    curved = lambda clip: jax.vmap(
        jax.grad(jax.grad(lambda x: losses.divergence(x, order, clip)))
    )
    is_inside = jnp.abs(x) < 0.5
    np.testing.assert_allclose(curved(0.5)(x)[is_inside], curved(None)(x)[is_inside])
    assert (curved(0.5)(x)[~is_inside] == 0).all()


def test_a_residual_far_off_has_a_finite_loss_and_gradient():
    value, slope = jax.value_and_grad(lambda x: losses.divergence(x, 0.0))(-500.0)
    assert np.isfinite(value) and slope == pytest.approx(2 - 2 * np.exp(20.0), rel=1e-5)


@pytest.mark.parametrize("order", [0.0, 0.5, 0.99, 0.99999, 1.00001, 1.01, 2.0])
def test_no_order_cancels_away_its_own_digits(order):
    """Against the formula with twice the digits."""
    residual = np.array([1e-4, 1e-3, 0.05, 0.49, 0.51, -2.0, -1e-3, 3.0])
    with jax.enable_x64(True):
        x = jnp.array(residual, jnp.float64)
        of = lambda x: (
            2 / (1 - order) ** 2 * ((1 - order) * x + jnp.expm1((order - 1) * x))
        )
        # expm1 leaves of its argument's square as many digits as the argument is small.
        near = np.abs((order - 1) * residual) < 1e-3
        want = np.where(near, residual**2 * (1 + (order - 1) * residual / 3), of(x))
        slope = np.where(
            near, 2 * residual + (order - 1) * residual**2, jax.vmap(jax.grad(of))(x)
        )
    x = jnp.array(residual, jnp.float32)
    np.testing.assert_allclose(losses.divergence(x, order), want, rtol=2e-5)
    traced = jax.jit(losses.divergence)(x, order)
    np.testing.assert_allclose(traced, want, rtol=2e-5)
    loss = lambda x: losses.divergence(x, order)
    got = jax.vmap(jax.grad(loss))(x)
    np.testing.assert_allclose(got, slope, rtol=2e-5)
    masked = lambda x: losses.masked_mean(loss(x), [True, False])
    assert np.isfinite(jax.grad(masked)(jnp.array([0.5, -1e17]))).all()
    np.testing.assert_array_equal(losses.divergence(x, order, clip=np.inf), loss(x))


def test_alpha_may_be_traced_or_one_per_trajectory():
    args = [jnp.array(x) for x in ([-5.0, -9.0], [-4.0, -8.0], [0.3, 0.1])]
    args += [jnp.array([2, 3])]
    want = [losses.powerflow(*args, alpha=a)[i] for i, a in enumerate((0.5, 4.0))]
    alpha = jnp.array([0.5, 4.0])
    np.testing.assert_array_equal(losses.powerflow(*args, alpha=alpha), want)
    narrow = losses.powerflow(*args, alpha=alpha.astype(jnp.bfloat16))
    np.testing.assert_array_equal(narrow, want)
    traced = jax.jit(lambda a: losses.powerflow(*args, alpha=a))
    np.testing.assert_allclose(traced(alpha), want, rtol=1e-6)
    assert traced(4.0)[1] == pytest.approx(want[1])


def test_lists_are_taken_and_narrow_types_computed_in_float32():
    lists = [[-5.0, -9.0], [-4.0, -8.0], 0.25, [2, 3]]
    arrays = [jnp.array(x) for x in lists]
    want = losses.powerflow(*arrays, alpha=4.0)
    np.testing.assert_array_equal(losses.powerflow(*lists, alpha=4), want)
    narrow = [x.astype(jnp.bfloat16) for x in arrays[:3]]
    got = losses.powerflow(*narrow, arrays[3], alpha=4.0)
    np.testing.assert_array_equal(got, want)
    assert losses.masked_mean([1.0, 3.0, 5.0], [1.0, 0.5, 0.0]) == 2
    assert losses.masked_mean(jnp.ones(70_000, jnp.float16), np.ones(70_000)) == 1
    with jax.enable_x64(True):
        got = losses.powerflow(*narrow[:2], -1.0, np.array([2, 3]), alpha=4.0)
        assert got.dtype == losses.divergence(narrow[0], 0.0, 0.1).dtype == jnp.float32
        assert losses.divergence(narrow[0].astype(float), clip=1).dtype == jnp.float64
    # Sums of many in bfloat16 stop growing at 256.
    one, zero = jnp.ones(2000, jnp.bfloat16), jnp.zeros(2000, jnp.int32)
    assert losses.group_log_z(one, 0.0, 1, zero, 1)[0] == -1
    assert losses.group_log_z(one, one * 0, 1, 0, 1).shape == (2000,)
    # Squares of integers wrap around at 2^31.
    assert losses.trajectory_balance([-300_000], [0], 0)[0] == 9e10
    assert losses.divergence([300_000])[0] == 9e10


def test_groups_may_be_spread_over_a_mesh_of_explicit_axes():
    """Such as `jax.make_mesh` makes, unless told otherwise."""
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Explicit,))
    spread = jax.NamedSharding(mesh, jax.P("data"))
    group = np.array([[5, 0], [-1, 2], [2, 7], [0, 0], [1, 3], [0, 1], [9, 2], [1, 1]])
    log_pf = -np.arange(16, dtype=np.float32).reshape(8, 2)
    length = np.abs(group) + 1
    args = (log_pf, 2 * log_pf, length, group)
    per_token = log_pf / length
    want = [[per_token[group == g].mean() if g in range(6) else 0] for g in group.flat]
    want = np.reshape(want, (8, 2))
    args = jax.device_put(args, spread)
    for f in (losses.group_log_z, jax.jit(losses.group_log_z, static_argnums=4)):
        got = f(*args, 6)
        np.testing.assert_allclose(got, want, rtol=1e-6)
        assert got.sharding.spec[0] == "data"
    assert (losses.group_log_z(*args, 0) == 0).all()


@pytest.mark.parametrize("alpha", [0.5, 4.0])
def test_types_are_promoted_by_no_rule_of_jax(alpha):
    args, rare = (LOG_PF, LOG_P_BASE, jnp.float32(0.5), LENGTH), LOG_P_BASE / 2

    def both(alpha):
        loss = losses.powerflow(*args, alpha=alpha, log_p_rare=rare)
        return losses.masked_mean(loss, LENGTH > 0)

    want = both(alpha)
    with jax.numpy_dtype_promotion("strict"):
        assert both(alpha) == want
        assert jax.jit(both)(jnp.float32(alpha)) == pytest.approx(want)
        zero = jnp.zeros(3, int)
        losses.group_log_z(LOG_PF, LOG_P_BASE, LENGTH, zero, 1)
        losses.divergence(LOG_PF, jnp.float32(0.5), clip=jnp.ones(3))


def test_rare_tokens_keep_the_power_1_below_alpha_1():
    rare, z = jnp.array([-1.5, 0.0, -0.5]), jnp.float32(0.2)
    args = (jnp.array([-3.0, -2.0, -1.0]), jnp.array([-4.0, -3.0, -2.0]), z)
    length = jnp.array([2, 3, 1])
    loss = functools.partial(losses.powerflow, *args, length, alpha=0.5)
    # 0.5 x log p_0 + 0.5 x rare, as a format term would have it.
    np.testing.assert_allclose(loss(log_p_rare=rare), loss(psi=rare / length))
    above = functools.partial(losses.powerflow, *args, length, alpha=2.0)
    np.testing.assert_array_equal(above(log_p_rare=rare), above())

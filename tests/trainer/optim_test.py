"""The optimiser: groups, rates, decay, clipping."""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from configs import default
from pfjax.trainer import optim, train_fns


def _config(warmup_steps=0, **changes):
    rate = functools.partial(
        optim.rate, "constant", warmup_steps=warmup_steps, num_steps=1
    )
    kwargs = {
        "learning_rate": rate(1e-3),
        "log_z_learning_rate": rate(1e-1),
        "weight_decay": 0.0,
        "clip_norm": 1.0,
    }
    return kwargs | changes


def _params():
    return {
        "policy": {"blocks": {"wq": jnp.ones((2, 4)), "attn_norm": jnp.ones((2, 4))}},
        "log_z": {"out": {"kernel": jnp.ones((10, 1)), "bias": jnp.ones(1)}},
    }


def _updates(config, grads, steps=1):
    return _run(optim.make_optimizer(**config), grads, steps)


def _run(optimizer, grads, steps):
    params = _params()
    state = optimizer.init(params)
    for _ in range(steps):
        updates, state = optimizer.update(grads, state, params)
    return updates


def test_each_group_has_its_rate_and_log_z_moves_by_it_whatever_its_width():
    updates = _updates(_config(), jax.tree.map(jnp.ones_like, _params()))
    np.testing.assert_allclose(updates["policy"]["blocks"]["wq"], -1e-3, rtol=1e-3)
    np.testing.assert_allclose(updates["log_z"]["out"]["bias"], -1e-1, rtol=1e-3)
    # Ten inputs of 1: together they move the output by the rate once.
    np.testing.assert_allclose(
        updates["log_z"]["out"]["kernel"].sum(), -1e-1, rtol=1e-3
    )


def test_only_matrices_decay():
    grads = jax.tree.map(jnp.zeros_like, _params())
    blocks = _updates(_config(weight_decay=0.1), grads)["policy"]["blocks"]
    np.testing.assert_allclose(blocks["wq"], -1e-4, rtol=1e-5)
    np.testing.assert_array_equal(blocks["attn_norm"], 0.0)


def test_warm_up_reaches_its_peak_and_stays():
    grads = jax.tree.map(jnp.ones_like, _params())
    for steps, share in ((1, 0.25), (2, 0.5), (4, 1.0), (6, 1.0)):
        wq = _updates(_config(warmup_steps=4), grads, steps)["policy"]["blocks"]["wq"]
        np.testing.assert_allclose(wq, -1e-3 * share, rtol=1e-3)


@pytest.mark.parametrize(
    ("schedule", "of_steps"),
    [
        # The warm-up is at its peak in step 2; from there to zero in step 6.
        ("constant", [0.5, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]),
    ],
)
def test_a_schedule_ends_at_zero_after_the_last_step(schedule, of_steps):
    rate = optim.rate(schedule, 1e-3, 2, 5)
    np.testing.assert_allclose([rate(i) for i in range(5)], np.multiply(1e-3, of_steps))
    if schedule != "constant":
        assert rate(5) == 0
    # An update goes by the rate of its step.
    config = _config(learning_rate=rate, updates_per_step=3)
    grads = jax.tree.map(jnp.ones_like, _params())
    for step, wanted in enumerate(of_steps):
        for updates in (3 * step + 1, 3 * step + 3):
            wq = _updates(config, grads, updates)["policy"]["blocks"]["wq"]
            np.testing.assert_allclose(wq, -1e-3 * wanted, rtol=1e-3)


def test_a_schedule_is_of_the_policy_and_log_z_moves_on():
    c = default.get_config()
    c.num_steps, c.optim.schedule, c.optim.clip_norm = 2, "linear", 1e9
    c.optim.weight_decay = 0.0
    of_policy, optimizer = train_fns.optimizer_of(ml_collections.FrozenConfigDict(c))
    grads = jax.tree.map(jnp.ones_like, _params())
    first, second = (_run(optimizer, grads, steps) for steps in (1, 2))
    rate = c.optim.learning_rate
    np.testing.assert_allclose([of_policy(0), of_policy(1)], [rate, rate / 2])
    move = lambda updates: updates["policy"]["blocks"]["wq"]
    np.testing.assert_allclose(move(second), move(first) / 2, rtol=1e-3)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3)
    jax.tree.map(close, second["log_z"], first["log_z"])


def test_a_large_gradient_of_log_z_does_not_shrink_the_policys():
    # Adam hides a common factor, so compare two steps of different gradients.
    small = jax.tree.map(jnp.ones_like, _params())
    large = {**small, "log_z": jax.tree.map(lambda x: 1e6 * x, small["log_z"])}
    a, b = (_updates(_config(), g)["policy"] for g in (small, large))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert optax.tree.norm(a) == pytest.approx(1e-3 * 4, rel=1e-2)


def test_first_moment_may_be_kept_in_half_and_the_second_is_not():
    optimizer = optim.make_optimizer(**_config(mu_dtype="bfloat16"))
    (adam,) = (
        x
        for x in jax.tree.leaves(
            optimizer.init(_params()), is_leaf=lambda x: hasattr(x, "mu")
        )
        if hasattr(x, "mu") and "policy" in x.mu and jax.tree.leaves(x.mu["policy"])
    )
    assert {x.dtype for x in jax.tree.leaves(adam.mu)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(adam.nu)} == {jnp.dtype("float32")}
    grads = jax.tree.map(lambda x: 0.3 * jnp.ones_like(x), _params())
    half, whole = (
        _updates(_config(mu_dtype=d), grads, 3) for d in ("bfloat16", "float32")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2), half, whole)


def test_the_average_of_weights_by_hand():
    def run(decay):
        optimizer, params = (
            optim.make_optimizer(**_config(average_decay=decay)),
            _params(),
        )
        state, seen = optimizer.init(params), [params["policy"]]
        for sign in (1.0, -2.0):
            grads = jax.tree.map(lambda x, s=sign: s * x, _params())
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            seen.append(params["policy"])
        return seen, optax.tree.get(state, "average")

    (first, second, third), average = run(0.75)
    blend = lambda a, b, c: 0.75 * (0.75 * a + 0.25 * b) + 0.25 * c
    want = jax.tree.map(blend, first, second, third)
    same = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(same, average["policy"], want)
    without, nothing = run(0.0)
    assert nothing is None
    jax.tree.map(np.testing.assert_array_equal, without[-1], third)

"""The chunked form of Gated DeltaNet, and single steps, are the recurrence as it stands."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pfjax.infra import sharding
from pfjax.model import delta, transformer
from tests.model import small_families

SIZES = delta.Sizes(key_heads=2, key_dim=5, value_heads=4, value_dim=3, kernel=4)
# Ends inside of chunks and at their ends, one of a token, several chunks, padding.
ROWS = [[50, 14, 1, 7, 100], [130, 2, 40]]
LENGTH = 200


def _segments(rows=ROWS, length=LENGTH):
    ids = [np.repeat(np.arange(len(row)) + 1, row) for row in rows]
    return np.stack([np.pad(x, (0, length - len(x))) for x in ids])


def _inputs(rows, length=LENGTH, seed=0):
    """Of a few tokens the state is all but lost, of others nothing."""
    rng = np.random.default_rng(seed)
    heads = (rows, length, SIZES.value_heads)
    decay = np.exp(rng.normal(-2, 3, heads)).clip(max=300)
    return delta.Inputs(
        mixed=rng.normal(0, 1, (rows, length, SIZES.conv_dim)).astype(np.float32),
        log_decay=-decay.astype(np.float32),
        beta=rng.uniform(0, 1, heads).astype(np.float32),
        kernel=rng.normal(0, 1.5, (SIZES.conv_dim, SIZES.kernel)).astype(np.float32),
    )


def _reference(x, row, span):
    """The recurrence over one sequence, in float64."""
    z, part = SIZES, slice(*span)
    mixed = x.mixed[row, part].astype(np.float64)
    padded = np.pad(mixed, ((z.kernel - 1, 0), (0, 0)))
    n = len(mixed)
    y = sum(padded[i : i + n] * x.kernel[:, i] for i in range(z.kernel))
    y = y / (1 + np.exp(-y))
    width = z.key_heads * z.key_dim
    unit = lambda a: a / np.sqrt((a**2).sum(-1, keepdims=True) + 1e-6)
    key = lambda a: np.repeat(unit(a.reshape(n, z.key_heads, -1)), 2, axis=1)
    q, k = key(y[:, :width]) / np.sqrt(z.key_dim), key(y[:, width : 2 * width])
    v = y[:, 2 * width :].reshape(n, z.value_heads, -1)
    state, out = np.zeros((z.value_heads, z.key_dim, z.value_dim)), []
    for t in range(n):
        state = state * np.exp(x.log_decay[row, span[0] + t])[:, None, None]
        answer = np.einsum("hk,hkv->hv", k[t], state)
        change = x.beta[row, span[0] + t][:, None] * (v[t] - answer)
        state = state + k[t][..., None] * change[:, None]
        out.append(np.einsum("hk,hkv->hv", q[t], state))
    return np.stack(out), padded[n:].T, state


def _spans(rows=ROWS):
    for row, lengths in enumerate(rows):
        ends = np.cumsum(lengths)
        yield from ((row, (end - n, end)) for n, end in zip(lengths, ends, strict=True))


def test_packed_rows_are_their_sequences_by_the_recurrence():
    x, segments = _inputs(2), _segments()
    got = jax.jit(delta.packed, static_argnums=0)(SIZES, x, segments)
    assert np.abs(got).max() > 0.5
    for row, span in _spans():
        want, _, _ = _reference(x, row, span)
        np.testing.assert_allclose(got[row, slice(*span)], want, atol=2e-6)


@pytest.mark.slow
def test_states_at_the_ends_are_those_of_the_recurrence_and_go_on():
    x, segments = _inputs(2), _segments()
    spans = list(_spans())
    row, place = np.array([(row, end - 1) for row, (_, end) in spans]).T
    out, ends = delta.packed_with_ends(SIZES, x, segments, row, place)
    np.testing.assert_array_equal(out, delta.packed(SIZES, x, segments))
    for i, (row, span) in enumerate(spans):
        _, conv, memory = _reference(x, row, span)
        np.testing.assert_allclose(ends.conv[i], conv, atol=1e-6)
        np.testing.assert_allclose(ends.memory[i], memory, atol=2e-6)
    # From the middle of the longest one by one.
    row, (begin, _) = spans[4]
    half = np.array([begin + 60])
    _, state = delta.packed_with_ends(SIZES, x, segments, np.array([row]), half)
    for t in range(begin + 61, begin + 100):
        token = delta.Inputs(*(y[row, t][None] for y in x[:3]), x.kernel)
        got, state = delta.step(SIZES, token, state)
        np.testing.assert_allclose(got[0], out[row, t], atol=2e-6)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, marks=() if x == "beta" else pytest.mark.slow)
        for x in ("mixed", "log_decay", "beta", "kernel")
    ],
)
def test_gradients_of_packed_rows_are_those_of_sequences(name):
    x, segments = _inputs(2), _segments()
    weight = np.random.default_rng(1).normal(size=(2, LENGTH, 4, 3)).astype(np.float32)

    def of_rows(y):
        out = delta.packed(SIZES, x._replace(**{name: y}), segments)
        return (out * weight * (segments > 0)[..., None, None]).sum()

    def one_by_one(y):
        given, total = x._replace(**{name: y}), 0.0
        for row, span in _spans():
            part = slice(*span)
            of = delta.Inputs(
                *(a[row : row + 1, part] for a in given[:3]), given.kernel
            )
            ones = np.ones((1, span[1] - span[0]), np.int32)
            total += (delta.packed(SIZES, of, ones)[0] * weight[row, part]).sum()
        return total

    got, want = (jax.jit(jax.grad(f))(getattr(x, name)) for f in (of_rows, one_by_one))
    assert np.abs(want).max() > 0.1 and np.isfinite(got).all()
    np.testing.assert_allclose(got, want, atol=3e-5 * np.abs(want).max())


@pytest.mark.slow
def test_the_gradient_is_the_slope():
    x, segments = _inputs(1, 70), _segments([[40, 30]], 70)
    f = lambda y: jnp.sin(delta.packed(SIZES, y, segments)).sum()
    grads = jax.grad(f)(x)
    rng = np.random.default_rng(3)
    step = jax.tree.map(lambda a: 2e-3 * rng.normal(size=a.shape).astype(np.float32), x)
    ahead = f(jax.tree.map(lambda a, b: a + b, x, step))
    behind = f(jax.tree.map(lambda a, b: a - b, x, step))
    slope = sum(jnp.vdot(a, b) for a, b in zip(grads, step, strict=True))
    assert (ahead - behind) / 2 == pytest.approx(float(slope), rel=2e-2)
    assert abs(slope) > 0.002


def test_nothing_passes_from_later_tokens_nor_between_sequences():
    x, segments = _inputs(2), _segments()
    before = delta.packed(SIZES, x, segments)
    place = 55  # in the second of the first row, from 50 to 63
    changed = x._replace(
        mixed=x.mixed.copy(), log_decay=x.log_decay.copy(), beta=x.beta.copy()
    )
    for y in changed[:3]:
        y[0, place] = -0.3 if y is changed.log_decay else 0.9
    after = delta.packed(SIZES, changed, segments)
    differs = np.any(np.asarray(before != after), axis=(2, 3))
    assert differs[0, place:64].all()
    differs[0, place:64] = False
    assert not differs.any()


def test_a_step_costs_the_same_wherever_it_stands():
    """And the state is all that it reads of what was before."""
    state = jax.eval_shape(lambda: delta.empty_state(SIZES, 6, "float32"))
    size = sum(x.size * x.dtype.itemsize for x in state)
    assert size == 6 * delta.state_bytes(SIZES, "float32")
    assert delta.state_bytes(SIZES, "float32", tensor=2) == size / 6 - 4 * 4 * 5 * 3 / 2
    # As wide as the states of Qwen3.5-0.8B's layers.
    z = delta.Sizes(16, 128, 16, 128, 4)
    assert delta.state_bytes(z, "bfloat16") == 4 * 16 * 128**2 + 2 * 3 * 6144


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"fsdp": 2, "tensor": 2}, {"fsdp": 1, "context": 4}])
def test_devices_share_heads_and_rows(tiny_config, sizes):
    """Loss and gradient of a model on a mesh are those on one device."""
    config = small_families.config_of("qwen3_5", tiny_config, window=0)
    config = dataclasses.replace(config, max_positions=256)
    params = transformer.init_params(config, jax.random.key(0))
    rows, length = [[50, 14, 7], [100, 20]], 128
    tokens = np.random.default_rng(0).integers(0, 16, (2, length))
    positions = [np.concatenate([np.arange(n) for n in row]) for row in rows]
    positions = np.stack([np.pad(x, (0, length - len(x))) for x in positions])
    segments = _segments(rows, length)

    @jax.jit
    def grad(params):
        def loss(params):
            how = (tokens, positions, segments, "full")
            hidden, _ = transformer.forward_packed(config, params, *how)
            return (jnp.sin(hidden) * (segments > 0)[..., None]).sum()

        return jax.value_and_grad(loss)(params)

    want, want_grad = grad(params)
    mesh = sharding.make_mesh(1, **sizes, devices=jax.devices()[:4])
    where = sharding.tree_shardings(mesh, transformer.logical_axes(config), params)
    with jax.set_mesh(mesh):
        got, got_grad = grad(jax.device_put(params, where))
    assert got == pytest.approx(float(want), rel=1e-4)
    flat = jax.tree.leaves_with_path(want_grad)
    for (path, x), y in zip(flat, jax.tree.leaves(got_grad), strict=True):
        bound = 1e-3 * np.abs(x).max() + 1e-5
        np.testing.assert_allclose(y, x, atol=bound, err_msg=str(path))

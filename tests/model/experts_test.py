"""Mixtures of experts against each expert computed alone."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pfjax.infra import sharding
from pfjax.model import experts, grouped_matmul_gpu, scoring, transformer
from tests.model import small_families
from tests.planner import plans

ROUTING = experts.Routing(num_experts=8, width=6, per_token=3, is_normalised=True)


def _weights(rng, d=16, f=ROUTING.width, rank=0):
    e, r = ROUTING.num_experts, rank
    shapes = {"router": (d, e), "gate": (e, d, f), "up": (e, d, f), "down": (e, f, d)}
    if rank:
        shapes |= {"gate_a": (e, d, r), "up_a": (e, d, r), "down_a": (e, f, r)}
        shapes |= {"gate_b": (e, r, f), "up_b": (e, r, f), "down_b": (e, r, d)}
    scale = lambda name: 0.1 if "_" in name else 0.3
    draw = lambda name, shape: (scale(name) * rng.normal(size=shape)).astype(np.float32)
    return experts.Weights(**{k: draw(k, shape) for k, shape in shapes.items()})


def _alone(routing, x, weights):
    """Every expert on every token, weighted by a matrix that is mostly zeros."""
    if weights.gate_a is not None:
        pair = lambda name: (getattr(weights, f"{name}_{x}") for x in "ab")
        added = lambda name: jnp.einsum("eir,ero->eio", *pair(name))
        whole = lambda name: getattr(weights, name) + added(name)
        weights = weights._replace(**{x: whole(x) for x in ("gate", "up", "down")})
    probs = jax.nn.softmax(x @ weights.router)
    least = jnp.sort(probs)[..., -routing.per_token, None]
    probs = jnp.where(probs >= least, probs, 0.0)
    if routing.is_normalised:
        probs = probs / probs.sum(axis=-1, keepdims=True)
    into = lambda w: jnp.einsum("btd,edf->btef", x, w)
    inner = jax.nn.silu(into(weights.gate)) * into(weights.up)
    return jnp.einsum("bte,btef,efd->btd", probs, inner, weights.down)


def _with_gradients(f, routing, x, weights):
    def loss(x, weights):
        y = f(routing, x, weights)
        return jnp.sum(jnp.sin(y)), y

    grad = jax.value_and_grad(loss, (0, 1), has_aux=True)
    (_, y), grads = jax.jit(grad)(x, weights)
    return y, grads


def _assert_close(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), a, b)


ours = functools.partial(experts.apply, activation=jax.nn.silu)


@pytest.mark.parametrize(("is_normalised", "rank"), [(True, 3), (False, 0)])
def test_experts_add_what_each_adds_alone(rng, is_normalised, rank):
    """With adapters, whose rank is no width that kernels take, and without."""
    routing = ROUTING._replace(is_normalised=is_normalised)
    weights = _weights(rng, rank=rank)
    x = rng.normal(size=(2, 9, 16)).astype(np.float32)
    got = _with_gradients(ours, routing, x, weights)
    _assert_close(got, _with_gradients(_alone, routing, x, weights))


def test_tokens_that_all_choose_the_same_experts_disturb_no_other(rng):
    """Padding is many times the same token; none of the others is dropped for it."""
    weights = _weights(rng)
    x = rng.normal(size=(1, 40, 16)).astype(np.float32)
    crowded = x.copy()
    crowded[:, 4:] = 100 * x[:, :1]
    run = jax.jit(lambda x: ours(ROUTING, x, weights))
    np.testing.assert_array_equal(run(crowded)[:, :4], run(x)[:, :4])


@pytest.mark.parametrize("width", [128, 16])
@pytest.mark.parametrize("sizes", [[70, 0, 30, 33], [0, 128, 5, 0], [0] * 4])
def test_the_kernel_finds_the_gradients_of_matrices(rng, sizes, width):
    """Of groups that are empty too, and whatever lies behind the last one."""
    m, sizes = 133, np.array(sizes, np.int32)
    rows, g = (rng.normal(size=(m, n)).astype(np.float32) for n in (256, width))
    g[sizes.sum() :] = np.nan
    got = experts._gradient_kernel(rows, g, sizes, interpret=True)
    ends = np.cumsum(sizes)
    groups = zip(ends - sizes, ends, strict=True)
    want = np.stack([rows[a:b].T @ g[a:b] for a, b in groups])
    np.testing.assert_allclose(got, want, atol=1e-4)
    np.testing.assert_allclose(experts._gradient(rows, g, sizes), want, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "sizes", [[70, 0, 30, 33], [0, 128, 5, 0], [0] * 4, [1, 1, 1, 1]]
)
def test_the_kernels_for_gpus_multiply_groups_of_rows(rng, sizes, dtype):
    """Groups that end within tiles, empty ones, and whatever lies behind the last one."""
    m, (i, o), sizes = 133, (48, 160), np.array(sizes, np.int32)
    rows, g = (jnp.array(rng.normal(size=(m, n)), dtype) for n in (i, o))
    rows, g = (x.at[sizes.sum() :].set(np.nan) for x in (rows, g))
    matrices = jnp.array(rng.normal(size=(len(sizes), i, o)), dtype)
    whole = jnp.where(jnp.isnan(rows), 1, rows)
    out = grouped_matmul_gpu.product(whole, matrices, sizes, interpret=True)
    # No group writes past its end, where the next one does; NaN is not written.
    assert jnp.isnan(out[sizes.sum() :]).all()
    gradient = grouped_matmul_gpu.gradient(rows, g, sizes, interpret=True)
    assert out.shape == (m, o) and out.dtype == gradient.dtype == dtype
    exact = lambda x: np.asarray(x, np.float64)
    close = {"rtol": 1e-2, "atol": 1e-2} if dtype == "bfloat16" else {"atol": 1e-4}
    for e, end in enumerate(np.cumsum(sizes)):
        own = slice(end - sizes[e], end)
        want = exact(rows[own]) @ exact(matrices[e])
        np.testing.assert_allclose(exact(out[own]), want, **close)
        want = exact(rows[own]).T @ exact(g[own])
        np.testing.assert_allclose(exact(gradient[e]), want, **close)


@pytest.mark.slow
def test_the_kernels_for_gpus_take_adapters_of_any_rank(rng, monkeypatch):
    weights = _weights(rng, f=32, rank=5)
    x = rng.normal(size=(2, 9, 16)).astype(np.float32)
    want = _with_gradients(_alone, ROUTING, x, weights)
    monkeypatch.setattr(sharding, "platform", lambda: ("gpu", ""))
    monkeypatch.delattr(jax.lax, "ragged_dot")
    for name in ("product", "gradient"):
        kernel = getattr(grouped_matmul_gpu, name)
        run = functools.partial(kernel, interpret=True)
        monkeypatch.setattr(grouped_matmul_gpu, name, run)
    _assert_close(_with_gradients(ours, ROUTING, x, weights), want)


def test_experts_are_chosen_in_float32(rng):
    """In bfloat16 some of them would be equally likely."""
    x = rng.normal(size=(64, 16)).astype(jnp.bfloat16)
    router = 0.02 * rng.normal(size=(16, 32))
    routing = ROUTING._replace(num_experts=32, is_normalised=False)
    routed = experts.route(routing, x[None], router.astype(jnp.bfloat16))
    probs, chosen = (y[0] for y in routed)
    exact = x.astype(np.float64) @ router.astype(jnp.bfloat16).astype(np.float64)
    order = np.argsort(-exact, axis=-1)[:, :3]
    np.testing.assert_array_equal(chosen, order)
    exact = np.exp(exact) / np.exp(exact).sum(axis=-1, keepdims=True)
    want = np.take_along_axis(exact, order, axis=-1)
    np.testing.assert_allclose(probs, want, rtol=1e-5)


_MORE = (
    {"tensor": 4},
    {"fsdp": 2, "tensor": 2},
    {"data": 2, "tensor": 2},
    {"tensor": 2, "context": 2},
    {"expert": 4},
    {"data": 2, "expert": 2, "context": 2},
)
MESHES = [
    *(pytest.param(x, marks=pytest.mark.slow) for x in _MORE),
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 2, "expert": 2, "tensor": 2},
]


@pytest.mark.parametrize("sizes", MESHES)
def test_experts_on_several_devices_add_the_same(rng, sizes):
    weights, x = _weights(rng, rank=2), rng.normal(size=(4, 6, 16)).astype(np.float32)
    want = _with_gradients(ours, ROUTING, x, weights)
    mesh = _mesh(sizes)
    axes = {"router": ("embed", "experts"), "down": ("experts", "mlp", "embed")}
    axes |= dict.fromkeys(("gate", "up"), ("experts", "embed", "mlp"))
    axes |= dict.fromkeys(("gate_a", "up_a"), ("experts", "embed", None))
    axes |= dict.fromkeys(("gate_b", "up_b"), ("experts", None, "mlp"))
    axes |= {"down_a": ("experts", "mlp", None), "down_b": ("experts", None, "embed")}
    where = sharding.tree_shardings(mesh, experts.Weights(**axes), weights)
    spread = jax.device_put(weights, where)
    with jax.set_mesh(mesh):
        got = _with_gradients(ours, ROUTING, sharding.put_batch(mesh, x), spread)
        shards = {s.data.shape[0] for s in spread.gate.addressable_shards}
    assert shards == {8 // (sizes.get("tensor", 1) * sizes.get("expert", 1))}
    _assert_close(got, want)


@pytest.mark.parametrize("axis", ["tensor", "expert"])
def test_no_device_has_all_experts(rng, axis):
    """Of 8 experts on 4 devices each multiplies with its 2, also for the gradient."""
    weights, x = _weights(rng), rng.normal(size=(4, 6, 16)).astype(np.float32)
    mesh = _mesh({axis: 4})
    axes = ("experts", "embed", "mlp")
    axes = experts.Weights(("embed", "experts"), axes, axes, axes)
    where = sharding.tree_shardings(mesh, axes, weights)
    put = lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)
    with jax.set_mesh(mesh):
        loss = lambda x, w: jnp.sum(ours(ROUTING, x, w))
        grad = jax.jit(jax.grad(loss, 1), out_shardings=where)
        text = grad.lower(x, jax.tree.map(put, weights, where)).compile().as_text()
    assert "[2,16,6]" in text and "[2,6,16]" in text
    assert "[8,16,6]" not in text and "[8,6,16]" not in text


@pytest.mark.slow
def test_tpus_multiply_rows_with_their_own_experts_only(tpu_mesh):
    """Also for the gradient: nowhere are there as many rows for each expert."""
    mesh = tpu_mesh("v5e:2x2", data=1, fsdp=1, tensor=4)
    d, e, f, r = 256, 16, 128, 24
    routing = experts.Routing(e, f, 2, True)
    shapes = experts.Weights((d, e), (e, d, f), (e, d, f), (e, f, d))
    into, back = [(e, d, r), (e, r, f)], [(e, f, r), (e, r, d)]
    shapes = experts.Weights(*shapes[:4], *into, *into, *back)
    axes = ("experts", "embed", "mlp")
    axes = experts.Weights(("embed", "experts"), *[axes] * 9)
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)
    weights = experts.Weights(*(shape(*s) for s in shapes))
    where = sharding.tree_shardings(mesh, axes, weights)
    with jax.set_mesh(mesh):
        loss = lambda x, w: jnp.sum(ours(routing, x, w).astype(jnp.float32) ** 2)
        grad = jax.jit(jax.grad(loss, (0, 1)), in_shardings=(None, where))
        compiled = grad.lower(shape(1, 1024, d), weights).compile()
    rows, local = 2 * 1024, e // 4
    seen = plans.arrays(compiled.as_text())
    assert any({rows, f} <= set(x) for x in seen)
    assert not [x for x in seen if {local, rows} <= set(x) and {d, f, r, 32} & set(x)]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES)
def test_scores_on_several_devices_are_the_same(rng, tiny_config, monkeypatch, sizes):
    monkeypatch.setattr(scoring, "SCORE_ROWS", 4)
    config = small_families.config_of("qwen3_moe", tiny_config, window=0)
    params = transformer.init_params(config, jax.random.key(0))
    sequences = [rng.integers(0, 16, size=n).tolist() for n in (20, 5, 9, 12)]
    want = scoring.score(transformer.Policy(config, params), sequences, [3, 1, 2, 4])
    mesh = _mesh(sizes)
    where = sharding.tree_shardings(mesh, transformer.logical_axes(config), params)
    with jax.set_mesh(mesh):
        policy = transformer.Policy(config, jax.device_put(params, where))
        got = scoring.score(policy, sequences, [3, 1, 2, 4])
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_experts_that_do_not_divide_are_refused_by_name(rng):
    weights, x = _weights(rng), rng.normal(size=(1, 6, 16)).astype(np.float32)
    with (
        jax.set_mesh(_mesh({"tensor": 3})),
        pytest.raises(ValueError, match="experts of size 8 .*mesh.tensor=3"),
    ):
        ours(ROUTING, x, weights)


def _mesh(sizes):
    devices = jax.devices()[: math.prod(sizes.values())]
    return sharding.make_mesh(**{"data": 1, "fsdp": 1, **sizes}, devices=devices)

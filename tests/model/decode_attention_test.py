"""Attention of decoding: every back end against a dense oracle."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pfjax.model import decode_attention, decode_kernel

# Natively where there is such a device (launch/benchmark.sh), where products of float32
# take fewer bits.
NATIVE = {"gpu": ["gpu"], "tpu": ["tpu"]}
BACKENDS = [
    "xla",
    *NATIVE.get(jax.default_backend(), ["tpu_interpret", "gpu_interpret"]),
]
TOLERANCE = 2e-6 if jax.default_backend() == "cpu" else 2e-2
S, K, M, C, W = 6, 2, 3, 64, 1024  # two blocks, two splits
PREFIX_SLOTS, SAMPLES_PER_PREFIX, PROMPT_WIDTH = 2, 4, 128
OWN_LENGTH = np.array([1, 5, 512, 513, 900, 1024], np.int32)
PROMPT_LENGTH = np.array([0, 77], np.int32)
GRID_INDEX = np.array([3, 1, 0, 5, 4, 7], np.int32)  # three of the first prefix slot


@pytest.fixture
def data(rng):
    return _draw(rng, C)


def _draw(rng, c):
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    q = draw(S, K * M, c)
    own = draw(S, K, W, c), draw(S, K, W, c)
    prompts = (
        draw(PREFIX_SLOTS, K, PROMPT_WIDTH, c),
        draw(PREFIX_SLOTS, K, PROMPT_WIDTH, c),
    )
    return q, own, prompts


def _oracle(q, own, prompts, own_start=(0,) * S, prompt_start=(0,) * S):
    out, c = np.zeros_like(q), q.shape[-1]
    for s in range(S):
        prefix_slot = GRID_INDEX[s] // SAMPLES_PER_PREFIX
        keys, values = (
            np.concatenate(
                [
                    p[prefix_slot, :, prompt_start[s] : PROMPT_LENGTH[prefix_slot]],
                    o[s, :, own_start[s] : OWN_LENGTH[s]],
                ],
                axis=1,
            )
            for p, o in zip(prompts, own, strict=True)
        )
        logits = np.einsum("kmc,kwc->kmw", q[s].reshape(K, M, c), keys) * c**-0.5
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[s] = np.einsum("kmw,kwc->kmc", weights, values).reshape(-1, c)
    return out


def _caches(backend, keys, values):
    return (np.swapaxes(keys, 2, 3) if backend == "xla" else keys), values


def _attend(backend, q, own, prompts, **starts):
    run = functools.partial(
        decode_attention.decode_attention,
        samples_per_prefix=SAMPLES_PER_PREFIX,
        backend=backend,
    )
    caches = _caches(backend, *own), _caches(backend, *prompts)
    out = jax.jit(run)(q, *caches, OWN_LENGTH, PROMPT_LENGTH, GRID_INDEX, **starts)
    return np.asarray(out)  # waits: callers change the arrays in place


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_dense_attention(data, backend):
    np.testing.assert_allclose(_attend(backend, *data), _oracle(*data), atol=TOLERANCE)


@pytest.mark.parametrize(
    "c", [64, *(pytest.param(x, marks=pytest.mark.slow) for x in (128, 256))]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_see_their_caches_from_where_they_start(rng, backend, c):
    data = _draw(rng, c)
    # Slots 3 to 5 have a prompt of 77 tokens: two see some of it, one nothing.
    prompt_start = np.array([0, 3, 200, 5, 76, 77], np.int32)
    own_start = np.array([0, 4, 511, 0, 600, 1000], np.int32)
    for starts in (
        {"prompt_start": prompt_start},
        {"own_start": own_start, "prompt_start": prompt_start},
    ):
        got = _attend(backend, *data, **starts)
        want = _oracle(*data, **starts)
        np.testing.assert_allclose(got, want, atol=TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_filled_is_not_read(data, backend):
    q, own, prompts = data
    want = _attend(backend, *data)
    for x in own:
        for s in range(S):
            x[s, :, OWN_LENGTH[s] :] = 1e9
    for x in prompts:
        for prefix_slot in range(PREFIX_SLOTS):
            x[prefix_slot, :, PROMPT_LENGTH[prefix_slot] :] = 1e9
    np.testing.assert_array_equal(_attend(backend, q, own, prompts), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_do_not_see_each_other(data, backend):
    q, own, prompts = data
    want = _attend(backend, *data)
    for x in (q, *own):
        x[2] += 1.0
    got = _attend(backend, q, own, prompts)
    others = np.arange(S) != 2
    np.testing.assert_array_equal(got[others], want[others])
    assert np.abs(got[2] - want[2]).max() > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_written_keys_and_values_are_read(data, backend):
    q, own, prompts = data
    # The newest token of each slot, and a prompt in a packed row, written by hand.
    new = tuple(x[np.arange(S), :, OWN_LENGTH - 1].copy() for x in own)
    of_prompt = tuple(x[1, :, :77].swapaxes(0, 1)[None].copy() for x in prompts)
    want = _oracle(*data)
    for x in own:
        x[np.arange(S), :, OWN_LENGTH - 1] = 7.0
    for x in prompts:
        x[1] = 7.0
    as_cache = lambda pair: tuple(map(jnp.asarray, _caches(backend, *pair)))
    own = decode_attention.write(backend, as_cache(own), new, OWN_LENGTH - 1)
    at = np.arange(77)[None]
    prefix_slot = np.ones_like(at)
    prompts = decode_attention.write_prompts(
        backend, as_cache(prompts), of_prompt, prefix_slot, at
    )
    other = tuple(2 * x for x in of_prompt)
    dropped = decode_attention.write_prompts(
        backend, prompts, other, 0 * prefix_slot - 1, at
    )
    for x, y in zip(prompts, dropped, strict=True):
        np.testing.assert_array_equal(x, y)
    got = decode_attention.decode_attention(
        q,
        own,
        prompts,
        OWN_LENGTH,
        PROMPT_LENGTH,
        GRID_INDEX,
        SAMPLES_PER_PREFIX,
        backend,
    )
    np.testing.assert_allclose(got, want, atol=TOLERANCE)


def _part(backend, q, keys, values, length, *start):
    """What a back end sums over one cache."""
    block = functools.partial(
        decode_attention._BLOCKS[backend], scale=q.shape[-1] ** -0.5
    )
    part = jax.jit(block)(q, *_caches(backend, keys, values), length, *start)
    assert {x.dtype for x in part} == {jnp.dtype("float32")}
    return jax.tree.map(np.asarray, part)


def _dense_part(q, keys, values, length):
    q, keys, values = (np.asarray(x, np.float64) for x in (q, keys, values))
    logits = np.einsum("nkmc,nkwc->nkmw", q, keys) * q.shape[-1] ** -0.5
    logits[..., np.arange(keys.shape[2]) >= length] = -np.inf
    top = logits.max(-1)
    weights = np.exp(logits - top[..., None])
    return np.einsum("nkmw,nkwc->nkmc", weights, values), top, weights.sum(-1)


def _draw_part(rng, m, c, width, dtype):
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    return draw(1, 2, m, c), draw(1, 2, width, c), draw(1, 2, width, c)


# A group of query heads, and a prompt's samples: more rows than a block of them.
@pytest.mark.parametrize(
    "m, c, width",
    [
        (6, 128, 2048),
        *(
            pytest.param(*x, marks=pytest.mark.slow)
            for x in ((100, 64, 640), (1, 64, 128))
        ),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_of_a_part_equal_dense_ones(rng, backend, m, c, width):
    tolerance = {"atol": max(TOLERANCE, 1e-5)}
    data = _draw_part(rng, m, c, width, "float32")
    for length in (1, 67, width - 1, width):
        want_out, want_top, want_total = _dense_part(*data, length)
        out, top, total = _part(backend, *data, np.array([length], np.int32))
        want = want_out / want_total[..., None]
        np.testing.assert_allclose(out / total[..., None], want, **tolerance)
        np.testing.assert_allclose(top, want_top, **tolerance)
        np.testing.assert_allclose(np.log(total), np.log(want_total), **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_part_weighs_nothing(rng, backend):
    data = _draw_part(rng, 6, 64, 1024, "float32")
    empty = _part(backend, *data, np.zeros(1, np.int32))
    assert not empty.out.any() and not empty.total.any()
    assert (empty.top <= decode_kernel.MASKED).all()


@pytest.mark.parametrize("m, c, width", [(6, 128, 2048), (100, 64, 640)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_see_a_part_from_where_they_start(rng, backend, m, c, width):
    q, keys, values = _draw_part(rng, m, c, width, "float32")
    length, least = width - 30, 600
    start = rng.integers(least, length + 100, m).astype(np.int32)
    start[:3] = least, length - 1, length  # the last sees nothing
    if backend != "xla":  # whole blocks that no row sees are not read
        keys, values = (x.at[:, :, :512].set(np.nan) for x in (keys, values))
    args = np.array([length], np.int32), start[None]
    part = _part(backend, q, keys, values, *args)
    assert np.isfinite(part.out).all()
    tolerance = {"atol": max(TOLERANCE, 1e-5)}
    for row, first in enumerate(start):
        out, top, total = (x[:, :, row : row + 1] for x in part)
        if first >= length:
            assert not out.any() and not total.any()
            assert (top <= decode_kernel.MASKED).all()
            continue
        seen = (q[:, :, row : row + 1], keys[:, :, first:], values[:, :, first:])
        want_out, want_top, want_total = _dense_part(*seen, length - first)
        want = want_out / want_total[..., None]
        np.testing.assert_allclose(out / total[..., None], want, **tolerance)
        np.testing.assert_allclose(top, want_top, **tolerance)
        np.testing.assert_allclose(np.log(total), np.log(want_total), **tolerance)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="compares interpreters")
@pytest.mark.parametrize("m, c", [(6, 128), (96, 64)])
def test_kernel_for_gpus_rounds_no_more_than_that_for_tpus(rng, m, c):
    data = _draw_part(rng, m, c, 1024, "bfloat16")
    want, _, total = _dense_part(*data, 800)
    errors = {}
    for backend in ("tpu_interpret", "gpu_interpret"):
        part = _part(backend, *data, np.full(1, 800, np.int32))
        error = part.out / part.total[..., None] - want / total[..., None]
        errors[backend] = np.sqrt(np.mean(error**2))
    assert errors["gpu_interpret"] <= errors["tpu_interpret"] < 1e-3


def test_back_end_of_a_platform(monkeypatch):
    chosen = decode_attention.decode_backend
    assert chosen("cpu", "cpu", 128) == "xla"
    assert chosen("tpu", "TPU v5 lite", 128) == "tpu"
    assert chosen("tpu", "TPU v5 lite", 64) == "xla"
    assert chosen("gpu", "NVIDIA H200", 64) == "gpu"
    assert chosen("gpu", "NVIDIA H200", 80) == "xla"
    # XLA takes no kernels of Triton's for GPUs before Ampere.
    for capability, want in (("7.5", "xla"), ("8.6", "gpu")):
        device = types.SimpleNamespace(device_kind="one", compute_capability=capability)
        monkeypatch.setattr(jax, "devices", lambda device=device: [device])
        assert chosen("gpu", "one", 64) == want


@pytest.mark.parametrize("c", [64, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("has_starts", [False, True])
def test_gpu_kernel_lowers_for_cuda(c, dtype, has_starts):
    """On a machine without a GPU: as far as Triton's intermediate language."""
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType

    floats = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    int32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    slots, prefix_slots, samples_per_prefix, heads, kv = 64, 8, 16, 12, 2
    own, prompts = floats((slots, kv, 1024, c)), floats((prefix_slots, kv, 512, c))
    run = functools.partial(
        decode_attention.decode_attention,
        samples_per_prefix=samples_per_prefix,
        backend="gpu",
    )
    device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = AbstractMesh(
        (1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device
    )
    check = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    with jax.sharding.use_abstract_mesh(mesh):
        exported = jax.export.export(
            jax.jit(run), platforms=["cuda"], disabled_checks=[check]
        )(
            floats((slots, heads, c)),
            (own, own),
            (prompts, prompts),
            int32((slots,)),
            int32((prefix_slots,)),
            int32((slots,)),
            **dict.fromkeys(("own_start", "prompt_start"), int32((slots,)))
            if has_starts
            else {},
        )
    text = exported.mlir_module()
    assert text.count("custom_call @__gpu$xla.gpu.triton") == 2  # prompts and own

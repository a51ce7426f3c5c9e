"""Attention of decoding: every back end against a dense oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pfjax.model import decode_attention

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
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    q = draw(S, K * M, C)
    own = draw(S, K, W, C), draw(S, K, W, C)
    prompts = (
        draw(PREFIX_SLOTS, K, PROMPT_WIDTH, C),
        draw(PREFIX_SLOTS, K, PROMPT_WIDTH, C),
    )
    return q, own, prompts


def _oracle(q, own, prompts):
    out = np.zeros_like(q)
    for s in range(S):
        prefix_slot = GRID_INDEX[s] // SAMPLES_PER_PREFIX
        keys, values = (
            np.concatenate(
                [
                    p[prefix_slot, :, : PROMPT_LENGTH[prefix_slot]],
                    o[s, :, : OWN_LENGTH[s]],
                ],
                axis=1,
            )
            for p, o in zip(prompts, own, strict=True)
        )
        logits = np.einsum("kmc,kwc->kmw", q[s].reshape(K, M, C), keys) * C**-0.5
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[s] = np.einsum("kmw,kwc->kmc", weights, values).reshape(-1, C)
    return out


def _caches(backend, keys, values):
    return (np.swapaxes(keys, 2, 3) if backend == "xla" else keys), values


def _attend(backend, q, own, prompts):
    run = functools.partial(
        decode_attention.decode_attention,
        samples_per_prefix=SAMPLES_PER_PREFIX,
        backend=backend,
    )
    caches = _caches(backend, *own), _caches(backend, *prompts)
    out = jax.jit(run)(q, *caches, OWN_LENGTH, PROMPT_LENGTH, GRID_INDEX)
    return np.asarray(out)  # waits: callers change the arrays in place


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_dense_attention(data, backend):
    np.testing.assert_allclose(_attend(backend, *data), _oracle(*data), atol=TOLERANCE)


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


def test_back_end_of_a_platform():
    assert decode_attention.decode_backend("cpu", 128) == "xla"
    assert decode_attention.decode_backend("tpu", 128) == "tpu"
    assert decode_attention.decode_backend("tpu", 64) == "xla"
    assert decode_attention.decode_backend("gpu", 64) == "gpu"
    assert decode_attention.decode_backend("gpu", 80) == "xla"


def test_gpu_kernel_lowers_for_cuda():
    """On a machine without a GPU: as far as Triton's intermediate language."""
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType

    bf16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    int32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    slots, prefix_slots, samples_per_prefix, heads, kv, c = 64, 8, 16, 12, 2, 128
    own, prompts = bf16((slots, kv, 1024, c)), bf16((prefix_slots, kv, 512, c))
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
            bf16((slots, heads, c)),
            (own, own),
            (prompts, prompts),
            int32((slots,)),
            int32((prefix_slots,)),
            int32((slots,)),
        )
    text = exported.mlir_module()
    assert text.count("custom_call @__gpu$xla.gpu.triton") == 2  # prompts and own

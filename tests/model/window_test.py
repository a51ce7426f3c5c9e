"""Sliding windows of attention over packed rows, on every back end that has them."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pfjax.infra import sharding
from pfjax.model import attention, chunked_attention, transformer
from tests.model import cudnn_emulation, packed_rows
from tests.model.packed_rows import B, C, H, K, T

BACKENDS = [x for x in packed_rows.BACKENDS if not x.startswith("triton")]


@pytest.fixture
def data(rng):
    return packed_rows.draw(rng)


# Alone; within a block; a block; across two blocks.
@pytest.mark.parametrize(
    "window",
    [*(pytest.param(x, marks=pytest.mark.slow) for x in (1, 5, 128)), 200],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_dense_attention_forward_and_backward(
    data, backend, window, monkeypatch
):
    attend, tolerance = packed_rows.attend_with(backend, monkeypatch, window)
    want, want_gradients = packed_rows.oracle(*data, window)
    out = attend(*data[:4])
    assert np.isfinite(out).all()
    is_real = data[3] > 0
    np.testing.assert_allclose(out[is_real], want[is_real], atol=tolerance)
    # Of them all: alone, a token has no gradient of its query and key.
    scale = max(np.abs(x).max() for x in want_gradients)
    for a, b in zip(packed_rows.gradients(attend, *data), want_gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * scale)


# In a segment that begins before the window, and in one that begins inside of it.
@pytest.mark.parametrize(
    "row, at", [pytest.param(1, 290, marks=pytest.mark.slow), (0, 200)]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_flows_to_what_is_before_the_window(
    data, backend, row, at, monkeypatch
):
    """Nor to later tokens and other segments."""
    attend, _ = packed_rows.attend_with(backend, monkeypatch, 128)
    pick = np.zeros((B, T, H, C), np.float32)
    pick[row, at] = 1.0
    gradients = packed_rows.gradients(attend, *data[:4], pick)
    sees = np.zeros((B, T), bool)
    sees[row] = packed_rows.seen(data[3], 128)[row, at]
    reached = [np.abs(x).max(axis=(2, 3)) > 0 for x in gradients]
    assert not (reached[0] & ~sees).any() and not (reached[1] & ~sees).any()
    np.testing.assert_array_equal(reached[2], sees)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_reaches_those_whose_window_it_is_in(data, backend, monkeypatch):
    """Bit for bit, and no others."""
    attend, _ = packed_rows.attend_with(backend, monkeypatch, 128)
    q, k, v, segment_ids, _ = data
    before = np.asarray(attend(q, k, v, segment_ids))
    row, at = 1, 100
    changed = [x.copy() for x in (q, k, v)]
    for x in changed:
        x[row, at] += 1.0
    after = np.asarray(attend(*changed, segment_ids))
    sees = np.zeros((B, T), bool)
    sees[row, at : at + 128] = True
    is_other = (segment_ids > 0) & ~sees
    np.testing.assert_array_equal(after[is_other], before[is_other])
    assert (np.abs(after[sees] - before[sees]).max(axis=(1, 2)) > 1e-6).all()


@pytest.mark.parametrize("backend", packed_rows.BACKENDS)
def test_a_window_as_wide_as_the_row_is_none(data, backend, monkeypatch):
    """One program, which back ends without windows have too."""

    def program(window):
        attend, _ = packed_rows.attend_with(backend, monkeypatch, window)
        return attend.lower(*data[:4]).as_text()

    assert program(T) == program(T + 1) == program(0)
    if backend in BACKENDS:
        assert program(T - 1) != program(0)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize(
    ("backend", "window", "length", "sizes"),
    [
        ("chunked", 200, 512, {"fsdp": 2, "context": 4}),
        # Parts of 150 tokens.
        pytest.param(
            "chunked", 5, T, {"context": 2, "tensor": 4}, marks=pytest.mark.slow
        ),
        ("plain", 200, T, {"data": 4, "fsdp": 1, "context": 2}),
        *(
            pytest.param("splash_interpret", *x, marks=pytest.mark.slow)
            for x in (
                (5, 512, {"fsdp": 2, "context": 4}),
                (200, 512, {"fsdp": 2, "context": 4}),  # of three devices
                (200, 512, {"context": 2, "tensor": 2}),
            )
        ),
    ],
)
def test_devices_that_share_rows_agree(data, backend, window, length, sizes):
    *args, weight = packed_rows.lengthened(data, 4, length)
    mesh = sharding.make_mesh(**{"fsdp": -1} | sizes)
    packed_rows.agrees_with_one_device(backend, mesh, args, weight, window)


def test_chunked_work_follows_the_window_not_the_row(monkeypatch):
    """Blocks of keys that are read, counted as the program runs."""
    counts, loop = [], jax.lax.fori_loop

    def counted(first, end, *args):
        jax.debug.callback(lambda x: counts.append(int(x)), end - first)
        return loop(first, end, *args)

    monkeypatch.setattr(jax.lax, "fori_loop", counted)
    monkeypatch.setattr(chunked_attention, "_BLOCK", 8)

    def read(blocks, window):
        """Forward and backward, for one segment of so many blocks."""
        counts.clear()
        x, ids = jnp.ones((1, 8 * blocks, 1, 4)), jnp.ones((1, 8 * blocks), jnp.int32)
        run = functools.partial(attention.packed_attention, backend="chunked")
        loss = lambda x: run(x, x, x, ids, window=window).sum()
        jax.block_until_ready(jax.jit(jax.grad(loss))(x))
        jax.effects_barrier()
        assert len(counts) == 2 * blocks
        return sum(counts)

    # Each block of queries reads its own and those before it...
    assert read(8, 0) == 2 * 36 and read(16, 0) == 2 * 136
    # ...of which a window of 12 tokens reaches two, as far as there are so many...
    assert read(8, 12) == 2 * (1 + 2 + 6 * 3)
    assert read(16, 12) == 2 * (1 + 2 + 14 * 3)
    # ...and one as long as a block reaches one.
    assert read(16, 8) == 2 * (1 + 15 * 2)


def _mesh_of(kind):
    return AbstractMesh(
        (1,) * len(sharding.MESH_AXES),
        sharding.MESH_AXES,
        axis_types=(AxisType.Auto,) * len(sharding.MESH_AXES),
        abstract_device=AbstractDevice(kind, num_cores=1, platform="gpu"),
    )


@pytest.mark.parametrize(
    "kind, want", [("NVIDIA H100 80GB HBM3", "cudnn"), ("NVIDIA L40S", "chunked")]
)
def test_back_end_of_layers_with_a_window(kind, want):
    with jax.sharding.use_abstract_mesh(_mesh_of(kind)):
        assert attention.chosen("auto", 128, "bfloat16", 512) == want


def test_triton_says_that_it_has_no_windows(data):
    with pytest.raises(ValueError, match="choose --config.attention=chunked"):
        attention.packed_attention(*data[:4], "triton", window=5)


def test_cudnn_is_told_of_the_window_forward_and_backward(monkeypatch):
    """On a machine without a GPU: as far as the custom calls of cuDNN."""
    cudnn_emulation.install(monkeypatch)
    args = [jax.ShapeDtypeStruct((2, 512, h, 128), jnp.bfloat16) for h in (4, 2, 2)]
    ids = jax.ShapeDtypeStruct((2, 512), jnp.int32)

    def run(q, k, v, ids, window):
        loss = lambda *x: attention.packed_attention(*x, ids, "cudnn", 4, window).sum()
        return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    def told(window):
        traced = jax.jit(run, static_argnums=4).trace(*args, ids, window)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        return re.findall(r"sliding_window_length\\22: (\d+)", text)

    with jax.sharding.use_abstract_mesh(_mesh_of("NVIDIA H100 80GB HBM3")):
        assert told(0) == ["0", "0"]
        assert told(200) == ["200", "200"]


def _layers(backend, windows, remat="attention"):
    """Layers scanned as a model's are, each with the window of its kind."""

    def attend(window, q, k, v, ids):
        return attention.packed_attention(q, k, v, ids, backend, window=window)

    kinds = [functools.partial(attend, window) for window in dict.fromkeys(windows)]
    kind = jnp.array([[*dict.fromkeys(windows)].index(x) for x in windows])

    def run(q, k, v, ids):
        def layer(q, kind):
            x = jnp.sin(q)  # so that the layer has something to compute again
            return q + jax.lax.switch(kind, kinds, x, k, v, ids), None

        if remat != "none":
            policy = transformer.REMAT[remat]
            layer = jax.checkpoint(layer, prevent_cse=False, policy=policy)
        return jax.lax.scan(layer, q, kind)[0]

    return run


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize(
    "backend, sizes",
    [
        ("chunked", {"fsdp": 4, "tensor": 2}),
        pytest.param(
            "splash_interpret", {"fsdp": 2, "context": 2}, marks=pytest.mark.slow
        ),
    ],
)
def test_layers_of_two_kinds_take_turns_in_a_scan(data, backend, sizes):
    *args, weight = packed_rows.lengthened(data, 4, 512)
    windows = (0, 200, 0)
    want = packed_rows.gradients(_layers("plain", windows, "none"), *args, weight)
    devices = jax.devices()[: math.prod(sizes.values())]
    with jax.set_mesh(sharding.make_mesh(**sizes, devices=devices)):
        got = packed_rows.gradients(_layers(backend, windows), *args, weight)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


def _shapes(dtype="float32"):
    arrays = [jax.ShapeDtypeStruct((1, 512, h, C), dtype) for h in (H, K, K)]
    return *arrays, jax.ShapeDtypeStruct((1, 512), jnp.int32)


@pytest.mark.parametrize("backend", ["chunked", "splash_interpret", "cudnn"])
def test_layers_of_two_kinds_store_no_more_than_layers_of_one(backend, monkeypatch):
    """What either branch keeps for the backward pass goes to one place."""
    cudnn_emulation.install(monkeypatch)

    def stored(*windows):
        run = _layers(backend, windows)
        residuals = lambda *x: jax.vjp(lambda *qkv: run(*qkv, x[3]), *x[:3])[1]
        kept = jax.eval_shape(residuals, *_shapes("bfloat16"))
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))

    assert stored(0, 200, 0, 200) < 1.01 * stored(200, 200, 200, 200)


@pytest.mark.parametrize("windows", [(200, 200), (0, 200)])
def test_rematerialisation_keeps_what_attention_computed(windows):
    """Exponentials: "full" computes those of the forward pass a second time."""

    def count(remat):
        loss = lambda *x: _layers("chunked", windows, remat)(*x).sum()
        run = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        return run.lower(*_shapes()).as_text().count("stablehlo.exponential ")

    assert count("full") > count("attention") == count("none")


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("context", [1, 2])
def test_splash_compiles_for_tpus(tpu_mesh, head_dim, context):
    """Forward and backward, rows shared or not, and skips what is before the window."""
    mesh = tpu_mesh("v5e:2x2", fsdp=4 // context, context=context)
    where = jax.NamedSharding(mesh, jax.P("fsdp", "context"))
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(
        (4, 4096, *shape), dtype, sharding=where
    )
    args = (array(4, head_dim), array(1, head_dim), array(1, head_dim))

    def loss(q, k, v, ids):
        assert attention.chosen("auto", head_dim, q.dtype, 700) == "splash"
        out = attention.packed_attention(q, k, v, ids, window=700)
        return out.astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        run = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        text = run.lower(*args, array(dtype=jnp.int32)).compile().as_text()
    kernels = {*re.findall(r"splash_\w+?_(fwd|dq|dkv)", text)}
    assert kernels == {"fwd", "dq", "dkv"}
    # Blocks of keys per block of queries that are read, and the other way round: of eight
    # those that 700 tokens may be in.
    read = {(int(x), int(y)) for x, y in re.findall(r"s8\[1,(\d+),(\d+)\]", text)}
    assert read == {(8 // context, 3), (3, 8)}

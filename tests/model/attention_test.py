"""Attention over packed rows: every back end against a dense oracle in float64.

Kernels run in interpreters here; `launch/benchmark.sh` runs them natively.
"""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pfjax.batch import PackShape
from pfjax.infra import sharding
from pfjax.model import attention, chunked_attention, transformer
from pfjax.packing import pack
from tests.model import cudnn_emulation, packed_rows
from tests.model.packed_rows import B, C, H, T


@pytest.fixture
def data(rng):
    return packed_rows.draw(rng)


@pytest.fixture(params=packed_rows.BACKENDS)
def run(request, monkeypatch):
    return packed_rows.attend_with(request.param, monkeypatch)


def test_equals_dense_attention_forward_and_backward(data, run):
    attend, tolerance = run
    want, want_gradients = packed_rows.oracle(*data)
    out = attend(*data[:4])
    assert np.isfinite(out).all()
    is_real = data[3] > 0
    np.testing.assert_allclose(out[is_real], want[is_real], atol=tolerance)
    for a, b in zip(packed_rows.gradients(attend, *data), want_gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


def test_is_causal_and_keeps_segments_apart(data, run):
    """Bit for bit: what a token may not see does not reach it."""
    attend, _ = run
    q, k, v, segment_ids, _ = data
    before = np.asarray(attend(q, k, v, segment_ids))
    at = 200  # in the third segment of the first row
    changed = [x.copy() for x in (q, k, v)]
    for x in changed:
        x[0, at] += 1.0
    after = np.asarray(attend(*changed, segment_ids))
    same_segment = segment_ids == segment_ids[0, at]
    same_segment[1:] = False
    may_see = same_segment & (np.arange(T) >= at)
    is_other = (segment_ids > 0) & ~may_see
    np.testing.assert_array_equal(after[is_other], before[is_other])
    assert (np.abs(after[may_see] - before[may_see]).max(axis=(1, 2)) > 1e-6).all()


def test_no_gradient_flows_to_what_a_token_does_not_see(data, run):
    attend, _ = run
    q, k, v, segment_ids, _ = data
    at = 200
    pick = np.zeros((B, T, H, C), np.float32)
    pick[0, at] = 1.0
    gradients = packed_rows.gradients(attend, q, k, v, segment_ids, pick)
    sees = np.zeros((B, T), bool)
    sees[0] = (segment_ids[0] == segment_ids[0, at]) & (np.arange(T) <= at)
    for name, x in zip("qkv", gradients, strict=True):
        reached = np.abs(x).max(axis=(2, 3)) > 0
        assert not (reached & ~sees).any(), name
    np.testing.assert_array_equal(np.abs(gradients[2]).max(axis=(2, 3)) > 0, sees)


def test_a_row_of_padding_yields_numbers(data, run):
    attend, _ = run
    q, k, v, segment_ids, weight = data
    nothing = np.zeros_like(segment_ids)
    assert np.isfinite(attend(q, k, v, nothing)).all()
    gradients = packed_rows.gradients(attend, q, k, v, nothing, 0 * weight)
    assert all((np.asarray(x) == 0).all() for x in gradients)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize("backend", ["chunked", "splash_interpret"])
@pytest.mark.parametrize(
    "sizes",
    [
        *(pytest.param(x, marks=pytest.mark.slow) for x in ((2, 1, 4), (2, 2, 2))),
        (1, 2, 4),
    ],
)
def test_meshes_agree_with_fewer_key_heads_than_devices(data, backend, sizes):
    """Two key heads on a "tensor" axis of four are repeated, their gradients summed."""
    *args, weight = (np.concatenate([x, x[:1]]) for x in data)
    packed_rows.agrees_with_one_device(
        backend, sharding.make_mesh(*sizes), args, weight
    )


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize(
    ("backend", "length", "sizes"),
    [
        ("chunked", 512, {"fsdp": 2, "context": 4}),
        # Parts of 150 tokens.
        pytest.param("chunked", T, {"context": 2, "tensor": 4}, marks=pytest.mark.slow),
        ("plain", T, {"data": 4, "fsdp": 1, "context": 2}),
        pytest.param(
            "splash_interpret", 512, {"fsdp": 2, "context": 4}, marks=pytest.mark.slow
        ),
        pytest.param(
            "splash_interpret", 512, {"context": 2, "tensor": 2}, marks=pytest.mark.slow
        ),
    ],
)
def test_devices_that_share_rows_agree(data, backend, length, sizes):
    """Queries are split over "context", keys and values gathered, their gradients summed."""
    *args, weight = packed_rows.lengthened(data, 4, length)
    mesh = sharding.make_mesh(**{"fsdp": -1} | sizes)
    packed_rows.agrees_with_one_device(backend, mesh, args, weight)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize(
    ("backend", "says"),
    [("cudnn", "mesh.context=1"), ("splash_interpret", "a multiple of 512")],
)
def test_who_cannot_share_rows_says_so(data, backend, says):
    *args, _ = (x[:2, :256] for x in data)
    with (
        jax.set_mesh(sharding.make_mesh(fsdp=2, context=4)),
        pytest.raises(ValueError, match=says),
    ):
        attention.packed_attention(*args, backend)


def test_chunked_memory_grows_with_the_row_not_with_its_square():
    def temporaries(t):
        one = jax.ShapeDtypeStruct((1, t, H, C), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, t), jnp.int32)
        loss = lambda *a: attention.packed_attention(*a, "chunked").sum()
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(one, one, one, ids)
        return compiled.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(8192) < 2.2 * temporaries(4096)


def test_chunked_skips_blocks_of_other_segments(data, monkeypatch):
    """Blocks that no query sees may hold NaN."""
    q, k, v, segment_ids, weight = data
    monkeypatch.setattr(chunked_attention, "_BLOCK", 50)
    segment_ids = np.where(np.arange(T) < 150, 1, 2)[None].repeat(B, 0)
    k, v = (x.copy() for x in (k, v))
    k[:, :150] = v[:, :150] = np.nan
    weight = weight * (segment_ids == 2)[..., None, None]
    run = functools.partial(attention.packed_attention, backend="chunked")
    assert np.isfinite(run(q, k, v, segment_ids)[:, 150:]).all()


def test_segments_of_several_rows_reach_cudnn_in_place():
    """Behind JAX's conversion to one list over all rows of a device."""
    ids = np.zeros((3, 32), np.int32)
    for row, lengths in zip(ids, ((5, 7, 3, 1), (9, 23), (32,)), strict=True):
        row[: sum(lengths)] = np.repeat(np.arange(len(lengths)) + 1, lengths)
    q = np.zeros((*ids.shape, H, C), jnp.bfloat16)

    @jax.jit
    def extents(ids):
        length, offset = attention.segment_extents(ids, 5)
        whole = cudnn._fix_seqlen_offsets(length, length, offset, offset, q, q)
        return offset, whole[0].ravel(), whole[2].ravel() // (H * C)

    by_row, length, offset = extents(ids)
    np.testing.assert_array_equal(by_row[0], [0, 5, 12, 15, 16, -1])  # 16: padding
    starts = [0, 5, 12, 15, 16, 32, 41, 64]
    lengths = [5, 7, 3, 1, 16, 9, 23, 32]
    np.testing.assert_array_equal(offset[:8], starts)
    np.testing.assert_array_equal(length[:8], lengths)
    # Nothing, at the end.
    assert (offset[8:] == 3 * 32).all() and (length[8:] == 0).all()


@pytest.mark.parametrize("backend", ["plain", "chunked", "splash", "triton", "cudnn"])
def test_the_output_has_the_type_of_the_queries(backend, tiny_config, monkeypatch):
    """Else layers, which are scanned, do not trace."""
    cudnn_emulation.install(monkeypatch)
    config = dataclasses.replace(
        tiny_config, head_dim=64, dtype="bfloat16", attention=backend
    )
    params = transformer.abstract_params(config)
    ids = jax.ShapeDtypeStruct((2, 256), jnp.int32)
    run = functools.partial(transformer.forward_packed, config)
    hidden, _ = jax.eval_shape(run, params, ids, ids, ids)
    assert hidden.dtype == jnp.bfloat16


def test_cudnn_refuses_float32(data):
    with pytest.raises(ValueError, match="16 bits, not in float32"):
        attention.packed_attention(*data[:4], "cudnn")


def _mesh_of(platform, kind):
    return AbstractMesh(
        (1,) * len(sharding.MESH_AXES),
        sharding.MESH_AXES,
        axis_types=(AxisType.Auto,) * len(sharding.MESH_AXES),
        abstract_device=AbstractDevice(kind, num_cores=1, platform=platform),
    )


@pytest.mark.parametrize(
    "platform, kind, head_dim, want",
    [
        ("cpu", "cpu", 128, "chunked"),
        ("tpu", "TPU v5 lite", 128, "splash"),
        ("tpu", "TPU v6 lite", 80, "chunked"),
        ("gpu", "NVIDIA A100-SXM4-80GB", 128, "triton"),
        ("gpu", "NVIDIA H100 80GB HBM3", 80, "chunked"),
        ("gpu", "NVIDIA H100 80GB HBM3", 128, "cudnn"),
        ("gpu", "NVIDIA B200", 128, "cudnn"),
    ],
)
def test_back_end_of_the_devices_of_the_mesh(platform, kind, head_dim, want):
    with jax.sharding.use_abstract_mesh(_mesh_of(platform, kind)):
        assert attention.chosen("auto", head_dim, "bfloat16") == want
        if want == "cudnn":
            assert attention.chosen("auto", head_dim, "float32") == "triton"


@pytest.mark.parametrize(
    "kind, capability, want",
    [
        ("NVIDIA L40S", "8.9", "triton"),
        ("NVIDIA H20", "9.0", "cudnn"),
        ("NVIDIA GeForce RTX 5090", "12.0", "cudnn"),
        ("AMD Instinct MI300X", "gfx942", "triton"),
        ("Tesla T4", "7.5", "chunked"),
        ("Tesla V100-SXM2-16GB", "7.0", "chunked"),
    ],
)
def test_back_end_of_a_gpu_that_is_here(monkeypatch, kind, capability, want):
    """By what it can do, not by its name."""
    device = types.SimpleNamespace(device_kind=kind, compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    with jax.sharding.use_abstract_mesh(_mesh_of("gpu", kind)):
        assert attention.chosen("auto", 128, "bfloat16") == want


def test_packed_rows_have_contiguous_segments(rng):
    """What the back ends rely on."""
    sequences = [rng.integers(1, 9, size=n) for n in rng.integers(2, 30, size=50)]
    batch, _, _ = pack(sequences, np.ones(50, int), PackShape(20, 2, 64, 16))
    ids = batch.segment_ids.reshape(-1, 64)
    changes = (ids[:, 1:] != ids[:, :-1]).sum(1)
    segments = [len(np.unique(row)) for row in ids]
    np.testing.assert_array_equal(changes + 1, segments)


def test_triton_kernel_lowers_for_cuda():
    """On a machine without a GPU: as far as Triton's language, forward and backward."""
    bf16 = lambda h: jax.ShapeDtypeStruct((2, 512, h, 128), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((2, 512), jnp.int32)

    def run(q, k, v, ids):
        loss = lambda *x: attention.packed_attention(*x, ids, "triton").sum()
        return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    mesh = _mesh_of("gpu", "NVIDIA H100 80GB HBM3")
    check = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    with jax.sharding.use_abstract_mesh(mesh):
        exported = jax.export.export(
            jax.jit(run), platforms=["cuda"], disabled_checks=[check]
        )(bf16(12), bf16(2), bf16(2), ids)
    # Forward, the preparation of the backward pass, and the backward pass.
    assert exported.mlir_module().count("custom_call @__gpu$xla.gpu.triton") == 3


@pytest.mark.parametrize("backend, full, kept", [("cudnn", 3, 2), ("triton", 4, 3)])
def test_rematerialisation_keeps_what_the_kernel_computed(
    backend, full, kept, tiny_config, monkeypatch
):
    """Kernels of a layer lowered for CUDA: "full" runs a second forward one."""
    cudnn_emulation.install(monkeypatch)
    config = dataclasses.replace(
        tiny_config, head_dim=64, dtype="bfloat16", attention=backend
    )
    params = transformer.abstract_params(config)
    ids = jax.ShapeDtypeStruct((2, 256), jnp.int32)

    def loss(params, ids, remat):
        hidden, _ = transformer.forward_packed(
            config, params, ids, ids, ids, remat, max_segments=5
        )
        return hidden.astype(jnp.float32).sum()

    def kernels(remat):
        run = jax.jit(jax.grad(loss), static_argnums=2)
        with jax.sharding.use_abstract_mesh(_mesh_of("gpu", "NVIDIA H100 80GB HBM3")):
            traced = run.trace(params, ids, remat)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        return len(re.findall(r"custom_call @__(cudnn|gpu)\$", text))

    assert (kernels("full"), kernels("attention")) == (full, kept)
    # The output is a residual of the kernel too, and stored once.
    stored = jax.eval_shape(
        lambda p, ids: jax.vjp(lambda p: loss(p, ids, "attention"), p)[1], params, ids
    )
    shape = (config.num_layers, *ids.shape, config.num_heads, config.head_dim)
    assert [x.shape for x in jax.tree.leaves(stored)].count(shape) == 1

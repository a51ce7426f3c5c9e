"""Collectives of compiled programs: what, along which axis, how often."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pfjax.infra import sharding
from pfjax.planner import hlo


@pytest.fixture
def mesh():
    return sharding.make_mesh(data=2, fsdp=2, tensor=2)


def _of(mesh, f, *shapes):
    args = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in shapes
    ]
    text = jax.jit(f).lower(*args).compile().as_text()
    return hlo.collectives(text, mesh)


def _mapped(mesh, f, spec_in, spec_out):
    return jax.shard_map(
        f, mesh=mesh, in_specs=spec_in, out_specs=spec_out, check_vma=False
    )


@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor"])
def test_a_sum_by_hand(mesh, axis):
    f = _mapped(mesh, lambda x: jax.lax.psum(x, axis), P(axis), P())
    (found,) = _of(mesh, f, ((8, 64), P(axis)))
    assert (found.kind, found.axes) == ("all-reduce", (axis,))
    assert (found.dtype, found.shape) == ("f32", (4, 64))
    # Two devices: each sends half of 1,024 bytes twice.
    assert (found.sent, found.times, found.loops) == (1024, 1, 0)


def test_a_gather_over_two_axes_inside_of_loops(mesh):
    def local(x, n):
        def five(x, _):
            whole = jax.lax.all_gather(x, ("fsdp", "tensor"), tiled=True)
            return x + whole.sum(), None

        def again(_, x):
            return jax.lax.scan(five, x, None, length=5)[0]

        return jax.lax.fori_loop(0, n[0].astype(int), again, x)

    both = ("fsdp", "tensor")
    f = _mapped(mesh, local, (P(both), P()), P(both))
    found = _of(mesh, f, ((16, 8), P(both)), ((1,), P()))
    assert {x.kind for x in found} == {"all-gather"}
    gather = max(found, key=lambda x: x.sent)
    assert gather.axes == both and gather.shape == (16, 8)
    # Three quarters of 512 bytes come from the others; 5 times an unknown number.
    assert (gather.sent, gather.times, gather.loops) == (384, 5, 1)


def test_a_shift_along_an_axis(mesh):
    def local(x):
        return jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 0)])

    (found,) = _of(
        mesh, _mapped(mesh, local, P("fsdp"), P("fsdp")), ((8, 4), P("fsdp"))
    )
    assert (found.kind, found.axes, found.sent) == ("collective-permute", ("fsdp",), 64)


@pytest.mark.slow
def test_a_sum_of_which_a_part_is_kept_is_sent_once_on_tpus(tpu_mesh):
    """Their compiler writes it as a sum of all, inside of a fusion."""
    mesh = tpu_mesh("v5e:2x2", data=1, fsdp=4, tensor=1)
    sum_of = lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True)
    f = _mapped(mesh, sum_of, P(None, "fsdp"), P("fsdp"))
    # And the padding's rows, a few, from device to device.
    found = max(_of(mesh, f, ((4096, 4096), P(None, "fsdp"))), key=lambda x: x.sent)
    assert (found.kind, found.axes) == ("reduce-scatter", ("fsdp",))
    # Three quarters of the array that a device holds, and some padding.
    assert found.sent == pytest.approx(0.75 * 4096 * 1024 * 4, rel=0.01)


def test_groups_as_compilers_write_them(mesh):
    """Transposed lists of devices, starts of asynchronous operations, and groups of one
    device, which send nothing."""
    text = """
ENTRY %main (p: f32[4]) -> f32[8] {
  %a = (f32[4]{0}, f32[8]{0}) all-gather-start(%p), replica_groups=[4,2]<=[2,2,2]T(0,2,1), dimensions={0}
  %b = f32[8]{0} all-gather-done(%a)
  %c = (bf16[4]{0:T(8,128)}, bf16[2]{0}) all-reduce(%p, %q), replica_groups={{0,4},{1,5}}, to_apply=%add
  %d = f32[4]{0} all-reduce(%p), replica_groups={{0},{1},{2},{3}}, to_apply=%add
}
"""
    gather, reduce = hlo.collectives(text, mesh)
    assert (gather.kind, gather.axes, gather.sent) == ("all-gather", ("fsdp",), 16)
    assert (reduce.kind, reduce.axes, reduce.sent) == ("all-reduce", ("data",), 12)


def test_what_a_collective_takes_is_not_what_it_makes(mesh):
    """As XLA starts several at once for GPUs: the arguments, then the results."""
    text = """
ENTRY %main (p: f32[8]) -> f32[4] {
  %a = ((bf16[8]{0}, f32[8,3]{1,0:T(8,128)}), (bf16[4]{0}, f32[4,3]{1,0:T(8,128)})) reduce-scatter-start(%p, %q), replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=2] {'fsdp'}, dimensions={0}
  %b = ((f32[4]{0}), f32[8]{0}) all-gather-start(%p), replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=2] {'fsdp'}, dimensions={0}
  %c = (f32[8]{0}, f32[8]{0}) all-gather(%p, %q), replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=2] {'fsdp'}, dimensions={0}
}
"""
    scatter, start, gather = hlo.collectives(text, mesh)
    # Of two devices each sends the half that is the other's.
    assert (scatter.dtype, scatter.shape, scatter.sent) == ("f32", (4, 3), 8 + 48)
    assert (start.shape, start.sent) == ((8,), 16)
    assert gather.sent == 2 * 16


def test_computations_end_where_the_compiler_ends_them(mesh):
    """Notes of kernels run over lines of which some begin with a bracket."""
    text = """
ENTRY %main (p: f32[4]) -> f32[4] {
  %k = f32[4]{0} custom-call(%p), backend_config={"notes": {
"block": 512
}}, metadata={op_name="kernel"}
  %c = f32[4]{0} all-reduce(%k), replica_groups={{0,4},{1,5}}, to_apply=%add
}
"""
    (found,) = hlo.collectives(text, mesh)
    assert (found.kind, found.axes) == ("all-reduce", ("data",))

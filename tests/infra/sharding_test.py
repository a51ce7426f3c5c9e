"""Meshes over nodes with slow links between them."""

import types

import jax
import numpy as np
import pytest

from pfjax.infra import hardware, sharding
from pfjax.planner import aot


@pytest.mark.parametrize(
    ("asked", "devices", "nodes", "sizes"),
    [
        ((0, -1, 1), 16, 2, (2, 8, 1, 1, 1)),
        ((0, -1, 4), 16, 2, (2, 2, 1, 1, 4)),
        ((0, -1, 1), 8, 1, (1, 8, 1, 1, 1)),
        ((0, 8, -1), 16, 2, (2, 8, 1, 1, 1)),
        # Both are given: what they leave.
        ((0, 16, 1), 16, 2, (1, 16, 1, 1, 1)),
        ((0, 2, 2), 16, 2, (4, 2, 1, 1, 2)),
        # A copy per node would leave half a matrix on each.
        ((0, -1, 16), 16, 2, (1, 1, 1, 1, 16)),
        ((1, -1, 1), 16, 2, (1, 16, 1, 1, 1)),
        ((-1, 4, 1), 16, 2, (4, 4, 1, 1, 1)),
    ],
)
def test_a_copy_of_the_weights_per_node_unless_told_otherwise(
    asked, devices, nodes, sizes
):
    assert sharding.mesh_sizes(*asked, devices, nodes) == sizes


def test_devices_that_share_a_row_are_of_one_copy():
    assert sharding.mesh_sizes(0, -1, 2, 16, 2, context=4) == (2, 1, 1, 4, 2)
    assert sharding.mesh_sizes(0, 4, 1, 16, 2, context=-1) == (2, 4, 1, 2, 1)


def test_devices_that_share_experts_are_of_one_copy():
    assert sharding.mesh_sizes(0, -1, 2, 16, 2, expert=4) == (2, 1, 4, 1, 2)
    assert sharding.mesh_sizes(0, 4, 1, 16, 2, expert=-1) == (2, 4, 2, 1, 1)


def _nodes(num_nodes, each):
    """Devices that are listed by turns: one of each node."""
    return [
        types.SimpleNamespace(
            id=i,
            slice_index=i % num_nodes,
            process_index=i,
            device_kind="x",
            platform="gpu",
        )
        for i in range(num_nodes * each)
    ]


@pytest.mark.parametrize("asked", [(0, -1, 1), (4, -1, 2), (2, 2, 2)])
def test_what_a_copy_is_split_over_lies_within_a_node(monkeypatch, asked):
    monkeypatch.setattr(sharding, "Mesh", lambda grid, *args, **kwargs: grid)
    grid = sharding.make_mesh(*asked, devices=_nodes(2, 4))
    assert len({d.id for d in grid.flat}) == 8
    for copy in grid:
        assert len({d.slice_index for d in np.ravel(copy)}) == 1


def test_devices_of_a_cpu_and_nodes_that_differ_are_one_node():
    devices = _nodes(2, 4)
    assert sharding.num_nodes(devices) == 2
    assert sharding.num_nodes(devices[:7]) == 1
    for device in devices:
        device.platform = "cpu"
    assert sharding.num_nodes(devices) == 1


def test_each_process_sets_the_last_of_its_devices_apart():
    devices = _nodes(2, 4)
    for device in devices:
        device.process_index = device.slice_index
    learn, draw = ([d.id for d in x] for x in sharding.split_off(devices, 4))
    assert (learn, draw) == ([0, 1, 2, 3], [4, 5, 6, 7])
    for number, says in ((3, "give a multiple of 2"), (8, "leaves none of 8")):
        with pytest.raises(ValueError, match=f"--config.mesh.rollout={number}.*{says}"):
            sharding.split_off(devices, number)


@pytest.mark.parametrize(
    ("topology", "apart"),
    [
        ("v5e:2x2", {3}),
        ("v5e:2x4", {2, 3, 4, 5}),
        ("v5e:4x4", {5, 6, 9, 10}),
        ("v5e:4x4", {4, 5, 6, 7, 9, 10, 13, 14}),
    ],
)
def test_tpus_in_the_middle_of_their_slice_are_set_apart(tpu_mesh, topology, apart):
    """Of the last of each process libtpu compiles no sum, and JAX makes no mesh."""
    learner = tpu_mesh(topology, rollout=len(apart))
    own = aot.actor_mesh(topology, len(apart), 1, is_abstract=False)
    assert {d.id for d in own.devices.flat} == apart
    assert not apart & {d.id for d in learner.devices.flat}
    for mesh in (learner, own):
        shape = (mesh.size, 8)
        rows = sharding.of_batch(mesh, shape, 0)
        x = jax.ShapeDtypeStruct(shape, "float32", sharding=rows)
        whole = sharding.replicated(mesh)
        jax.jit(lambda x: x.sum(0), out_shardings=whole).lower(x).compile()


def test_a_mesh_across_nodes_may_be_asked_for(monkeypatch):
    monkeypatch.setattr(sharding, "Mesh", lambda grid, *args, **kwargs: grid)
    assert sharding.make_mesh(1, devices=_nodes(2, 4)).shape == (1, 8, 1, 1, 1)


def test_nodes_of_a_topology():
    h100, v5e = hardware.CHIPS["h100"], hardware.CHIPS["v5e"]
    assert [hardware.num_nodes(h100, n) for n in (1, 8, 16, 20)] == [1, 1, 2, 1]
    assert hardware.num_nodes(v5e, 256) == 1  # a slice


def test_devices_are_regrouped_in_their_order_within_a_copy():
    mesh = sharding.make_mesh(data=2, fsdp=4)
    other = sharding.regrouped(mesh, 2)
    assert other.axis_sizes == (2, 2, 1, 1, 2)
    assert [*other.devices.flat] == [*mesh.devices.flat]
    assert sharding.regrouped(mesh, 0) is sharding.regrouped(mesh, 1) is mesh
    abstract = sharding.regrouped(mesh.abstract_mesh, 4)
    assert abstract.axis_sizes == (2, 1, 1, 1, 4)
    assert abstract.abstract_device == mesh.abstract_mesh.abstract_device
    with pytest.raises(ValueError, match="rollout_tensor=3 does not divide the 4 "):
        sharding.regrouped(mesh, 3)
    # Rows of rollouts are short, and each part of the batch has all experts.
    for axis in ("context", "expert"):
        shared = sharding.make_mesh(fsdp=2, tensor=2, **{axis: 2})
        assert sharding.regrouped(shared, 0).axis_sizes == (1, 4, 1, 1, 2)

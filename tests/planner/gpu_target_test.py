"""GPUs that are not here: described whole, and asked for where they are targets."""

import types

import jax
import numpy as np
import pytest

from pfjax.infra import hardware
from pfjax.planner import aot, gpu_target

GPUS = [kind for kind, chip in hardware.CHIPS.items() if chip.is_gpu]


@pytest.mark.parametrize("kind", GPUS)
def test_every_gpu_of_a_plan_is_described(kind):
    words = gpu_target.description(kind).split()
    chip = hardware.CHIPS[kind]
    value = lambda name: int(words[words.index(name) + 1])
    assert value("device_memory_size:") == int(chip.memory)
    assert value("memory_bandwidth:") == int(chip.bandwidth)
    # What one block may ask for is what the processor has, from Ampere on but for 1 KiB.
    shared = value("shared_memory_per_core:")
    reserved = 1024 if chip.capability >= (8, 0) else 0
    assert value("shared_memory_per_block_optin:") == shared - reserved
    assert words.count("{") == words.count("}")


def test_a_description_by_hand():
    text = gpu_target.description("h100")
    assert 'name: "NVIDIA H100 80GB HBM3"' in text
    assert "major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES" in text
    assert "core_count: 132" in text and "memory_bandwidth: 3350000000000" in text
    assert "major: 8 minor: 9 feature_extension: NONE" in gpu_target.description(
        "rtx4090"
    )


@pytest.mark.parametrize(
    "kind, capability, takes_packed_rows",
    [("gpu", "8.9", False), ("gpu", "9.0", True), ("gpu", "10.0", True), ("cpu", "", False)],
)  # fmt: skip
def test_cudnn_is_checked_for_the_target_and_not_for_this_machine(
    kind, capability, takes_packed_rows
):
    cudnn = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    device = types.SimpleNamespace(platform=kind, compute_capability=capability)
    mesh = types.SimpleNamespace(devices=np.array([[device]]))
    before = cudnn.check_compute_capability
    with gpu_target.told_to_cudnn(mesh):
        assert cudnn.check_compute_capability("9.0") == takes_packed_rows
        assert not cudnn.is_cuda_compute_capability_equal("10.3")
    assert cudnn.check_compute_capability is before
    assert not before("9.0")


def test_a_compiler_is_chosen_by_the_devices(monkeypatch):
    monkeypatch.setattr(aot, "tpu_mesh", lambda *args: ("tpu", *args))
    monkeypatch.setattr(gpu_target, "mesh", lambda *args: ("gpu", *args))
    assert aot.device_mesh("v5e:4x4", 0, -1, 1) == ("tpu", "v5e:4x4", 0, -1, 1)
    assert aot.device_mesh("h100:16", 0, -1, 1) == ("gpu", "h100", 16, 0, -1, 1)
    for found in (False, True):
        monkeypatch.setattr(gpu_target, "is_installed", lambda found=found: found)
        assert aot.can_compile("h100:8") == found


def test_the_devices_of_a_mesh_are_in_the_order_of_nodes(monkeypatch):
    """Each node has a copy of the weights: XLA is told of the nodes, the mesh follows."""
    from jax.experimental import topologies

    def two_nodes(name, platform, target_config, topology):
        assert (name, platform, topology) == ("", "cuda", "1x2x8")
        assert target_config == gpu_target.description("h100")
        devices = [jax.devices()[0]] * 16
        return types.SimpleNamespace(devices=devices)

    monkeypatch.setattr(topologies, "get_topology_desc", two_nodes)
    monkeypatch.setattr(
        gpu_target.sharding, "make_mesh", lambda devices, **sizes: (sizes, len(devices))
    )
    sizes = {"data": 2, "fsdp": 8, "expert": 1, "context": 1, "tensor": 1}
    assert gpu_target.mesh("h100", 16, 0, -1, 1) == (sizes, 16)

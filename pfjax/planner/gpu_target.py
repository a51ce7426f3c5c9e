"""NVIDIA GPUs that need not be here, described to XLA, which compiles for them.

What it makes lacks what only the card itself can tell: kernels are not timed against each
other, and cuDNN neither chooses its plans nor says how much memory they work in.
"""

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

from jax.sharding import Mesh

from pfjax.infra import hardware, sharding


class _Processor(NamedTuple):
    """What XLA asks of a GPU beside memory and bandwidth (`hardware.Chip`); sizes in bytes."""

    cores: int  # streaming multiprocessors
    units: int  # for float32, of each
    threads: int  # of each, at most
    shared_memory: int  # of each
    block_memory: int  # of the shared, what one block may ask for
    l2_cache: int
    clock: float  # GHz
    links: int  # NVLinks


# As the cards report it to XLA.
_HOPPER = _Processor(132, 128, 2048, 233_472, 232_448, 50 << 20, 1.98, 18)
_PROCESSORS = {
    "t4": _Processor(40, 64, 1024, 65_536, 65_536, 4 << 20, 1.59, 0),
    "a100": _Processor(108, 64, 2048, 167_936, 166_912, 40 << 20, 1.41, 12),
    "h100": _HOPPER,
    "h200": _HOPPER,
    "rtx4090": _Processor(128, 128, 1536, 102_400, 101_376, 72 << 20, 2.52, 0),
    "b200": _Processor(148, 128, 2048, 233_472, 232_448, 132_644_864, 1.965, 18),
}  # fmt: skip


def is_installed() -> bool:
    """Whether XLA's compiler for NVIDIA GPUs is here, a plugin of JAX."""
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    plugins = (f"jax_plugins.xla_cuda{n}" for n in (12, 13))
    return any(importlib.util.find_spec(name) is not None for name in plugins)


def mesh(kind: str, devices: int, *sizes: int, rollout: int = 0, **named: int) -> Mesh:
    """A mesh of GPUs, of a kind of `hardware.CHIPS`, to lower and compile for."""
    from jax.experimental import topologies

    nodes = hardware.num_nodes(hardware.CHIPS[kind], devices)
    found = topologies.get_topology_desc(
        "",
        "cuda",
        target_config=description(kind),
        topology=f"1x{nodes}x{devices // nodes}",
    )
    learning, _ = sharding.split_off(found.devices, rollout)
    # These devices do not say which node they are of; they are in the order of nodes.
    number = {"devices": len(learning), "nodes": nodes}
    found_sizes = sharding.mesh_sizes(*sizes, **named, **number)
    of_axis = dict(zip(sharding.MESH_AXES, found_sizes, strict=True))
    return sharding.make_mesh(**of_axis, devices=learning)


def description(kind: str) -> str:
    """XLA's `GpuTargetConfigProto` of a kind of GPU, as text."""
    chip, processor = hardware.CHIPS[kind], _PROCESSORS[kind]
    major, minor = chip.capability
    # From Hopper on some instructions are of one generation alone ("sm_90a").
    extension = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    return f"""
gpu_device_info {{
  name: "{chip.kinds[0]}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{
    major: {major} minor: {minor} feature_extension: {extension}
  }}
  core_count: {processor.cores}
  fpus_per_core: {processor.units}
  clock_rate_ghz: {processor.clock}
  device_memory_size: {int(chip.memory)}
  memory_bandwidth: {int(chip.bandwidth)}
  l2_cache_size: {processor.l2_cache}
  shared_memory_per_core: {processor.shared_memory}
  shared_memory_per_block: {48 << 10}
  shared_memory_per_block_optin: {processor.block_memory}
  registers_per_core_limit: {1 << 16}
  registers_per_block_limit: {1 << 16}
  threads_per_warp: 32
  threads_per_core_limit: {processor.threads}
  threads_per_block_limit: 1024
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: {2**31 - 1} block_dim_limit_y: 65535 block_dim_limit_z: 65535
  device_interconnect_info {{ active_links: {processor.links} }}
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{chip.kinds[0]}"
"""


@contextlib.contextmanager
def told_to_cudnn(mesh: Mesh) -> Iterator[None]:
    """Has JAX check calls of cuDNN against the GPUs of a mesh, if it is one of GPUs.

    It asks the devices of this machine, and nothing public tells it of others.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    device = mesh.devices.flat[0]
    if device.platform != "gpu":
        yield
        return
    numbers = lambda text: tuple(map(int, text.split(".")))
    here = numbers(device.compute_capability)
    with mock.patch.multiple(
        cudnn,
        check_compute_capability=lambda least: here >= numbers(least),
        is_cuda_compute_capability_equal=lambda other: here == numbers(other),
    ):
        yield

"""What devices can do: the peaks that their vendors state."""

import math
import re
from typing import NamedTuple

import jax

from pfjax.infra import gpu_memory


class Chip(NamedTuple):
    """One device, as JAX counts them; all rates are peaks per second."""

    kinds: tuple[str, ...]  # JAX's `device_kind`, or the beginning of it
    flops: float  # dense bfloat16
    memory: float  # bytes; of TPUs what a program may use, of GPUs all
    bandwidth: float  # bytes, of that memory
    links: float  # bytes sent to other devices of its slice or node, over all links
    network: float = math.inf  # bytes sent to other nodes; of TPUs, a slice is one
    host: int = 8  # devices of one machine of several, which are those of a process
    capability: tuple[int, int] | None = None  # NVIDIA's number of what a GPU can do

    @property
    def node(self) -> float:
        """Devices with fast links between them; of GPUs, those of an HGX board."""
        return 8 if self.is_gpu else math.inf

    @property
    def is_gpu(self) -> bool:
        return self.capability is not None


GIB = 2**30
# An adapter of 200 or 400 Gb/s per GPU, as in NVIDIA's DGX A100, H100, H200 and B200.
_HDR, _NDR = 25e9, 50e9
# Cards without NVLink: 16 lanes of PCIe 4; between nodes 100 Gb/s are assumed.
_PCIE, _EDR = 32e9, 12.5e9
CHIPS = {
    "v4": Chip(("TPU v4",), 275e12, 30.75 * GIB, 1.228e12, 300e9, host=4),
    "v5e": Chip(
        ("TPU v5 lite", "TPU v5e"), 197e12, 15.75 * GIB, 0.819e12, 200e9, host=4
    ),
    "v5p": Chip(("TPU v5", "TPU v5p"), 459e12, 95.73 * GIB, 2.765e12, 600e9, host=4),
    "v6e": Chip(
        ("TPU v6 lite", "TPU v6e"), 918e12, 31.24 * GIB, 1.638e12, 400e9, host=4
    ),
    # Half a chip.
    "tpu7x": Chip(("TPU7x", "TPU v7x"), 1153.5e12, 94.74 * GIB, 3.69e12, 300e9),
    # In bfloat16 it computes as in float32.
    "t4": Chip(
        ("Tesla T4",), 8.1e12, 14.56 * GIB, 0.32e12, _PCIE / 2, _EDR, capability=(7, 5)
    ),
    "a100": Chip(
        ("NVIDIA A100-SXM4-80GB",),
        312e12,
        79.15 * GIB,
        2.039e12,
        300e9,
        _HDR,
        capability=(8, 0),
    ),
    "h100": Chip(
        ("NVIDIA H100 80GB HBM3",),
        989e12,
        79.11 * GIB,
        3.35e12,
        450e9,
        _NDR,
        capability=(9, 0),
    ),
    "h200": Chip(
        ("NVIDIA H200",), 989e12, 139.80 * GIB, 4.8e12, 450e9, _NDR, capability=(9, 0)
    ),
    # With sums in float32, as JAX has them.
    "rtx4090": Chip(
        ("NVIDIA GeForce RTX 4090",),
        165.2e12,
        23.64 * GIB,
        1.008e12,
        _PCIE,
        _EDR,
        capability=(8, 9),
    ),
    "b200": Chip(
        ("NVIDIA B200",), 2250e12, 178.36 * GIB, 8.0e12, 900e9, _NDR, capability=(10, 0)
    ),
}
# The first GPUs of NVIDIA that XLA takes Triton's kernels for: Ampere.
_TRITON = (8, 0)


def chip_of(device_kind: str) -> Chip | None:
    """Finds a chip by JAX's `device_kind`; None when it is not known."""
    known = {kind: chip for chip in CHIPS.values() for kind in chip.kinds}
    fits = [kind for kind in known if device_kind.startswith(kind)]
    return known[max(fits, key=len)] if fits else None


def compute_capability(device_kind: str) -> tuple[int, int] | None:
    """NVIDIA's number of what a GPU can do, (9, 0) of Hopper; None of other devices.

    Of a device that is not here it is that of its chip.
    """
    here = next((x for x in jax.devices() if x.device_kind == device_kind), None)
    if here is None:
        chip = chip_of(device_kind)
        return chip and chip.capability
    # "9.0"; of AMD a name, "gfx942".
    found = re.fullmatch(r"(\d+)\.(\d+)", getattr(here, "compute_capability", ""))
    return found and (int(found[1]), int(found[2]))


def runs_triton(platform: str, device_kind: str) -> bool:
    """Whether Pallas's kernels for GPUs run there: not on NVIDIA's T4, V100 and older."""
    if platform != "gpu":
        return False
    capability = compute_capability(device_kind)
    return capability is None or capability >= _TRITON


def usable_memory(chip: Chip) -> float:
    """Bytes of a device that a run may use: of GPUs, what JAX reserves."""
    return chip.memory * (gpu_memory.fraction() if chip.is_gpu else 1)


def num_nodes(chip: Chip, devices: int) -> int:
    """Whole nodes of a number of devices; one if they do not fill nodes."""
    whole = devices % chip.node == 0  # never of TPUs, whose node is endless
    return int(devices // chip.node) if whole else 1


def num_machines(chip: Chip, devices: int) -> int:
    """Machines of a number of devices; one if they do not fill machines."""
    return 1 if devices % chip.host else devices // chip.host


def mfu(flops: float, seconds: float) -> float | None:
    """Fraction of the peak FLOPs of all devices; None where that is not known."""
    chip = chip_of(jax.devices()[0].device_kind)
    return chip and flops / seconds / (chip.flops * jax.device_count())

"""Programs compiled ahead of time, for TPUs and GPUs that need not be here."""

import importlib.util
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh

from pfjax.batch import SCORES
from pfjax.infra import hardware, numerics, sharding
from pfjax.model import lora, transformer
from pfjax.model.transformer import Params
from pfjax.planner import gpu_target
from pfjax.planner.roofline import Workload
from pfjax.sampler import buffers, decode, slots, unstack
from pfjax.sampler.buffers import Queue, SamplerState, Settings
from pfjax.trainer import train_fns

# libtpu looks for the TPU of this machine unless told what there is.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


def parse(topology: str) -> tuple[hardware.Chip, int]:
    """The chip and the number of devices of a topology.

    Raises:
      ValueError: if it is not `v5e:4x4`, for TPUs, or `h200:8`, for GPUs.
    """
    kind, _, grid = topology.partition(":")
    try:
        chip = hardware.CHIPS[kind]
        devices = math.prod(max(int(x), 0) for x in grid.split("x"))
        if devices < 1:
            raise ValueError
    except (KeyError, ValueError):
        raise ValueError(
            f"--topology={topology}: give KIND:GRID for TPUs (v5e:4x4, v5p:4x4x4) or "
            f"KIND:NUMBER for GPUs (h200:8), KIND one of {sorted(hardware.CHIPS)}"
        ) from None
    return chip, devices * (2 if kind == "tpu7x" else 1)


def num_learning(topology: str, rollout: int) -> int:
    """Devices of a topology beside those for rollouts; see `sharding.num_learning`."""
    chip, devices = parse(topology)
    machines = hardware.num_machines(chip, devices) if rollout else 1
    return sharding.num_learning(devices, rollout, machines)


def _is_tpu(topology: str) -> bool:
    return not parse(topology)[0].is_gpu


def can_compile(topology: str) -> bool:
    """Whether a compiler for the devices is installed."""
    if _is_tpu(topology):
        return importlib.util.find_spec("libtpu") is not None
    return gpu_target.is_installed()


def extra(topology: str) -> str:
    """The extra of the package that brings the compiler for the devices."""
    return "tpu" if _is_tpu(topology) else "cuda13"


def device_mesh(topology: str, *sizes: int, **named: int) -> Mesh:
    """A mesh of a topology, to lower and compile for; see `can_compile`. Sizes of the axes
    are those that `sharding.make_mesh` takes."""
    if _is_tpu(topology):
        return tpu_mesh(topology, *sizes, **named)
    _, devices = parse(topology)
    return gpu_target.mesh(topology.partition(":")[0], devices, *sizes, **named)


def tpu_mesh(topology: str, *sizes: int, **named: int) -> Mesh:
    """A mesh of a TPU topology, to lower and compile for. Needs libtpu."""
    from jax.experimental import topologies

    os.environ |= _ENVIRONMENT
    # Otherwise two devices per chip, which nobody uses.
    chip = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    try:
        found = topologies.get_topology_desc(topology, "tpu", **chip)
    except jax.errors.JaxRuntimeError as error:
        said = str(error).splitlines()[0]
        raise ValueError(
            f"--topology={topology}: there is no such TPU: {said}"
        ) from error
    return sharding.make_mesh(*sizes, **named, devices=found.devices)


def abstract_mesh(topology: str, rollout: int = 0, **sizes: int) -> AbstractMesh:
    """A mesh of any topology, to derive shapes and shardings from."""
    chip, devices = parse(topology)[0], num_learning(topology, rollout)
    platform = "tpu" if _is_tpu(topology) else "gpu"
    return AbstractMesh(
        sharding.mesh_sizes(
            **sizes, devices=devices, nodes=hardware.num_nodes(chip, devices)
        ),
        sharding.MESH_AXES,
        axis_types=(AxisType.Auto,) * len(sharding.MESH_AXES),
        abstract_device=AbstractDevice(chip.kinds[0], num_cores=1, platform=platform),
    )


def actor_mesh(
    topology: str, rollout: int, tensor: int, is_abstract: bool
) -> AbstractMesh | Mesh:
    """The mesh of the devices of a topology that are set apart for rollouts."""
    whole = {"data": 1, "fsdp": -1, "tensor": 1}
    if is_abstract:
        mesh = abstract_mesh(topology, **whole)
        return mesh.update(axis_sizes=(1, rollout // tensor, 1, 1, tensor))
    devices = device_mesh(topology, **whole).devices.flat
    devices = sorted(devices, key=lambda d: d.id)
    return sharding.rollout_mesh(rollout, tensor, devices)


@numerics.as_promised()
def compile_phases(
    fns: train_fns.TrainFns,
    batch: tuple[Any, ...],
    work: Workload,
    rollout_mesh: Mesh,
) -> dict[str, Any]:
    """Compiles the program of each phase of a step, rollouts for their mesh, the others for
    the current one and a `batch` of `train_fns.abstract_minibatch`."""
    scored, number = batch
    rows = scored._replace(**dict.fromkeys(SCORES))
    frozen = fns.base if work.model.lora_rank else {}
    policy = lora.join(frozen, fns.state.params["policy"])
    if work.is_apart:  # they are sent there
        axes, shapes = transformer.logical_axes(work.model), policy
        where = sharding.rollout_shardings(rollout_mesh, axes, shapes)
        policy = train_fns.placed(shapes, where, work.model.dtype)
    with gpu_target.told_to_cudnn(jax.sharding.get_mesh()):
        with jax.set_mesh(rollout_mesh):
            decode_loop = _lower_decode(policy, work)
        phases = {
            "rollout": decode_loop,
            "score": fns.score_base.lower(fns.base, rows, number),
            "update": fns.train_step.lower(fns.state, frozen, scored, number),
        }
    return {phase: lowered.compile() for phase, lowered in phases.items()}


def _lower_decode(params: Params, work: Workload) -> Any:
    """The loop over tokens of a rollout, at the widest caches of its plan."""
    model, plan, g = work.model, work.plan, work.samples_per_prompt
    settings = Settings(model, plan, g, model.stop_ids)
    key = jax.eval_shape(lambda: jax.random.key(0))
    temperature = jax.ShapeDtypeStruct((), jnp.float32)
    of_program = {}

    def once(f, params, *args, **static):  # layers of the same parameters are alike
        kind = (f, *params)
        if kind not in of_program:
            of_program[kind] = results(f, params, *args, **static)
        return of_program[kind]

    weights = unstack.weights(model, params, run=once)
    state = SamplerState(weights, key, temperature)
    prompts = slots.prompts_per_part(plan, work.room, g)
    array = lambda n, dtype=jnp.int32: jax.ShapeDtypeStruct((plan.dp_size * n,), dtype)
    numbers = [*[array(prompts)] * 4, *[array(1)] * 5]
    alpha = array(prompts, jnp.float32) if model.alpha_range else None
    queue = Queue(*numbers, array(prompts * g, bool), alpha)
    sizes = {"width": plan.widths[-1], "new": work.max_new_tokens}
    prefixes, *others = results(buffers.start, queue, s=settings, **sizes)
    args = (state, prefixes, queue, *others)
    return decode.decode.lower(*args, s=settings, samples_per_prefix=g)


def results(f: Any, *args: Any, **kwargs: Any) -> Any:
    """Shapes of what a jitted function returns, sharded as by its compiled program."""
    shapes, program = f.eval_shape(*args, **kwargs), f.lower(*args, **kwargs).compile()
    return train_fns.placed(shapes, program.output_shardings)


def temporaries(compiled: Any) -> int:
    """Bytes that a program needs at its peak on one device, beside its arguments."""
    m = compiled.memory_analysis()
    by_sum = m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
    return max(by_sum, m.peak_memory_in_bytes - m.argument_size_in_bytes, 0)

"""What a step will take on devices that need not be here: memory, traffic, seconds.

Where the compiler for the devices is present the rollout and the update are compiled
for them, and memory and traffic are what the programs say; elsewhere both are estimated
from shapes. Seconds are lower bounds by a roofline: FLOPs, bytes of memory and bytes
over links, each at its peak.
"""

import contextlib
import math
from typing import Any, NamedTuple

import jax
import ml_collections
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh

from pfjax.infra import hardware, sharding
from pfjax.model import lora, transformer
from pfjax.model.transformer import ModelConfig
from pfjax.planner import decode_aot as rollout_ahead
from pfjax.planner import hlo, roofline
from pfjax.sampler import slots
from pfjax.trainer import setup


class Forecast(NamedTuple):
    """One config on one mesh. Bytes are of one device."""

    is_compiled: bool
    mesh: dict[str, int]
    state: dict[str, int]  # bytes of what stays
    phases: dict[str, dict[str, int]]  # bytes that each part of a step adds
    loads: dict[str, roofline.Load]
    collectives: dict[str, list[hlo.Collective]]
    plan: slots.Plan
    work: roofline.Traffic

    @property
    def micro_batches(self) -> int:
        """That the assumed lengths need."""
        return self.work.micro_batches

    @property
    def tokens(self) -> int:
        """Drawn in a step."""
        return self.work.responses * self.work.response_tokens

    def runs(self, phase: str, x: hlo.Collective) -> float:
        """How often a step runs a collective."""
        return x.times * self.work.runs(phase, x)

    @property
    def total(self) -> int:
        return sum(self.state.values()) + max(
            sum(x.values()) for x in self.phases.values()
        )

    def seconds(self, chip: hardware.Chip) -> dict[str, dict[str, float]]:
        """Of each part of a step, by what bounds it."""
        return {
            name: {
                "compute": x.flops / chip.flops,
                "memory": x.moved / chip.bandwidth,
                "links": sum(x.sent.values()) / chip.links,
            }
            for name, x in self.loads.items()
        }


def forecast(
    config: ml_collections.FrozenConfigDict,
    base_config: ModelConfig,
    mesh: Mesh | AbstractMesh,
    chip: hardware.Chip,
    response_tokens: int,
    can_compile: bool,
) -> Forecast:
    """Of a step of `config` on `mesh`.

    Args:
      config: of the run.
      base_config: of the checkpoint.
      mesh: of devices of which `chip` is one.
      chip: what the devices can do.
      response_tokens: mean length of a response, an assumption.
      can_compile: whether a compiler for the devices is here.

    Raises:
      ValueError: if sizes do not divide, or not one sample fits beside the state.
    """
    made = setup.programs(config, base_config, config.data.max_prompt_tokens, mesh)
    policy = made.step_config.model
    state = {
        "parameters": roofline.bytes_of(made.state.params),
        "optimizer": roofline.bytes_of(made.state.opt_state),
    }
    frozen = made.base if config.lora.rank else {}
    if config.base_memory == "device":
        state["base"] = roofline.bytes_of(made.base)
    with _current(mesh):
        plan = slots.plan_for(
            policy,
            sharding.platform()[0],
            lambda: int(chip.memory - sum(state.values())),
            num_prompts=config.prompts_per_step,
            samples_per_prompt=config.samples_per_prompt,
            max_new_tokens=config.max_new_tokens,
            prompt_width=config.data.max_prompt_tokens,
            num_slots=config.rollout_slots or None,
        )
        work = roofline.Traffic(config, made, mesh, plan, response_tokens)
        waiting = roofline.bytes_of(made.base) if config.base_memory == "host" else 0
        weights = roofline.rollout_weight_bytes(policy, mesh)
        found: dict[str, list[hlo.Collective]] = {}
        if can_compile:
            phases, found = _compiled(config, made, mesh, plan, frozen)
            loads = work.loads(found)
        else:
            phases = {
                "rollout": {"temporaries": plan.slots * policy.vocab_size * 12},
                "score": {
                    "temporaries": roofline.temporaries(
                        config, made, mesh, is_update=False
                    )
                },
                "update": {
                    "temporaries": roofline.temporaries(
                        config, made, mesh, is_update=True
                    )
                },
            }
            loads = work.loads(None)
    phases["rollout"] |= {"weights": weights, "caches": plan.cache_bytes}
    phases["score"]["base from the host"] = waiting
    return Forecast(
        is_compiled=can_compile,
        mesh=dict(mesh.shape),
        state=state,
        phases=phases,
        loads=loads,
        collectives=found,
        plan=plan,
        work=work,
    )


def _compiled(
    config: ml_collections.FrozenConfigDict,
    made: setup.Programs,
    mesh: Mesh,
    plan: slots.Plan,
    frozen: transformer.Params,
) -> tuple[dict[str, dict[str, int]], dict[str, list[hlo.Collective]]]:
    """Temporaries and collectives of the three programs of a step."""
    batch, old, number = setup.abstract_batch(made, config, mesh)
    policy = lora.join(frozen, made.state.params["policy"])
    programs = {
        "rollout": rollout_ahead.compile_decode(
            made.step_config.model,
            policy,
            plan,
            num_prompts=config.prompts_per_step,
            samples_per_prompt=config.samples_per_prompt,
            max_new_tokens=config.max_new_tokens,
        )[0],
        "score": made.score_step.lower(
            made.base, batch, number, config=made.base_config
        ).compile(),
        "update": made.train_step.lower(
            made.state, frozen, batch, old, number
        ).compile(),
    }
    phases = {"rollout": {"temporaries": _beyond_arguments(programs["rollout"])}}
    for name in ("score", "update"):
        phases[name] = {
            "temporaries": _beyond_arguments(programs[name]),
            "rows": roofline.bytes_of((batch, old)),
        }
    found = {name: hlo.collectives(x.as_text(), mesh) for name, x in programs.items()}
    return phases, found


def _beyond_arguments(compiled: Any) -> int:
    """Bytes of a program at its peak, beside its arguments."""
    m = compiled.memory_analysis()
    by_sum = m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
    return max(by_sum, m.peak_memory_in_bytes - m.argument_size_in_bytes, 0)


def is_tpu(topology: str) -> bool:
    """Whether a topology is of TPUs, `v5e:4x4`; else it is a number, `h200:8`."""
    return "x" in topology.partition(":")[2]


def _parse(topology: str) -> tuple[hardware.Chip, int]:
    """The chip and the number of devices."""
    kind, _, grid = topology.partition(":")
    try:
        chip = hardware.CHIPS[kind]
        devices = math.prod(int(x) for x in grid.split("x"))
    except (KeyError, ValueError):
        raise ValueError(
            f"--topology={topology}: give KIND:GRID for TPUs (v5e:4x4, v5p:4x4x4) or "
            f"KIND:NUMBER for GPUs (h200:8), KIND one of {sorted(hardware.CHIPS)}"
        ) from None
    return chip, devices * (2 if kind == "tpu7x" else 1)


def _mesh(
    topology: str, sizes: dict[str, int], can_compile: bool
) -> Mesh | AbstractMesh:
    """A mesh of devices that are not here."""
    if can_compile:
        return tpu_mesh(topology, **sizes)
    chip, devices = _parse(topology)
    platform = "tpu" if is_tpu(topology) else "gpu"
    return AbstractMesh(
        sharding.mesh_sizes(**sizes, devices=devices),
        sharding.MESH_AXES,
        axis_types=(AxisType.Auto,) * 3,
        abstract_device=AbstractDevice(chip.kinds[0], num_cores=1, platform=platform),
    )


def _current(mesh: Mesh | AbstractMesh) -> contextlib.AbstractContextManager:
    if isinstance(mesh, AbstractMesh):
        return jax.sharding.use_abstract_mesh(mesh)
    return jax.set_mesh(mesh)


def tpu_mesh(topology: str, data: int, fsdp: int, tensor: int) -> Mesh:
    """A mesh of a TPU topology, to lower and compile for. Needs libtpu and, where
    there is no TPU, the environment that `pfjax.plan` sets."""
    from jax.experimental import topologies

    kind = topology.partition(":")[0]
    found = topologies.get_topology_desc(
        platform="tpu",
        topology_name=topology,
        # Otherwise two devices a chip, which nobody uses.
        **({"chip_config_name": "megacore"} if kind == "v4" else {}),
    )
    return sharding.make_mesh(data, fsdp, tensor, devices=found.devices)


def plan(
    config: ml_collections.FrozenConfigDict,
    base_config: ModelConfig,
    topology: str,
    response_tokens: int,
    can_compile: bool,
) -> dict[str, Any]:
    """What `python -m pfjax.plan` prints, as a dictionary ready for JSON."""
    chip, devices = _parse(topology)
    out: dict[str, Any] = {
        "model": config.model,
        "topology": topology,
        "devices": devices,
        "compiled": can_compile,
        "response_tokens": response_tokens,
        "responses": config.prompts_per_step * config.samples_per_prompt,
        "mesh": dict(config.mesh),
        "error": None,
        "notes": [],
    }
    try:
        mesh = _mesh(topology, dict(config.mesh), can_compile)
        found = forecast(config, base_config, mesh, chip, response_tokens, can_compile)
    except (slots.NoRoom, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, slots.NoRoom) and "memory" not in str(error):
            raise
        # The compiler refuses what does not fit, and says no more than by how much.
        out["error"] = str(error).splitlines()[0]
        mesh = _mesh(topology, dict(config.mesh), False)
        few = _changed(config, {"rollout_slots": 1})
        found = forecast(few, base_config, mesh, chip, response_tokens, False)
    gib = lambda sizes: {name: x / hardware.GIB for name, x in sizes.items()}
    seconds = found.seconds(chip)
    slowest = {name: max(x.values()) for name, x in seconds.items()}
    bound = {name: max(x, key=x.get) for name, x in seconds.items()}
    longest = max(slowest, key=slowest.get)
    total = sum(slowest.values())
    parts, prompts = found.plan.dp_size, config.prompts_per_step
    if prompts % parts:
        out["notes"].append(
            f"{prompts} prompts over {parts} parts of the batch leave "
            f"{1 - prompts / parts / math.ceil(prompts / parts):.0%} of the devices idle "
            "in rollouts; prompts_per_step a multiple of mesh.data * mesh.fsdp does not"
        )
    return out | {
        "mesh": found.mesh,
        "memory_gib": {
            "state": gib(found.state),
            "phases": {name: gib(x) for name, x in found.phases.items()},
            "total": found.total / hardware.GIB,
            "available": chip.memory / hardware.GIB,
        },
        "fits": out["error"] is None and found.total <= chip.memory,
        "prompt_tokens": found.work.prompt_tokens,
        "rollout_plan": str(found.plan),
        "micro_batches": found.micro_batches,
        "phases": {
            name: {
                "pflop": x.flops * devices / 1e15,
                "seconds": slowest[name],
                "bound_by": bound[name],
                "seconds_by": seconds[name],
            }
            for name, x in found.loads.items()
        },
        "pflop": sum(x.flops for x in found.loads.values()) * devices / 1e15,
        "seconds": total,
        "tokens_per_s": found.tokens / total,
        "bound_by": f"{bound[longest]} ({longest})",
        "collectives": _traffic_of(found),
    }


def _traffic_of(found: Forecast) -> list[dict[str, Any]]:
    """Traffic by phase, kind and axis; of estimates, by phase and axis."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for phase, load in found.loads.items():
        if not found.is_compiled:
            for axes, sent in load.sent.items():
                rows[phase, "", axes] = {"gb": sent / 1e9, "largest": "(estimated)"}
        for x in found.collectives.get(phase, ()):
            key = phase, x.kind, "+".join(x.axes)
            row = rows.setdefault(key, {"gb": 0.0, "largest": "", "size": -1.0})
            row["gb"] += x.sent * found.runs(phase, x) / 1e9
            if x.sent > row["size"]:
                shape = ",".join(map(str, x.shape))
                row |= {"size": x.sent, "largest": f"{x.dtype}[{shape}]"}
    return [
        {"phase": phase, "kind": kind, "axes": axes, **row}
        for (phase, kind, axes), row in rows.items()
    ]


def _changed(
    config: ml_collections.FrozenConfigDict, changes: dict[str, Any]
) -> ml_collections.FrozenConfigDict:
    out = ml_collections.ConfigDict(config)
    with out.unlocked():
        out.update_from_flattened_dict(changes)
    return ml_collections.FrozenConfigDict(out)


def advice(
    config: ml_collections.FrozenConfigDict,
    base_config: ModelConfig,
    topology: str,
    response_tokens: int,
) -> str:
    """The smallest change, by estimate, that would make a run fit."""
    small = {"rows": 1, "remat": "full"}
    host = {} if config.lora.rank else {"base_memory": "host"}
    choices = [small, {"optim.mu_dtype": "bfloat16"}, host]
    choices += [{"mesh.tensor": n} for n in (2, 4, 8)]
    choices += [{**small, **host, "mesh.tensor": n} for n in (2, 4, 8)]
    choices += [{**small, "mesh.tensor": n, "lora.rank": 16} for n in (1, 2, 4, 8)]
    for changes in choices:
        try:
            found = plan(
                _changed(config, changes), base_config, topology, response_tokens, False
            )
        except ValueError:  # sizes that do not divide
            continue
        if found["fits"]:
            flags = " ".join(f"--config.{k}={v}" for k, v in changes.items())
            peak = found["memory_gib"]["total"]
            return f"it would fit with {flags} ({peak:.1f} GiB by estimate)"
    return "no change of a setting would make it fit: take more or larger devices"

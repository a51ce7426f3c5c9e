"""The plan of a run: does it fit, and what are the least seconds of a step?

Only here does the planner read a config and build the programs of a run.
"""

import functools
import math
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from pfjax.infra import hardware, sharding
from pfjax.infra.sharding import AnyMesh
from pfjax.model import attention, lora, transformer
from pfjax.model.config import ModelConfig
from pfjax.planner import aot, estimates, hlo, roofline
from pfjax.sampler import slots
from pfjax.trainer import actor, run_config, setup_rollouts, train_fns, update_memory


def make_plan(
    config: FrozenConfigDict,
    base_model: ModelConfig,
    topology: str,
    response_tokens: int,
    can_compile: bool,
) -> dict[str, Any]:
    """What `python -m pfjax.plan` prints, as a dictionary ready for JSON.

    Args:
      config, base_model: of the run and of its checkpoint.
      topology: name of the devices, `v5e:4x4` or `h200:8`.
      response_tokens: mean length of a response, an assumption.
      can_compile: whether to compile for the devices, or to estimate.

    Raises:
      ValueError: if the topology is unknown or sizes do not divide.
    """
    chip, devices = aot.parse(topology)
    aot.num_learning(topology, config.mesh.rollout)
    mesh, rollout_mesh = _meshes(config, topology, is_abstract=not can_compile)
    fns = train_fns.train_fns(config, base_model, config.data.max_prompt_tokens, mesh)
    state = _state_bytes(config, fns)
    free = _free_bytes(config, fns, mesh, state, chip)
    use_mesh = jax.set_mesh if can_compile else jax.sharding.use_abstract_mesh
    try:
        with use_mesh(rollout_mesh):
            work = _workload(config, fns, mesh, free, response_tokens)
        with use_mesh(mesh):
            if can_compile:
                phases, sent, caveats = _compile(fns, work, mesh, rollout_mesh)
            else:
                phases, sent = estimates.temporaries(work), estimates.sent(work)
                caveats = []
    except (slots.NoRoom, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, slots.NoRoom) and "memory" not in str(error):
            raise
        # What does not fit is refused, with no more than by how much: an estimate.
        small = run_config.with_values(config, {"rollout_slots": 1})
        plan = make_plan(small, base_model, topology, response_tokens, False)
        return plan | {"fits": False, "error": str(error).splitlines()[0]}
    for phase, sizes in _held(config, fns, work).items():
        phases[phase] |= sizes
    memory = _memory(state, phases, chip, work)
    return {
        "model": config.model,
        "topology": topology,
        "devices": devices,
        "compiled": can_compile,
        "mesh": work.mesh,
        "rollout_devices": config.mesh.rollout,
        "memory_gib": memory,
        "fits": memory["total"] <= memory["available"],
        "error": None,
        **_step(work, sent, chip, caveats),
    }


def _meshes(
    config: FrozenConfigDict, topology: str, is_abstract: bool
) -> tuple[AnyMesh, AnyMesh]:
    """Those of updates and of rollouts."""
    make_mesh = aot.abstract_mesh if is_abstract else aot.device_mesh
    mesh = make_mesh(topology, **config.mesh)
    rollout_mesh = sharding.regrouped(mesh, config.rollout_tensor)
    if config.mesh.rollout:
        own = (config.mesh.rollout, rollout_mesh.shape["tensor"])
        rollout_mesh = aot.actor_mesh(topology, *own, is_abstract=is_abstract)
    return mesh, rollout_mesh


def _state_bytes(config: FrozenConfigDict, fns: train_fns.TrainFns) -> dict[str, int]:
    """What stays on a device for the whole run."""
    out = {
        "parameters": sharding.part_bytes(fns.state.params),
        "optimizer": sharding.part_bytes(fns.state.opt_state),
    }
    return out if config.offload_ref else out | {"base": sharding.part_bytes(fns.base)}


def _free_bytes(
    config: FrozenConfigDict,
    fns: train_fns.TrainFns,
    mesh: AnyMesh,
    state: dict[str, int],
    chip: hardware.Chip,
) -> int:
    """What rollouts have of a device."""
    free = int(hardware.usable_memory(chip))
    if config.mesh.rollout:
        return free
    free -= sum(state.values())
    if config.max_staleness:
        free -= update_memory.of_update(fns, mesh, config.remat)
    return free


def _held(
    config: FrozenConfigDict, fns: train_fns.TrainFns, work: roofline.Workload
) -> dict[str, dict[str, int]]:
    """What phases keep on a device beside what their programs need."""
    at_once = setup_rollouts.num_drawing_at_once(config)
    return {
        "rollout": {
            # Devices of their own hold those that they draw by and those of the next step.
            "weights": work.weight_bytes * (at_once + work.is_apart),
            "caches": work.plan.cache_bytes * at_once,
        },
        "score": {
            "base from the host": sharding.part_bytes(fns.base) * config.offload_ref
        },
    }


def _workload(
    config: FrozenConfigDict,
    fns: train_fns.TrainFns,
    mesh: AnyMesh,
    free: int,
    response_tokens: int,
) -> roofline.Workload:
    """A step of the config: updates on `mesh`, rollouts on the current one, of whose devices
    each has `free` bytes for them."""
    model, rollout_mesh = fns.model, jax.sharding.get_abstract_mesh()
    sizes = setup_rollouts.plan_sizes(config, config.data.max_prompt_tokens)
    at_once = setup_rollouts.num_drawing_at_once(config)
    memory = lambda: free // at_once
    plan = slots.plan_for(model, sharding.platform(), memory, **sizes)
    # A rollout reads a copy of the weights that is whole but for "tensor".
    axes, shapes = transformer.logical_axes(model), transformer.abstract_params(model)
    where = sharding.rollout_shardings(rollout_mesh, axes, shapes)
    read = train_fns.placed(shapes, where, model.dtype)
    sent_bytes = 0
    if config.mesh.rollout:
        sent_bytes = sharding.part_bytes(lora.select(read) if model.lora_rank else read)
    return roofline.Workload(
        model=model,
        mesh=dict(mesh.shape),
        rollout_mesh=dict(rollout_mesh.shape),
        plan=plan,
        prompt_tokens=config.data.max_prompt_tokens // 4,
        response_tokens=response_tokens,
        micro_batch=fns.shape.microbatch_size
        // sharding.batch_ways(mesh)
        * config.pack_length
        // mesh.shape["context"],
        remat=config.remat,
        weight_bytes=sharding.part_bytes(read),
        param_bytes=sharding.part_bytes(fns.state.params),
        state_bytes=sharding.part_bytes(fns.state),
        room=sizes["num_prompts"],
        is_apart=config.mesh.rollout > 0,
        carries=config.max_staleness > (actor.AHEAD if config.mesh.rollout else 0),
        sent_bytes=sent_bytes,
        num_prompts=config.prompts_per_step,
        samples_per_prompt=config.samples_per_prompt,
        max_new_tokens=config.max_new_tokens,
    )


def _compile(
    fns: train_fns.TrainFns, work: roofline.Workload, mesh: Mesh, rollout_mesh: Mesh
) -> tuple[dict[str, dict[str, int]], dict[str, list[roofline.Sent]], list[str]]:
    """What each phase needs beside the state, and sends, as its program says; and what
    programs do not say."""
    batch = train_fns.abstract_minibatch(fns, mesh)
    phases, sent = {}, {}
    for phase, program in aot.compile_phases(fns, batch, work, rollout_mesh).items():
        phases[phase] = {"temporaries": aot.temporaries(program)}
        if phase != "rollout":
            phases[phase]["rows"] = sharding.part_bytes(batch[0])
        on = rollout_mesh if phase == "rollout" else mesh
        found = hlo.collectives(program.as_text(), on)
        sent[phase] = roofline.sent(work, phase, found)
    return phases, sent, _caveats(fns, work)


def _caveats(fns: train_fns.TrainFns, work: roofline.Workload) -> list[str]:
    """What a compiler cannot know of the current mesh's devices without asking them."""
    if sharding.platform()[0] != "gpu":
        return []
    model, most = fns.model, fns.shape.max_segments
    note = "compiled without a GPU: its kernels are not chosen by timing them"
    if attention.pays_for_segments(model.attention, model.head_dim, model.dtype):
        heads = model.num_heads / work.mesh["tensor"]
        room = functools.partial(
            attention.segment_bytes, work.micro_batch, heads, model.head_dim
        )
        few, many = (f"{room(n) / hardware.GIB:.1f} GiB for {n}" for n in (8, most))
        note += (
            ", and what cuDNN works in is not in these numbers: in an update about "
            f"{few} responses per row, {many}"
        )
    return [note]


def _memory(
    state: dict, phases: dict, chip: hardware.Chip, work: roofline.Workload
) -> dict[str, Any]:
    """GiB that stay, that each phase adds, and their sum at the peak of the step."""
    gib = lambda sizes: {name: x / hardware.GIB for name, x in sizes.items()}
    of_phase = {phase: sum(x.values()) for phase, x in phases.items()}
    drawn, learned = of_phase["rollout"], max(of_phase["score"], of_phase["update"])
    peak = sum(state.values()) + max(drawn, learned)
    if work.is_apart:
        peak = max(drawn, sum(state.values()) + learned)
    elif work.carries:
        peak = max(peak, sum(state.values()) + learned + phases["rollout"]["caches"])
    by_phase = {phase: gib(x) for phase, x in phases.items()}
    sums = gib({"total": peak, "available": hardware.usable_memory(chip)})
    return {"state": gib(state), "phases": by_phase, **sums}


def _step(
    work: roofline.Workload,
    sent: dict[str, list[roofline.Sent]],
    chip: hardware.Chip,
    caveats: list[str],
) -> dict[str, Any]:
    """The assumed lengths, the least seconds of a step, and what it sends."""
    phases = roofline.bounds(work, sent, chip)
    slowest = max(phases, key=lambda phase: phases[phase]["seconds"])
    of_phase = {phase: x["seconds"] for phase, x in phases.items()}
    seconds = sum(of_phase.values())
    if work.is_apart:
        seconds = max(of_phase["rollout"], seconds - of_phase["rollout"])
    parts, prompts = work.plan.dp_size, work.num_prompts
    idle = 1 - prompts / parts / math.ceil(prompts / parts)
    note = (
        f"{prompts} prompts over {parts} parts of the batch leave {idle:.0%} of the "
        f"devices idle in rollouts; prompts_per_step a multiple of {parts} does not"
    )
    rows = [(phase, x) for phase, rows in sent.items() for x in rows]
    if work.is_apart:
        weights = roofline.Sent(
            "copy", "to rollouts", work.sent_bytes / 1e9, "(weights)"
        )
        rows.append(("send", weights))
    notes = [note] if prompts % parts else []
    if work.is_apart:
        notes.append(
            "drawing and learning overlap: a step takes as long as the longer of the two"
        )
    return {
        "responses": work.responses,
        "prompt_tokens": work.prompt_tokens,
        "response_tokens": work.response_tokens,
        "rollout_plan": str(work.plan),
        "micro_batches": work.micro_batches,
        "phases": phases,
        "pflop": sum(x["pflop"] for x in phases.values()),
        "seconds": seconds,
        "tokens_per_s": work.responses * work.response_tokens / seconds,
        "bound_by": f"{phases[slowest]['bound_by']} ({slowest})",
        "collectives": [{"phase": phase, **x._asdict()} for phase, x in rows],
        "gb_sent": sum(x.gb for _, x in rows),
        "notes": notes + caveats,
    }

"""Which settings would do: the smallest change that makes a run fit, the fastest mesh."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

from ml_collections import FrozenConfigDict

from pfjax.infra import hardware
from pfjax.model.config import ModelConfig
from pfjax.planner import aot
from pfjax.planner.plan import make_plan
from pfjax.trainer import run_config

_MICROBATCH_SIZES = (1, 2, 4, 8, 16)
_CONTEXTS = (2, 4, 8, 16)  # devices that share rows which are too long for one


def advise(
    config: FrozenConfigDict,
    base_model: ModelConfig,
    topology: str,
    response_tokens: int,
) -> str:
    """The smallest change, by estimate, that would make a run fit."""
    args = (base_model, topology, response_tokens)
    small = {"microbatch_size": 1, "remat": "full"}
    host = {} if config.lora.rank else {"offload_ref": True}
    # One copy of the weights over all nodes.
    one = {"mesh.data": 1} if hardware.num_nodes(*aot.parse(topology)) > 1 else {}
    choices = [small, {"optim.mu_dtype": "bfloat16"}, host, one]
    choices += [{"mesh.tensor": n} for n in (2, 4, 8)]
    least = {**small, **one}
    choices += [{**least, **host, "mesh.tensor": n} for n in (2, 4, 8)]
    # Long rows, which several devices can share.
    choices += [
        {**least, "mesh.context": n, "rollout_tensor": m}
        for n in _CONTEXTS
        for m in (0, 2, 4)
    ]
    choices += [{**least, "mesh.tensor": n, "lora.rank": 16} for n in (1, 2, 4, 8)]
    for plan in _plans(config, choices, [], *args):
        if plan["fits"]:
            flags = " ".join(f"--config.{k}={v}" for k, v in plan["changes"].items())
            peak = plan["memory_gib"]["total"]
            return f"it would fit with {flags} ({peak:.1f} GiB by estimate)"
    return "no change of a setting would make it fit: take more or larger devices"


def search(
    config: FrozenConfigDict,
    base_model: ModelConfig,
    topology: str,
    response_tokens: int,
) -> list[dict[str, Any]]:
    """Plans, by estimate, of every mesh of the devices, for rollouts too, and several sizes of
    micro-batches. Devices share rows, `mesh.context`, only where nothing else fits
    with room to spare.

    Returns:
      One plan per possible mesh, as of `make_plan`, with the `rollout_tensor` and the size
      of micro-batches that are best there, and `changes`, the settings that lead to it.
      Those that fit come first, the fastest of them first; of equals one that leaves 15 %
      of the memory, then that which sends least.

    Raises:
      ValueError: if no mesh of the devices will do, with what the last one lacks.
    """
    devices = aot.num_learning(topology, config.mesh.rollout)
    ways = [n for n in range(1, devices + 1) if devices % n == 0]
    experts = ways if base_model.experts else [1]
    sizes = sorted({config.microbatch_size, *_MICROBATCH_SIZES} - {0})
    args, found, errors = (base_model, topology, response_tokens), [], []
    for context in (1, *_CONTEXTS):
        for fsdp, expert, tensor in itertools.product(ways, experts, ways):
            inside = fsdp * expert * context * tensor
            if devices % inside:
                continue
            changes = {"mesh.data": devices // inside, "mesh.fsdp": fsdp}
            if base_model.experts:
                changes |= {"mesh.expert": expert}
            if context > 1 or config.mesh.context > 1:
                changes |= {"mesh.context": context}
            changes |= {"mesh.tensor": tensor}
            shared = [n for n in ways if inside % n == 0]
            changes = [
                {**changes, "microbatch_size": rows, "rollout_tensor": n}
                for rows, n in itertools.product(sizes, shared)
            ]
            plans = _plans(config, changes, errors, *args)
            found += sorted(plans, key=_rank)[:1]
        if any(plan["fits"] and not _is_tight(plan) for plan in found):
            break
    if not found:
        raise ValueError(
            f"no mesh of the {devices} devices of {topology} will do: {errors[-1]}"
        )
    return sorted(found, key=_rank)


def _plans(
    config: FrozenConfigDict,
    changes: list[dict[str, Any]],
    errors: list[str],
    *args: Any,
) -> Iterator[dict[str, Any]]:
    """Those of a config with each of some changes that are possible, by estimate; why the
    others are not is added to `errors`."""
    for change in changes:
        changed = run_config.with_values(config, change)
        try:
            plan = make_plan(changed, *args, can_compile=False)
        except ValueError as error:  # sizes that do not divide
            errors.append(str(error))
        else:
            yield plan | {"changes": change}


def _rank(plan: dict[str, Any]) -> tuple[Any, ...]:
    # Estimates within a hundredth of each other are equal.
    speed = round(100 * math.log(plan["seconds"]))
    memory = plan["memory_gib"]
    if not plan["fits"]:
        return True, memory["total"]
    return False, speed, _is_tight(plan), plan["gb_sent"], memory["total"]


def _is_tight(plan: dict[str, Any]) -> bool:
    """Whether memory is so close to its limit that what an estimate has missed decides."""
    memory = plan["memory_gib"]
    return memory["total"] > 0.85 * memory["available"]

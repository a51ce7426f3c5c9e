"""Plans of recipes, and what tests read of them, whatever they are compiled for."""

import math
import re
from collections.abc import Iterator
from typing import Any

import ml_collections

from pfjax.model import hf_config, hub
from pfjax.planner import plan as planner
from pfjax.trainer import recipes


def config_of(name: str, **changes: Any) -> ml_collections.FrozenConfigDict:
    config = recipes.recipe(name)
    config.update_from_flattened_dict(changes)
    return ml_collections.FrozenConfigDict(config)


def base_of(config):
    return hf_config.read(hub.resolve_config(config.model))


def plan_of(config, topology: str, can_compile: bool) -> dict[str, Any]:
    return planner.make_plan(config, base_of(config), topology, 1024, can_compile)


def collectives(plan: dict[str, Any], phase: str) -> set[tuple[str, str]]:
    """Kinds and mesh axes of what a phase sends."""
    return {(x["kind"], x["axes"]) for x in plan["collectives"] if x["phase"] == phase}


def gathered(plan: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Type and size of the largest array of each kind of gather."""
    for x in plan["collectives"]:
        if x["kind"] in ("all-gather", "collective-permute"):
            dtype, _, shape = x["largest"].rstrip("]").partition("[")
            yield dtype, math.prod(int(n) for n in shape.split(","))


def arrays(text: str) -> set[tuple[int, ...]]:
    """Shapes of all arrays that a program's text names."""
    found = re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", text)
    return {tuple(int(n) for n in dims.split(",")) for dims in found}

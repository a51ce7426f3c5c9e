r"""Tells what a run takes before anyone pays for the devices.

    pfjax plan --config=qwen2_5_math_7b --topology=v5p:4x4x4
    pfjax plan --config=qwen2_5_math_7b --topology=h200:8
    pfjax plan --config=qwen2_5_math_7b --topology=h200:8 --search
    pfjax plan --config=qwen2_5_math_7b --all

The programs of a step are compiled for the topology on this machine, which needs none of
its devices but the extra `tpu` or `cuda13` (pip install 'pfjax[cuda13]'). Without it memory
and traffic are estimated from shapes; so they are for the meshes and sizes of micro-batches
that --search compares. Exit status 1 when the run does not fit.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from absl import flags, logging
from etils import epy
from ml_collections import FrozenConfigDict

from pfjax import cli

with epy.lazy_imports():
    import jax

    from pfjax.model import hf_config, hub
    from pfjax.planner import aot, choices, tables
    from pfjax.planner import plan as planner
    from pfjax.trainer import config_checks, run_config

cli.define_config_flag()
_TOPOLOGY = flags.DEFINE_string("topology", None, "v5e:4x4, v5p:4x4x4, h200:8, ...")
_ALL = flags.DEFINE_bool("all", False, "estimate a table of topologies instead")
_SEARCH = flags.DEFINE_bool("search", False, "compare the meshes of --topology instead")
_JSON = flags.DEFINE_bool("json", False, "print JSON")
_RESPONSE = flags.DEFINE_integer(
    "response_tokens",
    None,
    "mean length of a response; a third of max_new_tokens",
    lower_bound=1,
)

# What `--all` looks at; number of devices follows from the name.
TOPOLOGIES = (
    *(f"{kind}:{grid}" for kind in ("v5e", "v6e") for grid in ("2x2", "2x4", "4x4", "4x8", "8x8")),
    *(f"v5p:{grid}" for grid in ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4")),
    *(f"{kind}:{n}" for kind in ("a100", "h100", "h200", "b200") for n in (1, 4, 8)),
    "rtx4090:1",
    "t4:1",
)  # fmt: skip


def main() -> None:
    logging.set_verbosity(logging.ERROR)
    if _ALL.value == bool(_TOPOLOGY.value):
        raise ValueError("give --topology=NAME or --all")
    if _SEARCH.value and _ALL.value:
        raise ValueError("--search is of one --topology=NAME")
    jax.config.update("jax_platforms", "cpu")  # compiles and estimates, runs nothing
    config, base, response = _run()
    name, args = _TOPOLOGY.value, (config, base)
    estimate = lambda x: planner.make_plan(*args, x, response, False)
    if _ALL.value:
        plans = [_plan_or_why(estimate, x) for x in TOPOLOGIES]
        if all("model" not in x for x in plans):
            raise ValueError("{topology}: {error}".format(**plans[-1]))
        _show(plans, tables.of_topologies(plans))
        return
    if _SEARCH.value:
        found = choices.search(*args, name, response)
        try:
            present = estimate(name)
        except ValueError:  # its mesh is of other devices
            present = None
        _show(found, tables.of_search(present, found))
        plan = found[0]
    else:
        begin, can_compile = time.perf_counter(), aot.can_compile(name)
        plan = planner.make_plan(*args, name, response, can_compile)
        how = f"compiled in {time.perf_counter() - begin:.0f} s"
        if not plan["compiled"]:
            missing = "no compiler for these devices here, it comes with pfjax"
            why = "" if can_compile else f": {missing}[{aot.extra(name)}]"
            how = "estimated from shapes" + why
        advice = None if plan["fits"] else choices.advise(*args, name, response)
        plan |= {"advice": advice}
        _show(plan, tables.of_plan(plan, how))
    if not plan["fits"]:
        sys.exit(1)


def _run() -> tuple[FrozenConfigDict, Any, int]:
    """Its config, the model it starts from, and the mean length of a response."""
    config = FrozenConfigDict(cli.config())
    config_checks.check(config)
    config = run_config.with_adapter(config)
    base = hf_config.read(hub.resolve_config(config.model))
    config_checks.check_lengths(
        config, config.data.max_prompt_tokens, base.max_positions
    )
    response = _RESPONSE.value or max(config.max_new_tokens // 3, 1)
    if response > config.max_new_tokens:
        raise ValueError(
            f"--response_tokens={response}: no response has more than "
            f"--config.max_new_tokens={config.max_new_tokens}"
        )
    return config, base, response


def _plan_or_why(estimate: Callable, topology: str) -> dict[str, Any]:
    """A row of the table; of devices that the config does not suit, what was said."""
    try:
        return estimate(topology)
    except ValueError as error:
        return {"topology": topology, "fits": False, "error": str(error)}


def _show(values: Any, text: str) -> None:
    print(json.dumps(values, indent=2) if _JSON.value else text)


if __name__ == "__main__":
    cli.run(main)

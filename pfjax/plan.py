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

from absl import flags, logging
from ml_collections import FrozenConfigDict

from pfjax import cli
from pfjax.infra import sharding

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
)  # fmt: skip


def main() -> None:
    logging.set_verbosity(logging.ERROR)
    if _ALL.value == bool(_TOPOLOGY.value):
        raise ValueError("give --topology=NAME or --all")
    if _SEARCH.value and _ALL.value:
        raise ValueError("--search is of one --topology=NAME")
    import jax

    from pfjax.model import hf_config, hub
    from pfjax.planner import aot
    from pfjax.planner import plan as planner
    from pfjax.trainer import config_checks, run_config

    jax.config.update("jax_platforms", "cpu")  # compiles and estimates, runs nothing
    config, name = FrozenConfigDict(cli.config()), _TOPOLOGY.value
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
    plan_for = lambda x, can: planner.make_plan(config, base, x, response, can)
    if _ALL.value:
        _print_all([plan_for(x, False) for x in TOPOLOGIES])
        return
    if _SEARCH.value:
        found = planner.search(config, base, name, response)
        try:
            present = plan_for(name, False)
        except ValueError:  # its mesh is of other devices
            present = None
        _print_search(present, found)
        if not found[0]["fits"]:
            sys.exit(1)
        return
    can_compile = aot.can_compile(name)
    begin = time.perf_counter()
    plan = plan_for(name, can_compile)
    how = f"compiled in {time.perf_counter() - begin:.0f} s"
    advice = None if plan["fits"] else planner.advise(config, base, name, response)
    if not plan["compiled"]:
        extra = aot.extra(name)
        missing = f": no compiler for these devices here, it comes with pfjax[{extra}]"
        why = "" if can_compile else missing
        how = "estimated from shapes" + why
    if _JSON.value:
        print(json.dumps(plan | {"advice": advice}, indent=2))
    else:
        _print(plan, how, advice)
    if not plan["fits"]:
        sys.exit(1)


def _print(plan: dict, how: str, advice: str | None) -> None:
    mesh = sharding.describe(plan["mesh"])
    if n := plan["rollout_devices"]:
        mesh += f", and {n} devices for rollouts alone"
    print("{model} on {topology}: {devices} devices, mesh".format(**plan), mesh)
    print(f"({how})\n\nGiB per device")
    memory = plan["memory_gib"]
    for name, x in memory["state"].items():
        print(f"  {name:<12}{x:8.2f}")
    for name, parts in memory["phases"].items():
        some = ", ".join(f"{k} {v:.2f}" for k, v in parts.items() if v)
        print(f"  {name:<12}{sum(parts.values()):8.2f}  {some}")
    peak = "  {:<12}{total:8.2f}  of {available:.2f}:".format("peak", **memory)
    print(peak, "fits" if plan["fits"] else "DOES NOT FIT")
    if plan["error"]:
        print(f"  {plan['error']}")
    if not plan["fits"]:
        print(f"\n{advice}")
        return
    print(f"\nrollouts: {plan['rollout_plan']}")
    step = "\na step of {responses} responses, of {response_tokens} tokens to prompts"
    print((step + " of {prompt_tokens} (assumed)").format(**plan))
    print(f"  {'':<12}{'PFLOP':>8}  {'seconds at least':<18}bound by")
    rate = "{tokens_per_s:,.0f} tokens/s, most of it bound by {bound_by}"
    whole_step = plan | {"bound_by": rate.format(**plan)}
    for name, x in (plan["phases"] | {"all": whole_step}).items():
        print(f"  {name:<12}{x['pflop']:8.2f}  {x['seconds']:<18.2f}{x['bound_by']}")
    if plan["collectives"]:
        print("\nsent by a device in a step")
    row = "  {phase:<10}{kind:<20}{axes:<14}{gb:9.3f} GB  largest {largest}"
    for x in plan["collectives"]:
        print(row.format(**x))
    for note in plan["notes"]:
        print(f"\nnote: {note}")


def _print_all(plans: list[dict]) -> None:
    if _JSON.value:
        print(json.dumps(plans, indent=2))
        return
    how = "estimated from shapes (--topology=NAME compiles)"
    print(f"{plans[0]['model']}, {how}\n")
    columns = f"{'topology':<12}{'devices':>8}{'GiB':>9}{'of':>8}"
    print(f"{columns}  {'s/step':>8}{'tokens/s':>10}  bound by")
    cost = "{seconds:>8.1f}{tokens_per_s:>10,.0f}  {bound_by}"
    for x in plans:
        memory = "{total:>9.1f}{available:>8.1f}  ".format(**x["memory_gib"])
        row = "{topology:<12}{devices:>8}" + memory
        print((row + (cost if x["fits"] else "does not fit")).format(**x))


_SHOWN = 8  # plans of a search


def _print_search(present: dict | None, found: list[dict]) -> None:
    if _JSON.value:
        print(json.dumps(found, indent=2))
        return
    (best, *_), phases = found, list(found[0]["phases"])
    print("{model} on {topology}, estimated from shapes\n".format(**best))
    heads = "".join(f"{name:>9}" for name in phases)
    width = max(len(sharding.describe(plan["mesh"])) for plan in found[:_SHOWN])
    print(
        f"  {'mesh':<{width}}{'rollout_tensor':>16}{'rows':>5}{'GiB':>7}{'of':>6}{heads}{'s/step':>8}{'GB sent':>9}"
    )
    for plan in found[:_SHOWN]:
        print(_row(plan, width))
    if len(found) > _SHOWN:
        print(f"  and {len(found) - _SHOWN} more")
    if not best["fits"]:
        print("\nnothing fits: --topology without --search tells what would")
        return
    settings = " ".join(f"--config.{k}={v}" for k, v in best["changes"].items())
    print(f"\nfastest: {settings}\n{_gain(present, best)}")


def _row(plan: dict, width: int) -> str:
    out = f"  {sharding.describe(plan['mesh']):<{width}}"
    out += "{rollout_tensor:>16}{microbatch_size:>5}".format(**plan["changes"])
    out += "{total:>7.1f}{available:>6.1f}".format(**plan["memory_gib"])
    if not plan["fits"]:
        return out + "  does not fit"
    out += "".join(f"{x['seconds']:>9.2f}" for x in plan["phases"].values())
    return out + f"{plan['seconds']:>8.2f}{plan['gb_sent']:>9.0f}"


def _gain(present: dict | None, best: dict) -> str:
    if present is None:
        return "the mesh of the config does not suit these devices"
    if not present["fits"]:
        return "the config as it is does not fit"
    seconds = {
        n: (x["seconds"], best["phases"][n]["seconds"])
        for n, x in present["phases"].items()
    }
    why = [f"{n} {a:.2f} -> {b:.2f} s" for n, (a, b) in seconds.items() if a > 1.01 * b]
    sent = "{:.0f} -> {:.0f} GB sent by a device".format(
        present["gb_sent"], best["gb_sent"]
    )
    return "; ".join(
        ["the config as it is: {seconds:.2f} s".format(**present), *why, sent]
    )


if __name__ == "__main__":
    cli.run(main)

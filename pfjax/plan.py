r"""Tells what a run takes before anyone pays for the devices.

    python -m pfjax.plan --config=configs/qwen2_5_math_7b.py --topology=v5p:4x4x4
    python -m pfjax.plan --config=configs/qwen2_5_math_7b.py --topology=h200:8
    python -m pfjax.plan --config=configs/qwen2_5_math_7b.py --all

For a TPU topology the rollout and the update are compiled on this machine, which needs
no TPU but the extra `tpu` (pip install 'pfjax[tpu]'). Without it, and for GPUs, memory
and traffic are estimated from shapes. Exit status 1 when the run does not fit.
"""

import importlib.util
import json
import os
import sys
import time

from absl import app, flags, logging

from pfjax import cli

_CONFIG = cli.define_config_flag()
_TOPOLOGY = flags.DEFINE_string("topology", None, "v5e:4x4, v5p:4x4x4, h200:8, ...")
_ALL = flags.DEFINE_bool("all", False, "estimate a table of topologies instead")
_JSON = flags.DEFINE_bool("json", False, "print JSON")
_RESPONSE = flags.DEFINE_integer(
    "response_tokens", None, "mean length of a response; a third of max_new_tokens"
)

# What `--all` looks at; number of devices follows from the name.
TOPOLOGIES = (
    *(f"{kind}:{grid}" for kind in ("v5e", "v6e") for grid in ("2x2", "2x4", "4x4", "4x8", "8x8")),
    *(f"v5p:{grid}" for grid in ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4")),
    *(f"{kind}:{n}" for kind in ("a100", "h100", "h200", "b200") for n in (1, 4, 8)),
)  # fmt: skip


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.ERROR)
    # A compiler for TPUs looks for one unless told what there is.
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }
    if _ALL.value == bool(_TOPOLOGY.value):
        sys.exit("error: give --topology=NAME or --all")
    from pfjax.model import hf, hf_config
    from pfjax.planner import aot
    from pfjax.trainer import settings

    config = _CONFIG.value
    with cli.mistakes_in_one_line():
        settings.check_config(config)
        base = hf_config.read(hf.resolve_config(config.model))
        longest = config.data.max_prompt_tokens
        settings.check_lengths(config, longest, base.max_positions)
        response = _RESPONSE.value or max(config.max_new_tokens // 3, 1)
        if _ALL.value:
            _print_all(config, base, response)
            return
        name = _TOPOLOGY.value
        can_compile = aot.is_tpu(name) and bool(importlib.util.find_spec("libtpu"))
        begin = time.perf_counter()
        plan = aot.plan(config, base, name, response, can_compile)
        seconds = time.perf_counter() - begin
        advice = None if plan["fits"] else aot.advice(config, base, name, response)
    if _JSON.value:
        print(json.dumps(plan | {"advice": advice}, indent=2))
    else:
        _print(plan, advice, seconds)
    if not plan["fits"]:
        sys.exit(1)


def _print(plan: dict, advice: str | None, seconds: float) -> None:
    how = (
        f"compiled in {seconds:.0f} s"
        if plan["compiled"]
        else "estimated from shapes: no compiler for these devices here"
    )
    sizes = " x ".join(f"{k} {v}" for k, v in plan["mesh"].items())
    print(
        f"{plan['model']} on {plan['topology']}: {plan['devices']} devices, mesh {sizes}"
    )
    print(f"({how})\n")
    memory = plan["memory_gib"]
    print("GiB a device")
    for name, x in memory["state"].items():
        print(f"  {name:<12}{x:8.2f}")
    for name, parts in memory["phases"].items():
        some = ", ".join(f"{k} {v:.2f}" for k, v in parts.items() if v)
        print(f"  {name:<12}{sum(parts.values()):8.2f}  {some}")
    verdict = "fits" if plan["fits"] else "DOES NOT FIT"
    print(
        f"  {'peak':<12}{memory['total']:8.2f}  of {memory['available']:.2f}: {verdict}"
    )
    if plan["error"]:
        print(f"  {plan['error']}")
    if not plan["fits"]:
        print(f"\n{advice}")
        return
    print(f"\nrollouts: {plan['rollout_plan']}")
    print(
        f"\na step of {plan['responses']} responses, of {plan['response_tokens']} tokens "
        f"to prompts of {plan['prompt_tokens']} (assumed)"
    )
    print(f"  {'':<12}{'PFLOP':>8}  {'seconds at least':<18}bound by")
    for name, x in plan["phases"].items():
        print(f"  {name:<12}{x['pflop']:8.2f}  {x['seconds']:<18.2f}{x['bound_by']}")
    print(
        f"  {'all':<12}{plan['pflop']:8.2f}  {plan['seconds']:<18.2f}"
        f"{plan['tokens_per_s']:,.0f} tokens/s, most of it bound by {plan['bound_by']}"
    )
    if plan["collectives"]:
        print("\nsent by a device in a step")
        for x in plan["collectives"]:
            print(
                f"  {x['phase']:<10}{x['kind']:<20}{x['axes']:<14}{x['gb']:9.3f} GB"
                f"  largest {x['largest']}"
            )
    for note in plan["notes"]:
        print(f"\nnote: {note}")


def _print_all(config, base, response: int) -> None:
    from pfjax.planner import aot

    rows = [aot.plan(config, base, name, response, False) for name in TOPOLOGIES]
    if _JSON.value:
        print(json.dumps(rows, indent=2))
        return
    print(
        f"{config.model}, estimated from shapes (--topology=NAME compiles for TPUs)\n"
    )
    print(
        f"{'topology':<12}{'devices':>8}{'GiB':>9}{'of':>8}  {'s/step':>8}{'tokens/s':>10}  bound by"
    )
    for x in rows:
        memory = x["memory_gib"]
        line = f"{x['topology']:<12}{x['devices']:>8}{memory['total']:>9.1f}{memory['available']:>8.1f}  "
        if x["fits"]:
            line += f"{x['seconds']:>8.1f}{x['tokens_per_s']:>10,.0f}  {x['bound_by']}"
        else:
            line += "does not fit"
        print(line)


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse)

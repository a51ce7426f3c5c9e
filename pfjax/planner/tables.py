"""Plans as text, for people."""

from typing import Any

from pfjax.infra import sharding

_SHOWN = 8  # plans of a search


def of_plan(plan: dict[str, Any], how: str) -> str:
    """The memory and the time of one plan, or the advice if it does not fit; `how` says what
    it comes from."""
    mesh = sharding.describe(plan["mesh"])
    if n := plan["rollout_devices"]:
        mesh += f", and {n} devices for rollouts alone"
    out = ["{model} on {topology}: {devices} devices, mesh".format(**plan) + f" {mesh}"]
    out.append(f"({how})\n\nGiB per device")
    memory = plan["memory_gib"]
    for name, x in memory["state"].items():
        out.append(f"  {name:<12}{x:8.2f}")
    for name, parts in memory["phases"].items():
        some = ", ".join(f"{k} {v:.2f}" for k, v in parts.items() if v)
        out.append(f"  {name:<12}{sum(parts.values()):8.2f}  {some}")
    peak = "  {:<12}{total:8.2f}  of {available:.2f}:".format("peak", **memory)
    out.append(f"{peak} {'fits' if plan['fits'] else 'DOES NOT FIT'}")
    if plan["error"]:
        out.append(f"  {plan['error']}")
    out += _step(plan) if plan["fits"] else [f"\n{plan['advice']}"]
    return "\n".join(out)


def _step(plan: dict[str, Any]) -> list[str]:
    """The lines of what a step takes."""
    step = "\na step of {responses} responses, of {response_tokens} tokens to prompts"
    out = [f"\nrollouts: {plan['rollout_plan']}"]
    out.append((step + " of {prompt_tokens} (assumed)").format(**plan))
    out.append(f"  {'':<12}{'PFLOP':>8}  {'seconds at least':<18}bound by")
    rate = "{tokens_per_s:,.0f} tokens/s, most of it bound by {bound_by}"
    whole_step = plan | {"bound_by": rate.format(**plan)}
    for name, x in (plan["phases"] | {"all": whole_step}).items():
        row = f"  {name:<12}{x['pflop']:8.2f}  {x['seconds']:<18.2f}{x['bound_by']}"
        out.append(row)
    if plan["collectives"]:
        out.append("\nsent by a device in a step")
    row = "  {phase:<10}{kind:<20}{axes:<14}{gb:9.3f} GB  largest {largest}"
    out += [row.format(**x) for x in plan["collectives"]]
    return out + [f"\nnote: {note}" for note in plan["notes"]]


def of_topologies(plans: list[dict[str, Any]]) -> str:
    """One line for each of the plans of a run on several topologies, or why it is none."""
    known = [x for x in plans if "model" in x]
    how = "estimated from shapes (--topology=NAME compiles)"
    columns = f"{'topology':<12}{'devices':>8}{'GiB':>9}{'of':>8}"
    out = [f"{known[0]['model']}, {how}\n"]
    out.append(f"{columns}  {'s/step':>8}{'tokens/s':>14}  bound by")
    cost = "{seconds:>8.1f}{tokens_per_s:>14,.0f}  {bound_by}"
    for x in plans:
        if x not in known:
            out.append(f"{x['topology']:<12}{x['error']}")
            continue
        memory = "{total:>9.1f}{available:>8.1f}  ".format(**x["memory_gib"])
        row = "{topology:<12}{devices:>8}" + memory
        out.append((row + (cost if x["fits"] else "does not fit")).format(**x))
    return "\n".join(out)


def of_search(present: dict[str, Any] | None, found: list[dict[str, Any]]) -> str:
    """The best plans of a search, and what the first gains over the present one."""
    best, shown = found[0], found[:_SHOWN]
    heads = "".join(f"{name:>9}" for name in best["phases"])
    meshes = [sharding.describe(plan["mesh"]) for plan in shown]
    width = max(map(len, meshes))
    out = ["{model} on {topology}, estimated from shapes\n".format(**best)]
    columns = f"  {'mesh':<{width}}{'rollout_tensor':>16}{'rows':>5}{'GiB':>7}{'of':>6}"
    out.append(f"{columns}{heads}{'s/step':>8}{'GB sent':>9}")
    for mesh, plan in zip(meshes, shown, strict=True):
        out.append(f"  {mesh:<{width}}{_row(plan)}")
    if len(found) > _SHOWN:
        out.append(f"  and {len(found) - _SHOWN} more")
    if not best["fits"]:
        out.append("\nnothing fits: --topology without --search tells what would")
        return "\n".join(out)
    settings = " ".join(f"--config.{k}={v}" for k, v in best["changes"].items())
    return "\n".join([*out, f"\nfastest: {settings}\n{_gain(present, best)}"])


def _row(plan: dict[str, Any]) -> str:
    out = "{rollout_tensor:>16}{microbatch_size:>5}".format(**plan["changes"])
    out += "{total:>7.1f}{available:>6.1f}".format(**plan["memory_gib"])
    if not plan["fits"]:
        return out + "  does not fit"
    out += "".join(f"{x['seconds']:>9.2f}" for x in plan["phases"].values())
    return out + f"{plan['seconds']:>8.2f}{plan['gb_sent']:>9.0f}"


def _gain(present: dict[str, Any] | None, best: dict[str, Any]) -> str:
    if present is None:
        return "the mesh of the config does not suit these devices"
    if not present["fits"]:
        return "the config as it is does not fit"
    why = [f"the config as it is: {present['seconds']:.2f} s"]
    for name, x in present["phases"].items():
        before, after = x["seconds"], best["phases"][name]["seconds"]
        if before > 1.01 * after:
            why.append(f"{name} {before:.2f} -> {after:.2f} s")
    sent = f"{present['gb_sent']:.0f} -> {best['gb_sent']:.0f} GB sent by a device"
    return "; ".join([*why, sent])

"""What a run is, in the few lines at its start."""

from collections import Counter

import jax
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from pfjax.infra import sharding
from pfjax.model import attention, dial, lora
from pfjax.model.config import ModelConfig
from pfjax.model.transformer import abstract_params
from pfjax.objectives import ObjectiveConfig
from pfjax.sampler import slots
from pfjax.trainer import schedules, setup_rollouts
from pfjax.trainer.train_fns import TrainFns


def run(
    c: FrozenConfigDict,
    fns: TrainFns,
    mesh: Mesh,
    plan: slots.Plan,
) -> str:
    """Describes the run and what follows from the batch numbers, for the log."""
    m, shape = fns.model, fns.shape
    prompts, samples = c.prompts_per_step, c.samples_per_prompt
    return (
        f"{c.model} on {mesh.size} {jax.devices()[0].platform} device(s), "
        f"mesh {sharding.describe(mesh.shape)}\n"
        f"{_trained(c, fns)}\n"
        f"{c.objective}, {target(c, fns.objective)}: "
        f"{prompts} prompts x {samples} samples = {prompts * samples} responses per step, "
        f"{c.updates_per_rollout} update(s) of at most {shape.num_microbatches} micro-"
        f"batches of {shape.microbatch_size} x {c.pack_length} tokens\n"
        f"attention: {_attention(m)}; rematerialisation: {c.remat}\n"
        f"rollouts: {plan}" + _staleness(c)
    )


def notes(c: FrozenConfigDict, num_prompts: int) -> list[str]:
    """What else a reader of the log would not expect, with so many prompts to train on."""
    said = []
    if setup_rollouts.behavior_of(c, {}).replays:
        first = -(-num_prompts // c.prompts_per_step) + 1
        said.append(f"replay: from step {first} on, when prompts come again")
    if clock := c.data.clock:
        said.append(f"the chat template is told that it is {clock} (data.clock)")
    return said


def _staleness(c: FrozenConfigDict) -> str:
    if not c.max_staleness:
        return ""
    where = "those that learn"
    if n := c.mesh.rollout:
        where = f"{n} device(s) of their own, while the others learn"
    return f"\nresponses are drawn on {where}; weights may be {c.max_staleness} step(s) old"


def _attention(m: ModelConfig) -> str:
    """The back ends, and in which layers there is a window."""
    how = (m.attention, m.head_dim, m.dtype)
    names = dict.fromkeys(attention.chosen(*how, window) for window in m.windows)
    layers = Counter(kind.window for kind in m.layer_kinds if kind.window)
    windows = [f", windows of {w} tokens in {n} layers" for w, n in layers.items()]
    return " and ".join(names) + "".join(windows)


def target(c: FrozenConfigDict, objective: ObjectiveConfig) -> str:
    """The power of the base that is trained toward, and what varies by step."""
    by_step = schedules.parse(c.schedules)
    said = [c.schedules.replace(",", ", ")] if by_step else []
    if not objective.has_target:
        return ", ".join(["without a target", *said])
    if x := c.eta_cutoff:
        said.insert(0, f"of rare tokens 1 (eta_cutoff {x:g})")
    if c.alpha_range:
        ends = " to ".join(f"{x:g}" for x in dial.parse(c.alpha_range))
        said.insert(0, f"alpha from {ends}, evaluated at {c.alpha:g}")
    elif "alpha" not in by_step:
        said.insert(0, f"alpha {objective.target.alpha:g}")
    return ", ".join(said)


def _trained(c: FrozenConfigDict, fns: TrainFns) -> str:
    """How many parameters are trained, of how many."""
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    number = lambda n: f"{n / 1e6:,.1f} M" if n >= 1e6 else f"{n:,}"
    trained, whole = size(fns.state.params["policy"]), abstract_params(fns.model)
    if not c.lora.rank:
        return f"training all {number(trained)} parameters"
    return (
        f"training {number(trained)} of {number(size(whole))} parameters (LoRA rank "
        f"{c.lora.rank} on {', '.join(lora.target_names(fns.model.adapted))})"
        + (f", starting from {c.lora.init_from}" if c.lora.init_from else "")
    )

"""Plans: compiled for TPUs and fitting, their traffic as expected, estimates near."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import jax
import pytest

from pfjax.infra import hardware, sharding
from pfjax.model import rope, transformer
from pfjax.model.families import llama
from pfjax.planner import aot, choices, hlo
from pfjax.trainer import train_fns, update_memory
from tests.conftest import ROOT, run_command
from tests.planner import plans


def _mesh_of_this_machine(topology, **sizes):
    return sharding.make_mesh(**sizes)


@pytest.mark.slow
def test_a_step_of_the_toy_model_compiles(monkeypatch):
    """For the devices of the tests in place of TPUs, which take minutes."""
    monkeypatch.setattr(aot, "device_mesh", _mesh_of_this_machine)
    how = {"attention": "plain", "remat": "full"}
    config = plans.config_of("smoke", **how)
    plan = plans.plan_of(config, "v5e:2x4", can_compile=True)
    assert plan["compiled"] and plan["fits"] and plan["error"] is None
    memory = plan["memory_gib"]
    # 68 k parameters over 8 devices and the head of log Z', whole: 4 bytes each.
    params = transformer.abstract_params(plans.base_of(config))
    size = sum(x.size for x in jax.tree.leaves(params)) / 8 + 2 * 64**2
    got = memory["state"]["parameters"] * hardware.GIB
    assert got == pytest.approx(4 * size, rel=0.05)
    for phase in ("score", "update"):
        assert (
            0 < memory["phases"][phase]["rows"] < memory["phases"][phase]["temporaries"]
        )
    assert not plans.collectives(plan, "rollout")
    assert ("reduce-scatter", "fsdp") in plans.collectives(plan, "update")
    # Weights are gathered once by the base and twice by the policy.
    gathered = {
        x["phase"]: x["gb"] for x in plan["collectives"] if x["kind"] == "all-gather"
    }
    assert gathered["update"] == pytest.approx(2 * gathered["score"], rel=0.05)
    # Shared in rollouts alone, matrices are read in halves there, and lie as before.
    config = plans.config_of("smoke", rollout_tensor=2, **how)
    shared = plans.plan_of(config, "v5e:2x4", can_compile=True)
    weights = lambda x: x["memory_gib"]["phases"]["rollout"]["weights"]
    assert 0.5 * weights(plan) <= weights(shared) < 0.6 * weights(plan)
    assert {axes for _, axes in plans.collectives(shared, "rollout")} == {"tensor"}
    assert shared["memory_gib"]["state"] == plan["memory_gib"]["state"]
    in_update = lambda x: plans.collectives(x, "update")
    assert in_update(shared) == in_update(plan)


@pytest.fixture
def little_effort():
    """XLA spends a third of the time on a program that is slower, and no smaller."""
    before = jax.config.jax_exec_time_optimization_effort
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    yield
    jax.config.update("jax_exec_time_optimization_effort", before)


@pytest.mark.slow
def test_1_5b_compiles_for_v5e_16_and_fits(tpu_mesh, little_effort):
    config = plans.config_of("qwen2_5_math_1_5b", microbatch_size=1)
    plan = plans.plan_of(config, "v5e:4x4", can_compile=True)
    assert plan["fits"] and plan["memory_gib"]["total"] < 15.75
    state = plan["memory_gib"]["state"]
    # 1.54 G parameters: 4 bytes, twice 4, and 2, over 16 devices.
    split, log_z = 1.544e9 / 16 / hardware.GIB, 2 * 1536**2 / hardware.GIB
    assert state["parameters"] == pytest.approx(4 * (split + log_z), rel=0.01)
    assert state["optimizer"] == pytest.approx(8 * (split + log_z), rel=0.01)
    assert state["base"] == pytest.approx(2 * split, rel=0.01)
    # A prototype took 2.9 GB of temporaries for 4,096 tokens a device.
    assert plan["memory_gib"]["phases"]["update"]["temporaries"] < 2.9
    # Decoding exchanges nothing: every device has whole weights.
    assert not plans.collectives(plan, "rollout")
    assert {axes for _, axes in plans.collectives(plan, "update")} == {"fsdp"}
    # Weights are gathered in bfloat16, an array of a layer at a time, the largest that
    # of an MLP, 1,536 x 8,960; as a ring of shifts where it overlaps with products. Of
    # activations, only chunks of states and the rows of the embedding travel.
    for dtype, size in plans.gathered(plan):
        assert (dtype, size <= 1536 * 8960) == ("bf16", True)
    # Once a pass: of the base, of the policy, and again for the gradient, which then is
    # summed over devices.
    weights = 2 * 1.31e9 * 15 / 16 * plan["micro_batches"] / 1e9
    sent = {
        phase: sum(x["gb"] for x in plan["collectives"] if x["phase"] == phase)
        for phase in ("score", "update")
    }
    assert weights <= sent["score"] <= 1.5 * weights
    assert 3 * weights <= sent["update"] <= 1.5 * 3 * weights


@pytest.mark.slow
@pytest.mark.parametrize(
    "topology, changes",
    [("v5p:2x2x2", {}), ("v6e:4x4", {})],
)
def test_7b_compiles_and_fits(tpu_mesh, topology, changes, little_effort):
    plan = plans.plan_of(
        plans.config_of("qwen2_5_math_7b", **changes), topology, can_compile=True
    )
    assert plan["compiled"] and plan["fits"], plan["memory_gib"]
    axes = {axes for _, axes in plans.collectives(plan, "update")}
    assert {"fsdp"} <= axes <= {"fsdp", "tensor", "fsdp+tensor"}
    assert bool(plans.collectives(plan, "rollout")) == ("mesh.tensor" in changes)
    estimate = plans.plan_of(
        plans.config_of("qwen2_5_math_7b", **changes), topology, False
    )
    for phase in ("score", "update"):
        got, want = (
            sum(x["memory_gib"]["phases"][phase].values()) for x in (estimate, plan)
        )
        assert got == pytest.approx(want, rel=0.5), phase
    for name, x in plan["memory_gib"]["state"].items():
        assert estimate["memory_gib"]["state"][name] == pytest.approx(x)


@pytest.mark.parametrize(
    "can_compile", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_devices_that_draw_beside_the_learner_are_planned(monkeypatch, can_compile):
    monkeypatch.setattr(aot, "device_mesh", _mesh_of_this_machine)
    how = {"attention": "plain", "remat": "full", "max_staleness": 1}
    config = plans.config_of("smoke", **how, **{"mesh.rollout": 6})
    plan = plans.plan_of(config, "v5e:2x4", can_compile=can_compile)
    assert plan["fits"] and plan["mesh"]["fsdp"] == 2 and plan["rollout_devices"] == 6
    seconds = {phase: x["seconds"] for phase, x in plan["phases"].items()}
    learning = seconds["score"] + seconds["update"]
    assert plan["seconds"] == max(seconds["rollout"], learning)
    sent = [x["gb"] for x in plan["collectives"] if x["kind"] == "copy"]
    memory = plan["memory_gib"]
    # The policy's and the base's, which both draw, and the policy's of the next step.
    weights = memory["phases"]["rollout"]["weights"] * hardware.GIB / 1e9
    assert sent == [pytest.approx(weights / 3)]
    # An actor holds neither parameters nor moments.
    of_phase = {phase: sum(x.values()) for phase, x in memory["phases"].items()}
    learned = max(of_phase["score"], of_phase["update"])
    learned += sum(memory["state"].values())
    assert memory["total"] == max(of_phase["rollout"], learned)


def test_a_plan_has_the_slots_and_caches_of_its_run():
    def plan_with(**changes):
        sizes = {"mesh.data": 2, "prompts_per_step": 3}
        config = plans.config_of("smoke", **sizes, **changes)
        return plans.plan_of(config, "v5e:2x1", can_compile=False)

    # 2 prompts x 8 samples on the busier of 2 devices; a stream shares them out.
    now, stale = plan_with(), plan_with(max_staleness=1)
    assert now["rollout_plan"].startswith("32 samples at once")
    assert stale["rollout_plan"].startswith("24 samples at once")
    # Policy and base draw in turn, or side by side.
    alone = plan_with(max_staleness=1, **{"behavior.base": 0.0})
    caches = lambda plan: plan["memory_gib"]["phases"]["rollout"]["caches"]
    assert caches(stale) == 2 * caches(alone)
    now_alone = plan_with(**{"behavior.base": 0.0})
    assert caches(now) == caches(now_alone)


def test_a_rollout_whose_responses_go_on_waits_for_none_of_them():
    seconds = {}
    for staleness in (0, 2):
        config = plans.config_of("qwen2_5_math_1_5b", max_staleness=staleness)
        plan = plans.plan_of(config, "h100:8", can_compile=False)
        seconds[staleness] = plan["phases"]["rollout"]["seconds"]
    assert seconds[2] < 0.5 * seconds[0]


def test_estimates_follow_the_settings():
    small = {"microbatch_size": 1, "remat": "full"}
    total = {}
    for name, changes in {
        "small": small,
        "rows": {**small, "microbatch_size": 8},
        "dots": {**small, "remat": "dots"},
        "half": {**small, "optim.mu_dtype": "bfloat16"},
        "host": {**small, "offload_ref": True},
        "adapters": {**small, "lora.rank": 16},
    }.items():
        config = plans.config_of("qwen2_5_math_7b", **changes)
        plan = plans.plan_of(config, "h100:8", can_compile=False)
        assert not plan["compiled"]
        total[name] = plan["memory_gib"]
    update = lambda name: total[name]["phases"]["update"]["temporaries"]
    state = lambda name: sum(total[name]["state"].values())
    assert update("small") < update("dots") < update("rows")
    # 7.6 G parameters over 8 devices: 2 bytes of the moment, 2 of the base.
    assert state("small") - state("half") == pytest.approx(
        7.6 / 8 * 2 / 1.074, rel=0.05
    )
    assert state("small") - state("host") == pytest.approx(
        7.6 / 8 * 2 / 1.074, rel=0.05
    )
    # The base alone, beside adapters and the head of log Z'.
    assert state("adapters") < state("small") / 7 + 0.6


def test_a_plan_counts_on_the_memory_that_a_run_reserves(monkeypatch):
    found = {}
    for fraction in ("0.92", "0.2"):
        monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", fraction)
        plan = plans.plan_of(
            plans.config_of("qwen2_5_math_1_5b"), "h100:8", can_compile=False
        )
        assert plan["memory_gib"]["available"] == pytest.approx(79.11 * float(fraction))
        found[fraction] = plan["memory_gib"]["phases"]["rollout"]["caches"]
    assert found["0.92"] > found["0.2"]


def _update_links(topology, **changes):
    """Seconds on links of an update, and the bytes that a device sends by axes."""
    plan = plans.plan_of(
        plans.config_of("qwen2_5_math_1_5b", **changes), topology, False
    )
    rows = [x for x in plan["collectives"] if x["phase"] == "update"]
    seconds = plan["phases"]["update"]["seconds_by"]["links"]
    return seconds, {x["axes"]: 1e9 * x["gb"] for x in rows}


def test_what_crosses_nodes_is_priced_at_their_network():
    """By default weights are split within a node, and gradients alone cross."""
    inside, network = 450e9, 50e9
    seconds, sent = _update_links("h100:16")
    assert set(sent) == {"fsdp", "data"}
    assert seconds == pytest.approx(sent["fsdp"] / inside + sent["data"] / network)
    # Over all devices there are eight rings, each with a port of its own.
    seconds, sent = _update_links("h100:16", **{"mesh.data": 1})
    assert seconds == pytest.approx(sent["fsdp"] / 8 / network)
    # One node has no network.
    seconds, sent = _update_links("h100:8")
    assert seconds == pytest.approx(sent["fsdp"] / inside)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh, crossing",
    [
        ({"data": 4, "fsdp": 2}, {("all-reduce", 0)}),
        ({"data": 4, "fsdp": 1, "tensor": 2}, {("all-reduce", 0)}),
    ],
)
def test_copies_of_the_weights_meet_once_per_update(mesh, crossing):
    """Nothing that crosses nodes is in a loop: neither weights nor gradients of a part."""
    mesh = sharding.make_mesh(**mesh)
    config = plans.config_of("smoke", attention="plain")
    fns = train_fns.train_fns(config, plans.base_of(config), 16, mesh)
    batch = train_fns.abstract_minibatch(fns, mesh)
    with jax.set_mesh(mesh):
        update = fns.train_step.lower(fns.state, {}, *batch).compile()
        score = fns.score_base.lower(fns.base, *batch).compile()
    found = [
        {
            (x.kind, x.loops)
            for x in hlo.collectives(program.as_text(), mesh)
            if "data" in x.axes and x.sent > 64  # and not a count
        }
        for program in (update, score)
    ]
    # What is said of each token and trajectory is brought together afterwards.
    assert found[0] - {("all-gather", 0)} == crossing
    assert found[1] <= {("all-gather", 0)}


def test_rows_per_micro_batch_follow_the_memory_and_the_work():
    rows = lambda topology, name="qwen2_5_math_1_5b", **changes: _rows(
        plans.config_of(name, **changes), topology
    )
    # 1,024 responses of up to 4,096 tokens over 8 devices are 128 rows: 16 times 8.
    assert rows("h100:8") == 8
    assert rows("h100:8", prompts_per_step=8) == 2
    assert rows("h100:8", prompts_per_step=1) == 1
    # Of one device 32 rows of 4,096 would be few micro-batches, but save little traffic.
    assert rows("h100:1", remat="full") == 8
    # All weights of a 7B and their moments leave a v6e less room, and a v5e none.
    assert rows("v6e:4x4", "qwen2_5_math_7b") == 4
    assert rows("v6e:2x4", "qwen2_5_math_7b") < rows("v5p:2x2x2", "qwen2_5_math_7b")
    assert rows("h100:8", microbatch_size=3) == 3
    # Devices of unknown memory.
    config = plans.config_of("qwen2_5_math_1_5b")
    mesh = sharding.make_mesh()
    fns = train_fns.train_fns(config, plans.base_of(config), 1024, mesh)
    assert fns.shape.microbatch_size == mesh.size


def test_what_is_resident_leaves_rows_less_room():
    config = plans.config_of("qwen2_5_math_1_5b")
    mesh = aot.abstract_mesh("h100:8", data=1, fsdp=8, tensor=1)
    model = dataclasses.replace(plans.base_of(config), dtype="bfloat16")
    sizes = {"pack_length": 4096, "most": 128, "remat": "full", "param_bytes": 2**30}
    rows = [
        update_memory.rows_that_fit(
            model, mesh, resident_bytes=x * hardware.GIB, **sizes
        )
        for x in (10, 60, 66, 70, 100)
    ]
    assert rows == sorted(rows, reverse=True)
    assert rows[0] == 8 and rows[-1] == 1 and len(set(rows)) >= 3


def test_what_devices_that_share_experts_send_is_as_compiled():
    """For h100:8, with one row per micro-batch: 806 GB in scoring, 1,624 GB in the update."""
    mesh = {"mesh.tensor": 1, "mesh.fsdp": 1, "mesh.expert": 8, "rollout_tensor": 4}
    config = plans.config_of("qwen3_30b_a3b", microbatch_size=1, **mesh)
    plan = plans.plan_of(config, "h100:8", can_compile=False)
    sent = {
        phase: sum(
            x["gb"]
            for x in plan["collectives"]
            if (x["phase"], x["axes"]) == (phase, "expert")
        )
        for phase in ("score", "update")
    }
    assert sent["score"] == pytest.approx(806, rel=0.1)
    assert sent["update"] == pytest.approx(1624, rel=0.1)


def test_adapters_of_experts_are_counted_in_updates():
    """By 7.8 GiB, as two layers compiled for v5p:2x2x2 need for 65,536 tokens."""
    base = plans.base_of(plans.config_of("qwen3_30b_a3b"))
    mesh = {"data": 1, "fsdp": 2, "expert": 1, "context": 1, "tensor": 4}
    need = []
    for targets in ((), ("w_gate", "w_up", "w_down")):
        sizes = {"num_layers": 2, "lora_rank": 16, "lora_targets": targets}
        model = dataclasses.replace(base, **sizes)
        need.append(update_memory.pass_bytes(model, mesh, 65_536, "full"))
    assert 7 < (need[1] - need[0]) / hardware.GIB < 9


def _rows(config, topology):
    mesh = aot.abstract_mesh(topology, **config.mesh)
    fns = train_fns.train_fns(config, plans.base_of(config), 1024, mesh)
    return fns.shape.microbatch_size // sharding.batch_ways(mesh)


def test_a_copy_that_a_node_cannot_hold_may_be_split_over_all():
    config = plans.config_of("qwen2_5_math_7b", **{"mesh.tensor": 4})
    advice = choices.advise(config, plans.base_of(config), "rtx4090:16", 1024)
    assert advice.startswith("it would fit with --config.mesh.data=1 (")


@pytest.mark.slow
def test_a_search_finds_the_mesh_that_halves_the_rollouts():
    """A 7B reads its weights from the memory of four devices instead of one."""
    config = plans.config_of("qwen2_5_math_7b")
    found = choices.search(config, plans.base_of(config), "h100:8", 1024)
    seconds = lambda plan: plan["phases"]["rollout"]["seconds"]
    best, present = found[0], plans.plan_of(config, "h100:8", can_compile=False)
    # In updates weights are gathered, which sends half of what activations would.
    assert best["mesh"]["tensor"] == 1 and best["changes"]["rollout_tensor"] == 4
    as_one = {"mesh.fsdp": 2, "mesh.tensor": 4, "microbatch_size": 16}
    shared = plans.plan_of(
        plans.config_of("qwen2_5_math_7b", **as_one), "h100:8", False
    )
    assert seconds(best) == pytest.approx(seconds(shared), rel=0.01)
    assert best["gb_sent"] < shared["gb_sent"] / 2
    assert seconds(best) < seconds(present) / 2
    assert best["seconds"] < 0.65 * present["seconds"]
    # What is reported is the plan of the settings that are advised.
    again = plans.plan_of(
        plans.config_of("qwen2_5_math_7b", **best["changes"]), "h100:8", False
    )
    assert again == {k: v for k, v in best.items() if k != "changes"}
    # Every mesh once: 8 = 2 * 2 * 2 over three axes, but for tensor=8 and 4 heads.
    meshes = [tuple(x["mesh"].values()) for x in found]
    assert len(set(meshes)) == len(meshes) == 9
    fits = [x["fits"] for x in found]
    assert fits == sorted(fits, reverse=True) and not all(fits)
    speeds = [x["seconds"] for x in found if x["fits"]]
    assert speeds == sorted(speeds)


@pytest.mark.slow
def test_a_search_has_devices_share_rows_that_are_too_long_for_one():
    long = {"pack_length": 32768, "max_new_tokens": 31744, "microbatch_size": 1}
    config = plans.config_of("qwen2_5_math_7b", **long)
    found = choices.search(config, plans.base_of(config), "v6e:2x4", 8192)
    assert found[0]["fits"] and found[0]["mesh"]["context"] > 1
    limit = 0.85 * found[0]["memory_gib"]["available"]
    alone = [x for x in found if x["mesh"]["context"] == 1]
    assert alone and min(x["memory_gib"]["total"] for x in alone) > limit
    advice = choices.advise(config, plans.base_of(config), "v5e:4x4", 8192)
    assert "--config.mesh.context=" in advice


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [{"fsdp": 1, "context": 4}, {"data": 2, "context": 2}]
)
def test_a_row_that_devices_share_is_nowhere_whole(tpu_mesh, sizes):
    """But for its keys and values, tokens, and what is a number per token."""
    length, width, inner = 8192, 512, 1792
    model = llama.Config(
        vocab_size=32_000,
        embed_dim=width,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=128,
        mlp_dim=inner,
        rope=rope.RopeConfig(theta=10_000.0),
        norm_eps=1e-6,
        tied_embeddings=False,
        max_positions=length,
        stop_ids=(1,),
    )
    long = {"pack_length": length, "max_new_tokens": length - 1024}
    config = plans.config_of("qwen2_5_math_1_5b", microbatch_size=1, **long)
    mesh = tpu_mesh("v5e:2x2", **{"data": 1, "fsdp": 1, "tensor": 1} | sizes)
    fns = train_fns.train_fns(config, model, 1024, mesh)
    scored, number = train_fns.abstract_minibatch(fns, mesh)
    with jax.set_mesh(mesh):
        compiled = fns.train_step.lower(fns.state, {}, scored, number).compile()
    text = compiled.as_text()
    assert "splash" in text
    part = length // sizes["context"]
    seen = plans.arrays(text)
    assert any({part, inner} <= set(shape) for shape in seen)
    # Not the rows of all micro-batches either.
    of_row = [s for s in seen if length in s and s[0] != fns.shape.num_microbatches]
    whole = [s for s in of_row if math.prod(s) > length * 2 * 2 * 128]
    assert not whole, whole


def test_a_search_says_what_to_set_or_that_nothing_fits():
    done = run_command("pfjax.plan", "--config=smoke", "--topology=h100:2", "--search")
    assert done.returncode == 0, done.stderr
    assert "fastest: --config.mesh.data=" in done.stdout
    # A config whose own mesh is of other devices is what a search is for.
    other = ("--config=smoke", "--config.mesh.fsdp=3", "--topology=h100:2", "--search")
    done = run_command("pfjax.plan", *other)
    assert done.returncode == 0 and "does not suit these devices" in done.stdout
    args = ("--config=qwen2_5_math_7b", "--topology=rtx4090:1", "--search")
    done = run_command("pfjax.plan", *args)
    assert done.returncode == 1 and "nothing fits" in done.stdout


def test_prompts_that_leave_devices_idle_are_noted():
    plan = plans.plan_of(
        plans.config_of("qwen2_5_math_7b"), "v5p:4x4x4", can_compile=False
    )
    assert (
        "32 prompts over 64 parts of the batch leave 50% of the devices idle"
        in (plan["notes"][0])
    )


def test_what_does_not_fit_says_what_would(tpu_mesh):
    config = plans.config_of("qwen2_5_math_7b")
    plan = plans.plan_of(config, "v5e:4x4", can_compile=True)
    assert not plan["fits"] and "one sample of" in plan["error"]
    assert not plan["compiled"]  # what it prints is estimated
    advice = choices.advise(config, plans.base_of(config), "v5e:4x4", 1024)
    assert advice.startswith("it would fit with --config.")
    flags = dict(
        x.removeprefix("--config.").split("=") for x in advice.split() if "=" in x
    )
    changes = {k: int(v) if v.isdigit() else v for k, v in flags.items()}
    assert plans.plan_of(
        plans.config_of("qwen2_5_math_7b", **changes), "v5e:4x4", False
    )["fits"]


def test_a_program_that_the_compiler_refuses_is_no_crash(monkeypatch):
    def refuse(*_):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20G of 15G\n"
        )

    monkeypatch.setattr(aot, "compile_phases", refuse)
    monkeypatch.setattr(aot, "device_mesh", _mesh_of_this_machine)
    plan = plans.plan_of(
        plans.config_of("qwen2_5_math_1_5b"), "v5e:2x4", can_compile=True
    )
    assert not plan["fits"] and "Used 20G of 15G" in plan["error"]


def _run(*args):
    done = run_command("pfjax.plan", "--config=qwen2_5_math_7b", *args)
    return done.returncode, done.stdout, done.stderr


def test_command_says_how_it_knows_and_exits_by_what_fits(monkeypatch):
    monkeypatch.setattr(aot, "can_compile", lambda topology: False)
    status, out, error = _run("--topology=h200:8")
    assert status == 0, error
    assert (
        "(estimated from shapes: no compiler for these devices here, it comes with "
        "pfjax[cuda13])"
    ) in out
    for word in (
        "parameters",
        "optimizer",
        "base",
        "caches",
        "fits",
        "PFLOP",
        "tokens/s",
    ):
        assert word in out
    status, out, error = _run("--all")
    assert status == 0, error
    lines = {line.split()[0]: line for line in out.splitlines()[2:] if line}
    assert "does not fit" in lines["v5e:2x2"] and "does not fit" not in lines["h200:8"]


def test_the_table_says_of_which_devices_the_mesh_is_not():
    status, out, error = _run("--all", "--config=smoke", "--config.mesh.fsdp=8")
    assert status == 0, error
    lines = {line.split()[0]: line for line in out.splitlines()[2:] if line}
    assert "does not cover the 4 devices" in lines["v5e:2x2"]
    assert "(update)" in lines["h200:8"]


def test_command_line_of_a_run_that_does_not_fit():
    """In a process of its own, with its flags as they are typed."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pfjax.plan", "--json", "--topology=h100:1"),
            *("--config=configs/qwen2_5_math_7b.py", "--config.microbatch_size=2"),
        ],
        capture_output=True,
        check=False,
        text=True,
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 1
    plan = json.loads(done.stdout)
    assert not plan["fits"] and "--config.microbatch_size=1" in plan["advice"]


@pytest.mark.parametrize(
    "given, message",
    [
        (["--topology=v9:2x2"], "give KIND:GRID for TPUs"),
        (["--topology=h100:0"], "give KIND:GRID for TPUs"),
        (["--topology=v5e:0x4"], "give KIND:GRID for TPUs"),
        (["--topology=h100:1", "--response_tokens=0"], "--response_tokens"),
        (["--topology=h100:1", "--response_tokens=99999"], "no response has more than"),
        ([], "give --topology=NAME or --all"),
        (
            ["--topology=h200:8", "--config.mesh.tensor=3"],
            "does not cover the 8 devices",
        ),
        *(
            (
                [*how, "--config.mesh.rollout=8", "--config.max_staleness=1"],
                "--config.mesh.rollout=8 leaves none of 8 devices to learn",
            )
            for how in (["--topology=h200:8"], ["--topology=h200:8", "--search"])
        ),
        *(
            (
                [*how, "--config.mesh.rollout=3", "--config.max_staleness=1"],
                f"give a multiple of {machines}",
            )
            for machines, how in (
                (4, ["--topology=v5e:4x4"]),
                (2, ["--topology=h200:16", "--search"]),
            )
        ),
        (
            ["--topology=h200:8", "--config.mesh.tensor=8"],
            "heads of size 28 does not divide",
        ),
    ],
)
def test_mistakes_are_one_message(given, message):
    status, out, error = _run(*given)
    assert status == 1 and not out
    assert error.startswith("error: ") and message in error


def test_a_grid_that_no_tpu_has_is_one_message():
    pytest.importorskip("libtpu")
    status, _, error = _run("--topology=v5e:3x3")
    assert status == 1 and error.count("\n") == 1
    assert error.startswith("error: --topology=v5e:3x3: there is no such TPU: ")


@pytest.mark.parametrize(
    "name",
    [
        "qwen2_5_0_5b_gsm8k",
        "qwen2_5_1_5b",
        "qwen2_5_math_7b",
        "llama3_2_3b_instruct",
        "gemma3_1b_it",
        "olmo2_1b_instruct",
        "qwen3_5_0_8b",
        "qwen3_5_2b",
        "qwen3_30b_a3b",
    ],
)
def test_shapes_of_recipes_are_at_hand(name):
    """Parameters of the models, as their cards give them."""
    base = plans.base_of(plans.config_of(name))
    size = sum(x.size for x in jax.tree.leaves(transformer.abstract_params(base)))
    known = {
        "qwen2_5_0_5b_gsm8k": 0.494e9,
        "qwen2_5_1_5b": 1.54e9,
        "qwen2_5_math_7b": 7.62e9,
        "llama3_2_3b_instruct": 3.21e9,
        "gemma3_1b_it": 1.00e9,
        "olmo2_1b_instruct": 1.485e9,
        "qwen3_5_0_8b": 0.75e9,
        "qwen3_5_2b": 1.88e9,
        "qwen3_30b_a3b": 30.53e9,
    }
    assert size == pytest.approx(known[name], rel=0.005)
    assert dataclasses.is_dataclass(base)

"""Programs of runs, compiled for NVIDIA GPUs that are not here.

A tier of its own, since the compiler is large: bash launch/gpu_compile.sh
"""

import functools
import math
import re

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pfjax.infra import hardware
from pfjax.model import attention, decode_attention
from pfjax.planner import aot, gpu_target
from pfjax.trainer import train_fns
from tests.planner import plans

pytestmark = [
    pytest.mark.gpu_compile,
    pytest.mark.long_running,  # programs as a run has them
    pytest.mark.skipif(
        not gpu_target.is_installed(),
        reason="no compiler for GPUs here; bash launch/gpu_compile.sh gets it",
    ),
]


@pytest.fixture
def compiled(monkeypatch):
    """Compiles a config, for 8 H100s if not told otherwise: its plan, and its programs by
    phase."""
    compile_phases, programs = aot.compile_phases, {}

    def keep(*args):
        programs.update(compile_phases(*args))
        return programs

    monkeypatch.setattr(aot, "compile_phases", keep)

    def run(config, topology="h100:8"):
        return plans.plan_of(config, topology, can_compile=True), programs

    return run


# Adapters; all weights of a small and of a large model; another family.
@pytest.mark.parametrize(
    "recipe",
    [
        "qwen2_5_0_5b_gsm8k",
        "qwen2_5_math_1_5b",
        "qwen2_5_math_7b",
        "llama3_2_3b_instruct",
    ],
)
def test_recipes_compile_for_8_h100s_and_fit(recipe, compiled):
    config = plans.config_of(recipe)
    base = plans.base_of(config)
    plan, programs = compiled(config)
    assert plan["compiled"] and plan["fits"] and plan["error"] is None
    assert set(programs) == {"rollout", "score", "update"}
    assert "what cuDNN works in is not in these numbers" in plan["notes"][-1]

    # Caches and the state of training are changed where they lie.
    memory = {phase: x.memory_analysis() for phase, x in programs.items()}
    caches = plan["memory_gib"]["phases"]["rollout"]["caches"] * hardware.GIB
    assert 0.9 * caches < memory["rollout"].alias_size_in_bytes <= caches
    slots = int(plan["rollout_plan"].split()[0]) // plan["devices"]
    logits = 4 * slots * base.vocab_size  # of one token of each
    assert aot.temporaries(programs["rollout"]) < 1.2 * logits
    state = plan["memory_gib"]["state"]
    state = (state["parameters"] + state["optimizer"]) * hardware.GIB
    assert memory["update"].alias_size_in_bytes >= 0.99 * state

    # The logits of a chunk of tokens at most, and no part of the head but a device's own.
    vocab, chunk = base.vocab_size, 512
    texts = {phase: x.as_text() for phase, x in programs.items()}
    for phase in ("score", "update"):
        of_words = [x for x in plans.arrays(texts[phase]) if {vocab, vocab // 8} & {*x}]
        assert of_words and max(map(_size, of_words)) <= vocab * chunk, phase
    for dtype, size in plans.gathered(plan):
        assert size <= base.embed_dim * base.mlp_dim, dtype

    # Decoding exchanges nothing, and attends to prompts and own past by its kernel.
    assert not plans.collectives(plan, "rollout")
    kernels = texts["rollout"].count('custom_call_target="__gpu$xla.gpu.triton"')
    assert kernels == 2 * base.num_layers
    assert _attentions(texts["score"]) == 1
    assert config.remat == "full" and _attentions(texts["update"]) == 2


def test_a_model_with_windows_compiles_for_8_h100s_and_fits(compiled):
    """And with heads of 256, which attend without a kernel over packed rows."""
    plan, programs = compiled(plans.config_of("gemma3_1b_it"))
    assert plan["compiled"] and plan["fits"] and plan["error"] is None
    memory = programs["rollout"].memory_analysis()
    caches = plan["memory_gib"]["phases"]["rollout"]["caches"] * hardware.GIB
    assert 0.9 * caches < memory.alias_size_in_bytes <= caches
    text = programs["rollout"].as_text()
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 2 * 26
    assert not _attentions(programs["score"].as_text())


def test_a_model_with_states_compiles_for_8_h100s_and_fits(compiled):
    plan, programs = compiled(plans.config_of("qwen3_5_0_8b"))
    assert plan["compiled"] and plan["fits"] and plan["error"] is None
    # Keys and values of prompts and responses in the layers that have some; states are
    # changed where they lie too.
    memory = programs["rollout"].memory_analysis()
    caches = plan["memory_gib"]["phases"]["rollout"]["caches"] * hardware.GIB
    assert 0.9 * caches < memory.alias_size_in_bytes <= caches
    assert not plans.collectives(plan, "rollout")


def test_a_model_with_experts_compiles_for_8_h100s_and_fits(compiled):
    """Without its kernels the passes over packed rows take 40 GiB, as every token is
    multiplied with all experts of a device."""
    config = plans.config_of("qwen3_30b_a3b")
    plan, programs = compiled(config)
    assert plan["compiled"] and plan["fits"] and plan["error"] is None
    base, temporaries = plans.base_of(config), aot.temporaries
    assert temporaries(programs["score"]) < 12 * hardware.GIB
    assert temporaries(programs["update"]) < 22 * hardware.GIB
    # Three products in each layer of the list that decoding goes through, beside attention.
    kernels = programs["rollout"].as_text().count('"__gpu$xla.gpu.triton"')
    assert kernels == (2 + 3) * base.num_layers


def test_a_recipe_compiles_for_a_gpu_before_ampere(compiled):
    """Which XLA compiles no kernel of Triton's for: one stops all."""
    small = {"max_new_tokens": 256, "samples_per_prompt": 4}
    config = plans.config_of("qwen2_5_0_5b_gsm8k", **small)
    plan, programs = compiled(config, "t4:1")
    assert plan["compiled"] and plan["fits"] and plan["error"] is None
    assert not any("triton" in x.as_text() for x in programs.values())


def test_rematerialisation_but_for_attention_computes_it_once():
    config = plans.config_of("qwen2_5_math_1_5b", remat="attention")
    mesh = aot.device_mesh("h100:8", **config.mesh)
    base, longest = plans.base_of(config), config.data.max_prompt_tokens
    fns = train_fns.train_fns(config, base, longest, mesh)
    with jax.set_mesh(mesh), gpu_target.told_to_cudnn(mesh):
        batch = train_fns.abstract_minibatch(fns, mesh)
        update = fns.train_step.lower(fns.state, {}, *batch).compile()
    assert _attentions(update.as_text()) == 1


@pytest.mark.parametrize("kind", ["h100", "rtx4090"])
@pytest.mark.parametrize("c", [64, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_decoding_within_windows_compiles(kind, c, dtype):
    """Where the kernel's rows see their caches from different tokens on."""
    mesh = aot.device_mesh(f"{kind}:1", 1, 1, 1)
    everywhere = NamedSharding(mesh, PartitionSpec())
    array = functools.partial(jax.ShapeDtypeStruct, sharding=everywhere)
    slots, prompts = array((64,), "int32"), array((8,), "int32")
    own, of_prompts = array((64, 2, 1024, c), dtype), array((8, 2, 512, c), dtype)
    caches, queries = ((own,) * 2, (of_prompts,) * 2), array((64, 12, c), dtype)
    run = functools.partial(
        decode_attention.decode_attention, samples_per_prefix=16, backend="gpu"
    )
    starts = {"own_start": slots, "prompt_start": slots}
    with jax.set_mesh(mesh):
        lowered = jax.jit(run).lower(queries, *caches, slots, prompts, slots, **starts)
        text = lowered.compile().as_text()
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 2


def test_cudnn_attends_within_windows():
    mesh = aot.device_mesh("h100:1", 0, -1, 1)
    array = lambda *shape: jax.ShapeDtypeStruct(shape, "bfloat16")
    args = [array(2, 512, heads, 128) for heads in (4, 2, 2)]

    def loss(q, k, v, ids):
        out = attention.packed_attention(q, k, v, ids, max_segments=4, window=200)
        return out.astype("float32").sum()

    with jax.set_mesh(mesh), gpu_target.told_to_cudnn(mesh):
        run = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        text = (
            run.lower(*args, jax.ShapeDtypeStruct((2, 512), "int32"))
            .compile()
            .as_text()
        )
    assert _attentions(text) == 1
    assert text.count('custom_call_target="__cudnn$fmhaSoftmaxBackward"') == 1
    assert len(re.findall(r"sliding_window_length\W+200\b", text)) == 2


def _attentions(text: str) -> int:
    """Forward kernels of attention in a program."""
    return text.count('custom_call_target="__cudnn$fmhaSoftmax"')


def _size(shape: tuple[int, ...]) -> int:
    return math.prod(shape)

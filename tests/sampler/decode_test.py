"""Decoding compiled for TPUs, without one: shapes of Qwen2.5-1.5B, two layers."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pfjax.infra import sharding
from pfjax.model import decode_attention, rope, transformer
from pfjax.model.families import qwen2
from pfjax.planner import aot
from pfjax.sampler import decode, slots, unstack
from pfjax.sampler.buffers import Prompts, Queue, Results, SamplerState, Settings, Slots
from pfjax.trainer import train_fns
from tests.sampler import windowed

SLOTS, WIDTH, PREFIX_SLOTS, PROMPT_WIDTH, G, PROMPTS = 64, 1024, 8, 512, 16, 16
CONFIG = qwen2.Config(
    vocab_size=151_936,
    embed_dim=1536,
    num_layers=2,
    num_heads=12,
    num_kv_heads=2,
    head_dim=128,
    mlp_dim=8960,
    rope=rope.RopeConfig(theta=1e6),
    norm_eps=1e-6,
    tied_embeddings=True,
    max_positions=32_768,
    stop_ids=(151_643,),
    dtype="bfloat16",
)
PLAN = slots.Plan(
    *(1, SLOTS, PREFIX_SLOTS, PROMPT_WIDTH, (SLOTS,), (WIDTH,), "bfloat16", "tpu", 0),
    windows=(0, 0),
)


def _compile(mesh, config=CONFIG, plan=PLAN):
    """The compiled program, and bytes of a full layer's keys on a device."""
    parts = sharding.batch_ways(mesh)
    split = ("data", "fsdp")

    def array(shape, dtype, *axes):
        where = NamedSharding(mesh, P(*axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    int32 = lambda *shape: array((parts * shape[0], *shape[1:]), jnp.int32, split)
    kv_axis = sharding.spec(mesh, ("kv_heads",), (config.num_kv_heads,))[0]

    def caches(batch, widths):
        def one(width):
            shapes = decode_attention.cache_shapes("tpu", parts * batch, 2, width, 128)
            return tuple(array(x, jnp.bfloat16, split, kv_axis) for x in shapes)

        return [one(width) for width in widths]

    params = transformer.abstract_params(config)
    where = sharding.tree_shardings(mesh, transformer.logical_axes(config), params)
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=s),
        params,
        where,
    )
    state = SamplerState(
        unstack.weights(config, params, run=aot.results),
        jax.eval_shape(lambda: jax.random.key(0)),
        jax.ShapeDtypeStruct((), jnp.float32),
    )
    n = PROMPTS * G
    bools = array((parts * n,), bool, split)
    queue = Queue(
        *(int32(PROMPTS) for _ in range(4)), *(int32(1) for _ in range(5)), bools
    )
    prompts = caches(PREFIX_SLOTS, plan.prompt_widths)
    prompts = Prompts(prompts, int32(PREFIX_SLOTS))
    of_slots = Slots(*(int32(SLOTS) for _ in range(4)), int32(1), int32(1))
    log_probs = array((parts * n, WIDTH), jnp.float32, split)
    results = Results(int32(n, WIDTH), log_probs, int32(n), bools)
    cache = caches(SLOTS, plan.response_widths(WIDTH))
    lowered = decode.decode.lower(
        state,
        prompts,
        queue,
        of_slots,
        cache,
        results,
        s=Settings(config, plan, G, config.stop_ids),
        samples_per_prefix=G,
    )
    per_device = SLOTS * WIDTH * 128 * 2 * (1 if kv_axis else 2)
    return lowered.compile(), per_device


@pytest.mark.slow
@pytest.mark.parametrize(
    "topology, axes",
    [("v5e:2x2", (4, 1, 1)), ("v6e:2x2", (1, 2, 2)), ("v5p:2x2x1", (1, 1, 4))],
)
def test_compiles_for_tpus_with_the_kernel_and_in_place(tpu_mesh, topology, axes):
    mesh = tpu_mesh(topology, *axes)
    with jax.set_mesh(mesh):
        compiled, keys = _compile(mesh)
    memory = compiled.memory_analysis()
    own = 2 * CONFIG.num_layers * keys
    assert own <= memory.alias_size_in_bytes < 1.1 * own
    # Neither a copy of the caches nor the logits of more than a step.
    assert memory.temp_size_in_bytes < keys
    text = compiled.as_text()
    # Prompts and own past, in each layer.
    kernels = re.findall(r"custom-call\(.*decode_attention", text)
    assert len(kernels) == 2 * CONFIG.num_layers, len(kernels)
    moved = re.findall(
        r"= (\w+)\[([\d,]*)\]\S* (?:all-\w+|reduce-scatter|collective-permute)", text
    )
    if mesh.shape["tensor"] == 1:
        assert not moved
    # Activations of a step, never weights or caches: at most slots x width of model.
    for _, shape in moved:
        size = 1
        for n in shape.split(","):
            size *= int(n or 1)
        assert size <= SLOTS * CONFIG.embed_dim, shape


# What a chain keeps of a response, its windows cover in part.
@pytest.mark.slow
@pytest.mark.parametrize("keeps_all", [False, True])
def test_windows_compile_for_tpus_in_place(tpu_mesh, keeps_all):
    config = windowed.config_of(CONFIG, 0, 200)
    plan = dataclasses.replace(PLAN, windows=(0, 200), keeps_all=keeps_all)
    mesh = tpu_mesh("v6e:2x2", 4, 1, 1)
    with jax.set_mesh(mesh):
        compiled, keys = _compile(mesh, config, plan)
    own = 2 * keys * (2 if keeps_all else 1 + 256 / WIDTH)
    memory = compiled.memory_analysis()
    assert own <= memory.alias_size_in_bytes < 1.1 * own
    assert memory.temp_size_in_bytes < keys
    kernels = re.findall(r"custom-call\(.*decode_attention", compiled.as_text())
    assert len(kernels) == 2 * config.num_layers, len(kernels)


def test_weights_are_put_together_a_layer_at_a_time():
    """Where devices share matrices in another way than in updates, all of one may be put
    together before it is split anew: of a stack of layers, as much as the model."""
    config = dataclasses.replace(CONFIG, num_layers=16, vocab_size=64)
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    shapes = transformer.abstract_params(config)
    where = sharding.tree_shardings(mesh, transformer.logical_axes(config), shapes)
    params = train_fns.placed(shapes, where)
    needs, alike = [], {}

    def run(f, *args, **static):
        if f not in alike:
            compiled = f.lower(*args, **static).compile()
            needs.append(compiled.memory_analysis().temp_size_in_bytes)
            alike[f] = f.eval_shape(*args, **static)
        return alike[f]

    with jax.set_mesh(sharding.regrouped(mesh, 4)):
        unstack.weights(config, params, run=run)
    whole = sum(x.size * 4 for x in jax.tree.leaves(shapes["blocks"]))
    assert len(needs) == 2 and max(needs) < whole / 4, (needs, whole)

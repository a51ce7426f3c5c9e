"""Decoding compiled for the devices of a mesh, which need not be here."""

from typing import Any

import jax
import jax.numpy as jnp

from pfjax.model.transformer import ModelConfig, Params
from pfjax.sampler import decode, options, slots


def compile_decode(
    config: ModelConfig,
    params: Params,
    plan: slots.Plan,
    *,
    num_prompts: int,
    samples_per_prompt: int,
    max_new_tokens: int,
) -> tuple[Any, decode.SamplerState]:
    """The loop over tokens of a rollout at the widest caches of its plan.

    Args:
      config: of the policy.
      params: its shapes, with their shardings.
      plan: of the rollout.

    Returns:
      The compiled program, and the shapes of the weights that it reads.
    """
    settings = decode.Settings(
        config=config,
        samples_per_prompt=samples_per_prompt,
        stop_ids=config.stop_ids,
        is_greedy=False,
        token_filters=options.NO_FILTERS,
        backend=plan.backend,
        cache_dtype=plan.cache_dtype,
    )
    state = decode.SamplerState(
        _as_compiled(decode.weights, config, params),
        jax.eval_shape(lambda: jax.random.key(0)),
        jax.ShapeDtypeStruct((), jnp.float32),
    )
    prompts = -(-num_prompts // plan.dp_size)
    int32 = lambda n: jax.ShapeDtypeStruct((plan.dp_size * n,), jnp.int32)
    queue = decode.Queue(
        *(int32(prompts) for _ in range(3)),
        *(int32(1) for _ in range(3)),
        jax.ShapeDtypeStruct((plan.dp_size * prompts * samples_per_prompt,), bool),
    )
    prompts, of_slots, cache, results = _as_compiled(
        decode.start,
        queue,
        s=settings,
        slots=plan.slots,
        width=plan.widths[-1],
        prefix_slots=plan.prefix_slots,
        prompt_width=plan.prompt_width,
        new=max_new_tokens,
    )
    lowered = decode.decode.lower(
        state,
        prompts,
        queue,
        of_slots,
        cache,
        results,
        s=settings,
        samples_per_prefix=samples_per_prompt,
    )
    return lowered.compile(), draw


def _as_compiled(f: Any, *args: Any, **kwargs: Any) -> Any:
    """Shapes of what a jitted function returns, placed as its program places them."""
    where = f.lower(*args, **kwargs).compile().output_shardings
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        f.eval_shape(*args, **kwargs),
        where,
    )

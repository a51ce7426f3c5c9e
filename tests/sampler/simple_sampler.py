"""The first sampler of pfjax, kept as a reference for the one that replaced it.

A prompt is prefilled once and its keys and values are read by all of its samples.
Decoding is one `while_loop` over all samples, with caches of the full length, that
ends when every sample has. It draws by the same random numbers.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Float, Int, Key

from pfjax.batch import Rollout
from pfjax.infra import sharding
from pfjax.model import log_probs, transformer
from pfjax.model.config import ModelConfig
from pfjax.model.transformer import Params, Policy
from pfjax.targets import Array

MASKED = -1e30

PROMPT_WIDTH_MULTIPLE = 16


class _State(NamedTuple):
    """What the decode loop carries. Suffix caches are `[L, P, G, R, K, C]`."""

    t: Int[Array, ""]  # tokens drawn so far
    last: Int[Array, "p g"]
    done: Bool[Array, "p g"]
    tokens: Int[Array, "p g r"]
    log_probs: Float[Array, "p g r"]
    lengths: Int[Array, "p g"]
    cache: transformer.KeyValue


def rollout(
    policy: Policy,
    prompts: list[list[int]],
    samples_per_prompt: int = 8,
    max_new_tokens: int = 512,
    temperature: float = 1.0,
    seed: int = 0,
    *,
    step: int = 0,
    prompt_ids: list[int] | None = None,
    stop_ids: tuple[int, ...] | None = None,
    prompt_width: int | None = None,
) -> Rollout:
    """Draws responses.

    Args:
      policy: the model; under `jax.set_mesh` the prompts are split over its
        "data" and "fsdp" axes.
      prompts: P lists of token ids, none empty.
      samples_per_prompt: G.
      max_new_tokens: R; a response that has not stopped by then is cut.
      temperature: of sampling. Recorded log-probs are at temperature 1 always.
      seed: with the same seed, step and prompt ids the draws are the same.
      step: training step, so that a prompt draws anew when it returns.
      prompt_ids: P integers that stand for the prompts in the random numbers;
        their order in the list when not given.
      stop_ids: tokens that end a response; the config's when not given.
      prompt_width: pads prompts to this width, so that batches of different
        prompts share one compiled program; next multiple of 16 when not given.

    Returns:
      Host arrays; see `types.Rollout`.

    Raises:
      ValueError: for an empty prompt, a temperature that is not positive, prompts
        wider than `prompt_width`, or more positions than the model has.
    """
    lengths = np.array([len(p) for p in prompts], np.int32)
    longest = int(lengths.max(initial=0))
    if prompt_width is None:
        prompt_width = -(-longest // PROMPT_WIDTH_MULTIPLE) * PROMPT_WIDTH_MULTIPLE
    _check(policy.config, lengths, prompt_width, max_new_tokens, temperature)
    tokens = np.zeros((len(prompts), prompt_width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    ids = np.arange(len(prompts)) if prompt_ids is None else np.asarray(prompt_ids)
    out = _rollout(
        policy.params,
        tokens,
        lengths,
        ids.astype(np.int32),
        jax.random.fold_in(jax.random.key(seed), step),
        np.float32(temperature),
        config=policy.config,
        num_samples=samples_per_prompt,
        max_new_tokens=max_new_tokens,
        stop_ids=policy.config.stop_ids if stop_ids is None else stop_ids,
    )
    tokens, lengths, log_probs, finished = (np.asarray(x) for x in out)
    slot_steps = int(lengths.size * lengths.max())
    return Rollout(tokens, lengths, log_probs, finished, slot_steps)


def _check(
    config: ModelConfig,
    lengths: np.ndarray,
    prompt_width: int,
    max_new_tokens: int,
    temperature: float,
) -> None:
    if not len(lengths) or lengths.min() == 0:
        raise ValueError(f"prompts must not be empty, got lengths {lengths.tolist()}")
    if lengths.max() > prompt_width:
        raise ValueError(
            f"a prompt has {lengths.max()} tokens, prompt_width is {prompt_width}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if lengths.max() + max_new_tokens > config.max_positions:
        raise ValueError(
            f"a prompt of {lengths.max()} tokens and {max_new_tokens} new ones exceed "
            f"the model's {config.max_positions} positions"
        )


@functools.partial(
    jax.jit, static_argnames=("config", "num_samples", "max_new_tokens", "stop_ids")
)
def _rollout(
    params: Params,
    prompts: Int[Array, "p s"],
    prompt_lengths: Int[Array, "p"],
    prompt_ids: Int[Array, "p"],
    key: Key[Array, ""],
    temperature: Float[Array, ""],
    *,
    config: ModelConfig,
    num_samples: int,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
) -> tuple[Array, Array, Array, Array]:
    p, width = prompts.shape
    g, r = num_samples, max_new_tokens
    prompts = sharding.constrain(prompts, "batch", None)
    # Cast once, not in every step of the loop; the values are those of a forward
    # that casts where it uses them.
    params = jax.tree.map(lambda x: x.astype(config.dtype), params)
    head = transformer.head_weight(params)
    keys = _sample_keys(key, prompt_ids, g)
    is_prompt = jnp.arange(width)[None] < prompt_lengths[:, None]
    first, prefix = _prefill(config, params, prompts, prompt_lengths, is_prompt)

    def draw(state: _State, logits: Float[Array, "p g v"]) -> _State:
        at_t = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(
            keys, state.t
        )
        token = jax.vmap(jax.vmap(jax.random.categorical))(at_t, logits / temperature)
        token = token.astype(jnp.int32)
        log_p, _ = log_probs.log_softmax_at(logits, token)
        stops = jnp.isin(token, jnp.array(stop_ids, jnp.int32))
        return state._replace(
            t=state.t + 1,
            last=token,
            tokens=state.tokens.at[:, :, state.t].set(token),
            log_probs=state.log_probs.at[:, :, state.t].set(log_p),
            lengths=state.lengths + ~state.done,
            done=state.done | stops,
        )

    def decode(state: _State) -> _State:
        hidden, kv = _forward_one(
            config, params, state, prefix, prompt_lengths, is_prompt
        )
        # Of the token at response index t - 1; one write for all layers.
        at = (0, 0, 0, state.t - 1, 0, 0)
        cache = tuple(
            lax.dynamic_update_slice(c, new[:, :, :, None].astype(c.dtype), at)
            for c, new in zip(state.cache, kv, strict=True)
        )
        return draw(state._replace(cache=cache), log_probs.logits(hidden, head))

    shape = (config.num_layers, p, g, r, config.num_kv_heads, config.head_dim)
    cache = sharding.constrain(
        jnp.zeros(shape, config.dtype), None, "batch", None, None, "kv_heads", None
    )
    start = _State(
        t=jnp.int32(0),
        last=jnp.zeros((p, g), jnp.int32),
        done=jnp.zeros((p, g), bool),
        tokens=jnp.zeros((p, g, r), jnp.int32),
        log_probs=jnp.zeros((p, g, r), jnp.float32),
        lengths=jnp.zeros((p, g), jnp.int32),
        cache=(cache, cache),
    )
    logits = log_probs.logits(first, head)[:, None]
    start = draw(start, jnp.broadcast_to(logits, (p, g, logits.shape[-1])))
    end = lax.while_loop(lambda s: (s.t < r) & ~s.done.all(), decode, start)
    return end.tokens, end.lengths, end.log_probs, end.done


def _sample_keys(
    key: Key[Array, ""], prompt_ids: Int[Array, "p"], num_samples: int
) -> Key[Array, "p g"]:
    of_prompt = jax.vmap(jax.random.fold_in, (None, 0))(key, prompt_ids)
    per_sample = jax.vmap(jax.random.fold_in, (None, 0))
    return jax.vmap(per_sample, (0, None))(of_prompt, jnp.arange(num_samples))


def _prefill(
    config: ModelConfig,
    params: Params,
    prompts: Int[Array, "p s"],
    lengths: Int[Array, "p"],
    is_prompt: Bool[Array, "p s"],
) -> tuple[Float[Array, "p d"], transformer.KeyValue]:
    """The state that predicts the first token, and the prompts' keys and values."""
    positions = jnp.broadcast_to(jnp.arange(prompts.shape[1])[None], prompts.shape)
    hidden, kv = transformer.forward_packed(
        config, params, prompts, positions, is_prompt.astype(jnp.int32)
    )
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    return last[:, 0], kv


def _forward_one(
    config: ModelConfig,
    params: Params,
    state: _State,
    prefix: transformer.KeyValue,
    prompt_lengths: Int[Array, "p"],
    is_prompt: Bool[Array, "p s"],
) -> tuple[Float[Array, "p g d"], transformer.KeyValue]:
    """Runs the last token drawn, which stands at response index t - 1."""
    p, g, r = state.tokens.shape
    filled = jnp.broadcast_to(jnp.arange(r)[None, None] < state.t - 1, (p, g, r))
    positions = jnp.broadcast_to((prompt_lengths + state.t - 1)[:, None], (p, g))

    def attend(q, k, v, cache, window):
        k_pre, v_pre, k_suf, v_suf = cache
        return _decode_attention(
            q, (k, v), (k_pre, v_pre), (k_suf, v_suf), is_prompt, filled
        )

    cache = (*prefix, *state.cache)
    return transformer.apply(config, params, state.last, positions, attend, cache)


def _decode_attention(
    q: Float[Array, "p g h c"],
    new: tuple[Float[Array, "p g k c"], Float[Array, "p g k c"]],
    prefix: tuple[Float[Array, "p s k c"], Float[Array, "p s k c"]],
    suffix: tuple[Float[Array, "p g r k c"], Float[Array, "p g r k c"]],
    prefix_mask: Bool[Array, "p s"],
    suffix_mask: Bool[Array, "p g r"],
) -> Float[Array, "p g h c"]:
    """Attention of one new token a sample: prompt, own past, and itself.

    The prompt's keys and values are stored once and read by all G samples; the
    three blocks share one softmax.

    Args:
      q: queries of the new token.
      new: its own key and value, not yet in the cache.
      prefix: keys and values of the prompts, shared by their samples.
      suffix: keys and values of the tokens drawn so far.
      prefix_mask: which prompt tokens exist.
      suffix_mask: which slots of the suffix are filled.
    """
    k_new, v_new = new
    k_pre, v_pre = prefix
    k_suf, v_suf = suffix
    s, r = k_pre.shape[1], k_suf.shape[2]
    qg = _group(q, k_new)
    logits = jnp.concatenate(
        [
            jnp.where(
                prefix_mask[:, None, None, None],
                _logits("pgkhc,pskc->pgkhs", qg, k_pre),
                MASKED,
            ),
            jnp.where(
                suffix_mask[:, :, None, None],
                _logits("pgkhc,pgrkc->pgkhr", qg, k_suf),
                MASKED,
            ),
            _logits("pgkhc,pgkc->pgkh", qg, k_new)[..., None],
        ],
        axis=-1,
    )
    weights = jax.nn.softmax(logits, axis=-1).astype(v_new.dtype)
    w_pre, w_suf, w_new = jnp.split(weights, [s, s + r], axis=-1)
    out = (
        jnp.einsum("pgkhs,pskc->pgkhc", w_pre, v_pre)
        + jnp.einsum("pgkhr,pgrkc->pgkhc", w_suf, v_suf)
        + w_new * v_new[:, :, :, None]
    )
    return out.reshape(q.shape)


def _group(q: Array, k: Array) -> Array:
    """[..., H, C] -> [..., K, H/K, C]: query heads beside the head they read."""
    *lead, h, c = q.shape
    return q.reshape(*lead, k.shape[-2], h // k.shape[-2], c)


def _logits(shapes: str, q: Array, k: Array) -> Array:
    scale = q.shape[-1] ** -0.5
    return scale * jnp.einsum(shapes, q, k, preferred_element_type=jnp.float32)

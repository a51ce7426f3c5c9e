"""A model with sliding windows in some of its layers, and its log-probs by dense masks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pfjax.model import log_probs, transformer
from pfjax.model.config import LayerKind, ModelConfig
from pfjax.model.families import qwen2
from pfjax.model.transformer import Policy
from pfjax.sampler import unstack


@dataclasses.dataclass(frozen=True)
class WindowedConfig(qwen2.Config):
    of_layers: tuple[int, ...] = ()

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        return tuple(LayerKind(w, self.rope) for w in self.of_layers)


def config_of(base: ModelConfig, *windows: int, **changes) -> WindowedConfig:
    fields = {x.name: getattr(base, x.name) for x in dataclasses.fields(base)}
    fields |= {"num_layers": len(windows), "max_positions": 512, "of_layers": windows}
    return WindowedConfig(**fields | changes)


def policy_of(config: WindowedConfig) -> Policy:
    """Random weights of which attention's are large, so that who is seen matters."""
    params = transformer.init_params(config, jax.random.key(0))
    params["blocks"] |= {x: 1.5 * params["blocks"][x] for x in ("wq", "wk", "wv", "wo")}
    return Policy(config, params)


def dense(q, k, v, segment_ids, window):
    """Attention of packed rows by a mask of all pairs."""
    b, t, _, c = q.shape
    at = jnp.arange(t)
    ago = at[:, None] - at[None]
    is_seen = (ago >= 0) & ((ago < window) | (window == 0))
    is_seen = is_seen[None] & (segment_ids[:, :, None] == segment_ids[:, None])
    grouped = q.reshape(b, t, k.shape[2], -1, c)
    logits = c**-0.5 * jnp.einsum("btkgc,bskc->bkgts", grouped, k)
    weights = jax.nn.softmax(jnp.where(is_seen[:, None, None], logits, -1e30))
    return jnp.einsum("bkgts,bskc->btkgc", weights, v).reshape(q.shape)


def score(policy: Policy, prompts, responses) -> list[np.ndarray]:
    """Log-probs of responses, one array each."""
    c = policy.config
    lengths = [len(p) + len(y) for p, y in zip(prompts, responses, strict=True)]
    tokens = np.zeros((len(prompts), max(lengths)), np.int32)
    for row, p, y in zip(tokens, prompts, responses, strict=True):
        row[: len(p) + len(y)] = [*p, *y]

    @jax.jit
    def run(params, tokens):
        weights = unstack.weights(c, params)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        windows = [kind.window for kind in c.layer_kinds]
        attend = lambda q, k, v, layer: dense(
            q, k, v, jnp.ones_like(tokens), windows[layer]
        )
        hidden = transformer.apply_layers(c, weights, tokens, positions, attend)
        logits = log_probs.logits(hidden, transformer.head_weight(weights))
        log_p = jax.nn.log_softmax(logits)[:, :-1]
        return jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=2)[..., 0]

    log_p = np.asarray(run(policy.params, tokens))
    return [
        row[len(p) - 1 : len(p) + len(y) - 1]
        for row, p, y in zip(log_p, prompts, responses, strict=True)
    ]


def assert_same_draws(a, b):
    """Of two rollouts."""
    np.testing.assert_array_equal(a.lengths, b.lengths)
    for at in np.ndindex(a.lengths.shape):
        n = a.lengths[at]
        np.testing.assert_array_equal(a.tokens[at][:n], b.tokens[at][:n])
        np.testing.assert_allclose(a.log_probs[at][:n], b.log_probs[at][:n], atol=1e-5)

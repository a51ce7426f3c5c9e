"""Log-probs without logits: against the whole softmax, on every mesh, and in memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pfjax.infra import sharding
from pfjax.model import log_probs, scoring

B, T, D, V = 8, 10, 8, 24


@pytest.fixture
def data(rng):
    hidden = jnp.array(rng.normal(size=(B, T, D)), jnp.float32)
    head = jnp.array(rng.normal(size=(V, D)), jnp.float32)
    targets = jnp.array(rng.integers(0, V, size=(B, T)), jnp.int32)
    where = jnp.array(rng.random((B, T)) < 0.6)
    return hidden, head, targets, where


def _whole(hidden, head, targets, where):
    log_p = jax.nn.log_softmax(hidden @ head.T)
    at = jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    entropy = -(jnp.exp(log_p) * log_p).sum(-1)
    return jnp.where(where, at, 0), jnp.where(where, entropy, 0)


def _gradients(f, hidden, head, targets, where):
    """Of a loss in which every token counts differently, and entropy is read too."""
    weight = jnp.cos(jnp.arange(B * T, dtype=jnp.float32)).reshape(B, T)

    def loss(hidden, head):
        log_p, entropy = f(hidden, head, targets, where)
        return jnp.sum(weight * log_p) + jax.lax.stop_gradient(entropy.sum())

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(hidden, head)


# Chunks: single, a ragged end, all at once. Tiles of 24 words: 7 leaves a rest.
TILINGS = [(c, t) for c in (1, 9, 512) for t in (1, 7, 12, 4096)]
SOME_TILINGS = [(1, 1), (9, 7), (512, 4096)]


@pytest.mark.parametrize(
    "chunk, tile",
    [
        pytest.param(*x, marks=() if x in SOME_TILINGS else pytest.mark.slow)
        for x in TILINGS
    ],
)
def test_values_and_gradients_equal_those_of_the_whole_softmax(
    data, monkeypatch, chunk, tile
):
    monkeypatch.setattr(log_probs, "CHUNK", chunk)
    monkeypatch.setattr(log_probs, "CPU_TILE", tile)
    got, want = log_probs.token_log_probs(*data), _whole(*data)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    got, want = (_gradients(f, *data) for f in (log_probs.token_log_probs, _whole))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_what_is_not_asked_for_is_neither_computed_nor_needed(data, monkeypatch):
    hidden, head, targets, where = data
    want = (
        log_probs.token_log_probs(*data),
        _gradients(log_probs.token_log_probs, *data),
    )
    monkeypatch.setattr(log_probs, "CHUNK", 1)  # no chunk is filled up with others
    hidden = jnp.where(where[..., None], hidden, jnp.nan)
    args = hidden, head, targets, where
    got = log_probs.token_log_probs(*args), _gradients(log_probs.token_log_probs, *args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)
    nothing = log_probs.token_log_probs(hidden, head, targets, jnp.zeros_like(where))
    assert all((x == 0).all() for x in nothing)


@pytest.mark.parametrize(
    "sizes",
    [
        (8, 1, 1),
        (2, 2, 2),
        *(
            pytest.param(x, marks=pytest.mark.slow)
            for x in ((1, 8, 1), (1, 1, 8), (2, 1, 4), (1, 4, 2))
        ),
    ],
)
def test_meshes_share_the_vocabulary_and_agree(data, sizes, monkeypatch):
    monkeypatch.setattr(log_probs, "CHUNK", 3)
    monkeypatch.setattr(log_probs, "CPU_TILE", 2)  # of 3 words a device, or more
    # Devices hold different numbers of tokens that are asked for.
    where = data[3].at[0].set(False).at[1].set(True)
    data = (*data[:3], where)
    want = _whole(*data), _gradients(_whole, *data)
    mesh = sharding.make_mesh(*sizes)
    batch, vocab = ("data", "fsdp"), ("fsdp", "tensor")
    put = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, P(*axes)))
    args = (
        put(data[0], batch), put(data[1], vocab), put(data[2], batch), put(where, batch)
    )  # fmt: skip
    with jax.set_mesh(mesh):
        run = jax.jit(log_probs.token_log_probs)
        got = run(*args), _gradients(log_probs.token_log_probs, *args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


def _compile(mesh, tokens, vocab, d, dtype=jnp.bfloat16):
    """Forward and backward of `tokens` a device, in rows of 4,096."""
    parts = sharding.batch_ways(mesh)
    shape = (parts * tokens // 4096, 4096)

    def array(shape, dtype, *axes):
        where = NamedSharding(mesh, sharding.spec(mesh, axes, shape))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def run(hidden, head, targets, where):
        loss = lambda h, w: log_probs.token_log_probs(h, w, targets, where)[0].sum()
        return jax.value_and_grad(loss, argnums=(0, 1))(hidden, head)

    with jax.set_mesh(mesh):
        return (
            jax.jit(run)
            .lower(
                array((*shape, d), dtype, "batch", None, None),
                array((vocab, d), jnp.float32, "vocab", None),
                array(shape, jnp.int32, "batch", None),
                array(shape, bool, "batch", None),
            )
            .compile()
        )


def test_temporaries_do_not_grow_with_tokens_times_vocabulary():
    """32,768 tokens at a vocabulary of 151,936, where the logits are 20 GB."""
    mesh = sharding.make_mesh(fsdp=8)
    d = 64
    temp = {
        (tokens, vocab): _compile(
            mesh, tokens // 8, vocab, d, jnp.float32
        ).memory_analysis().temp_size_in_bytes
        for tokens in (32_768, 65_536)
        for vocab in (75_968, 151_936)
    }  # fmt: skip
    # A chunk of logits and what is made of it: 8 x 512 tokens, an eighth of the words.
    logits = 4 * 8 * log_probs.CHUNK * 151_936 // 8
    assert temp[32_768, 151_936] < 4 * logits
    # Twice the tokens add states; with twice the words that is no more.
    growth = [temp[65_536, v] - temp[32_768, v] for v in (75_968, 151_936)]
    assert growth[1] <= growth[0] + 1e6, temp
    assert growth[0] < 20 * 4 * d * 32_768 / 8, temp


@pytest.mark.slow
def test_the_head_stays_where_it_is_on_a_tpu(tpu_mesh):
    tokens, vocab, d = 8192, 151_936, 1536
    compiled = _compile(tpu_mesh("v5e:4x4", 1, 8, 2), tokens, vocab, d)
    text = compiled.as_text()
    moved = re.findall(
        r"= \(?(\w+)\[([\d,]*)\]\S* (?:all-\w+|reduce-scatter|collective-permute)", text
    )
    assert moved
    sizes = [
        functools.reduce(lambda a, b: a * int(b), filter(None, shape.split(",")), 1)
        for _, shape in moved
    ]
    # States of a chunk of all devices, or sums of them, which XLA pads a little.
    assert max(sizes) <= 1.1 * 8 * log_probs.CHUNK * d, moved
    logits = 4 * 8 * log_probs.CHUNK * vocab // 16
    own = 3 * 4 * vocab * d // 16 + 3 * 4 * tokens * d
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * logits + own


def test_a_temperature_divides_logits(tiny_policy):
    vocab = tiny_policy.config.vocab_size
    every, starts = [[3, 4, v] for v in range(vocab)], [2] * vocab
    score = lambda *t: np.concatenate(scoring.score(tiny_policy, every, starts, *t))
    for temperature in (0.25, 1.0, 3.0):
        want = score() / temperature
        want -= np.logaddexp.reduce(want)
        np.testing.assert_allclose(score(temperature), want, atol=1e-4)
    with pytest.raises(ValueError, match="must be positive, got 0"):
        score(0.0)


def test_rare_tokens_are_those_that_eta_sampling_leaves_out(tiny_policy):
    vocab = tiny_policy.config.vocab_size
    every, starts = [[3, 4, v] for v in range(vocab)], [2] * vocab
    log_p = np.concatenate(scoring.score(tiny_policy, every, starts))
    entropy = -(np.exp(log_p) * log_p).sum()
    of_entropy = float(np.exp(-2 * entropy))  # a cutoff at which both bounds are one
    found = {}
    for eta in (of_entropy / 9, of_entropy * 9):
        got = scoring.rare_log_probs(tiny_policy, every, starts, eta)
        bound = min(eta, eta**0.5 * np.exp(-entropy))
        want = np.where(np.exp(log_p) < bound, log_p, 0)
        np.testing.assert_allclose(np.concatenate(got), want, atol=1e-5)
        found[eta] = (want != 0).sum()
    assert 0 < min(found.values()) < max(found.values()) < vocab, found

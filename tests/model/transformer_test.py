"""The network against transformers, and what a token must not see."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pfjax import packing
from pfjax.batch import PackShape
from pfjax.infra import sharding
from pfjax.model import (
    attention,
    chunked_attention,
    hf,
    layers,
    log_probs,
    rope,
    scoring,
    transformer,
)
from pfjax.packing import from_segments, pack, response_sum, unpack_responses


def torch_logits(folder, tokens):
    import torch
    import transformers

    reference = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    )
    with torch.no_grad():
        return reference(torch.tensor(tokens)).logits.numpy()


def our_logits(policy, tokens):
    positions = np.tile(np.arange(tokens.shape[1]), (len(tokens), 1))
    hidden, _ = transformer.forward_packed(
        policy.config, policy.params, tokens, positions, np.ones_like(tokens)
    )
    return log_probs.logits(hidden, transformer.head_weight(policy.params))


@pytest.mark.parametrize("is_tied", [False, True])
def test_logits_equal_those_of_transformers(tmp_path, tiny_policy, rng, is_tied):
    config, params = tiny_policy
    if is_tied:
        config = dataclasses.replace(config, tied_embeddings=True)
        params = {k: v for k, v in params.items() if k != "head"}
    hf.save(transformer.Policy(config, params), tmp_path / "m")
    tokens = rng.integers(0, config.vocab_size, size=(2, config.max_positions))
    want = torch_logits(tmp_path / "m", tokens)
    got = our_logits(hf.load(tmp_path / "m"), tokens)
    assert want.std() > 1.0
    np.testing.assert_allclose(got, want, atol=1e-4)


def _packed(rng, vocab):
    sequences = [rng.integers(0, vocab, size=n) for n in (9, 14, 5, 11)]
    prompts = np.array([3, 4, 1, 10])
    batch, placement, used = pack(sequences, prompts, PackShape(1, 2, 24, 3))
    assert used == 1
    return sequences, prompts, jax.tree.map(lambda x: x[0], batch), placement


def test_no_gradient_from_later_tokens_or_other_segments(rng, tiny_policy):
    """d(output at t) / d(embedding at s) is 0 unless s <= t in the same segment."""
    config, params = tiny_policy
    _, _, batch, _ = _packed(rng, config.vocab_size)
    table = params["embed"][batch.tokens]  # a row of its own for every token
    shape = batch.tokens.shape
    own = np.arange(batch.tokens.size).reshape(shape)
    config = dataclasses.replace(config, vocab_size=batch.tokens.size)

    def output(table, row, t):
        tables = {**params, "embed": table.reshape(-1, table.shape[-1])}
        hidden, _ = transformer.forward_packed(
            config, tables, own, batch.positions, batch.segment_ids
        )
        return jnp.sum(hidden[row, t] ** 2)

    grad = jax.jit(jax.grad(output))
    for row in range(shape[0]):
        for t in range(shape[1]):
            seen = np.abs(grad(table, row, t)).sum(axis=-1) > 0
            segment = batch.segment_ids[row]
            may_see = np.zeros(shape, bool)
            may_see[row] = (segment == segment[t]) & (np.arange(shape[1]) <= t)
            if segment[t]:
                np.testing.assert_array_equal(seen, may_see)
            else:  # what padding sees of padding is left to the back end
                assert not (seen & ~may_see).any()


@pytest.fixture
def in_double(monkeypatch):
    """What is computed in float32 is computed in float64, by the same lines."""
    double = types.SimpleNamespace(**vars(jnp))
    double.float32 = jnp.float64
    # Integers stay what they are.
    double.arange = lambda *args, dtype=jnp.int32: jnp.arange(*args, dtype=dtype)
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float64)
    modules = (packing, attention, chunked_attention, layers, log_probs, rope, scoring)
    for module in (*modules, transformer):
        monkeypatch.setattr(module, "jnp", double)
    for module in (chunked_attention, log_probs):
        monkeypatch.setattr(module, "_dot", dot)
    with jax.enable_x64(True):
        yield


def test_packed_equals_unpacked_in_value_and_gradient(rng, tiny_policy, in_double):
    config = dataclasses.replace(tiny_policy.config, dtype="float64")
    params = jax.tree.map(lambda x: x.astype(jnp.float64), tiny_policy.params)
    sequences, prompts, batch, placement = _packed(rng, config.vocab_size)

    def packed(params):
        log_p, _, _ = scoring.packed_log_probs(config, params, batch)
        sums = response_sum(log_p, batch)
        return jnp.sum(jnp.where(batch.is_real, sums, 0.0) ** 2), sums

    def alone(params):
        total, sums = 0.0, []
        for y, n in zip(sequences, prompts, strict=True):
            positions = np.arange(len(y))[None]
            hidden, _ = transformer.forward_packed(
                config, params, y[None], positions, np.ones((1, len(y)), int)
            )
            logits = log_probs.logits(hidden, transformer.head_weight(params))[0]
            log_p = jax.nn.log_softmax(logits)[np.arange(n - 1, len(y) - 1), y[n:]]
            sums.append(log_p.sum())
            total += sums[-1] ** 2
        return total, jnp.array(sums)

    (loss, sums), grads = jax.jit(jax.value_and_grad(packed, has_aux=True))(params)
    (want, want_sums), want_grads = jax.jit(jax.value_and_grad(alone, has_aux=True))(
        params
    )
    assert {x.dtype for x in jax.tree.leaves((loss, grads))} == {np.dtype("float64")}
    np.testing.assert_allclose(from_segments(sums, placement), want_sums, rtol=1e-12)
    np.testing.assert_allclose(loss, want, rtol=1e-12)
    # Entries of hundreds cancel in some sums: the rounding is that of the largest.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12 * np.abs(b).max()),
        grads,
        want_grads,
    )


def test_scores_are_those_of_the_packed_batch(rng, tiny_policy):
    """`score` is the same computation behind the public interface."""
    sequences, prompts, batch, placement = _packed(rng, tiny_policy.config.vocab_size)
    log_p, _, _ = scoring.packed_log_probs(*tiny_policy, batch)
    scored = scoring.score(tiny_policy, [y.tolist() for y in sequences], prompts)
    for a, b in zip(scored, unpack_responses(log_p, placement), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "head_dim", "sizes"),
    [
        ("chunked", 8, {}),
        # Devices share rows, which splash attention splits into whole blocks.
        pytest.param(
            "splash_interpret", 128, {"fsdp": 2, "context": 4}, marks=pytest.mark.slow
        ),
    ],
)
def test_scores_on_more_devices_than_rows(
    rng, tiny_policy, monkeypatch, backend, head_dim, sizes
):
    """Every device has a row, as it must, and most of them an empty one."""
    monkeypatch.setattr(scoring, "SCORE_ROWS", 3)
    config = dataclasses.replace(
        tiny_policy.config, attention=backend, head_dim=head_dim
    )
    params = transformer.init_params(config, jax.random.key(0))
    sequences = [rng.integers(0, 16, size=n).tolist() for n in (70, 5, 9)]
    alone = dataclasses.replace(config, attention="plain")
    want = scoring.score(transformer.Policy(alone, params), sequences, [3, 1, 2])
    mesh = sharding.make_mesh(**sizes)
    where = sharding.tree_shardings(mesh, transformer.logical_axes(config), params)
    policy = transformer.Policy(config, jax.device_put(params, where))
    with jax.set_mesh(mesh):
        got = scoring.score(policy, sequences, [3, 1, 2])
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize(
    "remat",
    ["full", *(pytest.param(x, marks=pytest.mark.slow) for x in ("attention", "dots"))],
)
def test_rematerialised_gradients_are_the_same(rng, tiny_policy, remat):
    config, params = tiny_policy
    _, _, batch, _ = _packed(rng, config.vocab_size)

    def loss(params, remat):
        log_p, _, _ = scoring.packed_log_probs(config, params, batch, remat)
        return response_sum(log_p, batch).sum()

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    plain, again = grad(params, "none"), grad(params, remat)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain, again)


def test_policies_of_rematerialisation_store_what_they_say(tiny_policy):
    """Bytes stored for the backward pass, by counting residuals."""
    config, params = tiny_policy
    b, t = 2, 32
    tokens = np.zeros((b, t), np.int32)
    stored = {}
    for remat in transformer.REMAT:

        def loss(params, remat=remat):
            hidden, _ = transformer.forward_packed(
                config, params, tokens, tokens, 1 + tokens, remat
            )
            return jnp.sum(hidden**2)

        residuals = jax.eval_shape(lambda p, f=loss: jax.vjp(f, p)[1], params)
        of_layers = [x for x in jax.tree.leaves(residuals) if x.shape[:1] == (2,)]
        stored[remat] = sum(x.size for x in of_layers)
    tokens_of_layers = config.num_layers * b * t
    d, h = config.embed_dim, config.num_heads
    # The attention's output, H * C = 2 D here, and its sum a head.
    assert stored["attention"] - stored["full"] == tokens_of_layers * (2 * d + h)
    assert stored["full"] < stored["attention"] < stored["dots"] < stored["none"]


def test_scoring_has_one_program_under_way(tiny_policy, monkeypatch):
    """Several on two devices of a CPU stopped for ever in most runs."""
    done, run, fetch = [], scoring._score, sharding.fetch
    monkeypatch.setattr(scoring, "SCORE_ROWS", 1)
    monkeypatch.setattr(scoring, "_score", lambda *a: done.append("run") or run(*a))
    monkeypatch.setattr(sharding, "fetch", lambda x: done.append("fetch") or fetch(x))
    scoring.score(tiny_policy, [[1] * 40] * 3, [2] * 3)
    assert done == ["run", "fetch"] * 3

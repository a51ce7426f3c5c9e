"""The update: one denominator, one program, one result on every mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pfjax import objectives
from pfjax.batch import SCORES, PackShape
from pfjax.infra import sharding
from pfjax.model import lora, scoring, transformer
from pfjax.objectives import ObjectiveConfig
from pfjax.packing import (
    from_segments,
    pack,
    response_sum,
    to_segments,
    unpack_responses,
)
from pfjax.trainer import step
from pfjax.trainer.log_z import init_head
from pfjax.trainer.minibatch import dropout_seeds
from tests.conftest import AS_OUTSIDE, count_compiles
from tests.model import small_families

# Not Adam: its first update is the sign of the gradient, which turns the rounding of
# an entry near 0 into a difference of twice the learning rate.
SHAPE = {
    "num_microbatches": 6,
    "microbatch_size": 2,
    "pack_length": 32,
    "max_segments": 4,
}
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))


POWERFLOW = ObjectiveConfig("powerflow", alpha=4.0)
DAPO = ObjectiveConfig("grpo", loss_aggregation="token")


def _state(policy, seed=3):
    head = init_head(policy.config.embed_dim, jax.random.key(seed))
    # Not zero, so that gradients reach the prompt's states as well.
    kernel = head["out"]["kernel"]
    head["out"]["kernel"] = 0.1 * jax.random.normal(jax.random.key(9), kernel.shape)
    params = jax.tree.map(jnp.copy, {"policy": policy.params, "log_z": head})
    return step.TrainState(jnp.int32(0), params, OPTIMIZER.init(params))


def _data(rng, count=12, **shape):
    sequences = [rng.integers(0, 16, size=n) for n in rng.integers(6, 25, size=count)]
    batch, placement, used = pack(
        sequences,
        rng.integers(1, 5, size=count),
        PackShape(**(SHAPE | shape)),
        psi=rng.choice([0.0, -0.5], size=count).astype(np.float32),
        prompt_index=np.arange(count, dtype=np.int32) // 4,
    )
    return sequences, batch, placement, used


def _base_scores(batch):
    """A made-up base: any function of the token will do."""
    return (-1.0 - 0.1 * (batch.tokens % 7)).astype(np.float32)


def _static(model, objective=POWERFLOW):
    """The static arguments of `loss_fn`."""
    return {
        "model": model,
        "objective": objective,
        "stop_ids": model.stop_ids,
        "remat": "none",
    }


@functools.cache
def _jitted(model, objective, as_outside=False):
    static = {"optimizer": OPTIMIZER, **_static(model, objective)}
    update = functools.partial(step.train_step, **static)
    return jax.jit(update, compiler_options=AS_OUTSIDE if as_outside else None)


def _scores(*values, **more):
    """Scores of a batch by name."""
    return dict(zip(SCORES, values, strict=False)) | more


def _rewarded(batch, placement):
    """Scores of a batch, with advantages that have to do with nothing."""
    advantage = np.cos(np.arange(len(placement.row))).astype(np.float32)
    reward = to_segments(advantage, placement, batch.length.shape)
    return _scores(_base_scores(batch), reward=reward)


def _run(policy, batch, used, objective=POWERFLOW, old=None, as_outside=False):
    """The new state, scalars, statistics, and log-probs of tokens."""
    batch = batch._replace(**(old or _scores(_base_scores(batch))))
    update = _jitted(policy.config, objective, as_outside)
    return update(_state(policy), {}, batch, jnp.int32(used))


def _assert_same(a, b, **tolerance):
    tolerance = {"atol": 1e-5} | tolerance
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def _assert_same_stats(a, b, atol=1e-5):
    """Sums of exponentials reach thousands: those to a relative error. Sums of log-probs
    reach a hundred, where neighbours in float32 are 8e-6 apart."""
    large = {"kl": 0, "capped": 0, "floored": 0}
    for name in large:
        x, y = getattr(a, name), getattr(b, name)
        np.testing.assert_allclose(x, y, rtol=1e-4, err_msg=name)
    _assert_same(a._replace(**large), b._replace(**large), atol=atol, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("objective", [POWERFLOW, DAPO])
def test_result_does_not_depend_on_rows_or_micro_batches(tiny_policy, objective):
    shapes = [
        {},
        {"microbatch_size": 1, "num_microbatches": 12},
        {
            "microbatch_size": 4,
            "pack_length": 64,
            "max_segments": 8,
            "num_microbatches": 2,
        },
    ]
    results = []
    for shape in shapes:
        _, batch, placement, used = _data(np.random.default_rng(0), **shape)
        old = _rewarded(batch, placement)
        state, scalars, stats, _ = _run(tiny_policy, batch, used, objective, old)
        stats = jax.tree.map(lambda x, p=placement: from_segments(x, p), stats)
        results.append((state.params, scalars, stats))
    for *other, stats in results[1:]:
        _assert_same(results[0][:2], tuple(other))
        _assert_same_stats(results[0][2], stats)


def test_tokens_of_all_rows_count_alike(rng, tiny_policy):
    """On policy the loss of each is minus its advantage."""
    _, batch, placement, used = _data(rng)
    old = _rewarded(batch, placement)
    _, scalars, _, _ = _run(tiny_policy, batch, used, DAPO, old)
    length, reward = placement.length, from_segments(old["reward"], placement)
    of_tokens = -length * reward
    want = of_tokens.sum() / length.sum()
    np.testing.assert_allclose(scalars["loss"], want, rtol=1e-5)
    assert abs(want - (of_tokens / length).mean()) > 0.05 * abs(want)


def test_nan_in_padding_changes_nothing(rng, tiny_policy):
    _, batch, _, used = _data(rng)
    want = _run(tiny_policy, batch, used)
    old = _scores(
        np.where(batch.is_response, _base_scores(batch), np.nan), None, None, None
    )
    padded = batch._replace(psi=np.where(batch.is_real, batch.psi, np.nan))
    got = _run(tiny_policy, padded, used, old=old)
    np.testing.assert_array_equal(got[1]["loss"], want[1]["loss"])
    _assert_same(got[0].params, want[0].params, atol=0)


@pytest.mark.slow
def test_gradient_is_that_of_the_mean_loss_of_trajectories_alone(rng, tiny_policy):
    """Against the formula, one trajectory at a time, without packing."""
    _, batch, placement, used = _data(rng, count=5)
    state = _state(tiny_policy)
    base = _base_scores(batch)
    grads = jax.tree.map(jnp.zeros_like, state.params)
    loss_fn = functools.partial(step.loss_fn, **_static(tiny_policy.config))
    grad_fn = jax.jit(jax.grad(loss_fn, has_aux=True))
    for i in range(used):
        part = batch._replace(log_p_base=base)
        part = jax.tree.map(lambda x, i=i: x[i], part)
        one, _ = grad_fn(state.params, {}, part, jnp.float32(5), jnp.float32(9))
        grads = jax.tree.map(jnp.add, grads, one)

    flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), batch)

    def alone(params):
        losses = []
        for row, slot in zip(placement.row, placement.segment, strict=True):
            at = flat.segment_ids[row] == slot + 1
            y, is_response = flat.tokens[row][at], flat.is_response[row][at]
            hidden, _ = transformer.forward_packed(
                tiny_policy.config, params["policy"], y[None],
                np.arange(len(y))[None], np.ones((1, len(y)), int),
            )  # fmt: skip
            log_p = jax.nn.log_softmax(hidden[0] @ params["policy"]["head"].T)
            log_p = log_p[np.arange(len(y) - 1), y[1:]]
            h, n = params["log_z"], is_response.sum()
            x = hidden[0, : len(y) - n].mean(axis=0)
            for k in "12":
                x = jax.nn.gelu(
                    x @ h[f"layer{k}"]["kernel"] + h[f"layer{k}"]["bias"],
                    approximate=False,
                )
                x = (x - x.mean()) / jnp.sqrt(x.var() + 1e-5)
                x = x * h[f"norm{k}"]["scale"] + h[f"norm{k}"]["bias"]
            log_z = x @ h["out"]["kernel"][:, 0] + h["out"]["bias"][0]
            m = jnp.where(is_response[1:], log_p, 0.0).sum() / n
            m0 = base.reshape(flat.tokens.shape)[row][at][is_response].sum() / n
            losses.append((log_z + m - 4.0 * (m0 + flat.psi[row, slot])) ** 2)
        return jnp.stack(losses).mean()

    _assert_same(grads, jax.jit(jax.grad(alone))(state.params), atol=2e-4)


def test_importance_weight_is_one_on_policy_and_clipped_off_it(rng, tiny_policy):
    _, batch, placement, used = _data(rng)
    _, _, first, log_p = _run(tiny_policy, batch, used)
    assert (from_segments(first.weight, placement) == 1.0).all()
    # Scores of a policy that gave each token 0.01 nats less or more.
    for drift, low, high in ((-0.01, 1.0, 1.28), (0.01, 0.8, 1.0), (1.0, 0.8, 0.8)):
        old = _scores(
            _base_scores(batch),
            log_p + drift,
            np.zeros(len(log_p), bool),
            None,
        )
        _, _, table, _ = _run(tiny_policy, batch, used, old=old)
        weight = from_segments(table.weight, placement)
        length = from_segments(batch.length, placement)
        want = np.clip(np.exp(-drift * length), 0.8, 1.28)
        np.testing.assert_allclose(weight, want, rtol=1e-4)
        assert (weight >= low - 1e-6).all() and (weight <= high + 1e-6).all()


def test_first_update_is_on_policy_to_the_bit_whatever_was_scored(rng, tiny_policy):
    """Of several updates a rollout: the ratio is 1, as if nothing had been scored."""
    _, batch, placement, used = _data(rng)
    # Two programs, whose bits are equal as XLA's newer code for loops has them.
    want = _run(tiny_policy, batch, used, as_outside=True)
    scored = want[3] + 0.3
    for is_first in (True, False):
        flag = np.full(len(scored), is_first)
        old = _scores(_base_scores(batch), scored, flag, None)
        how = {"old": old, "as_outside": True}
        state, scalars, table, _ = _run(tiny_policy, batch, used, **how)
        weight = from_segments(table.weight, placement)
        assert (weight == 1.0).all() == is_first
        if is_first:
            _assert_same((state.params, scalars), (want[0].params, want[1]), atol=0)


def test_group_estimate_takes_the_place_of_the_head(rng, tiny_policy):
    _, batch, placement, used = _data(rng)
    log_z = np.full(batch.length.shape, -0.25, np.float32)
    old = _scores(_base_scores(batch), None, None, log_z)
    _, scalars, table, _ = _run(tiny_policy, batch, used, old=old)
    assert (from_segments(table.log_z, placement) == -0.25).all()
    assert scalars["log_z_grad_norm"] == 0


SPLITS = [
    (data, fsdp, tensor)
    for devices in (1, 2, 4, 8)
    for data in (1, 2, 4, 8)
    for fsdp in (1, 2, 4, 8)
    for tensor in (1, 2, 4)  # as many heads
    if data * fsdp * tensor == devices
] + [
    # Devices that share rows, the fourth number: with each of the others, and with two.
    (1, 1, 1, 8), (2, 1, 1, 4), (1, 4, 1, 2), (1, 1, 4, 2), (2, 2, 1, 2), (1, 2, 2, 2)
]  # fmt: skip


@pytest.mark.parametrize(
    "sizes",
    [pytest.param(s, marks=() if s == (2, 2, 2) else pytest.mark.slow) for s in SPLITS],
)
def test_every_mesh_gives_the_same_step(rng, tiny_policy, sizes):
    _check_mesh(rng, tiny_policy, sizes, POWERFLOW)


@pytest.mark.slow
def test_a_program_from_the_cache_does_not_hang(tiny_policy):
    # On this mesh it does within five updates, on JAX 0.10 without `order_collectives`; XLA
    # then ends the process.
    for _ in range(2):
        _jitted.cache_clear()
        jax.clear_caches()
        for _ in range(8):
            _check_mesh(np.random.default_rng(0), tiny_policy, (4, 1, 2), POWERFLOW)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    # Devices that share experts, the last number: alone, and with each of the others.
    [(1, 2, 2), (1, 1, 4), (2, 2, 2), (1, 2, 2, 2)]
    + [(1, 1, 1, 1, 4), (2, 1, 1, 1, 4), (1, 2, 2, 1, 2), (1, 2, 1, 2, 2)],
)
def test_experts_on_several_devices_give_the_same_step(rng, tiny_config, sizes):
    config = small_families.config_of("qwen3_moe", tiny_config, window=0)
    params = transformer.init_params(config, jax.random.key(0))
    policy = transformer.Policy(config, params)
    # A little: the gradient is compared by its absolute difference.
    policy = small_families.adapted(policy, small_families.ALL, by=0.05)
    _check_mesh(rng, policy, sizes, POWERFLOW)


@pytest.mark.slow
def test_tokens_are_counted_over_a_mesh_split_along_every_axis(rng, tiny_policy):
    _check_mesh(rng, tiny_policy, (2, 2, 2), DAPO)


def _check_mesh(rng, tiny_policy, sizes, objective):
    # 8 rows: as many as the devices that a batch may be split over.
    shape = {"microbatch_size": 8, "num_microbatches": 3}
    _, batch, placement, used = _data(rng, count=24, **shape)
    old = _rewarded(batch, placement)
    want_state, want_scalars, want_stats, want_log_p = _run(
        tiny_policy, batch, used, objective, old
    )
    devices = jax.devices()[: np.prod(sizes)]
    names = ("data", "fsdp", "tensor", "context", "expert")
    by_name = dict(zip(names, sizes, strict=False))
    mesh = sharding.make_mesh(**by_name, devices=devices)
    config = tiny_policy.config
    of_params = sharding.tree_shardings(
        mesh, transformer.logical_axes(config), tiny_policy.params
    )
    spread = transformer.Policy(config, jax.device_put(tiny_policy.params, of_params))
    with jax.set_mesh(mesh):
        put = sharding.put_batch(mesh, batch, dim=1)
        old = sharding.put_batch(mesh, old, 1)
        state, scalars, stats, log_p = _run(spread, put, used, objective, old)
        is_split = not state.params["policy"]["head"].sharding.is_fully_replicated
        assert is_split == (np.prod(sizes[1:]) > 1)
        _assert_same(scalars, want_scalars)
        _assert_same_stats(stats, want_stats, atol=2e-5)
        _assert_same(log_p, want_log_p, atol=2e-5)
        _assert_same(state.params, want_state.params)


@pytest.fixture
def adapted(tiny_policy):
    """With adapters that matter."""
    targets = lora.projections("q_proj,o_proj,down_proj")
    sizes = {"lora_rank": 2, "lora_alpha": 4.0, "lora_targets": targets}
    config = dataclasses.replace(tiny_policy.config, **sizes)
    made = lora.init_params(config, jax.random.key(0))["blocks"]
    noise = lambda k, x: 0.3 * jax.random.normal(jax.random.key(len(k)), x.shape)
    made = {"blocks": {k: noise(k, x) for k, x in made.items()}}
    return transformer.Policy(config, lora.join(tiny_policy.params, made))


def _run_dropped(policy, batch, placement, used, seeds, rate=0.25):
    """The new parameters, and log-probs of the tokens of each trajectory."""
    seeds = to_segments(seeds, placement, batch.length.shape)
    scores = _scores(_base_scores(batch), dropout_seed=seeds)
    batch = batch._replace(**scores)
    if not (mesh := jax.sharding.get_mesh()).empty:
        batch = sharding.put_batch(mesh, batch, dim=1)
    static = _static(policy.config) | {"dropout": rate}
    update = functools.partial(step.train_step, optimizer=OPTIMIZER, **static)
    state, *_, log_p = jax.jit(update)(_state(policy), {}, batch, jnp.int32(used))
    return state.params, np.concatenate(unpack_responses(log_p, placement))


@pytest.mark.slow
def test_dropout_depends_on_its_seeds_and_not_on_packing(adapted):
    seeds = dropout_seeds(0, 1, 12)
    results = []
    for shape in (
        {},
        {"microbatch_size": 1, "pack_length": 64, "max_segments": 8},
    ):
        _, *data = _data(np.random.default_rng(0), **shape)
        results.append(_run_dropped(adapted, *data, seeds))
    _assert_same(*results)
    _, *data = _data(np.random.default_rng(0))
    # One trajectory's seed changes what is dropped of it alone.
    length = data[1].length[0]
    one = np.append(dropout_seeds(0, 2, 1), seeds[1:])
    others = _run_dropped(adapted, *data, one)[1]
    far = np.abs(others - results[0][1])
    assert far[:length].max() > 1e-2 and far[length:].max() < 1e-6
    whole = _run_dropped(adapted, *data, seeds, rate=0.0)[1]
    assert np.abs(whole - results[0][1]).max() > 1e-2


@pytest.mark.slow
def test_dropout_is_the_same_on_a_mesh_split_along_every_axis(rng, adapted):
    _, *data = _data(rng, count=24, microbatch_size=8, num_microbatches=3)
    seeds = dropout_seeds(0, 1, 24)
    want = _run_dropped(adapted, *data, seeds)
    mesh = sharding.make_mesh(2, 2, 2, devices=jax.devices())
    axes = transformer.logical_axes(adapted.config)
    where = sharding.tree_shardings(mesh, axes, adapted.params)
    spread = jax.device_put(adapted.params, where)
    with jax.set_mesh(mesh):
        policy = transformer.Policy(adapted.config, spread)
        _assert_same(_run_dropped(policy, *data, seeds), want, atol=2e-5)


def test_compiles_once_whatever_packing_needed(rng, tiny_policy):
    update = jax.jit(
        functools.partial(
            step.train_step, optimizer=OPTIMIZER, **_static(tiny_policy.config)
        ),
        donate_argnums=0,
    )
    state = _state(tiny_policy)
    with count_compiles() as count:
        for n in (3, 12, 7):
            _, batch, _, used = _data(rng, count=n)
            batch = batch._replace(log_p_base=_base_scores(batch))
            state, *_ = update(state, {}, batch, jnp.int32(used))
    assert sum(v for k, v in count.items() if "train_step" in k) == 1, count


def test_the_base_at_alpha_one_stays_where_it_is(rng, tiny_policy):
    """Policy = base, log Z' = 0, no format term: no loss, no gradient, no update."""
    _, batch, _, used = _data(rng)
    batch = batch._replace(psi=np.zeros_like(batch.psi))
    score = jax.jit(functools.partial(step.score_step, model=tiny_policy.config))
    log_p, _, _ = score(tiny_policy.params, batch, jnp.int32(used))
    old = _scores(log_p, None, None, np.zeros(batch.length.shape, np.float32))
    alone = ObjectiveConfig("powerflow", alpha=1.0)
    _, scalars, table, _ = _run(tiny_policy, batch, used, alone, old)
    assert scalars["loss"] < 1e-10
    assert scalars["grad_norm"] < 1e-4
    assert np.abs(table.residual).max() < 1e-5


def _whole_log_softmax(policy, batch):
    """Of every token that predicts the one at each place, `[M, B, T, V]`."""

    def one(part):
        hidden, _ = transformer.forward_packed(
            policy.config,
            policy.params,
            part.tokens,
            part.positions,
            part.segment_ids,
        )
        logits = hidden @ policy.params["head"].T
        return jax.nn.log_softmax(jnp.pad(logits[:, :-1], ((0, 0), (1, 0), (0, 0))))

    parts = [jax.tree.map(lambda x, i=i: x[i], batch) for i in range(len(batch.tokens))]
    return jnp.stack([one(part) for part in parts])


def test_the_likelihood_is_the_cross_entropy_of_optax(rng, tiny_policy):
    _, batch, placement, used = _data(
        rng, count=3, num_microbatches=1, microbatch_size=4
    )
    assert used == 1
    batch = batch._replace(log_p_base=_base_scores(batch))
    static = _static(tiny_policy.config, ObjectiveConfig("sft"))
    params = _state(tiny_policy).params
    how = (jnp.float32(3), jnp.float32(placement.length.mean()))

    def ours(policy):
        part = jax.tree.map(lambda x: x[0], batch)
        return step.loss_fn(params | {"policy": policy}, {}, part, *how, **static)[0]

    def theirs(policy):
        logits = _whole_log_softmax(tiny_policy._replace(params=policy), batch)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.tokens)
        return loss[batch.is_response].mean()

    both = (jax.jit(jax.value_and_grad(f)) for f in (ours, theirs))
    _assert_same(*(f(params["policy"]) for f in both))


@pytest.mark.parametrize("name", scoring.TOKEN_REWARDS)
def test_scores_of_stopping_and_of_tokens_are_those_of_whole_logits(
    rng, tiny_policy, name
):
    _, batch, _, used = _data(rng)
    score = jax.jit(step.score_step, static_argnames=("model", "stop_ids", "of_token"))
    _, log_p_stop, reward = score(
        tiny_policy.params,
        batch,
        jnp.int32(used),
        model=tiny_policy.config,
        stop_ids=(1, 5),
        of_token=scoring.TOKEN_REWARDS[name].of_token,
    )
    whole = _whole_log_softmax(tiny_policy, batch)
    at = batch.is_response
    stops = np.logaddexp(whole[..., 1], whole[..., 5])
    np.testing.assert_allclose(log_p_stop[at], stops[at], atol=1e-5)
    want = {
        # logsumexp(x) - mean(x) = -mean(log p).
        "self_certainty": -whole.mean(axis=-1),
        "sequence_log_prob": np.take_along_axis(whole, batch.tokens[..., None], -1)[
            ..., 0
        ],
        "negative_entropy": (np.exp(whole) * whole).sum(axis=-1),
    }
    np.testing.assert_allclose(reward[at], want[name][at], atol=1e-5)
    assert not np.any(log_p_stop[~at]) and not np.any(reward[~at])


@pytest.mark.slow
def test_sub_trajectories_are_those_of_all_pairs_of_prefixes(rng, tiny_policy):
    _, batch, placement, used = _data(rng, count=6)
    alpha = 2.0
    base_stop = (-2.0 - 0.1 * (batch.tokens % 5)).astype(np.float32)
    base = _base_scores(batch)
    old = _scores(base, log_stop_base=base_stop)
    subtb = ObjectiveConfig("subtb", alpha=alpha)
    _, _, table, _ = _run(tiny_policy, batch, used, subtb, old)
    got = from_segments(table.loss, placement)
    whole = _whole_log_softmax(tiny_policy, batch)
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    for i, (row, slot) in enumerate(zip(placement.row, placement.segment, strict=True)):
        at = (flat(batch.segment_ids)[row] == slot + 1) & flat(batch.is_response)[row]
        tokens, p = flat(batch.tokens)[row][at], flat(whole)[row][at]
        p0, p0_stop = flat(base)[row][at], flat(base_stop)[row][at]
        # log P - alpha log R of the first t tokens and a stop.
        u = []
        for t in range(len(tokens)):
            chosen = sum(p[s, tokens[s]] - alpha * p0[s] for s in range(t))
            u.append(chosen + p[t, 1] - alpha * p0_stop[t])
        pairs = [(a - b) ** 2 for j, a in enumerate(u) for b in u[:j]]
        want = np.mean(pairs) if pairs else 0.0
        np.testing.assert_allclose(got[i], want, rtol=1e-4)


@pytest.mark.slow
def test_the_band_leaves_tokens_out_of_sums_and_length(rng, tiny_policy):
    _, batch, placement, used = _data(rng)
    *_, log_p = _run(tiny_policy, batch, used)
    # Every third token has drifted out of the band, the others within it.
    out = np.arange(batch.tokens.shape[-1]) % 3 == 0
    drift = np.where(out, 0.5, 0.01).astype(np.float32)
    old = _scores(
        _base_scores(batch),
        np.asarray(log_p) - drift,
        np.zeros(len(batch.tokens), bool),
    )
    masked = ObjectiveConfig("powerflow", alpha=4.0, mask_clipped_tokens=True)
    _, _, table, _ = _run(tiny_policy, batch, used, masked, old)
    kept = np.where(batch.is_response & ~out, 1.0, 0.0)
    sums = lambda x: from_segments(
        np.stack([response_sum(jnp.asarray(x[i] * kept[i]),
                  jax.tree.map(lambda y, i=i: y[i], batch)) for i in range(len(x))]),
        placement,
    )  # fmt: skip
    n = sums(np.ones_like(kept))
    got = lambda name: from_segments(getattr(table, name), placement)
    np.testing.assert_allclose(got("num_loss_tokens"), n)
    np.testing.assert_allclose(got("log_pf"), sums(log_p), rtol=1e-5)
    np.testing.assert_allclose(got("log_p_base"), sums(old["log_p_base"]), rtol=1e-5)
    np.testing.assert_allclose(got("weight"), np.clip(np.exp(0.01 * n), 0.8, 1.28),
                               rtol=1e-4)  # fmt: skip
    some = np.maximum(n, 1)
    psi = from_segments(batch.psi, placement)
    m, m0 = got("log_pf") / some, got("log_p_base") / some
    np.testing.assert_allclose(
        got("residual"), got("log_z") + m - 4 * (m0 + psi), rtol=1e-4, atol=1e-5
    )


def test_clipped_ratios_are_sums_over_tokens(rng, tiny_policy):
    _, batch, placement, used = _data(rng)
    *_, log_p = _run(tiny_policy, batch, used)
    drift = np.where(np.arange(batch.tokens.shape[-1]) % 2, 0.5, -0.5)
    old = _scores(
        _base_scores(batch),
        (np.asarray(log_p) - drift).astype(np.float32),
        np.zeros(len(batch.tokens), bool),
        reward=np.where(batch.is_real, np.sign(batch.psi + 0.1), 0).astype(np.float32),
    )
    grpo = ObjectiveConfig("grpo", alpha=4.0)
    _, _, table, _ = _run(tiny_policy, batch, used, grpo, old)
    for i, (row, slot) in enumerate(zip(placement.row, placement.segment, strict=True)):
        segment_ids, is_response, psi = (
            x.reshape(-1, x.shape[-1])[row]
            for x in (batch.segment_ids, batch.is_response, batch.psi)
        )
        ratio = np.exp(drift[(segment_ids == slot + 1) & is_response])
        a = 1.0 if psi[slot] == 0 else -1.0
        want = -np.mean(np.minimum(ratio * a, np.clip(ratio, 0.8, 1.28) * a))
        got = from_segments(table.loss, placement)[i]
        np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.parametrize(
    "objective",
    [
        pytest.param(k, marks=() if k == "grpo" else pytest.mark.slow)
        for k in sorted(objectives.OBJECTIVES)
    ],
)
def test_nan_in_padding_changes_nothing_for_any_objective(rng, tiny_policy, objective):
    _, batch, _, used = _data(rng, count=4)
    objective = ObjectiveConfig(objective, alpha=4.0)

    def run(padding):
        of_tokens = lambda x: np.where(batch.is_response, x, padding).astype(np.float32)
        of_slots = lambda x: np.where(batch.is_real, x, padding).astype(np.float32)
        old = _scores(
            of_tokens(_base_scores(batch)),
            of_tokens(-1.5),
            np.zeros(len(batch.tokens), bool),
            log_z=of_slots(-0.5),
            reward=of_slots(0.7),
            log_stop_base=of_tokens(-2.0),
        )
        return _run(tiny_policy, batch, used, objective, old)

    want, got = run(0.0), run(np.nan)
    assert np.isfinite(want[1]["grad_norm"]) and want[1]["grad_norm"] > 0
    np.testing.assert_array_equal(got[1]["loss"], want[1]["loss"])
    _assert_same(got[0].params, want[0].params, atol=0)

"""Rollouts of models with sliding windows: caches that keep no more, true log-probs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pfjax.infra import sharding
from pfjax.model import transformer
from pfjax.sampler import buffers, decode, engine, mcmc, resize, slots, smc, windows
from pfjax.sampler.buffers import Queue, Settings
from pfjax.sampler.options import Capacity, StopConditions
from pfjax.targets import Target
from tests.sampler import windowed

# From none that is cached to seven times the narrowest window.
PROMPTS = [[2 + (i + j) % 9 for j in range(n)] for i, n in enumerate((1, 2, 8, 20, 37))]
TARGET = Target(0.5, has_format=False)


@pytest.fixture
def policy(tiny_config):
    return windowed.policy_of(windowed.config_of(tiny_config, 5, 0, 20))


@pytest.fixture(autouse=True)
def narrow_caches(monkeypatch):
    """Caches of 16, 32 and 64 tokens: they grow while the windows fill."""
    monkeypatch.setattr(slots, "_NARROWEST", 16)


def _assert_recorded_truly(policy, prompts, out):
    at = list(np.ndindex(out.lengths.shape))
    responses = [out.tokens[i][: out.lengths[i]].tolist() for i in at]
    want = windowed.score(policy, [prompts[i[0]] for i in at], responses)
    for i, log_p in zip(at, want, strict=True):
        recorded = out.log_probs[i][: out.lengths[i]]
        np.testing.assert_allclose(recorded, log_p, atol=1e-5)


@pytest.fixture
def widths_seen(monkeypatch):
    """(slots, widths of the layers' caches) of each program that decodes."""
    seen, original = [], decode.decode

    def spy(*args, **kwargs):
        cache = args[4]
        seen.append((len(args[3].sample), tuple(v.shape[2] for _, v in cache)))
        return original(*args, **kwargs)

    monkeypatch.setattr(decode, "decode", spy)
    return seen


@pytest.mark.slow
def test_windows_matter(policy):
    """Or else the tests below would say nothing."""
    full = windowed.config_of(policy.config, 0, 0, 0)
    prompts, responses = [PROMPTS[4]] * 2, [[3, 4, 5], [6, 7, 8]]
    one = windowed.score(policy, prompts, responses)
    other = windowed.score(policy._replace(config=full), prompts, responses)
    assert np.abs(np.subtract(one, other)).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("num_slots", [6, None])
def test_recorded_log_probs_are_those_of_windows(policy, widths_seen, num_slots):
    """With slots that are refilled, caches that grow, and fewer slots in the end."""
    capacity = Capacity(num_slots=num_slots)
    out = engine.rollout(policy, PROMPTS, 8, 60, seed=1, capacity=capacity)
    assert out.lengths.max() == 60 and np.median(out.lengths) < 40
    _assert_recorded_truly(policy, PROMPTS, out)
    numbers, widths = map(set, zip(*widths_seen, strict=True))
    assert len(numbers) > 1
    assert {(16, 64, 32), (16, 16, 16)} < widths
    assert all(x[0] == 16 and x[2] <= 32 for x in widths)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tpu_interpret", "gpu_interpret"])
def test_kernels_draw_the_same(tiny_config, monkeypatch, backend):
    """In blocks of 128 tokens: of longer prompts some are dropped."""
    monkeypatch.undo()  # kernels take no narrower caches
    policy = windowed.policy_of(windowed.config_of(tiny_config, 5, 0, 140))
    prompts = [[2 + (i * j) % 9 for j in range(n)] for i, n in enumerate((2, 150, 300))]
    draw = lambda x: engine.rollout(
        policy,
        prompts,
        3,
        150,
        stop=StopConditions((-1,)),
        capacity=Capacity(backend=x),
    )
    want = draw("xla")
    _assert_recorded_truly(policy, prompts, want)
    windowed.assert_same_draws(draw(backend), want)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"num_slots": 1}, {"num_slots": 7}, {"prompt_width": 100}]
)
def test_slots_and_widths_change_no_draw(policy, changes):
    args = (policy, PROMPTS, 6, 40)
    want = engine.rollout(*args, seed=2)
    got = engine.rollout(*args, seed=2, capacity=Capacity(**changes))
    windowed.assert_same_draws(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [(2, 2, 2), (1, 8, 1)])
def test_a_mesh_changes_no_draw(policy, axes):
    args, capacity = (PROMPTS, 4, 30), Capacity(num_slots=8)
    want = engine.rollout(policy, *args, capacity=capacity)
    mesh = sharding.make_mesh(*axes)
    axes = transformer.logical_axes(policy.config)
    where = sharding.tree_shardings(mesh, axes, policy.params)
    spread = policy._replace(params=jax.device_put(policy.params, where))
    with jax.set_mesh(mesh):
        got = engine.rollout(spread, *args, capacity=capacity)
    windowed.assert_same_draws(got, want)


@pytest.mark.slow
def test_chains_that_go_back_see_what_they_saw(policy):
    """A ring would have lost it: Metropolis-Hastings draws ends of responses anew."""
    out = mcmc.metropolis_hastings(policy, PROMPTS, TARGET, 4, 40, blocks=2, steps=6)
    assert np.median(out.lengths) > 8
    _assert_recorded_truly(policy, PROMPTS, out)


@pytest.mark.slow
def test_particles_keep_their_windows(policy):
    out, found = smc.sequential_monte_carlo(policy, PROMPTS, TARGET, 8, 40, particles=8)
    assert found.min_ess.min() < 4 and np.median(out.lengths) > 8  # resampled
    _assert_recorded_truly(policy, PROMPTS, out)


def _plan(config, max_new_tokens=60, prompt_width=37, **changes):
    return slots.plan_for(
        config,
        ("cpu", "cpu"),
        lambda: 10**9,
        num_prompts=5,
        samples_per_prompt=8,
        max_new_tokens=max_new_tokens,
        prompt_width=prompt_width,
        **{"num_slots": 16} | changes,
    )


@pytest.mark.parametrize("keeps_all", [False, True])
@pytest.mark.parametrize("backend", ["xla", "tpu"])
def test_caches_keep_the_window_and_their_bytes_are_known(policy, backend, keeps_all):
    changes = {"max_new_tokens": 300, "prompt_width": 150}
    plan = _plan(policy.config, **changes, backend=backend, keeps_all=keeps_all)
    settings = Settings(policy.config, plan, 8, (1,))
    one, queue = np.zeros(1, np.int32), np.zeros(5, np.int32)
    queue = Queue(*[queue] * 4, *[one] * 5, np.zeros(40, bool))
    sizes = {"s": settings, "width": plan.widths[-1], "new": 300}
    prompts, _, own, _ = jax.eval_shape(lambda q: buffers.start(q, **sizes), queue)
    width_of = lambda cache: [v.shape[2] for _, v in cache]
    wide, of_prompts, *kept = {
        "xla": (304, 160, 16, 32),
        "tpu": (384, 256, 128, 128),
    }[backend]
    assert width_of(prompts.cache) == [kept[0], of_prompts, kept[1]]
    if keeps_all:
        assert width_of(own) == [wide] * 3
    else:
        assert width_of(own) == [kept[0], wide, kept[1]]
    arrays = jax.tree.leaves((prompts.cache, own))
    assert plan.cache_bytes == sum(x.size * x.dtype.itemsize for x in arrays)


def test_windows_that_nothing_outgrows_are_none(policy):
    # Prompts of 16, responses of 16: 20 is reached, 33 is not.
    config = windowed.config_of(policy.config, 5, 20, 32, 33)
    assert _plan(config, 16, 16).windows == (5, 20, 0, 0)


def test_a_window_on_paper():
    """W = 3 over a prompt of 5 cached tokens, of which 4 are kept: positions 1 to 4."""
    number = lambda *x: jnp.array(x, jnp.int32)
    drawn = number(0, 1, 2, 3, 7)
    at = windows.response_index(3, drawn, keeps_all=False)
    np.testing.assert_array_equal(at, [0, 1, 2, 0, 1])
    length, start = windows.of_response(3, drawn, keeps_all=False)
    np.testing.assert_array_equal(length, [1, 2, 3, 3, 3])
    assert start is None
    at = windows.response_index(3, drawn, keeps_all=True)
    np.testing.assert_array_equal(at, drawn)
    length, start = windows.of_response(3, drawn, keeps_all=True)
    np.testing.assert_array_equal(length, drawn + 1)
    np.testing.assert_array_equal(start, [0, 0, 0, 1, 5])
    # At position 5 those from 3 on are seen: index 2; then from 4 on, then none.
    length, start = windows.of_prompt(3, 4, number(2, 5), jnp.ones(5, int), drawn)
    np.testing.assert_array_equal(length, [2, 4])
    np.testing.assert_array_equal(start, [2, 3, 4, 5, 9])
    # Of a shorter prompt all is kept, and seen from position 2.
    _, start = windows.of_prompt(3, 4, number(2, 5), jnp.zeros(5, int), drawn)
    np.testing.assert_array_equal(start, [0, 1, 2, 3, 7])
    slot = number(1, 1, 1, 1, 1, -1, 0)[None]
    positions = number(0, 1, 2, 3, 4, 0, 1)[None]
    slot, at = windows.prompt_index(3, 4, number(2, 5), slot, positions)
    np.testing.assert_array_equal(slot[0], [-1, 1, 1, 1, 1, -1, 0])
    np.testing.assert_array_equal(at[0, 1:5], [0, 1, 2, 3])
    assert at[0, 6] == 1


def test_a_full_window_is_not_copied_when_caches_grow(policy):
    plan = _plan(policy.config)
    settings = Settings(policy.config, plan, 8, (1,))
    make = lambda width: buffers.empty_cache(settings, 16, plan.response_widths(width))
    before, after = (resize.Sizes(16, width, 8) for width in (32, 64))
    cache, prompts, of_slots = make(32), object(), object()
    how = {"s": settings, "before": before, "after": after}
    out = resize.resize(prompts, of_slots, cache, **how)
    assert out[0] is prompts and out[1] is of_slots
    assert out[2][0] is cache[0] and out[2][2] is cache[2]
    shapes = lambda cache: [v.shape for _, v in cache]
    assert shapes(out[2]) == shapes(make(64))

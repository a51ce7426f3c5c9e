"""Rollouts: drawn from the model, by known random numbers, with true log-probs."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pfjax.batch import Rollout
from pfjax.infra import sharding
from pfjax.model import hf, scoring
from pfjax.sampler import decode, engine, slots
from pfjax.sampler.options import Capacity, StopConditions, TokenFilters
from pfjax.sampler.scheduler import Scheduler
from tests.conftest import all_responses, count_compiles, run_on_two_processes
from tests.sampler import simple_sampler

PROMPTS = [[2, 3, 4], [5], [6, 7, 8, 9, 10], [3, 3]]


def _cut(rollout):
    """Responses and their log-probs as lists."""
    return [
        [
            (rollout.tokens[p, g, :n].tolist(), rollout.log_probs[p, g, :n])
            for g, n in enumerate(row)
        ]
        for p, row in enumerate(rollout.lengths)
    ]


def test_recorded_log_probs_equal_the_scorers(tiny_policy):
    out = _cut(engine.rollout(tiny_policy, PROMPTS, 8, 20, temperature=1.3, seed=1))
    flat = [(p, *sample) for p, row in zip(PROMPTS, out, strict=True) for sample in row]
    scored = scoring.score(
        tiny_policy, [p + y for p, y, _ in flat], [len(p) for p, _, _ in flat]
    )
    for (_, _, recorded), want in zip(flat, scored, strict=True):
        np.testing.assert_allclose(recorded, want, atol=1e-5)


def test_some_of_the_samples_are_drawn_as_among_all_by_the_same_programs(tiny_policy):
    kwargs = {"samples_per_prompt": 6, "max_new_tokens": 12, "seed": 4}
    kwargs["capacity"] = Capacity(num_slots=4)  # which stay as many to the end
    whole = _cut(engine.rollout(tiny_policy, PROMPTS, **kwargs))
    for chosen in (range(4), range(4, 6), range(1)):
        with count_compiles() as compiled:
            some = engine.rollout(tiny_policy, PROMPTS, **kwargs, samples=chosen)
        assert not compiled, dict(compiled)
        for got, want in zip(_cut(some), whole, strict=True):
            assert [y for y, _ in got] == [y for y, _ in want][
                chosen.start : chosen.stop
            ]


def test_stop_token_ends_a_response_and_counts(tiny_policy):
    out = engine.rollout(tiny_policy, PROMPTS, 16, 12)
    assert out.finished.any() and not out.finished.all()
    for (y, log_p), done, n in zip(
        [s for row in _cut(out) for s in row],
        out.finished.reshape(-1),
        out.lengths.reshape(-1),
        strict=True,
    ):
        assert 1 not in y[:-1]
        assert (y[-1] == 1) == done
        assert done or n == 12
        assert np.isfinite(log_p).all() and (log_p <= 0).all()


def test_draws_do_not_depend_on_the_company(tiny_policy):
    ids = [40, 41, 42, 43]
    kwargs = {"seed": 5, "step": 3, "capacity": Capacity(prompt_width=16)}
    whole = _cut(engine.rollout(tiny_policy, PROMPTS, 4, 10, prompt_ids=ids, **kwargs))
    order = [2, 0, 3, 1]
    mixed = _cut(
        engine.rollout(
            tiny_policy, [PROMPTS[i] for i in order], 4, 10,
            prompt_ids=[ids[i] for i in order], **kwargs,
        )
    )  # fmt: skip
    fewer = _cut(
        engine.rollout(tiny_policy, PROMPTS[1:3], 2, 10, prompt_ids=ids[1:3], **kwargs)
    )
    for place, i in enumerate(order):
        for a, b in zip(mixed[place], whole[i], strict=True):
            assert a[0] == b[0]
            np.testing.assert_array_equal(a[1], b[1])  # one shape: bit for bit
    for i in (1, 2):
        for a, b in zip(fewer[i - 1], whole[i][:2], strict=True):
            assert a[0] == b[0]


@pytest.mark.parametrize("change", ["seed", "step", "prompt_ids"])
def test_draws_depend_on_seed_step_and_prompt_id(tiny_policy, change):
    kwargs = {"seed": 5, "step": 3, "prompt_ids": [0, 1, 2, 3]}
    other = kwargs | {change: [4, 5, 6, 7] if change == "prompt_ids" else 9}
    a = engine.rollout(tiny_policy, PROMPTS, 4, 10, **kwargs)
    b = engine.rollout(tiny_policy, PROMPTS, 4, 10, **other)
    same = [x[0] == y[0] for r, s in zip(_cut(a), _cut(b), strict=True)
            for x, y in zip(r, s, strict=True)]  # fmt: skip
    assert sum(same) < len(same) / 2


@pytest.mark.slow
def test_a_mesh_changes_no_draw(tmp_path, tiny_policy):
    alone = engine.rollout(tiny_policy, PROMPTS, 8, 20)
    hf.save(tiny_policy, tmp_path / "m")
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        spread = engine.rollout(hf.load(tmp_path / "m", mesh), PROMPTS, 8, 20)
    for row, other in zip(_cut(alone), _cut(spread), strict=True):
        for a, b in zip(row, other, strict=True):
            assert a[0] == b[0]
            np.testing.assert_allclose(a[1], b[1], atol=1e-5)


@pytest.mark.parametrize(
    "temperature", [1.0, pytest.param(0.7, marks=pytest.mark.slow)]
)
def test_frequencies_are_those_of_the_model(enumerable_folder, temperature):
    policy = hf.load(enumerable_folder)
    prompt, draws = [2, 3], 20_000
    out = engine.rollout(policy, [prompt], draws, 3, temperature=temperature, seed=2)
    count = collections.Counter(tuple(y) for y, _ in _cut(out)[0])
    responses = all_responses(4, 1, 3)
    exact = _exact(policy, prompt, responses, temperature)
    assert exact.sum() == pytest.approx(1.0, abs=1e-5)
    assert set(count) <= set(map(tuple, responses))
    # Chi-square with rare responses pooled; 5 standard deviations of its own.
    expected = draws * exact
    seen = np.array([count[tuple(y)] for y in responses])
    rare = expected < 10
    seen = np.append(seen[~rare], seen[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    statistic = ((seen - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
    freedom = len(expected) - 1
    assert freedom > 10
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)


def _exact(policy, prompt, responses, temperature):
    """Probabilities by scoring every response, token by token at a temperature."""
    if temperature == 1.0:
        scores = scoring.score(
            policy, [prompt + y for y in responses], [len(prompt)] * len(responses)
        )
        return np.exp([s.sum() for s in scores])
    # p_T(v | prefix) from the log-probs of all one-token continuations.
    prefixes = sorted({tuple(y[:t]) for y in responses for t in range(len(y))})
    grown = [[*prompt, *p, v] for p in prefixes for v in range(4)]
    scores = scoring.score(policy, grown, [len(g) - 1 for g in grown])
    log_p = np.array([s[0] for s in scores]).reshape(len(prefixes), 4) / temperature
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    table = dict(zip(prefixes, log_p, strict=True))
    return np.exp(
        [sum(table[tuple(y[:t])][y[t]] for t in range(len(y))) for y in responses]
    )


def _same_draws(a, b):
    for row, other in zip(_cut(a), _cut(b), strict=True):
        for x, y in zip(row, other, strict=True):
            assert x[0] == y[0]
            np.testing.assert_allclose(x[1], y[1], atol=1e-5)
    np.testing.assert_array_equal(a.finished, b.finished)


@pytest.mark.parametrize(
    "num_slots",
    [
        pytest.param(1, marks=pytest.mark.slow),
        7,
        pytest.param(32, marks=pytest.mark.slow),
        pytest.param(None, marks=pytest.mark.slow),
    ],
)
def test_slots_and_stages_change_no_draw(tiny_policy, monkeypatch, num_slots):
    # Caches of 16, 32 and 40 tokens; fewer prefix slots than prompts with 1 and 7 slots.
    monkeypatch.setattr(slots, "_NARROWEST", 16)
    prompts = [[2 + i % 5, *range(3, 3 + i)] for i in range(12)]
    kwargs = {"samples_per_prompt": 24, "max_new_tokens": 40, "seed": 3, "step": 2}
    want = simple_sampler.rollout(tiny_policy, prompts, **kwargs)
    assert want.lengths.sum() > 2000 and want.lengths.max() > 32
    got = engine.rollout(
        tiny_policy, prompts, capacity=Capacity(num_slots=num_slots), **kwargs
    )
    _same_draws(got, want)


@pytest.mark.parametrize(
    "axes",
    [
        pytest.param((8, 1, 1), marks=pytest.mark.slow),
        pytest.param((1, 2, 4), marks=pytest.mark.slow),
        pytest.param((2, 2, 2), marks=pytest.mark.slow),
    ],
)
def test_a_mesh_changes_no_draw_of_refilled_slots(tmp_path, tiny_policy, axes):
    # 2 key/value heads on a tensor axis of 4 are replicated; 11 prompts fill 8 parts
    # unevenly.
    prompts = [[2 + i % 5, *range(3, 3 + i)] for i in range(11)]
    kwargs = {
        "samples_per_prompt": 4,
        "max_new_tokens": 20,
        "capacity": Capacity(num_slots=16),
    }
    alone = engine.rollout(tiny_policy, prompts, **kwargs)
    hf.save(tiny_policy, tmp_path / "m")
    mesh = sharding.make_mesh(*axes)
    with jax.set_mesh(mesh):
        spread = engine.rollout(hf.load(tmp_path / "m", mesh), prompts, **kwargs)
    _same_draws(alone, spread)


@pytest.fixture
def parrot(tiny_policy):
    """Repeats the token 2 until it is cut, and stops after any other."""
    c = tiny_policy.config
    params = jax.tree.map(np.zeros_like, tiny_policy.params)
    one_hot = np.eye(c.vocab_size, c.embed_dim, dtype=np.float32)
    head = np.zeros_like(params["head"])
    head[c.stop_ids[0]], head[2] = 10.0, 20.0 * one_hot[2]
    params |= {"embed": one_hot, "head": head, "final_norm": np.ones(c.embed_dim)}
    return tiny_policy._replace(params=jax.tree.map(jnp.float32, params))


@pytest.mark.parametrize(
    ("num", "ratio"), [pytest.param(16, 1.15, marks=pytest.mark.slow), (15, 1.3)]
)
def test_parts_whose_responses_end_early_are_dealt_more_prompts(
    parrot, monkeypatch, num, ratio
):
    """Every other prompt has a long response: dealt in turns, one of two parts would
    draw them all."""
    schedulers, make = [], engine.Scheduler
    monkeypatch.setattr(
        engine,
        "Scheduler",
        lambda *args, **how: schedulers.append(make(*args, **how)) or schedulers[-1],
    )
    prompts = [[2], [3]] * num
    kwargs = {"max_new_tokens": 64, "capacity": Capacity(num_slots=4)}
    alone = engine.rollout(parrot, prompts, 2, **kwargs)
    assert alone.lengths.T.tolist() == [[64, 1] * num] * 2
    mesh = sharding.make_mesh(data=2, fsdp=1, devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        spread = engine.rollout(parrot, prompts, 2, **kwargs)
    _same_draws(alone, spread)
    steps = np.asarray(schedulers[-1].on_device[1].slot_steps)
    assert len(steps) == 2 and steps.max() < ratio * steps.mean(), steps


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tpu_interpret", "gpu_interpret"])
def test_kernels_draw_the_same(tiny_policy, backend):
    kwargs = {"samples_per_prompt": 4, "max_new_tokens": 20}
    want, got = (
        engine.rollout(
            tiny_policy, PROMPTS, capacity=Capacity(num_slots=8, backend=x), **kwargs
        )
        for x in (None, backend)
    )
    _same_draws(got, want)


@pytest.mark.slow
def test_the_devices_are_at_work_while_the_host_looks(tiny_policy, monkeypatch):
    events = []
    decoded, looked = Scheduler._decode, Scheduler._look
    monkeypatch.setattr(
        Scheduler, "_decode", lambda self: events.append("decode") or decoded(self)
    )
    monkeypatch.setattr(
        Scheduler, "_look", lambda self, *x: events.append("look") or looked(self, *x)
    )
    engine.rollout(tiny_policy, PROMPTS, 8, 40)
    assert events.count("look") > 2
    for i, event in enumerate(events):
        if event == "look":
            before = events[:i]
            assert before.count("decode") == before.count("look") + 2


@pytest.mark.slow
def test_two_processes_draw_what_one_does(tmp_path, tiny_policy):
    hf.save(tiny_policy, tmp_path / "m")
    code = """
import numpy as np
from pfjax.infra import sharding
from pfjax.model import hf
from pfjax.sampler import engine
from pfjax.sampler.options import Capacity
folder, out = args
mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
with jax.set_mesh(mesh):
    policy = hf.load(folder, mesh)
    rollout = engine.rollout(policy, [[2, 3 + i] for i in range(6)], 4, 20, capacity=Capacity(num_slots=8))
if jax.process_index() == 0:
    np.savez(out, **{k: x for k, x in rollout._asdict().items() if x is not None})
"""
    run_on_two_processes(code, tmp_path / "m", tmp_path / "rollout.npz")
    with np.load(tmp_path / "rollout.npz") as got:
        two = Rollout(**got)
    prompts = [[2, 3 + i] for i in range(6)]
    _same_draws(two, engine.rollout(tiny_policy, prompts, 4, 20))


@pytest.mark.slow
def test_slots_are_refilled_and_taken_away(tiny_policy):
    prompts = [[2, 3 + i % 10] for i in range(16)]
    kwargs = {"samples_per_prompt": 64, "max_new_tokens": 100}
    want = simple_sampler.rollout(tiny_policy, prompts, **kwargs)
    refilled = engine.rollout(
        tiny_policy, prompts, capacity=Capacity(num_slots=16), **kwargs
    )
    fewer = engine.rollout(
        tiny_policy, prompts, capacity=Capacity(num_slots=1024), **kwargs
    )
    tokens = want.lengths.sum()
    assert tokens / want.slot_steps < 0.25  # waits for the longest
    assert tokens / refilled.slot_steps > 0.9
    # Begun all at once: looks every 8 steps are rare for 7 tokens a response.
    assert tokens / fewer.slot_steps > 0.3
    for got in (refilled, fewer):
        for row, other in zip(_cut(got), _cut(want), strict=True):
            assert [y for y, _ in row] == [y for y, _ in other]


@pytest.mark.slow
def test_programs_are_few_and_serve_every_rollout_of_a_shape(tiny_policy):
    def draw(seed, prompts):
        engine.rollout(
            tiny_policy,
            prompts,
            8,
            40,
            seed=seed,
            capacity=Capacity(prompt_width=16, num_slots=16),
        )

    def ladder_and_widths():
        plan = slots.make_plan(
            tiny_policy,
            num_prompts=8,
            samples_per_prompt=8,
            max_new_tokens=40,
            prompt_width=16,
            num_slots=16,
        )
        return len(plan.ladder) * len(plan.widths)

    some = [[2 + i % 5, *range(3, 3 + i)] for i in range(8)]
    others = [[*range(2, 2 + 2 * i), 9] for i in range(8)]
    with count_compiles() as n:
        for seed in range(4):
            draw(seed, some)
            draw(seed, others)
    decodes = sum(count for name, count in n.items() if "decode" in name)
    assert 1 <= decodes <= ladder_and_widths()
    with count_compiles() as n:
        draw(0, some)
        draw(3, others)
    assert not n, dict(n)


def test_the_cache_is_updated_in_place_and_its_size_is_known(tiny_policy):
    kwargs = {
        "samples_per_prompt": 4,
        "max_new_tokens": 40,
        "capacity": Capacity(num_slots=8),
    }
    seen = []
    original = decode.decode

    def spy(*args, **kwargs):
        if not seen:
            lowered = original.lower(*args, **kwargs)
            sizes = [x.nbytes for x in jax.tree.leaves((args[1].cache, args[4]))]
            own = sum(x.nbytes for x in jax.tree.leaves(args[4]))
            seen.append((lowered.compile().memory_analysis(), sum(sizes), own))
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "decode", spy)
        engine.rollout(tiny_policy, PROMPTS, **kwargs)
    memory, caches, own = seen[0]
    assert memory.alias_size_in_bytes >= own
    # No second cache among the temporaries.
    assert memory.temp_size_in_bytes < own
    plan = slots.make_plan(
        tiny_policy,
        num_prompts=4,
        samples_per_prompt=4,
        max_new_tokens=40,
        prompt_width=5,
        num_slots=8,
    )
    assert plan.cache_bytes == caches


@pytest.mark.slow
def test_responses_are_passed_on_as_they_end(tiny_policy):
    calls = []
    out = engine.rollout(
        tiny_policy,
        PROMPTS,
        16,
        40,
        capacity=Capacity(num_slots=8),
        on_finish=calls.append,
    )
    assert len(calls) > 3
    seen = {(f.prompt, f.sample): f for call in calls for f in call}
    assert len(seen) == sum(map(len, calls)) == out.lengths.size
    for (p, g), f in seen.items():
        n = out.lengths[p, g]
        np.testing.assert_array_equal(f.tokens, out.tokens[p, g, :n])
        np.testing.assert_array_equal(f.log_probs, out.log_probs[p, g, :n])
        assert f.is_stopped == out.finished[p, g]


def test_more_responses_than_there_is_room_for_are_drawn_in_turns(
    tiny_policy, monkeypatch
):
    args, kwargs = (tiny_policy, PROMPTS, 3, 12), {"prompt_ids": [4, 9, 2, 30]}
    whole = engine.rollout(*args, **kwargs)
    sizes, found = [], []
    monkeypatch.setattr(slots, "_RESULT_BYTES", 2 * 4 * 3 * 12 * 8)  # two prompts
    start = Scheduler.__init__

    def counted(self, *args, **kwargs):
        start(self, *args, **kwargs)
        sizes.append(self.on_device[-1].tokens.shape[0])

    monkeypatch.setattr(Scheduler, "__init__", counted)
    out = engine.rollout(*args, **kwargs, on_finish=found.extend)
    assert sizes == [6, 6]
    for name in ("tokens", "lengths", "log_probs", "finished"):
        np.testing.assert_array_equal(getattr(out, name), getattr(whole, name))
    assert out.slot_steps == 2 * 6 * 12
    got = {(x.prompt, x.sample): x.tokens.tolist() for x in found}
    for (q, g), n in np.ndenumerate(whole.lengths):
        assert got[q, g] == whole.tokens[q, g, :n].tolist()
    # A budget is one of all responses.
    sizes.clear()
    engine.rollout(*args, stop=StopConditions(max_total_tokens=40))
    assert sizes == [12]


def test_what_is_drawn_counts_as_memory(tiny_policy):
    def plan(gigabytes):
        memory = lambda: gigabytes * 10**9
        sizes = {"num_prompts": 10**4, "samples_per_prompt": 64}
        sizes |= {"max_new_tokens": 64, "prompt_width": 8}
        return slots.plan_for(tiny_policy.config, ("tpu", ""), memory, **sizes)

    assert plan(4).slots > 64
    with pytest.raises(slots.NoRoom):
        plan(1)


def test_a_look_fetches_what_is_new(tiny_policy, monkeypatch):
    """With many prompts as much for each response as with few."""
    fetched, fetch = [], sharding.fetch

    def counted(tree):
        found = fetch(tree)
        fetched.extend(x.size for x in jax.tree.leaves(found) if x.ndim > 1)
        return found

    monkeypatch.setattr(sharding, "fetch", counted)
    text = lambda ids: "".join(chr(97 + i) for i in ids)
    for how in (
        {"on_finish": lambda finished: None},
        {"stop": StopConditions(stop_strings=("abcd",), decode_text=text)},
    ):
        of_each = []
        for times in (4, 32):
            fetched.clear()
            args = (tiny_policy, PROMPTS * times, 1, 40)
            engine.rollout(*args, capacity=Capacity(num_slots=8), **how)
            of_each.append(sum(fetched) / times)
        assert of_each[1] < 1.5 * of_each[0]


@pytest.mark.parametrize("num_slots", [pytest.param(4, marks=pytest.mark.slow), 64])
def test_stop_strings_end_a_response_where_they_are_complete(tiny_policy, num_slots):
    text = lambda ids: "".join(chr(97 + i) for i in ids)
    free = engine.rollout(tiny_policy, PROMPTS, 16, 40, seed=1)
    out = engine.rollout(
        tiny_policy, PROMPTS, 16, 40, seed=1, capacity=Capacity(num_slots=num_slots),
        stop=StopConditions(stop_strings=("de", "k"), decode_text=text),
    )  # fmt: skip
    num_cut = 0
    for at in np.ndindex(*out.lengths.shape):
        whole = text(free.tokens[at][: free.lengths[at]])
        ends = [whole.find(s) + len(s) for s in ("de", "k") if s in whole]
        want = min(ends, default=len(whole))
        assert out.lengths[at] == want
        assert text(out.tokens[at][:want]) == whole[:want]
        assert out.finished[at] == (free.finished[at] or bool(ends))
        num_cut += want < len(whole)
    assert 5 < num_cut < out.lengths.size
    # Their slots went to others, or away.
    whole = engine.rollout(
        tiny_policy, PROMPTS, 16, 40, seed=1, capacity=Capacity(num_slots=num_slots)
    )
    assert out.slot_steps < whole.slot_steps


@pytest.mark.parametrize(
    "num_slots, share",
    [
        (4, 0.7),
        pytest.param(16, 0.3, marks=pytest.mark.slow),
        pytest.param(64, 0.5, marks=pytest.mark.slow),
    ],
)
def test_a_budget_cuts_all_at_the_largest_common_length(tiny_policy, num_slots, share):
    free = engine.rollout(tiny_policy, PROMPTS, 16, 40)
    budget = int(free.lengths.sum() * share)
    calls = []
    out = engine.rollout(
        tiny_policy, PROMPTS, 16, 40, capacity=Capacity(num_slots=num_slots),
        stop=StopConditions(max_total_tokens=budget), on_finish=calls.append,
    )  # fmt: skip
    longest = out.lengths.max()
    np.testing.assert_array_equal(out.lengths, np.minimum(free.lengths, longest))
    np.testing.assert_array_equal(
        out.finished, free.finished & (free.lengths <= longest)
    )
    assert out.lengths.sum() <= budget
    assert np.minimum(free.lengths, longest + 1).sum() > budget
    assert sum(len(f.tokens) for call in calls for f in call) == out.lengths.sum()
    with pytest.raises(ValueError, match="less than one token for each of the 64"):
        engine.rollout(
            tiny_policy, PROMPTS, 16, 40, stop=StopConditions(max_total_tokens=63)
        )


def test_greedy_takes_the_likeliest_token(tiny_policy):
    out = engine.rollout(tiny_policy, PROMPTS, 2, 8, temperature=0.0)
    for prompt, row in zip(PROMPTS, _cut(out), strict=True):
        assert row[0][0] == row[1][0]
        y, log_p = row[0]
        for t in range(len(y)):
            options = [prompt + y[:t] + [v] for v in range(16)]
            scores = scoring.score(tiny_policy, options, [len(prompt) + t] * 16)
            assert np.argmax(scores) == y[t]
            np.testing.assert_allclose(log_p[t], np.max(scores), atol=1e-5)


def test_truncated_draws_stay_within_and_keep_the_true_log_probs(tiny_policy):
    only = TokenFilters(top_k=3)
    out = _cut(engine.rollout(tiny_policy, [[2, 3]], 64, 2, token_filters=only))[0]
    grown = [[2, 3, v] for v in range(16)]
    log_p = np.array([x[0] for x in scoring.score(tiny_policy, grown, [2] * 16)])
    best = set(np.argsort(-log_p)[:3].tolist())
    assert {y[0] for y, _ in out} == best
    for y, recorded in out:
        np.testing.assert_allclose(recorded[0], log_p[y[0]], atol=1e-5)


def test_mistakes_are_named(tiny_policy):
    for kwargs, message in [
        ({"prompts": [[2], []]}, "must not be empty"),
        ({"temperature": -1.0}, "temperature must not be negative"),
        (
            {"prompts": [[2] * 17], "capacity": Capacity(prompt_width=16)},
            "prompt_width is 16",
        ),
        ({"max_new_tokens": 128}, "exceed the model's 128 positions"),
    ]:
        with pytest.raises(ValueError, match=message):
            engine.rollout(
                tiny_policy, **({"prompts": PROMPTS, "max_new_tokens": 8} | kwargs)
            )
    with pytest.raises(ValueError, match="stop_strings need decode_text"):
        StopConditions(stop_strings=("a",))
    for strings in ("12", ("",)):
        with pytest.raises(ValueError, match="a tuple of texts that are not empty"):
            StopConditions(stop_strings=strings, decode_text=str)

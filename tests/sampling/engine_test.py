"""Rollouts: drawn from the model, by known random numbers, with true log-probs."""

import collections

import jax
import numpy as np
import pytest

from pfjax import sharding
from pfjax.policy import hf, logprobs
from pfjax.sampling import engine
from tests.conftest import all_responses

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
    scored = logprobs.score(
        tiny_policy, [p + y for p, y, _ in flat], [len(p) for p, _, _ in flat]
    )
    for (_, _, recorded), want in zip(flat, scored, strict=True):
        np.testing.assert_allclose(recorded, want, atol=1e-5)


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
    kwargs = {"seed": 5, "step": 3, "prompt_width": 16}
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


@pytest.mark.parametrize("temperature", [1.0, 0.7])
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
        scores = logprobs.score(
            policy, [prompt + y for y in responses], [len(prompt)] * len(responses)
        )
        return np.exp([s.sum() for s in scores])
    # p_T(v | prefix) from the log-probs of all one-token continuations.
    prefixes = sorted({tuple(y[:t]) for y in responses for t in range(len(y))})
    grown = [[*prompt, *p, v] for p in prefixes for v in range(4)]
    scores = logprobs.score(policy, grown, [len(g) - 1 for g in grown])
    log_p = np.array([s[0] for s in scores]).reshape(len(prefixes), 4) / temperature
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    table = dict(zip(prefixes, log_p, strict=True))
    return np.exp(
        [sum(table[tuple(y[:t])][y[t]] for t in range(len(y))) for y in responses]
    )


def test_mistakes_are_named(tiny_policy):
    for kwargs, message in [
        ({"prompts": [[2], []]}, "must not be empty"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"prompts": [[2] * 17], "prompt_width": 16}, "prompt_width is 16"),
        ({"max_new_tokens": 128}, "exceed the model's 128 positions"),
    ]:
        with pytest.raises(ValueError, match=message):
            engine.rollout(tiny_policy, **({"prompts": PROMPTS} | kwargs))

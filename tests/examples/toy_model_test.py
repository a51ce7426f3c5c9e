"""The toy task, and that its committed model has its distribution."""

import numpy as np
import pytest

from examples import toy_model as toy
from pfjax.model import hf, tokenizer
from pfjax.sampler import engine
from pfjax.tasks import grading


def test_responses_have_the_frequencies_described(rng):
    problems = toy.all_problems()
    assert len(problems) == 45 * 81
    sampled = [(p, toy.sample_response(p, rng)) for p in problems for _ in range(4)]
    correct = np.array([grading.last_boxed(y) == p.answer for p, y in sampled])
    is_guess = np.array([y.startswith("\\boxed") for _, y in sampled])
    assert is_guess.mean() == pytest.approx(0.3, abs=0.02)
    assert correct[is_guess].mean() == pytest.approx(0.4, abs=0.03)
    assert correct[~is_guess].mean() == pytest.approx(0.64, abs=0.02)


def test_sets_of_problems_are_disjoint():
    seen, train, held_out = (set(s) for s in toy.split_problems(0))
    assert not seen & train and not seen & held_out and not train & held_out
    assert seen | train | held_out == set(toy.all_problems())


@pytest.mark.slow
def test_the_committed_model_has_these_frequencies(rng):
    policy, tok = hf.load("pfjax/toy"), tokenizer.load("pfjax/toy")
    problems = toy.split_problems(0)[2]
    out = engine.rollout(
        policy, [tokenizer.encode_prompt(tok, p.prompt) for p in problems], 32, 32
    )
    correct, guess = [], []
    for p, row, lengths in zip(problems, out.tokens, out.lengths, strict=True):
        for y, n in zip(row, lengths, strict=True):
            text = tokenizer.decode(tok, y[:n].tolist())
            correct.append(grading.last_boxed(text) == p.answer)
            guess.append(text.startswith("\\boxed"))
    # 2,048 samples from 64 problems: 4 standard errors.
    assert np.mean(guess) == pytest.approx(0.3, abs=0.04)
    assert np.mean(correct) == pytest.approx(0.7 * 0.64 + 0.3 * 0.4, abs=0.045)
    assert out.finished.mean() > 0.99

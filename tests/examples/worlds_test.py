"""Worlds: one grammar gives samples, lists and exact values, which separate the methods."""

import json
import math

import numpy as np
import pytest

import pfjax
from examples import toy_model
from examples.base_model import make_tokenizer
from examples.worlds import WORLDS, chains, exact, stories, sums
from examples.worlds import grammar as grammars
from examples.worlds.chains import Chain
from examples.worlds.grammar import Choice, Grammar
from examples.worlds.world import WORDS
from pfjax.model import tokenizer
from pfjax.tasks import grading

# A grammar with different lengths, an odd state and a path shared by two.
_SMALL = {
    "start": [Choice(0.6, "a", "x"), Choice(0.3, "bb", "x"), Choice(0.1, "c", False)],
    "x": [Choice(0.7, "dddd", True), Choice(0.3, "e", False)],
}
SMALL = Grammar("start", _SMALL.__getitem__)

worlds = pytest.mark.parametrize("world", WORLDS.values(), ids=lambda w: w.name)
listed = pytest.mark.parametrize(
    "world", [w for w in WORLDS.values() if w.is_listable], ids=lambda w: w.name
)


def some(world, count: int = 3) -> list:
    return world.problems()[1][:count]


@listed
def test_probabilities_of_the_list_sum_to_1(world):
    for problem in some(world):
        found = world.responses(problem)
        assert math.isclose(sum(r.probability for r in found), 1, rel_tol=1e-12)
        assert len({r.text for r in found}) == len(found)


@listed
def test_samples_are_in_the_list_at_its_frequencies(world, rng):
    problem = some(world)[0]
    at = {r.text: r.probability for r in world.responses(problem)}
    drawn = [world.sample(problem, rng) for _ in range(2000)]
    assert set(drawn) <= at.keys()
    likeliest = max(at, key=at.get)
    sd = math.sqrt(at[likeliest] / 2000)
    assert drawn.count(likeliest) / 2000 == pytest.approx(at[likeliest], abs=4 * sd)


@worlds
def test_the_choices_of_a_state_begin_with_different_tokens(world):
    """What makes a temperature one of states."""
    for problem in some(world):
        grammar = world.grammar(problem)
        states, seen = [grammar.start], set()
        while states:
            choices = grammar.choices(states.pop())
            firsts = [grammars.first_token(c.text) for c in choices]
            assert len(set(firsts)) == len(firsts)
            new = {c.state for c in choices if not isinstance(c.state, bool)} - seen
            seen |= new
            states.extend(new)


@pytest.fixture(scope="module")
def grader():
    with grading.Grader() as found:
        yield found


@worlds
def test_the_grader_finds_correct_what_the_grammar_does(world, rng, grader):
    grader.check_golds([p.answer for p in world.problems()[1]])
    for problem in some(world):
        grammar = world.grammar(problem)
        for each in (grammar, grammars.tempered(grammar, 3.0)):
            for r in (grammars.sample(each, rng) for _ in range(50)):
                answer = grading.last_boxed(r.text)
                is_equal = answer is not None and grader.is_equal(
                    problem.answer, answer
                )
                assert is_equal == r.is_correct, r.text


@worlds
def test_the_tokenizer_counts_as_the_grammar_does(world, rng):
    tok = make_tokenizer(WORDS)
    problem = some(world)[0]
    for _ in range(20):
        r = grammars.sample(world.grammar(problem), rng)
        ids = tok.encode(r.text)
        assert len(ids) + 1 == r.length
        assert tok.unk_token_id not in ids
        assert tok.decode(ids) == r.text
        prompt = tokenizer.encode_prompt(tok, problem.prompt)
        assert len(prompt) + r.length <= world.max_tokens


@worlds
def test_problems_are_disjoint(world):
    fitted, train, held_out = (set(x) for x in world.split(0))
    assert not fitted & train
    assert not held_out & (fitted | train)
    assert (len(train), len(held_out)) == (world.num_train, 64)


# The dynamic programme against the list.
CASES = [
    SMALL,
    sums.grammar(sums.Problem(57, 48)),
    stories.grammar(stories.Word("abcd"), is_unequal=True),
    chains.grammar(Chain(3, 5, 4)),
]
cases = pytest.mark.parametrize(
    "grammar", CASES, ids=["small", "sums", "stories", "chains"]
)


def by_listing(grammar: Grammar, log_weight) -> grammars.Summary:
    found = grammars.responses(grammar)
    w = np.exp([log_weight(r) for r in found])
    w /= w.sum()
    n = np.array([r.length for r in found])
    mean = w @ n
    std = math.sqrt(w @ (n - mean) ** 2)
    return grammars.Summary(w @ [r.is_correct for r in found], mean, std)


@cases
@pytest.mark.parametrize("alpha", [0.5, 4.0])
@pytest.mark.parametrize("log_z", [0.0, -0.3, 0.2])
def test_a_tilt_by_dynamic_programming_is_that_of_the_list(grammar, alpha, log_z):
    log_weight = lambda r: alpha * math.log(r.probability) - log_z * r.length
    log_sum, tilted = grammars.tilted(grammar, alpha, log_z)
    found = grammars.responses(grammar)
    assert log_sum == pytest.approx(np.logaddexp.reduce([log_weight(r) for r in found]))
    assert grammars.summary(tilted) == pytest.approx(by_listing(grammar, log_weight))


@cases
@pytest.mark.parametrize("alpha", [0.5, 4.0])
def test_the_length_aware_sum_is_1(grammar, alpha):
    log_z, tilted = grammars.length_aware(grammar, alpha)
    found = grammars.responses(grammar)
    log_weight = lambda r: alpha * math.log(r.probability) - log_z * r.length
    assert sum(math.exp(log_weight(r)) for r in found) == pytest.approx(1, rel=1e-9)
    assert grammars.summary(tilted) == pytest.approx(by_listing(grammar, log_weight))


def test_a_temperature_by_hand():
    # Square roots of 0.6, 0.3, 0.1 and of 0.7, 0.3.
    first, second = np.sqrt([0.6, 0.3, 0.1]), np.sqrt([0.7, 0.3])
    p_x, p_true = first[:2].sum() / first.sum(), second[0] / second.sum()
    got = grammars.summary(grammars.tempered(SMALL, 2.0)).accuracy
    assert got == pytest.approx(p_x * p_true)


def test_distinct_correct_responses_by_hand():
    # Correct: a dddd (0.42) and bb dddd (0.21); of two samples.
    expected = (1 - 0.58**2) + (1 - 0.79**2)
    assert grammars.distinct_correct(SMALL, 2) == pytest.approx(expected)


def test_flattening_the_aligned_stories_returns_the_pretrained_ones():
    word = stories.Word("dkbm")
    for is_unequal in (False, True):
        aligned = stories.grammar(word, is_unequal)
        back = grammars.tilted(aligned, 1 / stories.ALIGNMENT)[1]
        before = grammars.responses(stories.pretrained(word, is_unequal))
        after = {r.text: r.probability for r in grammars.responses(back)}
        assert after == pytest.approx({r.text: r.probability for r in before})


# Accuracy over the held-out prompts, as docs/study/worlds.md has it.
ACCURACY = {
    "sums": {
        "base": 0.520,
        "temperature 0.25": 0.582,
        "p^4, whole sequences": 0.179,
        "p^4, length-aware": 0.923,
    },
    "detour": {
        "base": 0.498,
        "temperature 0.25": 0.190,
        "p^4, whole sequences": 0.999,
        "p^4, length-aware": 0.999,
    },
    "misconceptions": {
        "base": 0.395,
        "temperature 0.25": 0.412,
        "p^2, length-aware": 0.494,
        "p^4, length-aware": 0.412,
        "p^8, length-aware": 0.291,
    },
    "chains": {
        "base": 0.093,
        "temperature 0.25": 0.709,
        "p^4, whole sequences": 0.753,
        "p^4, length-aware": 0.854,
    },
}
DISTINCT = {
    "stories": {
        "base": 3.98,
        "temperature 2": 6.34,
        "p^0.5, whole sequences": 9.94,
        "p^0.5, length-aware": 9.94,
    },
    "stories_unequal": {
        "temperature 2": 6.34,
        "p^0.5, whole sequences": 9.94,
        "p^0.5, length-aware": 8.04,
    },
}


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, exact.Row]]:
    return {
        name: {r.method: r for r in exact.of_generator(w, w.problems()[1])}
        for name, w in WORLDS.items()
    }


@pytest.mark.slow
def test_exact_values_are_those_of_the_page(rows):
    for name, values in ACCURACY.items():
        got = {m: round(rows[name][m].accuracy, 3) for m in values}
        assert got == values, name
    for name, values in DISTINCT.items():
        got = {m: round(rows[name][m].distinct, 2) for m in values}
        assert got == values, name


@pytest.mark.slow
def test_worlds_separate_the_methods(rows):
    accuracy = {n: {m: r.accuracy for m, r in x.items()} for n, x in rows.items()}
    sums_, detour, chains_ = (accuracy[n] for n in ("sums", "detour", "chains"))
    whole, aware, cold = (
        "p^4, whole sequences",
        "p^4, length-aware",
        "temperature 0.25",
    )
    # Length-aware above temperature above whole sequences.
    assert sums_[aware] > sums_[cold] + 0.3 > sums_[whole] + 0.6
    # A look ahead: temperature falls below its base.
    assert detour[aware] > detour["base"] + 0.4 > detour[cold] + 0.6
    # Care takes tokens.
    assert chains_[aware] > chains_[whole] + 0.08 > chains_[cold] + 0.1
    # Up, then down, below where it began.
    by_alpha = [accuracy["misconceptions"][f"p^{a}, length-aware"] for a in (2, 4, 8)]
    base = accuracy["misconceptions"]["base"]
    assert by_alpha[0] > base + 0.05
    assert by_alpha[0] > by_alpha[1] + 0.05 > by_alpha[2] + 0.1
    assert by_alpha[2] < base - 0.05
    # Variety returns at equal validity; the length correction costs where lengths differ.
    for name, margin in (("stories", 3.0), ("stories_unequal", 3.0)):
        flat, warm = (
            rows[name][m] for m in ("p^0.5, whole sequences", "temperature 2")
        )
        assert flat.distinct > warm.distinct + margin
        assert flat.accuracy > warm.accuracy
    unequal = rows["stories_unequal"]
    gap = (
        unequal["p^0.5, whole sequences"].distinct
        - unequal["p^0.5, length-aware"].distinct
    )
    assert gap > 1.5


def test_chains_have_60_to_250_tokens():
    shortest, longest = Chain(7, 0, 1), Chain(16, 0, 1)
    rng = np.random.default_rng(0)
    for problem in (shortest, longest):
        grammar = chains.grammar(problem)
        lengths = [grammars.sample(grammar, rng).length for _ in range(200)]
        assert min(lengths) >= 60
        assert max(lengths) <= 250


def test_the_toy_has_the_vocabulary_of_its_model():
    made = make_tokenizer(toy_model.WORDS)
    assert made.get_vocab() == tokenizer.load("pfjax/toy").get_vocab()


def log_prob(grammar: Grammar, text: str) -> float:
    """Of the one path that spells a text."""
    state, total = grammar.start, 0.0
    while not isinstance(state, bool):
        p, said, state = next(
            c for c in grammar.choices(state) if text.startswith(c.text)
        )
        total, text = total + math.log(p), text.removeprefix(said)
    return total


@pytest.mark.parametrize(("name", "tolerance"), [("sums", 1e-9), ("chains", 0.05)])
def test_a_model_that_is_the_generator_has_its_values(name, tolerance, monkeypatch):
    """Listed, or of samples: 8 x 64, and the length-aware log Z' from them."""
    world = WORLDS[name]
    problems = some(world, 8)

    def score(policy, tok, problems, texts, temperature):
        return [
            np.array([log_prob(g, text) for text in mine])
            for p, mine in zip(problems, texts, strict=True)
            for g in [grammars.tempered(world.grammar(p), temperature)]
        ]

    monkeypatch.setattr(exact, "score", score)
    rows, distance = exact.of_model(world, problems, None, None)
    assert distance.kl == pytest.approx(0, abs=1e-9)
    for got, want in zip(rows, exact.of_generator(world, problems), strict=True):
        assert got.method == want.method
        assert got.accuracy == pytest.approx(want.accuracy, abs=tolerance)
        assert got.length == pytest.approx(want.length, rel=tolerance)
        assert got.log_z == pytest.approx(want.log_z, abs=tolerance)
        assert got.distinct == pytest.approx(want.distinct, abs=tolerance, nan_ok=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("detour")
    WORLDS["detour"].make(out, steps=3)
    return out


@pytest.mark.slow
def test_a_base_model_is_fitted_and_loads(folder):
    policy, tok = pfjax.load(str(folder)), tokenizer.load(str(folder))
    world = WORLDS["detour"]
    train, held_out = world.problems()
    for name, problems in (("train", train), ("eval", held_out)):
        lines = (folder / f"{name}.jsonl").read_text().splitlines()
        prompts = [json.loads(line)["prompt"] for line in lines]
        assert prompts == [p.prompt for p in problems]
    rows, distance = exact.of_model(world, held_out[:2], policy, tok)
    assert len(rows) == 4
    # Three steps from random weights: nearly all of it is outside of the list.
    assert distance.leak > 0.9
    assert distance.kl > 5
    assert policy.config.vocab_size >= len(tok)

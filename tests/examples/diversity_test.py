"""Measures of diversity against brute force and by hand."""

import collections
import gzip
import itertools
import logging
import math
import sys

import numpy as np
import pytest

from examples.creative import diversity

POEMS = [
    "the cat sat on the mat and slept",
    "the dog sat on the mat and the dog slept",
    "rain falls on the grey roof of the house",
    "a",
    "",
]


def _random_texts(rng, num, words, vocabulary):
    return [
        " ".join(rng.choice(list(vocabulary), rng.integers(0, words + 1)))
        for _ in range(num)
    ]


def _lcs_by_table(a, b):
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, j in itertools.product(range(len(a)), range(len(b))):
        table[i + 1, j + 1] = (
            table[i, j] + 1 if a[i] == b[j] else max(table[i, j + 1], table[i + 1, j])
        )
    return table[-1, -1]


def test_rouge_l_by_hand():
    # LCS(a b c d, b x d) = b d = 2; P = 2/3, R = 2/4; F = 2 (2/3)(1/2) / (7/6) = 4/7
    assert diversity.pairwise_rouge_l(["a b c d", "b x d"]) == pytest.approx(4 / 7)
    # with z, which shares nothing: (4/7 + 0 + 0) / 3
    got = diversity.pairwise_rouge_l(["a b c d", "b x d", "z"])
    assert got == pytest.approx(4 / 21)
    assert diversity.pairwise_rouge_l(["", ""]) == 1.0
    assert diversity.pairwise_rouge_l(["", "a"]) == 0.0


def test_rouge_l_is_that_of_the_textbook_table(rng):
    for _ in range(300):
        a, b = _random_texts(rng, 2, 90, "abcde")
        x, y = a.split(), b.split()
        if x or y:
            want = 2 * _lcs_by_table(x, y) / (len(x) + len(y))
            assert diversity.pairwise_rouge_l([a, b]) == pytest.approx(want)


def test_distinct_n_by_hand():
    texts = ["a b a b", "a c"]
    # words a b a b | a c: 3 of 6; pairs ab ba ab | ac: 3 of 4, none across the texts
    assert diversity.distinct_n(texts, 1) == pytest.approx(3 / 6)
    assert diversity.distinct_n(texts, 2) == pytest.approx(3 / 4)
    assert diversity.distinct_n(texts, 5) == 0.0
    # 4 words: both cut at 2: a b | a c
    assert diversity.distinct_n(texts, 1, budget=4) == pytest.approx(3 / 4)
    # 5 words: the second has but 2, so the first keeps 3: a b a | a c
    assert diversity.distinct_n(texts, 1, budget=5) == pytest.approx(3 / 5)
    assert diversity.distinct_n(texts, 1, budget=99) == pytest.approx(3 / 6)
    # of 4 words chance draws 4 (1 - (3/4)^6) different ones in 6
    want = 3 / (4 * (1 - 0.75**6))
    assert diversity.distinct_n(texts, 1, vocabulary=4) == pytest.approx(want)
    with pytest.raises(ValueError, match="budget >= 1, got 1 and 0"):
        diversity.distinct_n(texts, 1, budget=0)


def test_budget_is_spent_evenly(rng):
    for _ in range(200):
        lengths = rng.integers(0, 9, rng.integers(1, 6)).tolist()
        budget = int(rng.integers(1, 30))
        cut = diversity._equal_cut(lengths, budget)
        fits = [c for c in range(10) if sum(min(n, c) for n in lengths) <= budget]
        assert cut == min(max(fits), max(lengths))


def test_adjusted_distinct_n_is_level_for_even_draws(rng):
    def score(length, **kwargs):
        text = " ".join(map(str, rng.integers(0, 500, length)))
        return diversity.distinct_n([text], 1, **kwargs)

    assert score(200) > 1.5 * score(1000)  # 0.82 and 0.43 expected
    assert score(200, vocabulary=500) == pytest.approx(1, abs=0.06)
    assert score(1000, vocabulary=500) == pytest.approx(1, abs=0.06)


def _bleu(words, references):
    """BLEU-4 with NLTK's smoothing method 1, term by term."""
    if not words:
        return float([] in references)
    product, orders = 1.0, min(4, len(words))
    for k in range(1, orders + 1):

        def grams(text, k=k):
            return collections.Counter(
                tuple(text[i : i + k]) for i in range(len(text) - k + 1)
            )

        hits = sum(
            min(m, max(grams(r)[gram] for r in references))
            for gram, m in grams(words).items()
        )
        if k == 1 and hits == 0:
            return 0.0
        product *= (hits or 0.1) / (len(words) - k + 1)
    r = min((abs(len(r) - len(words)), len(r)) for r in references)[1]
    return min(1.0, math.exp(1 - r / len(words))) * product ** (1 / orders)


def test_self_bleu_by_hand():
    # a b c d against a b c x y, and back:
    # p = 3/4, 2/3, 1/2, .1/1; shorter than its reference: e^(1 - 5/4)
    first = math.exp(-1 / 4) * (3 / 4 * 2 / 3 * 1 / 2 * 0.1) ** (1 / 4)
    # p = 3/5, 2/4, 1/3, .1/2; longer: no penalty
    second = (3 / 5 * 2 / 4 * 1 / 3 * 0.1 / 2) ** (1 / 4)
    got = diversity.self_bleu(["a b c d", "a b c x y"])
    assert got == pytest.approx((first + second) / 2)
    assert diversity.self_bleu(["a b c d", "e f g h"]) == 0.0


def test_self_bleu_is_the_mean_bleu_against_the_others(rng):
    for _ in range(30):
        texts = [*_random_texts(rng, 4, 12, "aabc"), *POEMS]
        words = [t.split() for t in texts]
        want = np.mean(
            [_bleu(w, words[:i] + words[i + 1 :]) for i, w in enumerate(words)]
        )
        assert diversity.self_bleu(texts) == pytest.approx(want)


def test_compression_ratio_counts_bytes_and_is_repeatable():
    texts = ["so much depends", "é upon"]
    raw = "so much depends\né upon".encode()  # 23 bytes, é being two
    assert len(raw) == 23
    want = 23 / len(gzip.compress(raw, mtime=0))
    assert diversity.compression_ratio(texts) == pytest.approx(want)
    assert want < 1 and diversity.compression_ratio(["ab " * 200] * 2) > 10


def test_compression_ratio_is_of_any_order(rng):
    texts = _random_texts(rng, 6, 300, ["moon", "river", "stone", "of", "the"])
    orders = [list(rng.permutation(texts)) for _ in range(10)]
    assert len({gzip.compress("\n".join(o).encode(), mtime=0) for o in orders}) > 1
    assert len({diversity.compression_ratio(o) for o in orders}) == 1


def test_vendi_by_hand():
    # K/2 of cosine 1/2 has eigenvalues 3/4 and 1/4
    want = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    got = diversity.vendi(np.array([[1, 0.5], [0.5, 1]]))
    assert got == pytest.approx(want)
    assert diversity.vendi(np.ones((7, 7))) == pytest.approx(1)
    assert diversity.vendi(np.eye(7)) == pytest.approx(7)
    two_groups = np.kron(np.eye(2), np.ones((3, 3)))
    assert diversity.vendi(two_groups) == pytest.approx(2)


@pytest.mark.parametrize(
    "matrix",
    [
        [[2.0, 0.0], [0.0, 2.0]],
        [[1.0, 0.5], [0.0, 1.0]],
        [[1.0, 2.0], [2.0, 1.0]],
    ],
)
def test_vendi_refuses_what_is_no_kernel(matrix):
    with pytest.raises(ValueError, match="positive semi-definite"):
        diversity.vendi(np.array(matrix))


def test_semantic_diversity_by_hand():
    # unit vectors at 0, 60 and 180 degrees, lengths 1, 2, 3: cosines 1/2, -1, -1/2;
    # the negative ones count as 0: (1/2 + 1 + 1) / 3
    vectors = np.array([[1, 0], [1, math.sqrt(3)], [-3, 0]])
    assert diversity.semantic_diversity(vectors) == pytest.approx(2.5 / 3)
    assert diversity.semantic_diversity(np.ones((4, 3))) == pytest.approx(0)
    assert diversity.semantic_diversity(np.eye(4)) == pytest.approx(1)
    with pytest.raises(ValueError, match="finite, not 0"):
        diversity.semantic_diversity(np.array([[1.0, 0.0], [0.0, 0.0]]))
    with pytest.raises(ValueError, match="finite, not 0"):
        diversity.semantic_diversity(np.array([[1.0, 0.0], [0.0, np.nan]]))


def test_lexical_vectors_by_hand():
    # a a b: words a (1 + log 2), b; pairs aa, ab. b: word b. Cosine: 1 / |a a b|
    vectors = diversity.load_embedder("lexical")(["A a, b!", "b"])
    norm = math.sqrt((1 + math.log(2)) ** 2 + 3)
    assert vectors[0] @ vectors[1] == pytest.approx(1 / norm)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1)
    empty, blank, other = diversity.load_embedder("lexical")(["", " -- ", "b"])
    assert empty @ blank == pytest.approx(1) and empty @ other == 0


def test_copies_are_not_diverse_and_strangers_are():
    embed = diversity.load_embedder("lexical")
    for text in POEMS:
        same = diversity.diversity_scores([[text] * 4], embed)
        assert same["semantic_diversity"] == pytest.approx(0, abs=1e-12)
        assert same["vendi"] == pytest.approx(1)
        assert same["rouge_l"] == same["self_bleu"] == pytest.approx(1)
    strangers = [" ".join(f"{x}{i}" for i in range(9)) for x in "abc"]
    far = diversity.diversity_scores([strangers], embed)
    assert far["semantic_diversity"] == pytest.approx(1)
    assert far["vendi"] == pytest.approx(3)
    assert far["rouge_l"] == far["self_bleu"] == 0
    assert far["distinct_1"] == far["distinct_3"] == 1


def test_order_of_responses_and_of_prompts_does_not_matter(rng):
    responses = [_random_texts(rng, 5, 30, "abcdefgh") for _ in range(3)]
    shuffled = [list(rng.permutation(texts)) for texts in responses[::-1]]
    embed = diversity.load_embedder("lexical")
    want = diversity.diversity_scores(responses, embed, budget=40)
    got = diversity.diversity_scores(shuffled, embed, budget=40)
    assert got == pytest.approx(want)


def test_scores_are_means_over_prompts_with_their_errors():
    embed = diversity.load_embedder("lexical")
    scores = diversity.diversity_scores([["a b", "a b"], ["a", "c"]], embed, budget=4)
    # rouge 1 and 0; words 2 and 1; the second has 2 of 4 words; distinct 2/4 and 2/2
    for name, mean, error in [
        ("rouge_l", 0.5, 0.5),
        ("semantic_diversity", 0.5, 0.5),
        ("words_mean", 1.5, 0.5),
        ("budget_met", 0.5, 0.5),
        ("distinct_1", 0.75, 0.25),
        ("vendi", 1.5, 0.5),
    ]:
        assert scores[name] == pytest.approx(mean), name
        assert scores[f"{name}_se"] == pytest.approx(error), name
    v = diversity.VOCABULARY
    chance = [v * (1 - (1 - 1 / v) ** c) for c in (4, 2)]
    want = (2 / chance[0] + 2 / chance[1]) / 2
    assert scores["adjusted_distinct_1"] == pytest.approx(want)
    # 1, 2 and 3 words: sd 1, over sqrt 3
    three = diversity.diversity_scores([["a"] * 2, ["a b"] * 2, ["a b c"] * 2], embed)
    assert three["words_mean_se"] == pytest.approx(1 / math.sqrt(3))


def test_max_words_makes_length_equal():
    embed = diversity.load_embedder("lexical")
    long = [["a b c d", "a b e f"]]
    cut = diversity.diversity_scores(long, embed, max_words=2)
    assert cut == diversity.diversity_scores([["a b", "a b"]], embed)
    assert cut["words_mean"] == 2 and cut["rouge_l"] == 1
    # a budget cuts for distinct_* alone: a b | a b
    budgeted = diversity.diversity_scores(long, embed, budget=4)
    assert budgeted["distinct_1"] == 0.5 and budgeted["words_mean"] == 4


def test_mistakes_are_named():
    embed = diversity.load_embedder("lexical")
    with pytest.raises(ValueError, match=r"sample two or more.*2 prompts.*\{1: 1\}"):
        diversity.diversity_scores([["a", "b"], ["a"]], embed)
    with pytest.raises(ValueError, match="got 0 prompts"):
        diversity.diversity_scores([], embed)
    with pytest.raises(ValueError, match=r"2 texts became embeddings \(1, 3\)"):
        diversity.diversity_scores([["a", "b"]], lambda texts: np.ones((1, 3)))
    for measure in (diversity.pairwise_rouge_l, diversity.self_bleu):
        with pytest.raises(ValueError, match="two or more, got 1"):
            measure(["alone"])


FAKE_PACKAGE = """
import pathlib
import numpy as np

class SentenceTransformer:
    def __init__(self, folder, *, local_files_only):
        assert local_files_only
        assert (pathlib.Path(folder) / "config.json").exists(), "not resolved"
        if "broken" in folder:
            raise RuntimeError("no modules")

    def encode(self, texts, *, convert_to_numpy, show_progress_bar):
        return np.array([[len(t), 1.0] for t in texts], np.float32)
"""


@pytest.fixture
def fake_package(tmp_path, monkeypatch):
    """Stands in for the package sentence-transformers, with an empty hub cache."""
    import huggingface_hub.constants

    (tmp_path / "sentence_transformers.py").write_text(FAKE_PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sentence_transformers", False)
    cache = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    yield cache
    sys.modules.pop("sentence_transformers", None)


def _model(folder, weights=b"w"):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_a_model_folder_is_loaded_and_named_by_its_weights(tmp_path, fake_package):
    one = diversity.load_embedder(str(_model(tmp_path / "a" / "model")))
    copy = diversity.load_embedder(str(_model(tmp_path / "b" / "model")))
    other = diversity.load_embedder(str(_model(tmp_path / "c" / "model", b"v")))
    assert one.name.startswith("model@") and str(tmp_path) not in one.name
    assert one.name == copy.name != other.name
    np.testing.assert_array_equal(one(["ab", ""]), [[2, 1], [0, 1]])


def test_auto_takes_the_model_in_the_cache_else_words(fake_package, caplog):
    with caplog.at_level(logging.WARNING):
        for name in ("", "auto"):
            assert diversity.load_embedder(name).name == "lexical"
    assert len(caplog.records) == 2 and "hf download" in caplog.text
    repo = fake_package / "models--sentence-transformers--all-MiniLM-L6-v2"
    _model(repo / "snapshots" / "abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    for name in ("auto", diversity.AUTO_MODEL, "all-MiniLM-L6-v2"):
        assert diversity.load_embedder(name).name.startswith("all-MiniLM-L6-v2@")
    assert len(caplog.records) == 2


def test_the_network_is_not_asked(fake_package, monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    def snapshot_download(hub_id, *, local_files_only=False):
        asked.append((hub_id, local_files_only))
        raise errors.LocalEntryNotFoundError("not here")

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    diversity.load_embedder("auto")
    with pytest.raises(ValueError, match="not here"):
        diversity.load_embedder("a/b")
    assert asked == [(diversity.AUTO_MODEL, True), ("a/b", True)]


def test_a_named_model_that_is_not_here_is_an_error(tmp_path, fake_package):
    broken = _model(tmp_path / "broken")
    for name, why in [
        ("some-model", "`hf download` the model"),
        (str(tmp_path / "nowhere" / "at" / "all"), "'lexical'"),
        (str(tmp_path), "config.json"),
        (str(broken), "no modules"),
    ]:
        with pytest.raises(ValueError, match="is not here") as error:
            diversity.load_embedder(name)
        assert why in str(error.value)


def test_without_the_package_only_words_are_left(monkeypatch, caplog, tmp_path):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ValueError, match="install sentence-transformers"):
        diversity.load_embedder(str(_model(tmp_path / "model")))
    with caplog.at_level(logging.WARNING):
        assert diversity.load_embedder().name == "lexical"
    assert len(caplog.records) == 1

r"""How much the responses to one prompt differ, without a judge.

A token is a word between white space, as the published numbers have it. All measures
move with the length and the number of responses: compare policies at equal length
(see `max_words`) and with equally many responses per prompt.
"""

import collections
import functools
import gzip
import itertools
import logging
import math
import pathlib
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from pfjax.evaluation import estimators

_LOG = logging.getLogger(__name__)
# Looked for when no embedder is named. It reads the first 256 word pieces of a text.
AUTO_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
WORD_BUDGET = 1000
VOCABULARY = 30_522  # as of BERT's word pieces
_BLEU_ORDER = 4


class Embedder(NamedTuple):
    """Texts to vectors `[n, d]`, which compare within one call."""

    name: str  # stored with every score: numbers of two embedders do not compare
    encode: Callable[[list[str]], np.ndarray]

    def __call__(self, texts: list[str]) -> np.ndarray:
        return self.encode(texts)


def load_embedder(name: str = "auto") -> Embedder:
    """An embedder that is already on this machine; nothing is downloaded.

    Args:
      name: "lexical" for overlap of words and word pairs, which needs no model but
        takes a paraphrase for something new; name or folder of a sentence-transformers
        model; "auto" (or "") for `AUTO_MODEL` if it is here, else "lexical".

    Raises:
      ValueError: if a model was named and it, or the package, is not here.
    """
    if name not in ("", "auto", "lexical"):
        return _sentence_model(name)
    if name != "lexical":
        try:
            return _sentence_model(AUTO_MODEL)
        except ValueError as error:
            _LOG.warning("semantic diversity is of words, not of meaning: %s", error)
    return Embedder("lexical", _lexical)


def _sentence_model(name: str) -> Embedder:
    from pfjax.model import hub

    folder = pathlib.Path(name).expanduser()
    try:
        import huggingface_hub
        import sentence_transformers

        if not folder.is_dir():
            hub_id = name if "/" in name else f"sentence-transformers/{name}"
            path = huggingface_hub.snapshot_download(hub_id, local_files_only=True)
            folder = pathlib.Path(path)
        # Folders are called "model" as often as not; the weights tell.
        full_name = f"{pathlib.Path(name).name}@{hub.fingerprint(folder)}"
        load = sentence_transformers.SentenceTransformer
        model = load(str(folder), local_files_only=True)
    except Exception as error:
        raise ValueError(
            f"embedder {name!r} is not here: {error}; install sentence-transformers and "
            "`hf download` the model, or give its folder, or use 'lexical'"
        ) from error
    options = {"convert_to_numpy": True, "show_progress_bar": False}
    return Embedder(full_name, functools.partial(model.encode, **options))


def _lexical(texts: list[str]) -> np.ndarray:
    """`1 + log(count)` of words and pairs of neighbours, case folded, unit norm.

    Nothing is hashed, so nothing collides. Texts without a word have one vector.
    """
    counts = []
    for text in texts:
        words = re.findall(r"\w+", text.casefold()) or [""]
        counts.append(collections.Counter([*words, *itertools.pairwise(words)]))
    at = {gram: i for i, gram in enumerate(dict.fromkeys(g for c in counts for g in c))}
    vectors = np.zeros((len(texts), len(at)))
    for row, count in zip(vectors, counts, strict=True):
        row[[at[g] for g in count]] = 1 + np.log(list(count.values()))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def semantic_diversity(vectors: Float[np.ndarray, "n d"]) -> float:
    r"""Mean over pairs of one minus the cosine; higher is more diverse.

    .. math:: \frac{2}{n(n-1)} \sum_{i<j} 1 - clip(\cos(e_i, e_j), 0, 1)

    Older code of Verbalized Sampling has `(1 - cos) / 2`, about half of this. Embedders
    differ more than policies do: name yours beside the number.

    References:
      Zhang et al. 2025, Verbalized Sampling, arXiv 2510.01171.
    """
    pairs = _cosines(vectors)[np.triu_indices(len(vectors), k=1)]
    return float(np.mean(1 - np.clip(pairs, 0, 1)))


def vendi(similarities: Float[np.ndarray, "n n"]) -> float:
    r"""Effective number of different responses, 1 to n; higher is more diverse.

    .. math:: \exp(-\sum_i \lambda_i \log \lambda_i), \lambda_i eigenvalues of K / n

    K is symmetric, positive semi-definite, 1 on the diagonal: cosines as they are,
    since clipped ones may fail. Only numbers of equally many responses compare.

    References:
      Friedman and Dieng 2022, arXiv 2210.02410.
    """
    k = similarities.astype(np.float64)
    weights = np.linalg.eigvalsh(k) / len(k)
    is_symmetric, has_ones = np.allclose(k, k.T), np.allclose(np.diag(k), 1)
    if not (is_symmetric and has_ones and weights[0] > -1e-4):
        raise ValueError(
            "vendi needs a symmetric, positive semi-definite matrix with diagonal 1, "
            f"got diagonal {np.diag(k)}, smallest eigenvalue {weights[0] * len(k):.3g}"
        )
    weights = weights[weights > 0]
    return float(np.exp(-np.sum(weights * np.log(weights))))


def _cosines(vectors: np.ndarray) -> np.ndarray:
    vectors = np.asarray(vectors, np.float64)
    _check_pairs(len(vectors))
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not (np.isfinite(norms).all() and norms.all()):
        raise ValueError(f"embeddings must be finite, not 0; norms are {norms[:, 0]}")
    vectors = vectors / norms
    return vectors @ vectors.T


def pairwise_rouge_l(texts: list[str]) -> float:
    r"""Mean over pairs of the longest common subsequence; lower is more diverse.

    .. math:: F = 2PR / (P + R) = 2 LCS / (|a| + |b|), P = LCS / |b|, R = LCS / |a|

    Nothing is stemmed or folded, unlike in the package `rouge-score`. F of two empty
    texts is 1.

    References:
      Lin 2004, ROUGE; Zhang et al. 2025, arXiv 2510.01171.
    """
    _check_pairs(len(texts))
    words = [text.split() for text in texts]
    total = 0.0
    for i, a in enumerate(words):
        where: dict[str, int] = {}  # word -> its places in `a` as bits
        for place, word in enumerate(a):
            where[word] = where.get(word, 0) | 1 << place
        for b in words[i + 1 :]:
            num = len(a) + len(b)
            total += 2 * _lcs(where, len(a), b) / num if num else 1.0
    return total / math.comb(len(texts), 2)


def _lcs(where: dict[str, int], length: int, b: list[str]) -> int:
    """Hyyro 2004, Bit-parallel LCS-length computation revisited: 20 us for 200 words."""
    row = full = (1 << length) - 1  # bit i is 0 where a[i] adds one to the LCS
    for word in b:
        if word in where:
            hit = row & where[word]
            row = (row + hit) | (row - hit)
    return length - (row & full).bit_count()


def self_bleu(texts: list[str]) -> float:
    r"""Mean BLEU-4 of each response against all others; lower is more diverse.

    .. math:: \min(1, e^{1 - r/c}) \prod_{k=1}^{4} p_k^{1/4}

    c words, r in the reference of closest length; `p_k` is the fraction of k-grams found
    in a reference, 0.1 hits if none (NLTK's smoothing method 1, as in Texygen). It
    grows with the number of responses. Ours: of fewer than 4 words the orders there
    are, so that copies give 1.

    References:
      Zhu et al. 2018, Texygen, arXiv 1802.01886; Papineni et al. 2002.
    """
    _check_pairs(len(texts))
    words = [text.split() for text in texts]
    log_p = np.zeros((len(texts), _BLEU_ORDER))
    for k in range(1, _BLEU_ORDER + 1):
        counts = [collections.Counter(_grams(w, k)) for w in words]
        # The two largest counts of a gram give its largest in all texts but one.
        most: dict[tuple[str, ...], tuple[int, int]] = {}
        for count in counts:
            for gram, m in count.items():
                first, second = most.get(gram, (0, 0))
                most[gram] = (m, first) if m > first else (first, max(second, m))
        for i, count in enumerate(counts):
            hits = sum(min(m, most[g][m == most[g][0]]) for g, m in count.items())
            if k == 1 and not hits:
                log_p[i, 0] = -np.inf
            elif count:
                log_p[i, k - 1] = np.log((hits or 0.1) / count.total())
    lengths = [len(w) for w in words]
    bleu = np.zeros(len(texts))
    for i, c in enumerate(lengths):
        others = lengths[:i] + lengths[i + 1 :]
        r = min(others, key=lambda length: (abs(length - c), length))
        orders = min(c, _BLEU_ORDER)
        bleu[i] = np.exp(min(0, 1 - r / c) + log_p[i].sum() / orders) if c else r == 0
    return float(np.mean(bleu))


def distinct_n(
    texts: list[str], n: int, budget: int | None = None, vocabulary: int | None = None
) -> float:
    r"""Fraction of n-grams that are new; higher is more diverse.

    .. math:: N / C, or expectation-adjusted N / (V (1 - ((V - 1) / V)^C))

    N distinct of C n-grams, pooled over the texts; none straddles two. N / C falls as
    text grows; the adjusted form, which divides by what uniform samples from V would give,
    moves less and may exceed 1.

    Args:
      budget: words counted, all texts cut at one length; of fewer all are, and look
        more diverse than they are.
      vocabulary: V of the adjusted form; None for the plain one.

    References:
      Li et al. 2016, arXiv 1510.03055; Liu et al. 2022, arXiv 2202.13587.
    """
    if n < 1 or (budget is not None and budget < 1):
        raise ValueError(f"distinct-n needs n and budget >= 1, got {n} and {budget}")
    words = [text.split() for text in texts]
    cut = None if budget is None else _equal_cut([len(w) for w in words], budget)
    grams = [gram for w in words for gram in _grams(w[:cut], n)]
    expected = float(len(grams))
    if vocabulary is not None:  # 1 - (1 - 1/V)^C without cancellation
        expected = -vocabulary * math.expm1(len(grams) * math.log1p(-1 / vocabulary))
    return len(set(grams)) / expected if grams else 0.0


def _equal_cut(lengths: list[int], budget: int) -> int:
    """The largest c with sum(min(length, c)) <= budget, or the longest length."""
    for i, length in enumerate(sorted(lengths)):
        even = budget // (len(lengths) - i)
        if length > even:
            return even
        budget -= length
    return max(lengths, default=0)


def _grams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def compression_ratio(texts: list[str]) -> float:
    """Bytes over gzip's bytes; higher is more redundant, so less diverse.

    It grows with the number of bytes, and depends a little on the version of zlib.
    Texts are sorted, so that their order is nothing.

    References:
      Shaib et al. 2024, arXiv 2403.00553.
    """
    raw = "\n".join(sorted(texts)).encode()
    return len(raw) / len(gzip.compress(raw, mtime=0))


def diversity_scores(
    responses: list[list[str]],
    embed: Callable[[list[str]], np.ndarray],
    budget: int = WORD_BUDGET,
    max_words: int | None = None,
) -> dict[str, float]:
    """All measures of the responses to each prompt, averaged over prompts.

    Args:
      responses: those to each prompt.
      embed: an `Embedder` (store its name beside the scores) or any such function.
      budget: words per prompt that `distinct_*` are of.
      max_words: cuts responses first, to compare policies at equal length.

    Returns:
      `semantic_diversity`, `vendi`, `rouge_l`, `self_bleu`, `distinct_n` and
      `adjusted_distinct_n` for n = 1, 2, 3, `compression_ratio`, `words_mean`,
      `budget_met` (fraction of prompts whose responses have `budget` words; below 1
      `distinct_*` flatter), and the standard error over prompts of each, `*_se`.

    Raises:
      ValueError: if there is no prompt, or one has a single response.
    """
    few = {i: len(texts) for i, texts in enumerate(responses) if len(texts) < 2}
    if few or not responses:
        raise ValueError(
            "diversity is between the responses to a prompt: sample two or more, or "
            f"leave the prompt out; got {len(responses)} prompts, too few for {few}"
        )
    per_prompt: dict[str, list[float]] = collections.defaultdict(list)
    for texts in responses:
        if max_words is not None:
            texts = [" ".join(text.split()[:max_words]) for text in texts]
        for name, value in _scores_of_prompt(texts, embed, budget).items():
            per_prompt[name].append(value)
    scores = {}
    for name, values in per_prompt.items():
        scores[name] = float(np.mean(values))
        scores[f"{name}_se"] = estimators.standard_error(np.array(values))
    return {name: x for name, x in scores.items() if x is not None}


def _scores_of_prompt(
    texts: list[str], embed: Callable[[list[str]], np.ndarray], budget: int
) -> dict[str, float]:
    vectors = np.asarray(embed(texts))
    if vectors.ndim != 2 or len(vectors) != len(texts):
        raise ValueError(f"{len(texts)} texts became embeddings {vectors.shape}")
    num_words = [len(text.split()) for text in texts]
    scores = {
        "semantic_diversity": semantic_diversity(vectors),
        "vendi": vendi(_cosines(vectors)),
        "rouge_l": pairwise_rouge_l(texts),
        "self_bleu": self_bleu(texts),
        "compression_ratio": compression_ratio(texts),
        "words_mean": float(np.mean(num_words)),
        "budget_met": float(sum(num_words) >= budget),
    }
    for n in (1, 2, 3):
        scores[f"distinct_{n}"] = distinct_n(texts, n, budget)
        scores[f"adjusted_distinct_{n}"] = distinct_n(texts, n, budget, VOCABULARY)
    return scores


def _check_pairs(num: int) -> None:
    if num < 2:
        raise ValueError(f"diversity is between responses: need two or more, got {num}")

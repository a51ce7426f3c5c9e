"""avg@k, pass@k, maj@k and their standard errors, from n samples per problem."""

import itertools
import math

import numpy as np
from jaxtyping import Bool, Float, Int


def standard_error(per_problem: Float[np.ndarray, "p"]) -> float | None:
    """Standard error of a mean over problems; None for fewer than two, which do not tell.

    Problems are what was drawn from a population: more samples per problem do not
    shrink the spread between problems.
    """
    n = len(per_problem)
    return float(np.std(per_problem, ddof=1) / np.sqrt(n)) if n > 1 else None


def pass_at_k(num_correct: Int[np.ndarray, "p"], n: int, k: int) -> np.ndarray:
    """Unbiased probability that k of n samples hold a correct one, `[P]`.

    .. math:: 1 - C(n - c, k) / C(n, k)

    Raises:
      ValueError: if k exceeds n.

    References:
      Chen et al. 2021, arXiv 2107.03374, Eq. 1.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@k needs 1 <= k <= n, got k={k}, n={n}")
    # Product form: no large binomials. A factor is 0 when n - c < k.
    miss = [np.prod(1.0 - k / np.arange(n - c + 1, n + 1)) for c in num_correct]
    return 1.0 - np.array(miss, np.float64)


def maj_at_k(
    classes: Int[np.ndarray, "n"],
    is_correct: Bool[np.ndarray, "n"],
    k: int,
    num_subsets: int = 100,
    seed: int = 0,
) -> float:
    """Expected correctness of the majority class of answers among k of n samples.

    Of tied classes the fraction that is correct; 0 when no sample votes. The mean is over
    all subsets of k, or over `num_subsets` random ones where there are more: the same for
    every problem and model.

    Args:
      classes: equivalence class of each sample's answer; -1 (no answer) has no vote.
      is_correct: whether each sample is correct.

    Raises:
      ValueError: if k exceeds n.
    """
    n = len(classes)
    if not 1 <= k <= n:
        raise ValueError(f"maj@k needs 1 <= k <= n, got k={k}, n={n}")
    if math.comb(n, k) <= num_subsets:
        subsets = map(list, itertools.combinations(range(n), k))
    else:
        rng = np.random.default_rng(seed)
        subsets = (rng.permutation(n)[:k] for _ in range(num_subsets))
    scores = []
    for subset in subsets:
        voted, correct = classes[subset], is_correct[subset]
        names, votes = np.unique(voted[voted >= 0], return_counts=True)
        winners = names[votes == votes.max(initial=0)]
        scores.append(np.mean([correct[voted == c].mean() for c in winners] or 0.0))
    return float(np.mean(scores))


def answer_entropy(classes: Int[np.ndarray, "n"]) -> float:
    r"""Entropy of one problem's answers, in nats; 0 if there are none.

    .. math:: -\sum_c f_c \log f_c

    with f_c the fraction of class c among the samples that have an answer.
    """
    _, votes = np.unique(classes[classes >= 0], return_counts=True)
    fraction = votes / max(votes.sum(), 1)
    return float(np.sum(fraction * np.log(1 / fraction)))

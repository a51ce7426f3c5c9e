"""Statistics of the study: intervals of means over seeds and bases, methods paired.

Runs of a world and a base are one stratum. A bootstrap sample draws seeds within each, the
same ones for all methods, so that an interval of a difference knows that they share bases
and prompts.

References:
  Agarwal et al., 2021 (arXiv 2108.13264): interquartile means, stratified bootstrap.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

_SAMPLES = 2000  # of the bootstrap

# `[strata, seeds]` of one method.
Scores = np.ndarray


class Interval(NamedTuple):
    value: float
    low: float  # of 95 %
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    @property
    def holds_zero(self) -> bool:
        return self.low <= 0 <= self.high


def interquartile_mean(x: np.ndarray) -> np.ndarray:
    """Mean of the middle half along the last axis; a value on the edge counts in part.

    >>> interquartile_mean(np.array([0.0, 1.0, 2.0, 100.0]))
    np.float64(1.5)
    >>> interquartile_mean(np.array([0.0, 1.0, 100.0]))  # a quarter, 1, a quarter
    np.float64(17.333333333333332)
    """
    n = x.shape[-1]
    at = np.arange(n)
    low, high = n / 4, 3 * n / 4
    weight = (np.minimum(at + 1, high) - np.maximum(at, low)).clip(0)
    return np.sort(x, axis=-1) @ (weight / weight.sum())


def mean(x: np.ndarray) -> np.ndarray:
    return x.mean(axis=-1)


def intervals(
    scores: Mapping[str, Scores],
    statistic: Callable[[np.ndarray], np.ndarray] = mean,
    reference: str | None = None,
) -> dict[str, Interval]:
    """Intervals of a statistic of all runs of each method.

    Args:
      scores: by method, `[strata, seeds]`; the same strata and seeds.
      statistic: over the last axis.
      reference: a method that the others are compared with; then intervals are of their
        differences from it.
    """
    rng = np.random.default_rng(0)
    strata, seeds = next(iter(scores.values())).shape
    drawn = rng.integers(seeds, size=(_SAMPLES, strata, seeds))
    at = np.arange(strata)[:, None]

    def both(x: Scores) -> tuple[float, np.ndarray]:
        return statistic(x.reshape(-1)), statistic(x[at, drawn].reshape(_SAMPLES, -1))

    value, resampled = both(scores[reference]) if reference else (0.0, 0.0)
    out = {}
    for name, x in scores.items():
        own, found = both(x)
        low, high = np.quantile(found - resampled, [0.025, 0.975])
        out[name] = Interval(float(own - value), float(low), float(high))
    return out

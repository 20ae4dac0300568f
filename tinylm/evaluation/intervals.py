"""95% confidence intervals for ratios of sums, for their differences, and for proportions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 1000
_MIN_PAIRS = 5
_Z95 = 1.959964


def bootstrap_ratio(numerators: np.ndarray, denominators: np.ndarray) -> tuple[float, float]:
    """Return the bootstrap interval for sum(numerators) / sum(denominators).

    Resampling keeps each numerator with its denominator. The bounds are NaN if there are fewer than 5 pairs.
    """
    if len(numerators) < _MIN_PAIRS:
        return math.nan, math.nan
    generator = np.random.default_rng(0)
    estimates = np.empty(_RESAMPLES)
    for index in range(_RESAMPLES):
        chosen = generator.integers(0, len(numerators), len(numerators))
        estimates[index] = numerators[chosen].sum() / max(float(denominators[chosen].sum()), 1.0)
    low, high = np.quantile(estimates, (0.025, 0.975))
    return float(low), float(high)


@dataclass(frozen=True)
class PairedDifference:
    """A score of the models A and B on the same texts, and the difference, A minus B, with its paired bootstrap interval."""

    a: float
    b: float
    difference: float
    ci95: tuple[float, float]


def paired_difference(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> PairedDifference:
    """Compare sum(a) / sum(weights) with sum(b) / sum(weights). Each index is one text."""
    total = float(weights.sum())
    scores = float(a.sum()) / total, float(b.sum()) / total
    return PairedDifference(*scores, scores[0] - scores[1], bootstrap_ratio(a - b, weights))


def wilson(successes: float, trials: int) -> tuple[float, float]:
    """Return the Wilson score interval for a proportion (Wilson 1927). The bounds are NaN if there are no trials."""
    if not trials:
        return math.nan, math.nan
    share, z = successes / trials, _Z95
    center = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / (1 + z * z / trials)
    return max(0.0, center - half), min(1.0, center + half)

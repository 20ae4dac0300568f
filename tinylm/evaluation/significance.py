"""Significance tests: whether two models differ on the same text, and whether two recipes differ across several seeds.

Two models are compared with a paired bootstrap and a permutation test. The losses of both models are summed over the same pieces of
text: documents if there are many, otherwise pieces of equal size in bytes. Because the comparison is paired, pieces that are hard
for both models do not add to the variance of the difference. The tokenizers may differ: a token's loss belongs to the piece that
contains the token's first byte.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinylm.errors import InputError
from tinylm.evaluation.breakdown import TokenLosses

_MIN_DOCUMENTS_TO_PAIR = 50
_MAX_PIECES = 200
_MIN_PIECE_BYTES = 200
_MIN_PIECES = 5
_RESAMPLES = 10_000


@dataclass(frozen=True)
class PairedComparison:
    """Bits per byte of the models A and B on the same text, and their difference, A minus B.

    `ci95` is a 95% paired bootstrap interval for the difference. `simultaneous_ci95` is wider if several comparisons are made
    together: with a probability of 95%, every one of these intervals contains its true difference (Bonferroni). `p_value` comes
    from a two-sided permutation test. It is the fraction of random swaps of A and B within pieces that yield a difference at
    least as large as the observed one. `pieces` is the number of pieces, and `kind` describes them.
    """

    a: float
    b: float
    difference: float
    ci95: tuple[float, float]
    simultaneous_ci95: tuple[float, float]
    p_value: float
    pieces: int
    kind: str


@dataclass(frozen=True)
class SeedComparison:
    """Welch's t-test for two recipes with several seeds each. `difference` is the difference in mean bits per byte, A minus B.

    Unlike `PairedComparison`, this test accounts for the variation between seeds, so it compares recipes rather than single models.
    """

    difference: float
    ci95: tuple[float, float]
    p_value: float


def compare_seeds(a: Sequence[float], b: Sequence[float]) -> SeedComparison:
    """Compare two recipes by the bits per byte of each seed (Welch 1947). Each recipe needs at least two seeds."""
    variances = [float(np.var(values, ddof=1)) / len(values) for values in (a, b)]
    difference = float(np.mean(a) - np.mean(b))
    error = math.sqrt(sum(variances))
    if error == 0:
        return SeedComparison(difference, (difference, difference), 1.0 if difference == 0 else 0.0)
    degrees = sum(variances) ** 2 / sum(v**2 / (len(values) - 1) for v, values in zip(variances, (a, b), strict=True))
    low, high = 0.0, 1e6  # bisection for the 95% quantile of |t|
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_test(middle, degrees) > 0.05 else (low, middle)
    return SeedComparison(difference, (difference - high * error, difference + high * error), t_test(difference / error, degrees))


def t_test(t: float, degrees: float) -> float:
    """Return the two-sided p-value of a t statistic: the probability that a Student's t variable is farther from 0.

    With t = sqrt(degrees) tan(angle), the density is proportional to cos(angle)**(degrees - 1).
    """
    angles = np.linspace(math.atan(abs(t) / math.sqrt(degrees)), math.pi / 2, 20_001)
    tail = float(np.trapezoid(np.cos(angles).clip(0) ** (degrees - 1), angles))
    log_half = math.lgamma(degrees / 2) - math.lgamma((degrees + 1) / 2) + 0.5 * math.log(math.pi) - math.log(2)
    return min(tail / math.exp(log_half), 1.0)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for multiple comparisons (Holm 1979), so that the family-wise error rate stays at the nominal level."""
    order = np.argsort(p_values, kind="stable")
    factors = len(p_values) - np.arange(len(p_values))
    adjusted = np.maximum.accumulate(np.asarray(p_values)[order] * factors).clip(max=1)
    corrected = np.empty(len(p_values))
    corrected[order] = adjusted
    return [float(value) for value in corrected]


def compare_losses(
    a: TokenLosses, a_byte_lengths: np.ndarray, b: TokenLosses, b_byte_lengths: np.ndarray, *, comparisons: int = 1
) -> PairedComparison:
    """Compare two models by their losses on the same text. `comparisons` is the number of comparisons made together.

    Raises `InputError` if the scored texts differ or are too short.
    """
    sizes = np.array(_document_bytes(a, a_byte_lengths))
    if sizes.tolist() != _document_bytes(b, b_byte_lengths):
        raise InputError("the texts differ", hint="choose a text for the comparison with --on")
    if len(sizes) >= _MIN_DOCUMENTS_TO_PAIR:
        kind, ends = "documents", np.cumsum(sizes)
    else:
        count = min(_MAX_PIECES, max(int(sizes.sum()) // _MIN_PIECE_BYTES, 1))
        kind, ends = "stretches of text", np.linspace(0, sizes.sum(), count + 1)[1:]
    if len(ends) < _MIN_PIECES:
        raise InputError("the text is too short for a comparison", hint="use at least 1,000 bytes")
    a_nats, b_nats = (_nats_of_pieces(losses, lengths, ends) for losses, lengths in ((a, a_byte_lengths), (b, b_byte_lengths)))
    weights = np.diff(ends, prepend=0)
    total = float(weights.sum())
    differences = (a_nats - b_nats) / math.log(2)
    generator = np.random.default_rng(0)
    chosen = generator.integers(0, len(differences), (_RESAMPLES, len(differences)))
    resampled = differences[chosen].sum(1) / weights[chosen].sum(1)
    low, high = np.quantile(resampled, (0.025, 0.975))
    lowest, highest = np.quantile(resampled, (0.025 / comparisons, 1 - 0.025 / comparisons))
    signs = generator.choice((-1.0, 1.0), (_RESAMPLES, len(differences)))
    as_large = np.abs((signs * differences).sum(1)) >= abs(differences.sum()) * (1 - 1e-12)
    return PairedComparison(
        a=float(a_nats.sum()) / math.log(2) / total,
        b=float(b_nats.sum()) / math.log(2) / total,
        difference=float(differences.sum()) / total,
        ci95=(float(low), float(high)),
        simultaneous_ci95=(float(lowest), float(highest)),
        p_value=float((as_large.sum() + 1) / (_RESAMPLES + 1)),
        pieces=len(differences),
        kind=kind,
    )


def _document_bytes(losses: TokenLosses, byte_lengths: np.ndarray) -> list[int]:
    return [int(byte_lengths[losses.shard.tokens[start:end]].sum()) for start, end in losses.shard.documents()]


def _nats_of_pieces(losses: TokenLosses, byte_lengths: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the summed loss of each piece in nats. `ends` contains the byte offsets at which the pieces end."""
    positions = losses.positions
    sizes = byte_lengths[losses.shard.tokens[positions]]
    starts = np.cumsum(sizes) - sizes
    return np.bincount(
        np.searchsorted(ends, starts, side="right").clip(max=len(ends) - 1),
        weights=losses.nats[positions],
        minlength=len(ends),
    )

"""Score translations with BLEU and chrF, including bootstrap confidence intervals. `sacrebleu` computes the scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from tinylm.errors import missing_extra

_RESAMPLES = 1000


@dataclass(frozen=True)
class TranslationScores:
    """Scores between 0 and 100, with 95% bootstrap confidence intervals. The intervals are None for a single sentence."""

    bleu: float
    bleu_ci95: tuple[float, float] | None
    bleu_signature: str
    """sacrebleu's description of the settings."""
    chrf: float
    chrf_ci95: tuple[float, float] | None


@dataclass(frozen=True)
class PairedScores:
    """BLEU scores of two systems on the same sentences, and the difference A minus B with a paired 95% bootstrap confidence
    interval."""

    a_bleu: float
    b_bleu: float
    difference: float
    ci95: tuple[float, float]
    p_value: float
    """Two-sided p-value from the fraction of resampled differences with the opposite sign (Koehn 2004)."""


def require_sacrebleu() -> ModuleType:
    """Import sacrebleu. If it is missing, raises `InputError` with the command that installs it."""
    try:
        import sacrebleu
    except ImportError:
        raise missing_extra("translate", "computing BLEU") from None
    module: ModuleType = sacrebleu
    return module


def corpus_bleu(translations: Sequence[str], references: Sequence[str]) -> float:
    """Return the BLEU score of translations, without a confidence interval."""
    return float(require_sacrebleu().metrics.BLEU().corpus_score(list(translations), [list(references)]).score)


def score(translations: Sequence[str], references: Sequence[str]) -> TranslationScores:
    """Score translations with one reference per sentence."""
    metrics = require_sacrebleu().metrics
    bleu, chrf = metrics.BLEU(), metrics.CHRF()
    values = [metric.corpus_score(list(translations), [list(references)]).score for metric in (bleu, chrf)]
    intervals = [_interval(metric, translations, references) for metric in (bleu, chrf)]
    return TranslationScores(values[0], intervals[0], str(bleu.get_signature()), values[1], intervals[1])


def compare(a: Sequence[str], b: Sequence[str], references: Sequence[str]) -> PairedScores:
    """Compare two lists of translations of the same sentences with the paired bootstrap."""
    metric = require_sacrebleu().metrics.BLEU()
    chosen = _resamples(len(references))
    full = [float(metric.corpus_score(list(each), [list(references)]).score) for each in (a, b)]
    first, second = (_resampled(metric, each, references, chosen) for each in (a, b))
    differences = first - second
    low, high = (float(value) for value in np.quantile(differences, (0.025, 0.975)))
    difference = full[0] - full[1]
    other_sign = int((differences * np.sign(difference) <= 0).sum()) if difference else len(differences)
    return PairedScores(full[0], full[1], difference, (low, high), min(1.0, 2 * (other_sign + 1) / (len(differences) + 1)))


def _interval(metric: Any, translations: Sequence[str], references: Sequence[str]) -> tuple[float, float] | None:
    if len(references) < 2:
        return None
    low, high = np.quantile(_resampled(metric, translations, references, _resamples(len(references))), (0.025, 0.975))
    return float(low), float(high)


def _resamples(sentences: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, sentences, (_RESAMPLES, sentences))


def _resampled(metric: Any, translations: Sequence[str], references: Sequence[str], chosen: np.ndarray) -> np.ndarray:
    """Return the score of each resample, (resamples,). Both metrics depend only on counts that are summed over sentences."""
    # sacrebleu does not provide public access to the counts of each sentence.
    counts = np.array(metric._extract_corpus_statistics(list(translations), [list(references)]), dtype=np.float64)
    return np.array([metric._compute_score_from_stats(counts[rows].sum(axis=0).tolist()).score for rows in chosen])

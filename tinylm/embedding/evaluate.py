"""Evaluate vectors on public test sets for analogies (questions-words) and word similarity (WordSim-353, SimLex-999).

An analogy file has section lines (`: NAME`) and questions with four words each. A similarity file has two words and a score per
line, separated by tabs, commas, semicolons or spaces. Questions that contain a word without a vector are skipped. Coverage is the
fraction of the questions that are not skipped.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tinylm.embedding.vectors import Vectors
from tinylm.errors import InputError

_BATCH = 256
"""Number of questions per batch."""


@dataclass(frozen=True)
class AnalogyResult:
    correct: int
    covered: int
    """Number of questions in which all words have a vector."""
    total: int
    sections: dict[str, tuple[int, int]] = field(default_factory=dict)
    """The number of (correct, covered) questions in each section."""

    @property
    def accuracy(self) -> float | None:
        """The fraction of the covered questions that were answered correctly, or None if no questions are covered."""
        return self.correct / self.covered if self.covered else None

    @property
    def coverage(self) -> float:
        return self.covered / self.total


@dataclass(frozen=True)
class SimilarityResult:
    pairs: int
    covered: int
    """Number of pairs in which both words have a vector."""
    spearman: float | None
    """Rank correlation with the human scores, or None if there are fewer than three pairs or all values are equal."""
    pearson: float | None


def evaluate(
    vectors: Vectors, path: Path, *, method: str = "3cosadd", max_names: int | None = 30_000
) -> AnalogyResult | SimilarityResult:
    """Evaluate vectors on an analogy or similarity file. The format is detected from the content.

    Only the first `max_names` names can be answers. Raises `InputError` if the file has neither format.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 at byte {error.start}", where=str(path)) from None
    except OSError as error:
        raise InputError(error.strerror or "cannot be read", where=str(path)) from None
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")]
    if not numbered:
        raise InputError("the file contains no questions", where=str(path))
    if any(line.startswith(":") for _, line in numbered) or len(numbered[0][1].split()) == 4:
        return _evaluate_analogies(vectors, numbered, path, method, max_names)
    return _evaluate_similarities(vectors, numbered, path)


def _evaluate_analogies(
    vectors: Vectors, lines: Iterable[tuple[int, str]], path: Path, method: str, max_names: int | None
) -> AnalogyResult:
    max_names = min(max_names or len(vectors), len(vectors))
    total, section = 0, ""
    questions: list[list[int]] = []
    question_sections: list[str] = []
    for number, line in lines:
        if line.startswith(":"):
            section = line[1:].strip()
            continue
        words = line.split()
        if len(words) != 4:
            raise InputError(f"an analogy has four words, not {len(words)}", where=f"{path}:{number}")
        total += 1
        rows = [vectors.find(word) for word in words]
        if all(row is not None and row < max_names for row in rows):
            questions.append([row for row in rows if row is not None])
            question_sections.append(section)
    if not total:
        raise InputError("the file contains no questions", where=str(path))
    correct = _answered_correctly(vectors, np.array(questions, dtype=np.int64).reshape(-1, 4), method, max_names)
    sections: dict[str, tuple[int, int]] = {}
    for section, is_correct in zip(question_sections, correct.tolist(), strict=True):
        section_correct, section_covered = sections.get(section, (0, 0))
        sections[section] = (section_correct + is_correct, section_covered + 1)
    return AnalogyResult(int(correct.sum()), len(questions), total, sections)


def _answered_correctly(vectors: Vectors, questions: np.ndarray, method: str, max_names: int) -> np.ndarray:
    """Return whether each question is answered correctly, (questions,). `questions` contains row numbers, (questions, 4)."""
    correct = np.zeros(len(questions), dtype=bool)
    for start in range(0, len(questions), _BATCH):
        batch = questions[start : start + _BATCH]
        scores = vectors.analogy_scores(batch[:, :3], method, max_names)
        np.put_along_axis(scores, batch[:, :3], -np.inf, axis=1)
        correct[start : start + _BATCH] = scores.argmax(axis=1) == batch[:, 3]
    return correct


def _evaluate_similarities(vectors: Vectors, lines: list[tuple[int, str]], path: Path) -> SimilarityResult:
    scores, cosines = [], []
    pairs = 0
    for position, (number, line) in enumerate(lines):
        parts = next((line.split(separator) for separator in ("\t", ",", ";") if separator in line), line.split())
        try:
            score = float(parts[2])
        except (IndexError, ValueError):
            if position == 0 and len(parts) > 2:
                continue  # a header
            raise InputError("a line must have two words and a number", where=f"{path}:{number}") from None
        pairs += 1
        rows = [vectors.find(word.strip()) for word in parts[:2]]
        if rows[0] is not None and rows[1] is not None:
            scores.append(score)
            cosines.append(float(vectors.normalized[rows[0]] @ vectors.normalized[rows[1]]))
    spearman = correlation(ranks(np.array(scores)), ranks(np.array(cosines)))
    return SimilarityResult(pairs, len(scores), spearman, correlation(np.array(scores), np.array(cosines)))


def ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value. Equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last_ranks = np.cumsum(counts)
    means: np.ndarray = last_ranks - (counts - 1) / 2
    return means[inverse] if len(values) else values


def correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    """Return Pearson's correlation, or None if there are fewer than three values or either array is constant."""
    if len(first) < 3 or first.std() == 0 or second.std() == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])

"""How good vectors are, by the public tests: analogies (questions-words) and word similarity (WordSim-353, SimLex-999).

An analogy file has a line `: section` before questions of four words; a similarity file has two words and a score, separated
by tabs, commas or spaces. Questions with a word that has no vector are left out, and the coverage says how many.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tinylm.embedding.vectors import Vectors
from tinylm.errors import InputError

_BATCH = 256


@dataclass(frozen=True)
class Analogies:
    correct: int
    covered: int
    total: int
    sections: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Section -> (correct, covered)."""

    @property
    def accuracy(self) -> float | None:
        """Of the questions whose words all have a vector; None when there are none."""
        return self.correct / self.covered if self.covered else None

    @property
    def coverage(self) -> float:
        return self.covered / self.total


@dataclass(frozen=True)
class Similarities:
    pairs: int
    covered: int
    spearman: float | None
    """Correlation of ranks, the usual figure; None below three pairs or where all are equal."""
    pearson: float | None


def evaluate(vectors: Vectors, path: Path, *, method: str = "3cosadd", most: int | None = 30_000) -> Analogies | Similarities:
    """Judge by one file, whose format is told from its lines. `most`: answers come from the first so many names only.

    Raises `InputError` for a file that is neither.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 at byte {error.start}", where=str(path)) from None
    except OSError as error:
        raise InputError(error.strerror or "cannot be read", where=str(path)) from None
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")]
    if not numbered:
        raise InputError("no questions in this file", where=str(path))
    if any(line.startswith(":") for _, line in numbered) or len(numbered[0][1].split()) == 4:
        return _analogies(vectors, numbered, path, method, most)
    return _similarities(vectors, numbered, path)


def _analogies(vectors: Vectors, lines: Iterable[tuple[int, str]], path: Path, method: str, most: int | None) -> Analogies:
    most = min(most or len(vectors), len(vectors))
    total, section = 0, ""
    rows: list[list[int]] = []
    places: list[str] = []
    for number, line in lines:
        if line.startswith(":"):
            section = line[1:].strip()
            continue
        words = line.split()
        if len(words) != 4:
            raise InputError(f"an analogy has four words, not {len(words)}", where=f"{path}:{number}")
        total += 1
        found = [vectors.find(word) for word in words]
        if all(row is not None and row < most for row in found):
            rows.append([row for row in found if row is not None])
            places.append(section)
    if not total:
        raise InputError("no questions in this file", where=str(path))
    right = _answered(vectors, np.array(rows, dtype=np.int64).reshape(-1, 4), method, most)
    sections: dict[str, tuple[int, int]] = {}
    for place, correct in zip(places, right.tolist(), strict=True):
        before = sections.get(place, (0, 0))
        sections[place] = (before[0] + correct, before[1] + 1)
    return Analogies(int(right.sum()), len(rows), total, sections)


def _answered(vectors: Vectors, rows: np.ndarray, method: str, most: int) -> np.ndarray:
    """Which questions are answered right, bool (questions,)."""
    right = np.zeros(len(rows), dtype=bool)
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        scores = vectors.analogy_scores(batch[:, :3], method, most)
        np.put_along_axis(scores, batch[:, :3], -np.inf, axis=1)
        right[start : start + _BATCH] = scores.argmax(axis=1) == batch[:, 3]
    return right


def _similarities(vectors: Vectors, lines: list[tuple[int, str]], path: Path) -> Similarities:
    given, ours = [], []
    pairs = 0
    for position, (number, line) in enumerate(lines):
        parts = next((line.split(mark) for mark in ("\t", ",", ";") if mark in line), line.split())
        try:
            score = float(parts[2])
        except (IndexError, ValueError):
            if position == 0 and len(parts) > 2:
                continue  # a header
            raise InputError("wants two words and a number", where=f"{path}:{number}") from None
        pairs += 1
        rows = [vectors.find(word.strip()) for word in parts[:2]]
        if rows[0] is not None and rows[1] is not None:
            given.append(score)
            ours.append(float(vectors.units[rows[0]] @ vectors.units[rows[1]]))
    ranked = correlation(ranks(np.array(given)), ranks(np.array(ours)))
    return Similarities(pairs, len(given), ranked, correlation(np.array(given), np.array(ours)))


def ranks(values: np.ndarray) -> np.ndarray:
    """The rank of each value, equal values sharing the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    means: np.ndarray = ends - (counts - 1) / 2
    return means[inverse] if len(values) else values


def correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    """Pearson's; None where it is not defined."""
    if len(first) < 3 or first.std() == 0 or second.std() == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])

"""Group vectors by similarity, and place labels in an image so that they do not overlap."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

MAX_GROUPS = 8
_NAMES_PER_GROUP = 12
_ITERATIONS = 30


def group(normalized: np.ndarray) -> np.ndarray:
    """Divide normalized vectors (names, dimensions) into groups. Return the group of each vector, int64 (names,).

    The method is spherical k-means (Dhillon & Modha 2001). The first center is the first vector. Each additional center is the
    vector that is least similar to the centers chosen before it, so no random numbers are needed. Group 0 is the largest.
    """
    count = max(1, min(MAX_GROUPS, len(normalized) // _NAMES_PER_GROUP))
    chosen = [0]
    closest = normalized @ normalized[0]
    while len(chosen) < count:
        chosen.append(int(closest.argmin()))
        closest = np.maximum(closest, normalized @ normalized[chosen[-1]])
    centers = normalized[chosen]
    groups = np.zeros(len(normalized), dtype=np.int64)
    for _ in range(_ITERATIONS):
        assigned = (normalized @ centers.T).argmax(axis=1)
        if (assigned == groups).all():
            break
        groups = assigned
        sums = np.stack([normalized[groups == number].sum(axis=0) for number in range(count)])
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        centers = np.where(norms > 0, sums / np.maximum(norms, 1e-12), centers)
    order = np.argsort(-np.bincount(groups, minlength=count), kind="stable")
    rank = np.empty(count, dtype=np.int64)
    rank[order] = np.arange(count)
    return rank[groups]


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    def overlaps(self, other: Box) -> bool:
        return self.left < other.right and other.left < self.right and self.bottom < other.top and other.bottom < self.top


def place_labels(
    points: np.ndarray, sizes: Iterable[tuple[float, float]], area: Box, limit: int, gap: float
) -> Iterator[tuple[int, float, float]]:
    """Yield (row, left, bottom) for up to `limit` labels that do not overlap, in row order. `left` and `bottom` are in pixels.

    `points` is (names, 2) in pixels, and `sizes` yields the width and height of each label. A label is placed to the right of, to
    the left of, above or below its point, at a distance of `gap`. It is skipped if all four places are taken or outside `area`.
    """
    placed: list[Box] = []
    for row, (width, height) in enumerate(sizes):
        if len(placed) == limit:
            return
        x, y = points[row]
        corners: Sequence[tuple[float, float]] = (
            (x + gap, y - height / 2),
            (x - gap - width, y - height / 2),
            (x - width / 2, y + gap),
            (x - width / 2, y - gap - height),
        )
        for left, bottom in corners:
            box = Box(left, bottom, left + width, bottom + height)
            inside = area.left <= box.left and box.right <= area.right and area.bottom <= box.bottom and box.top <= area.top
            if inside and not any(box.overlaps(other) for other in placed):
                placed.append(box)
                yield row, left, bottom
                break

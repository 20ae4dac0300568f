"""Smooth the training-loss curve without introducing lag, which would make the training loss look higher than the held-out loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

_RADIUS = 0.01
"""Half the width of the window, as a fraction of the run."""


def smoothed(losses: Sequence[float], fraction_done: float) -> list[float]:
    """Return the mean of the losses in a window around each loss. Near both ends the window shrinks, so that it stays centered.

    `fraction_done`: the completed fraction of the run. A centered window does not lag behind a falling loss, unlike a moving
    average of past losses. In a short run the window contains a single loss. Non-finite losses are excluded from the means.
    """
    radius = int(_RADIUS * len(losses) / max(fraction_done, 1e-9))
    if radius == 0:
        return list(losses)
    finite = [math.isfinite(loss) for loss in losses]
    sums = [0.0, *accumulate(loss if use else 0.0 for loss, use in zip(losses, finite, strict=True))]
    counts = [0, *accumulate(finite)]
    means = []
    for index, loss in enumerate(losses):
        reach = min(radius, index, len(losses) - 1 - index)
        low, high = index - reach, index + reach + 1
        means.append((sums[high] - sums[low]) / (counts[high] - counts[low]) if finite[index] else loss)
    return means

"""Looking at every loss and gradient before it is used: what is no number is left out, and what jumps is told.

A step without a usable gradient changes nothing. After some of them in a row the trainer goes back to its last good checkpoint and
on past the text that did it; when that does not help either, it stops and leaves a report (`training.replay`). What a guard
remembers is saved with every checkpoint, so that a resumed training is guarded as the one that was not stopped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import median

from tinylm.recipe.schema import GuardsSection

WINDOW = 64
_ENOUGH = 32
"""Losses to know before one of them can be a spike."""
_NORMAL = 1.4826
"""Of normally distributed numbers the standard deviation is this multiple of the median absolute deviation."""


@dataclass
class Watch:
    """What was seen so far; saved with every checkpoint."""

    in_a_row: int = 0
    """Steps left out since the last good one."""
    skipped: int = 0
    spikes: int = 0
    rollbacks: int = 0
    recent: list[float] = field(default_factory=list)
    """The last good losses, `WINDOW` at most."""


class Guard:
    """Judges steps by their loss and the norm of their gradient."""

    def __init__(self, section: GuardsSection, watch: Watch) -> None:
        self._section = section
        self._watch = watch

    def problem(self, loss: float, norm: float, overflow_expected: bool) -> str | None:
        """Why a step must be left out, or None. `overflow_expected`: a gradient scaler that finds its scale tries too high ones."""
        watch = self._watch
        if not math.isfinite(loss):
            what = f"the loss is {loss}"
        elif not math.isfinite(norm) and not overflow_expected:
            what = f"the norm of the gradient is {norm}"
        else:
            watch.in_a_row = 0
            return None
        watch.in_a_row += 1
        watch.skipped += 1
        return what

    @property
    def exhausted(self) -> bool:
        """Whether so many steps in a row were left out that going on makes no sense."""
        return self._watch.in_a_row >= self._section.patience

    @property
    def may_go_back(self) -> bool:
        return self._watch.rollbacks < self._section.rollbacks

    def spike(self, loss: float) -> float | None:
        """How many robust deviations a loss lies above the recent ones, where that is a spike; it is then counted.

        The median and the median absolute deviation are not moved by the spikes themselves (Leys et al. 2013).
        """
        watch, limit = self._watch, self._section.spike
        score = robust_score(loss, watch.recent)
        watch.recent = [*watch.recent[-(WINDOW - 1) :], loss]
        if limit is None or score is None or score <= limit:
            return None
        watch.spikes += 1
        return score


def robust_score(value: float, others: list[float]) -> float | None:
    """(value - median) / (1.4826 * median absolute deviation) of the others; None for too few of them or all alike."""
    if len(others) < _ENOUGH:
        return None
    middle = median(others)
    spread = _NORMAL * median(abs(other - middle) for other in others)
    return (value - middle) / spread if spread > 0 else None

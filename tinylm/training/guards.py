"""Check the loss and gradient norm of every step: skip non-finite steps and flag spikes.

A step with a non-finite loss or gradient does not update the weights. After `patience` consecutive skipped steps, the trainer rolls
back to the last good checkpoint and continues after the batches that failed. After `rollbacks` rollbacks, it instead
writes a report (`training.replay`) and aborts. Checkpoints contain the state of the guard, so that resuming does not reset it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import median

from tinylm.recipe.schema import GuardsSection

WINDOW = 64
"""Number of recent losses that a loss is compared with."""
_MIN_LOSSES = 32
"""Minimum number of recent losses needed to detect a spike."""
_MAD_TO_DEVIATION = 1.4826
"""Ratio of the standard deviation to the median absolute deviation in a normal distribution."""


@dataclass
class GuardState:
    """Counters and recent losses. The field names are keys in state.json."""

    in_a_row: int = 0
    """Number of consecutive skipped steps up to now."""
    skipped: int = 0
    spikes: int = 0
    rollbacks: int = 0
    recent: list[float] = field(default_factory=list)
    """The losses of the last `WINDOW` steps that were not skipped."""


class Guard:
    """Decides whether to skip a step, flag a spike, roll back or abort."""

    def __init__(self, section: GuardsSection, state: GuardState) -> None:
        self._section = section
        self._state = state

    def skip_reason(self, loss: float, grad_norm: float, overflow_expected: bool) -> str | None:
        """Return the reason to skip a step, or None. Also count the skipped steps.

        With `overflow_expected`, only the loss has to be finite, because a gradient scaler tries scales that are too large and
        skips those steps.
        """
        state = self._state
        if not math.isfinite(loss):
            reason = f"the loss is {loss}"
        elif not math.isfinite(grad_norm) and not overflow_expected:
            reason = f"the gradient norm is {grad_norm}"
        else:
            state.in_a_row = 0
            return None
        state.in_a_row += 1
        state.skipped += 1
        return reason

    @property
    def rollback_due(self) -> bool:
        """Whether `patience` consecutive steps have been skipped."""
        return self._state.in_a_row >= self._section.patience

    @property
    def may_roll_back(self) -> bool:
        """Whether another rollback is allowed. Otherwise, training must abort."""
        return self._state.rollbacks < self._section.rollbacks

    def spike_score(self, loss: float) -> float | None:
        """Return the robust z-score of a loss if it is a spike, else None. Also count spikes and record the loss.

        Spikes affect the median and the median absolute deviation much less than the mean and the standard deviation (Leys et al.
        2013).
        """
        state, limit = self._state, self._section.spike
        score = robust_z_score(loss, state.recent)
        state.recent = [*state.recent[-(WINDOW - 1) :], loss]
        if limit is None or score is None or score <= limit:
            return None
        state.spikes += 1
        return score


def robust_z_score(value: float, others: list[float]) -> float | None:
    """Return (value - median) / (1.4826 * median absolute deviation), with both medians taken over `others`.

    Return None if `others` has too few values or their deviation is 0.
    """
    if len(others) < _MIN_LOSSES:
        return None
    center = median(others)
    deviation = _MAD_TO_DEVIATION * median(abs(other - center) for other in others)
    return (value - center) / deviation if deviation > 0 else None

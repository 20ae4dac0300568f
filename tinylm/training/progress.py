"""The progress of a training run: counters, best results and guard state, as saved in each checkpoint's state.json."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from tinylm.training.guards import GuardState


@dataclass
class Progress:
    """The field names are keys of state.json. A loss is None until the first step or evaluation."""

    step: int = 0
    """Number of completed steps."""
    cursor: int = 0
    """Position in the data order where the next global batch begins, in sequences."""
    tokens: int = 0
    seconds: float = 0.0
    """Total time, summed over all resumes."""
    train_seconds: float = 0.0
    """Time spent in optimizer steps only."""
    train_loss: float | None = None
    val_loss: float | None = None
    val_bits_per_byte: float | None = None
    evaluated_step: int = 0
    best_step: int = 0
    best_val_loss: float | None = None
    watch: GuardState = field(default_factory=GuardState)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Progress:
        """Restore the progress from the content of a state.json."""
        values = {entry.name: state[entry.name] for entry in fields(cls)}
        return cls(**{**values, "watch": GuardState(**values["watch"])})

"""The progress of a training run: counters, best results and guard state, as saved in each checkpoint's state.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tinylm.errors import InputError
from tinylm.evaluation.metrics import Metric, Metrics
from tinylm.training.guards import GuardState

_COUNTS = ("step", "cursor", "tokens", "evaluated_step", "best_step")
_SINCE_BEST = "evaluations_since_best"
"""This key is optional, because older checkpoints do not have it."""
_TIMES = ("seconds", "train_seconds")
_LARGEST = 2**63


def check_state(state: dict[str, Any], where: str) -> None:
    """Raise `InputError` if the parsed state.json has missing keys or values of the wrong type."""
    watch = state.get("watch")
    if not isinstance(watch, dict) or not isinstance(state.get("scaler"), dict) or watch.keys() != GuardState().__dict__.keys():
        raise InputError("state.json has an unexpected structure", where=where)
    counts = {
        **{name: state.get(name) for name in _COUNTS},
        _SINCE_BEST: state.get(_SINCE_BEST, 0),
        **{name: watch[name] for name in watch if name != "recent"},
    }
    times = {name: state.get(name) for name in _TIMES}
    recent = watch["recent"] if isinstance(watch["recent"], list) else [None]
    wrong = [name for name, value in counts.items() if type(value) is not int or not 0 <= value < _LARGEST]
    wrong += [name for name, value in times.items() if not isinstance(value, (int, float)) or not 0 <= value < _LARGEST]
    wrong += ["recent"] * any(type(loss) not in (int, float) for loss in recent)
    losses = {key: value for key, value in state.items() if key.startswith(("val_", "best_val_")) or key == "train_loss"}
    wrong += [key for key, value in losses.items() if value is not None and type(value) not in (int, float)]
    if wrong:
        raise InputError(f"state.json has an invalid value for {wrong[0]}", where=where)


@dataclass
class Progress:
    """The progress of a run. `train_loss` is None before the first step, and `metrics` is None before the first evaluation."""

    step: int = 0
    """Number of completed steps."""
    cursor: int = 0
    """Position in the data order where the next global batch begins, in sequences."""
    tokens: int = 0
    seconds: float = 0.0
    """Total time in seconds, summed over all resumes."""
    train_seconds: float = 0.0
    """Time spent in optimizer steps only."""
    train_loss: float | None = None
    metrics: Metrics | None = None
    """The metrics from the latest evaluation."""
    evaluated_step: int = 0
    best_step: int = 0
    """The step of the best checkpoint, or 0 if there is none."""
    best_value: float | None = None
    """The primary metric of the best checkpoint."""
    evaluations_since_best: int = 0
    """Number of evaluations since the last one that improved the primary metric."""
    watch: GuardState = field(default_factory=GuardState)

    def as_state(self, defined: Sequence[Metric]) -> dict[str, Any]:
        """Return the contents of state.json. `defined` lists the metrics of the run, primary metric first."""
        return {
            "step": self.step,
            "cursor": self.cursor,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "train_seconds": self.train_seconds,
            "train_loss": self.train_loss,
            **{metric.key: None if self.metrics is None else self.metrics[metric.name] for metric in defined},
            "evaluated_step": self.evaluated_step,
            "best_step": self.best_step,
            _best_key(defined): self.best_value,
            _SINCE_BEST: self.evaluations_since_best,
            "watch": asdict(self.watch),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], defined: Sequence[Metric]) -> Progress:
        """Restore the progress from the contents of a state.json. `defined` lists the metrics of the run, as in `as_state`."""
        values = {metric.name: value for metric in defined if (value := state.get(metric.key)) is not None}
        return cls(
            step=state["step"],
            cursor=state["cursor"],
            tokens=state["tokens"],
            seconds=state["seconds"],
            train_seconds=state["train_seconds"],
            train_loss=state["train_loss"],
            metrics=Metrics(defined[0].name, values) if len(values) == len(defined) else None,
            evaluated_step=state["evaluated_step"],
            best_step=state["best_step"],
            best_value=state.get(_best_key(defined)) if state["best_step"] else None,
            evaluations_since_best=state.get(_SINCE_BEST, 0),
            watch=GuardState(**state["watch"]),
        )


def _best_key(defined: Sequence[Metric]) -> str:
    return f"best_{defined[0].key}"

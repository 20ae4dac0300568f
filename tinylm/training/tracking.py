"""Experiment trackers: an observer that logs the values in metrics.jsonl to TensorBoard, Weights & Biases or trackio.

Values have the same keys as in metrics.jsonl, for example `loss` and `val_loss`.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tinylm.errors import missing_extra
from tinylm.recipe import Recipe
from tinylm.recipe.schema import flattened
from tinylm.training.metrics import EvaluationEvent, Observer, StepEvent

_NOT_LOGGED = ("step", "batch")
"""Event fields that are not logged as curves."""


class Backend(Protocol):
    """A tracking service or library. `start` is called once, before `log`."""

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """The exceptions that the methods may raise, for example if the disk is full. Training continues without the tracker."""
        ...

    def start(self) -> None:
        """Begin an empty run. Discard what was logged for this run folder before, if that is possible."""
        ...

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Writes event files to the `tensorboard` folder in the run folder."""

    errors = (OSError,)

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise missing_extra("tensorboard", "tracking: tensorboard") from None
        self._folder = folder / "tensorboard"
        self._recipe = recipe
        self._make_writer = SummaryWriter

    def start(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._writer = self._make_writer(str(self._folder))
        self._writer.add_text("recipe", f"```yaml\n{self._recipe.to_yaml()}```", 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Logs to the `tinylm` project. With WANDB_MODE=offline, everything stays in the `wandb` folder in the run folder.

    Values cannot be removed from a W&B run, so a resumed run becomes a new W&B run. Only offline runs are replaced.
    """

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        try:
            import wandb
        except ImportError:
            raise missing_extra("wandb", "tracking: wandb") from None
        self._wandb = wandb
        self._folder = folder / "wandb"
        self.errors = (wandb.Error, OSError)
        self._settings: dict[str, Any] = {
            "project": "tinylm",
            "name": folder.name,
            "dir": str(folder),
            "config": flattened(recipe.as_dict()),
        }

    def start(self) -> None:
        for offline in self._folder.glob("offline-run-*"):
            shutil.rmtree(offline, ignore_errors=True)
        self._run = self._wandb.init(**self._settings)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """Logs to the local `tinylm` project in trackio. A resumed run becomes a new run in trackio, as in W&B."""

    errors = (OSError,)

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        try:
            import trackio
        except ImportError:
            raise missing_extra("trackio", "tracking: trackio") from None
        self._trackio = trackio
        self._name, self._config = folder.name, flattened(recipe.as_dict())

    def start(self) -> None:
        self._trackio.init("tinylm", name=self._name, config=self._config, resume="never", embed=False)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._trackio.log(dict(values), step=step)

    def close(self) -> None:
        self._trackio.finish()


BACKENDS: dict[str, Callable[[Path, Recipe], Backend]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}
"""The values of `tracking` in a recipe."""


class Tracker(Observer):
    """Forwards step and evaluation events to a backend. If the backend fails, reports the error with `note` and stops logging."""

    def __init__(self, name: str, backend: Backend, note: Callable[[str], None]) -> None:
        self._name = name
        self._backend = backend
        self._note = note
        self._failed = False

    def resumed(self, steps: Sequence[StepEvent], evaluations: Sequence[EvaluationEvent]) -> None:
        """Start the tracker and log the whole history again, because a killed run may have logged more or less than it saved."""
        self._call(self._backend.start)
        events: list[StepEvent | EvaluationEvent] = [*steps, *evaluations]
        for event in sorted(events, key=lambda event: event.step):
            self._log(event)

    def step(self, event: StepEvent) -> None:
        self._log(event)

    def evaluation(self, event: EvaluationEvent) -> None:
        self._log(event)

    def close(self) -> None:
        self._call(self._backend.close)

    def _log(self, event: StepEvent | EvaluationEvent) -> None:
        self._call(lambda: self._backend.log(event.step, _values(event)))

    def _call(self, function: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            function()
        except self._backend.errors as error:
            self._failed = True
            self._note(f"{self._name} failed: {error}; training continues without it")


def trackers(recipe: Recipe, folder: Path, note: Callable[[str], None]) -> list[Tracker]:
    """Return a tracker for each value of `tracking`. Raises `InputError` if its package is not installed."""
    return [Tracker(name, BACKENDS[name](folder, recipe), note) for name in recipe.tracking]


def _values(event: StepEvent | EvaluationEvent) -> dict[str, float]:
    """Return the finite numbers in an event, by their keys in metrics.jsonl."""
    fields = event.as_line()
    numbers = {key: value for key, value in fields.items() if isinstance(value, (int, float)) and not isinstance(value, bool)}
    return {key: value for key, value in numbers.items() if key not in _NOT_LOGGED and math.isfinite(value)}

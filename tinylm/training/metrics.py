"""The events of a training run, the `Observer` that receives them, and `MetricsFile`, which writes them to the run folder."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tinylm.errors import WorkError
from tinylm.evaluation.metrics import Metrics
from tinylm.paths import atomic_write_text
from tinylm.training.jsonl_log import JsonLinesLog

_LOGGED_BEFORE_SAVING = ("step", "skipped", "spike")
"""Kinds of lines that are written before the checkpoint for their step is saved. All other kinds are written afterwards."""


@dataclass(frozen=True)
class StepEvent:
    """A logged optimizer step. `loss` is the mean over all targets in the global batch before the update, in nats per token."""

    step: int
    tokens: int
    """Number of training tokens so far."""
    loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    mfu: float | None
    """Model FLOPs utilization: the model's FLOP/s divided by the peak FLOP/s of the device in this precision.

    None if FLOPs cannot be estimated for the architecture."""
    seconds: float
    """Total training time in seconds, summed over all resumes."""
    fraction_done: float
    """Completed fraction of the training run, in (0, 1]."""
    batch: str = ""
    """Hash of the sequences in the global batch. It does not depend on the number of processes."""
    distillation_loss: float | None = None
    """The divergence from the teachers (`objective.teacher`) in nats per token, or None without teachers. `loss` excludes it."""

    def as_line(self) -> dict[str, Any]:
        """Return the fields of a metrics.jsonl line. Without teachers, the line has no `distillation_loss`."""
        line = asdict(self)
        if self.distillation_loss is None:
            del line["distillation_loss"]
        return line


@dataclass(frozen=True)
class EvaluationEvent:
    """An evaluation on the held-out data."""

    step: int
    tokens: int
    """Number of training tokens so far."""
    metrics: Metrics
    """The value of each metric by name, such as `metrics["loss"]`."""
    train_seconds: float
    """Time spent in optimizer steps only."""
    seconds: float
    """Total training time in seconds, summed over all resumes."""
    best: bool
    """Whether the checkpoint for this step was saved and is the best so far."""

    def as_line(self) -> dict[str, Any]:
        """Return the fields of a metrics.jsonl line. Each metric has its own key, such as `val_loss`."""
        times = {"train_seconds": self.train_seconds, "seconds": self.seconds}
        return {"step": self.step, "tokens": self.tokens, **self.metrics.as_dict(), **times, "best": self.best}

    @classmethod
    def from_line(cls, line: Mapping[str, Any]) -> EvaluationEvent:
        """Create an event from a metrics.jsonl line without its `kind`. Raises `TypeError` if a field is missing or unknown."""
        metrics = Metrics.from_dict(line)
        if metrics is None:
            raise TypeError("the line has no metric")
        return cls(metrics=metrics, **{key: value for key, value in line.items() if key not in metrics.as_dict()})


@dataclass(frozen=True)
class GuardEvent:
    """A `skipped` step, a `spike` in the loss, or a `rollback` to the checkpoint for `step`."""

    kind: str
    step: int
    cursor: int
    """Position in the data order after this step, in sequences."""
    reason: str


@dataclass(frozen=True)
class SampleEvent:
    """Text that the model generated during training. `text` does not include the prompt."""

    step: int
    prompt: str
    text: str


class Observer:
    """Receives the events of a training run. Override the methods you need. By default, they do nothing.

    All methods may call `request_stop`.
    """

    stop_requested = False

    def request_stop(self) -> None:
        """Save a checkpoint and stop training after the current step. The run can be resumed."""
        self.stop_requested = True

    def step(self, event: StepEvent) -> None: ...

    def evaluation(self, event: EvaluationEvent) -> None: ...

    def sample(self, event: SampleEvent) -> None: ...

    def guard(self, event: GuardEvent) -> None: ...

    def resumed(self, steps: Sequence[StepEvent], evaluations: Sequence[EvaluationEvent]) -> None:
        """Called once, before all other methods, with the events from before the run was resumed. A new run has none."""

    def saved(self, step: int) -> None:
        """Called when the checkpoint for `step` is complete. A background thread saves it, so this may be a few steps later."""

    def phase(self, name: str) -> None:
        """Called when a phase begins: `first step`, `training`, `evaluating`, `saving` or `sampling`."""

    def note(self, text: str) -> None:
        """Called with a message for the user."""

    def close(self) -> None:
        """Called when training ends, even after an error."""

    def stopping(self) -> None:
        """Called from the signal handler. Training will save a checkpoint and stop after the current step."""


class Observers(Observer):
    """Forwards every event to several observers, in order."""

    def __init__(self, members: Sequence[Observer]) -> None:
        self._members = tuple(members)

    @property
    def stop_requested(self) -> bool:  # type: ignore[override]  # read-only, because the members store the requests
        return any(member.stop_requested for member in self._members)

    def request_stop(self) -> None:
        for member in self._members:
            member.request_stop()

    def step(self, event: StepEvent) -> None:
        for member in self._members:
            member.step(event)

    def evaluation(self, event: EvaluationEvent) -> None:
        for member in self._members:
            member.evaluation(event)

    def sample(self, event: SampleEvent) -> None:
        for member in self._members:
            member.sample(event)

    def guard(self, event: GuardEvent) -> None:
        for member in self._members:
            member.guard(event)

    def resumed(self, steps: Sequence[StepEvent], evaluations: Sequence[EvaluationEvent]) -> None:
        for member in self._members:
            member.resumed(steps, evaluations)

    def saved(self, step: int) -> None:
        for member in self._members:
            member.saved(step)

    def phase(self, name: str) -> None:
        for member in self._members:
            member.phase(name)

    def note(self, text: str) -> None:
        for member in self._members:
            member.note(text)

    def close(self) -> None:
        """Close all members in order, even if one of them raises."""
        with ExitStack() as stack:
            for member in reversed(self._members):
                stack.callback(member.close)

    def stopping(self) -> None:
        for member in self._members:
            member.stopping()


class MetricsFile(Observer):
    """Appends events to metrics.jsonl and samples.md in a run folder.

    When a run is resumed, all events written after the checkpoint for `resumed_step` are removed: events from later steps, and the
    evaluation and samples for that step. If writing fails, `on_write_error` receives a message. By default, it raises `WorkError`.
    """

    def __init__(self, folder: Path, resumed_step: int, on_write_error: Callable[[str], None] | None = None) -> None:
        self._samples = folder / "samples.md"
        self._on_write_error = on_write_error or _raise_work_error
        self._log = JsonLinesLog(folder / "metrics.jsonl", _written_before_saving(resumed_step))
        self._truncate_samples(resumed_step)

    def _truncate_samples(self, step: int) -> None:
        if self._samples.exists():
            atomic_write_text(self._samples, _samples_before(self._samples.read_bytes().decode("utf-8", "replace"), step))

    def history(self) -> tuple[list[StepEvent], list[EvaluationEvent]]:
        """Return the step and evaluation events in the file. Lines from other versions with different fields are skipped."""
        steps: list[StepEvent] = []
        evaluations: list[EvaluationEvent] = []
        for line in self._log.records():
            kind = line.pop("kind", None)
            values: dict[str, Any] = {key: math.nan if value is None else value for key, value in line.items()}
            with suppress(TypeError):
                if kind == "step":
                    steps.append(StepEvent(**values))
                elif kind == "eval":
                    evaluations.append(EvaluationEvent.from_line(values))
        return steps, evaluations

    @contextmanager
    def _handle_write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._on_write_error(f"cannot write the log: {error.strerror or error}")

    def _write(self, kind: str, fields: Mapping[str, Any]) -> None:
        with self._handle_write_errors():
            self._log.write({"kind": kind, **fields})

    def step(self, event: StepEvent) -> None:
        self._write("step", event.as_line())

    def evaluation(self, event: EvaluationEvent) -> None:
        self._write("eval", event.as_line())

    def guard(self, event: GuardEvent) -> None:
        if event.kind == "rollback":
            with self._handle_write_errors():
                self._log.remove_unless(_written_before_saving(event.step))
                self._truncate_samples(event.step)
        self._write(event.kind, asdict(event))

    def sample(self, event: SampleEvent) -> None:
        with self._handle_write_errors(), open(self._samples, "a", encoding="utf-8", newline="\n") as file:
            quoted = "\n".join("    " + line for line in (event.prompt + event.text).split("\n"))
            file.write(f"## Step {event.step}\n\n{quoted}\n\n")

    def close(self) -> None:
        with self._handle_write_errors():
            self._log.close()


def _written_before_saving(step: int) -> Callable[[Mapping[str, Any]], bool]:
    """Return a predicate that is true for metrics.jsonl lines written before the checkpoint for `step` was saved."""
    return lambda line: "kind" in line and line["step"] < step + (line["kind"] in _LOGGED_BEFORE_SAVING)


def _raise_work_error(problem: str) -> None:
    raise WorkError(problem, hint="free some disk space and resume with --resume")


def _samples_before(samples: str, step: int) -> str:
    """Return the sections of samples.md before `step`. Generated text is indented, so it is never mistaken for a heading."""
    sections = re.split(r"^(?=## Step \d+\n)", samples, flags=re.MULTILINE)
    return "".join(section for section in sections if section and int(section.split("\n", 1)[0].removeprefix("## Step ")) < step)

"""What a training reports as it goes: events, and the observer that keeps them in metrics.jsonl and samples.md."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from tinylm.errors import WorkError
from tinylm.paths import write_whole

_NOT_JSON = (float("inf"), float("-inf"))
_OF_A_STEP = ("step", "skipped", "spike")
"""Lines that are written before a step is saved; others come after."""


@dataclass(frozen=True)
class StepEvent:
    """One logged optimiser step. `loss`: mean nats over every target of the global batch, before the update."""

    step: int
    tokens: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    mfu: float
    """Model FLOPs utilisation: the model's FLOPs per second over those of the machine's matrix products in this precision."""
    seconds: float
    done: float
    """Share of the training that is done, in (0, 1]."""
    batch: str = ""
    """A fingerprint of the sequences of the global batch: equal for equal batches, however many processes shared them."""


@dataclass(frozen=True)
class EvaluationEvent:
    """One measurement on the held-out text."""

    step: int
    tokens: int
    val_loss: float
    val_bits_per_byte: float
    train_seconds: float
    """Spent on optimiser steps, and not on measuring, saving or sampling."""
    seconds: float
    best: bool


@dataclass(frozen=True)
class GuardEvent:
    """A step that was `skipped`, a `spike` of the loss, or a `rollback` to the step that is named."""

    kind: str
    step: int
    cursor: int
    """Sequences of the data's order that lie behind."""
    reason: str


@dataclass(frozen=True)
class SampleEvent:
    step: int
    prompt: str
    text: str


class Observer:
    """Hears what happens in a training. Every method may be left as it is."""

    def step(self, event: StepEvent) -> None: ...

    def evaluation(self, event: EvaluationEvent) -> None: ...

    def sample(self, event: SampleEvent) -> None: ...

    def guard(self, event: GuardEvent) -> None: ...

    def earlier(self, steps: Sequence[StepEvent], evaluations: Sequence[EvaluationEvent]) -> None:
        """What a resumed training had logged before; told once, before anything else."""

    def saved(self, step: int) -> None:
        """The checkpoint of a step is whole; heard when the training next looks, which may be some steps later."""

    def phase(self, name: str) -> None:
        """What the training does now: `first step`, `training`, `evaluating`, `saving`, `sampling`."""

    def note(self, text: str) -> None:
        """Something that the person should know."""

    def stopping(self) -> None:
        """A signal came: the training will save and stop after this step. Called from the signal's handler."""


class Observers(Observer):
    """Several observers as one."""

    def __init__(self, members: Sequence[Observer]) -> None:
        self._members = tuple(members)

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

    def earlier(self, steps: Sequence[StepEvent], evaluations: Sequence[EvaluationEvent]) -> None:
        for member in self._members:
            member.earlier(steps, evaluations)

    def saved(self, step: int) -> None:
        for member in self._members:
            member.saved(step)

    def phase(self, name: str) -> None:
        for member in self._members:
            member.phase(name)

    def note(self, text: str) -> None:
        for member in self._members:
            member.note(text)

    def stopping(self) -> None:
        for member in self._members:
            member.stopping()


class MetricsFile(Observer):
    """Appends to metrics.jsonl and samples.md of a run folder.

    A resumed run first forgets what came after its checkpoint was saved: later steps, and what was measured since. `refused`
    hears of what the disk does not take, and may raise to end the training.
    """

    def __init__(self, folder: Path, resumed_step: int, refused: Callable[[str], None] | None = None) -> None:
        self._metrics = folder / "metrics.jsonl"
        self._samples = folder / "samples.md"
        self._refused = refused or _end
        self._forget_after(resumed_step)
        self._file = self._opened()

    def _opened(self) -> IO[str]:
        return open(self._metrics, "a", encoding="utf-8", newline="\n")

    def _forget_after(self, step: int) -> None:
        kept = [line for line in self._lines() if line["step"] < step + (line["kind"] in _OF_A_STEP)]
        write_whole(self._metrics, "".join(json.dumps(line) + "\n" for line in kept))
        if self._samples.exists():
            write_whole(self._samples, _until(self._samples.read_bytes().decode("utf-8"), step))

    def _lines(self) -> list[dict[str, Any]]:
        if not self._metrics.exists():
            return []
        lines = []
        for line in self._metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                event = json.loads(line)
            except ValueError:  # torn by a crash
                continue
            if isinstance(event, dict) and "kind" in event and isinstance(event.get("step"), int):
                lines.append(event)
        return lines

    def history(self) -> tuple[list[StepEvent], list[EvaluationEvent]]:
        """What the file holds, as it was told; lines of another version are left out."""
        steps: list[StepEvent] = []
        evaluations: list[EvaluationEvent] = []
        for line in self._lines():
            kind = line.pop("kind")
            values: dict[str, Any] = {key: math.nan if value is None else value for key, value in line.items()}
            with suppress(TypeError):
                if kind == "step":
                    steps.append(StepEvent(**values))
                elif kind == "eval":
                    evaluations.append(EvaluationEvent(**values))
        return steps, evaluations

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # what could not be written stays in the buffer and is tried again
            self._refused(f"what happens cannot be logged: {error.strerror or error}")

    def _write(self, kind: str, event: StepEvent | EvaluationEvent | GuardEvent) -> None:
        numbers = {key: None if value in _NOT_JSON or value != value else value for key, value in asdict(event).items()}
        with self._disk():
            self._file.write(json.dumps({"kind": kind} | numbers, allow_nan=False) + "\n")
            self._file.flush()

    def step(self, event: StepEvent) -> None:
        self._write("step", event)

    def evaluation(self, event: EvaluationEvent) -> None:
        self._write("eval", event)

    def guard(self, event: GuardEvent) -> None:
        if event.kind == "rollback":
            with self._disk():
                self._file.close()
                self._forget_after(event.step)
                self._file = self._opened()
        self._write(event.kind, event)

    def sample(self, event: SampleEvent) -> None:
        with self._disk(), open(self._samples, "a", encoding="utf-8", newline="\n") as file:
            quoted = "\n".join("    " + line for line in (event.prompt + event.text).split("\n"))
            file.write(f"## Step {event.step}\n\n{quoted}\n\n")

    def close(self) -> None:
        with self._disk():
            self._file.close()


def _end(what: str) -> None:
    raise WorkError(what, hint="make room, and go on with --resume")


def _until(samples: str, step: int) -> str:
    """samples.md with only what was written before `step`. What the model wrote is indented, so it cannot pass for a heading."""
    sections = re.split(r"^(?=## Step \d+\n)", samples, flags=re.MULTILINE)
    return "".join(section for section in sections if section and int(section.split("\n", 1)[0].removeprefix("## Step ")) < step)

"""metrics.jsonl and samples.md record the events of a run. Resuming removes everything written after the checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tinylm.errors import WorkError
from tinylm.evaluation.metrics import Metrics
from tinylm.training import jsonl_log
from tinylm.training.metrics import EvaluationEvent, GuardEvent, MetricsFile, Observer, Observers, SampleEvent, StepEvent


def _step(step: int, grad_norm: float = 1.0) -> StepEvent:
    return StepEvent(step, step * 10, 2.0, 0.01, grad_norm, 100.0, 0.3, 0.5, step / 10)


def _evaluation(step: int) -> EvaluationEvent:
    return EvaluationEvent(step, step * 10, Metrics("loss", {"loss": 1.5, "bits_per_byte": 1.1}), 0.4, 0.7, True)


def _lines(folder: Path) -> list[dict[str, object]]:
    def reject(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=reject) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_each_line_contains_the_event_kind_and_its_fields(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path, 0)
    metrics.step(_step(1))
    metrics.evaluation(_evaluation(1))
    metrics.close()
    step, evaluation = _lines(tmp_path)
    assert step["kind"] == "step"
    assert step["loss"] == 2.0
    assert (step["tokens_per_second"], step["mfu"], step["seconds"], step["fraction_done"]) == (100.0, 0.3, 0.5, 0.1)
    assert {"step", "tokens", "loss", "lr", "grad_norm"} <= set(step)
    assert evaluation["kind"] == "eval"
    assert (evaluation["train_seconds"], evaluation["seconds"]) == (0.4, 0.7)
    assert list(evaluation) == [
        *("kind", "step", "tokens", "val_loss", "val_bits_per_byte", "train_seconds", "seconds", "best"),
    ]
    assert (evaluation["val_loss"], evaluation["val_bits_per_byte"]) == (1.5, 1.1)


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_non_finite_numbers_are_written_as_null(tmp_path: Path, norm: float) -> None:
    metrics = MetricsFile(tmp_path, 0)
    metrics.step(_step(1, norm))
    metrics.close()
    assert _lines(tmp_path)[0]["grad_norm"] is None


def test_each_line_is_flushed_immediately(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path, 0)
    metrics.step(_step(1))
    assert len(_lines(tmp_path)) == 1
    metrics.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_causes_an_error_or_a_note_and_unwritten_lines_are_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl_log, "open", lambda *_, **__: open("/dev/full", "a"), raising=False)  # noqa: SIM115
    raises = MetricsFile(tmp_path, 0)
    for write in (lambda: raises.step(_step(1)), raises.close):  # closing the file tries to write the line again
        with pytest.raises(WorkError, match=r"cannot write the log: No space left.*--resume"):
            write()
    errors: list[str] = []
    continues = MetricsFile(tmp_path, 0, errors.append)
    continues.step(_step(2))
    continues.close()
    assert len(errors) == 2
    assert all("No space left" in error for error in errors)


def test_the_history_contains_the_logged_events(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path, 0)
    metrics.step(_step(1, math.inf))
    metrics.guard(GuardEvent("skipped", 2, 16, "the loss is nan"))
    metrics.step(_step(3))
    metrics.evaluation(_evaluation(3))
    metrics.close()
    (first, second), evaluations = MetricsFile(tmp_path, 4).history()
    assert (first.step, second, evaluations) == (1, _step(3), [_evaluation(3)])
    assert math.isnan(first.grad_norm)


def test_a_rollback_removes_later_lines_and_is_logged(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path, 0)
    for step in (1, 2, 3):
        metrics.step(_step(step))
    metrics.evaluation(_evaluation(2))
    metrics.guard(GuardEvent("rollback", 2, 32, "the loss is nan"))
    metrics.step(_step(3))
    metrics.close()
    assert [(line["kind"], line["step"]) for line in _lines(tmp_path)] == [("step", 1), ("step", 2), ("rollback", 2), ("step", 3)]
    MetricsFile(tmp_path, 2).close()
    assert [(line["kind"], line["step"]) for line in _lines(tmp_path)] == [("step", 1), ("step", 2)]


def test_resuming_removes_everything_written_after_the_checkpoint(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path, 0)
    for step in range(1, 5):
        metrics.step(_step(step))
        if step % 2 == 0:
            metrics.evaluation(_evaluation(step))
            metrics.sample(SampleEvent(step, "Once", f" upon {step}\n\n## Step 9\n\r## Step 9\n"))
    metrics.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "st')  # a line that a crash truncated
    MetricsFile(tmp_path, 4).close()
    assert [(line["kind"], line["step"]) for line in _lines(tmp_path)] == [
        ("step", 1),
        ("step", 2),
        ("eval", 2),
        ("step", 3),
        ("step", 4),
    ]
    samples = (tmp_path / "samples.md").read_text()
    assert "upon 2" in samples
    assert "upon 4" not in samples
    MetricsFile(tmp_path, 0).close()
    assert _lines(tmp_path) == []
    assert (tmp_path / "samples.md").read_text() == ""


def test_samples_and_their_prompts_are_indented(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path, 0)
    metrics.sample(SampleEvent(3, "Two", " lines\n# not a title"))
    metrics.close()
    assert (tmp_path / "samples.md").read_text() == "## Step 3\n\n    Two lines\n    # not a title\n\n"


def test_every_observer_receives_every_event() -> None:
    received: list[tuple[str, str]] = []

    class Recorder(Observer):
        def __init__(self, name: str) -> None:
            self.name = name

        def step(self, event: StepEvent) -> None:
            received.append((self.name, "step"))

        def evaluation(self, event: EvaluationEvent) -> None:
            received.append((self.name, "evaluation"))

        def sample(self, event: SampleEvent) -> None:
            received.append((self.name, "sample"))

        def saved(self, step: int) -> None:
            received.append((self.name, "saved"))

        def phase(self, name: str) -> None:
            received.append((self.name, name))

        def note(self, text: str) -> None:
            received.append((self.name, text))

        def stopping(self) -> None:
            received.append((self.name, "stopping"))

        def close(self) -> None:
            received.append((self.name, "close"))

    both = Observers([Recorder("a"), Recorder("b")])
    both.step(_step(1))
    both.evaluation(_evaluation(1))
    both.sample(SampleEvent(1, "", ""))
    both.saved(1)
    both.phase("saving")
    both.note("a note")
    both.stopping()
    both.close()
    events = ("step", "evaluation", "sample", "saved", "saving", "a note", "stopping", "close")
    assert received == [(name, event) for event in events for name in "ab"]


def test_all_observers_are_closed_even_if_one_raises() -> None:
    closed: list[str] = []

    class Failing(Observer):
        def close(self) -> None:
            closed.append("failing")
            raise OSError("the disk is full")

    class Working(Observer):
        def close(self) -> None:
            closed.append("working")

    with pytest.raises(OSError, match="the disk is full"):
        Observers([Failing(), Working()]).close()
    assert closed == ["failing", "working"]

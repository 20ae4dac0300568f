"""metrics.jsonl and samples.md: what is written, and what a resumed run forgets."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tinylm.errors import WorkError
from tinylm.training.metrics import EvaluationEvent, GuardEvent, MetricsFile, Observer, Observers, SampleEvent, StepEvent


def _step(step: int, grad_norm: float = 1.0) -> StepEvent:
    return StepEvent(step, step * 10, 2.0, 0.01, grad_norm, 100.0, 0.3, 0.5, step / 10)


def _evaluation(step: int) -> EvaluationEvent:
    return EvaluationEvent(step, step * 10, 1.5, 1.1, 0.4, 0.7, True)


def _lines(folder: Path) -> list[dict[str, object]]:
    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_each_line_says_its_kind_and_carries_the_events_numbers(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path, 0)
    metrics.step(_step(1))
    metrics.evaluation(_evaluation(1))
    metrics.close()
    step, evaluation = _lines(tmp_path)
    assert step["kind"] == "step"
    assert step["loss"] == 2.0
    assert (step["tokens_per_second"], step["mfu"], step["seconds"], step["done"]) == (100.0, 0.3, 0.5, 0.1)
    assert {"step", "tokens", "loss", "lr", "grad_norm"} <= set(step)
    assert evaluation["kind"] == "eval"
    assert (evaluation["train_seconds"], evaluation["seconds"]) == (0.4, 0.7)
    assert {"step", "tokens", "val_loss", "val_bits_per_byte"} <= set(evaluation)


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_what_json_has_no_number_for_is_null(tmp_path: Path, norm: float) -> None:
    metrics = MetricsFile(tmp_path, 0)
    metrics.step(_step(1, norm))
    metrics.close()
    assert _lines(tmp_path)[0]["grad_norm"] is None


def test_lines_are_on_disk_as_soon_as_they_are_written(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path, 0)
    metrics.step(_step(1))
    assert len(_lines(tmp_path)) == 1
    metrics.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that refuses every byte")
def test_a_disk_that_refuses_ends_the_work_or_is_told_and_what_it_refused_is_tried_again(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path, 0)
    with open("/dev/full", "a") as full:
        metrics._file = full
        with pytest.raises(WorkError, match=r"cannot be logged: No space left.*--resume"):
            metrics.step(_step(1))
        told: list[str] = []
        metrics._refused = told.append
        metrics.step(_step(2))
        metrics.close()
    assert len(told) == 2
    assert all("No space left" in what for what in told)


def test_the_history_is_what_was_told(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path, 0)
    metrics.step(_step(1, math.inf))
    metrics.guard(GuardEvent("skipped", 2, 16, "the loss is nan"))
    metrics.step(_step(3))
    metrics.evaluation(_evaluation(3))
    metrics.close()
    (first, second), evaluations = MetricsFile(tmp_path, 4).history()
    assert (first.step, second, evaluations) == (1, _step(3), [_evaluation(3)])
    assert math.isnan(first.grad_norm)


def test_going_back_forgets_what_came_after_and_says_so(tmp_path: Path) -> None:
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


def test_a_resumed_run_forgets_later_steps_and_what_was_measured_after_its_checkpoint(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path, 0)
    for step in range(1, 5):
        metrics.step(_step(step))
        if step % 2 == 0:
            metrics.evaluation(_evaluation(step))
            metrics.sample(SampleEvent(step, "Once", f" upon {step}\n\n## Step 9\n\r## Step 9\n"))
    metrics.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "st')  # torn by a crash
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


def test_samples_quote_the_prompt_and_every_line(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path, 0)
    metrics.sample(SampleEvent(3, "Two", " lines\n# not a title"))
    metrics.close()
    assert (tmp_path / "samples.md").read_text() == "## Step 3\n\n    Two lines\n    # not a title\n\n"


def test_several_observers_hear_everything() -> None:
    heard: list[tuple[str, str]] = []

    class Ear(Observer):
        def __init__(self, name: str) -> None:
            self.name = name

        def step(self, event: StepEvent) -> None:
            heard.append((self.name, "step"))

        def evaluation(self, event: EvaluationEvent) -> None:
            heard.append((self.name, "evaluation"))

        def sample(self, event: SampleEvent) -> None:
            heard.append((self.name, "sample"))

        def saved(self, step: int) -> None:
            heard.append((self.name, "saved"))

        def phase(self, name: str) -> None:
            heard.append((self.name, name))

        def note(self, text: str) -> None:
            heard.append((self.name, text))

        def stopping(self) -> None:
            heard.append((self.name, "stopping"))

    both = Observers([Ear("a"), Ear("b")])
    both.step(_step(1))
    both.evaluation(_evaluation(1))
    both.sample(SampleEvent(1, "", ""))
    both.saved(1)
    both.phase("saving")
    both.note("smaller")
    both.stopping()
    what_was_said = ("step", "evaluation", "sample", "saved", "saving", "smaller", "stopping")
    assert heard == [(ear, what) for what in what_was_said for ear in "ab"]

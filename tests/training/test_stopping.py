"""Whenever a signal arrives, training stops and saves the last step."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from conftest import StopAt, tiny_recipe

from tinylm.pipeline import train
from tinylm.run import Run
from tinylm.training.metrics import EvaluationEvent, Observer, StepEvent


class _Interrupter(Observer):
    """Sends SIGINT at one event in step 10, and counts the calls to `stopping`."""

    def __init__(self, event: str) -> None:
        self.event = event
        self.stopping_calls = 0

    def _on_event(self, event: str, step: int) -> None:
        if event == self.event and step == 10:
            os.kill(os.getpid(), signal.SIGINT)

    def step(self, event: StepEvent) -> None:
        self._on_event("logged", event.step)

    def evaluation(self, event: EvaluationEvent) -> None:
        self._on_event("evaluated", event.step)

    def saved(self, step: int) -> None:
        self._on_event("saved", step)

    def stopping(self) -> None:
        self.stopping_calls += 1


@pytest.mark.skipif(os.name == "nt", reason="requires POSIX signals")
@pytest.mark.parametrize(("event", "every"), [("logged", 1000), ("logged", 10), ("saved", 10), ("evaluated", 10)])
def test_a_signal_at_any_event_saves_the_step(text_file: Path, tmp_path: Path, event: str, every: int) -> None:
    recipe = tiny_recipe(text_file, "modern", f"checkpoint.every={every}", f"evaluation.every={every}")
    observer = _Interrupter(event)
    result = train(recipe, tmp_path / "run", device="cpu", observer=observer)
    assert (result.stopped, result.step, result.signal_number) == ("signal", 10, signal.SIGINT)
    assert observer.stopping_calls == 1
    last = Run.open(tmp_path / "run").checkpoint("last")
    assert (last.step, last.problem()) == (10, None)


def test_a_run_accepts_several_observers_and_closes_them(text_file: Path, tmp_path: Path) -> None:
    class Closed(StopAt):
        closed = 0

        def close(self) -> None:
            self.closed += 1

    observers = [Closed(3), Closed(2)]
    result = train(tiny_recipe(text_file), tmp_path / "run", device="cpu", observer=observers)
    assert (result.stopped, result.step) == ("callback", 2)
    assert [observer.closed for observer in observers] == [1, 1]

"""A signal stops a training saved, whenever in a step it comes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from conftest import tiny_recipe

from tinylm.pipeline import train
from tinylm.run import Run
from tinylm.training.metrics import EvaluationEvent, Observer, StepEvent


class Interrupting(Observer):
    """Sends SIGINT when it hears of `moment` at step 10, and counts what it is told of that."""

    def __init__(self, moment: str) -> None:
        self.moment = moment
        self.told = 0

    def _maybe(self, moment: str, step: int) -> None:
        if moment == self.moment and step == 10:
            os.kill(os.getpid(), signal.SIGINT)

    def step(self, event: StepEvent) -> None:
        self._maybe("logged", event.step)

    def evaluation(self, event: EvaluationEvent) -> None:
        self._maybe("measured", event.step)

    def saved(self, step: int) -> None:
        self._maybe("saved", step)

    def stopping(self) -> None:
        self.told += 1


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(("moment", "every"), [("logged", 1000), ("logged", 10), ("saved", 10), ("measured", 10)])
def test_what_was_trained_is_saved(text_file: Path, tmp_path: Path, moment: str, every: int) -> None:
    recipe = tiny_recipe(text_file, "modern", f"checkpoint.every={every}", f"evaluation.every={every}")
    observer = Interrupting(moment)
    result = train(recipe, tmp_path / "run", device="cpu", observer=observer)
    assert (result.stopped, result.step, result.signal_number) == ("signal", 10, signal.SIGINT)
    assert observer.told == 1
    last = Run.open(tmp_path / "run").checkpoint("last")
    assert (last.step, last.problem()) == (10, None)

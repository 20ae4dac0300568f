"""Training stops after `evaluation.patience` evaluations without improvement, at the same step if the run is interrupted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from command import RunCli
from conftest import NoteCollector, StopAt, tiny_recipe

from tinylm.pipeline import train
from tinylm.recipe import Recipe
from tinylm.run import Run

OVERFITTING = ("training.optimizer=adamw", "training.optimizer.lr=0.3", "training.schedule=constant", "training.schedule.warmup=0")
"""With this learning rate, the loss on held-out text soon increases."""


def _recipe(text: Path, *overrides: str) -> Recipe:
    small = ("model.n_layer=1", "training.steps=40", "evaluation.every=2", "evaluation.max_tokens=100", "checkpoint.every=3")
    return tiny_recipe(text, "modern", *small, *OVERFITTING, "evaluation.patience=3", *overrides)


@pytest.fixture(scope="module")
def stopped(short_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "stopped"
    observer = NoteCollector()
    result = train(_recipe(short_file), folder, device="cpu", observer=observer)
    assert (result.stopped, result.as_dict()["stopped"]) == ("patience", "patience")
    assert (
        f"stopping early: 3 evaluations without improvement since step {result.best_step} (evaluation.patience)" in observer.notes
    )
    return Run.open(folder)


def _evaluations(run: Run) -> list[tuple[int, float]]:
    return [(line["step"], line["val_loss"]) for line in run.metrics() if line["kind"] == "eval"]


def test_training_stops_at_the_third_evaluation_after_the_best_one(stopped: Run) -> None:
    losses = [loss for _, loss in _evaluations(stopped)]
    best = losses.index(min(losses))
    assert len(losses) == best + 4 < 20
    assert stopped.checkpoint("last").step == _evaluations(stopped)[-1][0]
    assert stopped.checkpoint("best").step == _evaluations(stopped)[best][0]


def test_a_resumed_run_stops_at_the_same_step(short_file: Path, stopped: Run, tmp_path: Path) -> None:
    last = stopped.checkpoint("last").step
    recipe = _recipe(short_file)
    train(recipe, tmp_path / "run", device="cpu", observer=StopAt(last - 1))
    result = train(recipe, tmp_path / "run", device="cpu", resume=True)
    assert (result.stopped, result.step) == ("patience", last)
    assert _evaluations(Run.open(tmp_path / "run")) == _evaluations(stopped)


def test_more_patience_continues_the_run_and_the_same_patience_does_not(short_file: Path, stopped: Run, tmp_path: Path) -> None:
    shutil.copytree(stopped.path, tmp_path / "run")
    again = train(_recipe(short_file), tmp_path / "run", device="cpu", resume=True)
    assert (again.stopped, again.step) == ("patience", stopped.checkpoint("last").step)
    more = _recipe(short_file, "evaluation.patience=4")
    result = train(more, tmp_path / "run", device="cpu", resume=True, allow_change=["evaluation.patience"])
    assert result.step > again.step


def test_the_command_says_why_training_stopped(short_file: Path, tmp_path: Path, run_cli: RunCli) -> None:
    (tmp_path / "recipe.yaml").write_text(_recipe(short_file).to_yaml(), encoding="utf-8")
    result = run_cli("train", tmp_path / "recipe.yaml", "--out", tmp_path / "run", "--device", "cpu")
    assert (result.code, "evaluations no longer improved (evaluation.patience)" in result.err) == (0, True)

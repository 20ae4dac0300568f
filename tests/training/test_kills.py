"""A run that is repeatedly killed and resumed is bit-identical to an uninterrupted run."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import training_processes
from conftest import tiny_recipe
from safetensors.torch import load_file

from tinylm.data.datasets import TokenStream
from tinylm.data.prepare import prepare
from tinylm.recipe import Recipe
from tinylm.reporting import SILENT
from tinylm.run import Run
from tinylm.training.metrics import Observer

pytestmark = pytest.mark.skipif(os.name == "nt", reason="requires POSIX signals")
STEPS = 16


def _recipe(text: Path, *overrides: str) -> Recipe:
    """Return a recipe with dropout, two micro-batches per step, an epoch boundary in the middle, and frequent saves."""
    hard = ("model.dropout=0.2", "model.n_embd=16", "evaluation.max_tokens=200")
    often = ("checkpoint.every=2", "checkpoint.keep=2", "evaluation.every=5", "sampling.every=7", "sampling.max_new_tokens=2")
    return tiny_recipe(text, "modern", *hard, *often, f"training.steps={STEPS}", "training.compile=off", *overrides)


def _logged(folder: Path) -> list[dict[str, Any]]:
    """Return the records in metrics.jsonl without durations and speeds."""
    timings = ("seconds", "train_seconds", "tokens_per_second", "mfu")
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in timings} for line in lines]


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights and optimizer state from the last checkpoint."""
    last = Run(folder).checkpoint("last").path
    return {name: tensor for file in sorted(last.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _assert_identical(first: Path, second: Path) -> None:
    assert _logged(first) == _logged(second)
    tensors, others = _tensors(first), _tensors(second)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
    assert (first / "samples.md").read_text() == (second / "samples.md").read_text()
    for pointer in ("best", "last"):
        assert (first / "checkpoints" / pointer).read_text() == (second / "checkpoints" / pointer).read_text()


class _KillInEvaluation(Observer):
    """Kill this process at the start of an evaluation."""

    def phase(self, name: str) -> None:
        if name == "evaluating":
            os.kill(os.getpid(), signal.SIGKILL)


def _train_with_kills(recipe: Recipe, folder: Path) -> None:
    """Train in `folder`. Kill the process in an evaluation, in a save and at an arbitrary moment, and resume it each time."""
    processes = training_processes.start(recipe, folder, resume=True, observer=_KillInEvaluation())
    assert training_processes.wait(processes) == [-signal.SIGKILL]
    _kill_during_save(recipe, folder)
    assert all(checkpoint.problem() is None for checkpoint in Run(folder).checkpoints())
    lines = training_processes.logged_lines(folder)
    processes = training_processes.start(recipe, folder, resume=True)
    assert training_processes.kill_when(processes, lambda: training_processes.logged_lines(folder) > lines + 3)
    training_processes.run(recipe, folder, resume=True)


def _kill_during_save(recipe: Recipe, folder: Path) -> None:
    """Resume the run and kill it until it leaves a partial checkpoint."""
    for _ in range(20):
        processes = training_processes.start(recipe, folder, resume=True)
        training_processes.kill_when(processes, lambda: training_processes.is_saving(folder))
        if training_processes.is_saving(folder):
            return
    raise AssertionError("no kill occurred during a save")


def test_training_crosses_an_epoch_boundary(short_file: Path) -> None:
    recipe = _recipe(short_file)
    prepared = prepare(recipe.data, recipe.tokenizer, SILENT)
    assert 3 * 8 < TokenStream(prepared.train.tokens, 32, recipe.seed).examples_per_epoch < (STEPS - 3) * 8


def test_a_repeatedly_killed_run_equals_an_uninterrupted_run(short_file: Path, tmp_path: Path) -> None:
    recipe = _recipe(short_file)
    training_processes.run(recipe, tmp_path / "uninterrupted")
    _train_with_kills(recipe, tmp_path / "killed")
    _assert_identical(tmp_path / "killed", tmp_path / "uninterrupted")
    assert [path.name for path in (tmp_path / "killed" / "checkpoints").glob(".*")] == []

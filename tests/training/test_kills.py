"""A training that is killed at any moment and resumed, again and again, is the training that was not: to the bit."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import lives
import pytest
import torch
from conftest import tiny_recipe
from safetensors.torch import load_file

from tinylm.data.batches import Batches
from tinylm.data.prepare import prepare
from tinylm.recipe import Recipe
from tinylm.reporting import SILENT
from tinylm.run import Run

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
STEPS = 16


@pytest.fixture(scope="module")
def short_file(english: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text(english[1000:7000], encoding="utf-8")
    return path


def _recipe(text: Path, *overrides: str) -> Recipe:
    """Dropout on, four micro-batches a step, an epoch's border in the middle, and hardly a step without a save."""
    hard = ("model.dropout=0.2", "training.micro_batch_size=2", "model.n_embd=16", "evaluation.max_tokens=200")
    often = ("checkpoint.every=2", "checkpoint.keep=2", "evaluation.every=5", "sampling.every=7", "sampling.max_new_tokens=2")
    return tiny_recipe(text, "modern", *hard, *often, f"training.steps={STEPS}", "training.compile=off", *overrides)


def _logged(folder: Path) -> list[dict[str, Any]]:
    """Every line without what the clock decides."""
    clock = ("seconds", "train_seconds", "tokens_per_second", "mfu")
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of the last checkpoint, whatever files they lie in."""
    last = Run(folder).checkpoint("last").path
    return {name: tensor for file in sorted(last.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _same(one: Path, two: Path) -> None:
    assert _logged(one) == _logged(two)
    ours, theirs = _tensors(one), _tensors(two)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert (one / "samples.md").read_text() == (two / "samples.md").read_text()
    for pointer in ("best", "last"):
        assert (one / "checkpoints" / pointer).read_text() == (two / "checkpoints" / pointer).read_text()


def _tormented(recipe: Recipe, folder: Path, seed: int, count: int = 1) -> tuple[int, int]:
    """Train into `folder` through kills at random moments: how many there were, and how many of them in a save."""
    chance = random.Random(seed)
    in_saves = 0
    for kills in range(100):
        done, in_save = lives.lines(folder), chance.random() < 0.4
        wanted = done + chance.randint(3, 16)

        def moment(in_save: bool = in_save, wanted: int = wanted) -> bool:
            return lives.saving(folder) if in_save and lives.lines(folder) > wanted - 8 else lives.lines(folder) >= wanted

        processes = lives.started(recipe, folder, count=count, resume=True)
        if not lives.killed_when(processes, moment, victim=chance.randrange(count)):
            assert all(process.exitcode == 0 for process in processes)
            return kills, in_saves
        in_saves += lives.saving(folder)
    raise AssertionError("no end is near")


def test_the_epochs_border_lies_inside(short_file: Path) -> None:
    recipe = _recipe(short_file)
    prepared = prepare(recipe.data, recipe.tokenizer, SILENT)
    assert 3 * 8 < Batches(prepared.train.tokens, 32, recipe.seed).windows < (STEPS - 3) * 8


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_killed_again_and_again_it_is_the_same_run(precision: str, short_file: Path, tmp_path: Path) -> None:
    recipe = _recipe(short_file, f"training.precision={precision}")
    lives.run(recipe, tmp_path / "whole")
    kills, _ = _tormented(recipe, tmp_path / "killed", seed=7)
    assert kills >= 2
    _same(tmp_path / "killed", tmp_path / "whole")
    assert [path.name for path in (tmp_path / "killed" / "checkpoints").glob(".*")] == []


def test_killed_inside_a_save_the_checkpoint_before_it_is_whole(short_file: Path, tmp_path: Path) -> None:
    recipe = _recipe(short_file)
    folder = tmp_path / "killed"
    for _ in range(20):
        lives.killed_when(lives.started(recipe, folder, resume=True), lambda: lives.lines(folder) > 6 and lives.saving(folder))
        if lives.saving(folder):
            break
    assert lives.saving(folder), "no kill hit a save"
    assert all(checkpoint.problem() is None for checkpoint in Run(folder).checkpoints())
    lives.run(recipe, folder, resume=True)
    assert not lives.saving(folder)

"""`tinylm sweep` with real training runs in separate processes."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import COMMAND, CommandResult, RunCli, environment, error_of

from tinylm.pipeline import train
from tinylm.recipe import load
from tinylm.run import Run


@pytest.fixture
def recipe_file(text_file: Path, tmp_path: Path) -> Path:
    recipe = {
        "name": "tiny",
        "data": {"train": str(text_file)},
        "tokenizer": "byte",
        "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "context_length": 16},
        "training": {"steps": 4, "global_batch_size": 2, "precision": "fp32", "compile": False},
        "evaluation": {"every": 2, "max_tokens": 200},
        "checkpoint": {"every": 1},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def document(done: CommandResult) -> dict[str, Any]:
    assert done.code == 0, done.err
    loaded: dict[str, Any] = done.json
    return loaded


def test_a_terminated_sweep_continues_and_matches_uninterrupted_runs(run_cli: RunCli, recipe_file: Path, tmp_path: Path) -> None:
    arguments = (recipe_file, "--set", "seed=1,2", "--set", "training.steps=6", "--json")
    folder = tmp_path / "killed"
    command = [*COMMAND, "sweep", *map(str, arguments), "--out", str(folder)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not (folder / "seed=1" / "checkpoints" / "last").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 143
    assert Run.open(folder / "seed=1").checkpoints()

    resumed = document(run_cli("sweep", *arguments, "--out", folder, "--jobs", "2"))
    losses = {}
    for seed in (1, 2):
        recipe = load(recipe_file, (f"seed={seed}", "training.steps=6"))
        losses[seed] = train(recipe, tmp_path / str(seed), device="cpu").metrics["loss"]
    assert {row["values"]["seed"]: row["val_loss"] for row in resumed["rows"]} == losses
    assert resumed["best"]["values"] == {"training.steps": 6}, "the seeds of one setting are averaged"
    assert not (folder / "logs" / "seed=1.stdout").exists()


def test_a_search_runs_the_requested_trials_and_repeats_the_best_with_more_seeds(
    run_cli: RunCli, recipe_file: Path, tmp_path: Path
) -> None:
    pytest.importorskip("optuna")
    search = ("sweep", recipe_file, "--range", "training.optimizer.lr=1e-4..1e-1:log", "--json", "--out", tmp_path / "s")
    first = document(run_cli(*search, "--trials", "1", "--seeds", "2"))
    assert [row["status"] for row in first["rows"]] == ["done", "done"]
    assert first["best"]["runs"] == 2
    second = document(run_cli(*search, "--trials", "2", "--seeds", "1"))
    assert second["rows"][0] == first["rows"][0], "the first trial must not be trained again"
    rates = [row["values"]["training.optimizer.lr"] for row in second["rows"][:2]]
    assert len(set(rates)) == 2
    assert all(1e-4 <= rate <= 1e-1 for rate in rates)

    other = run_cli("sweep", recipe_file, "--range", "training.optimizer.lr=1e-4..1:log", "--trials", "1", "--out", tmp_path / "s")
    assert "a search over different values" in error_of(other)

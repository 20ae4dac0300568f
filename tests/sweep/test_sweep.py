"""`tinylm sweep` with real training runs in separate processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tinylm.pipeline import train
from tinylm.recipe import load
from tinylm.run import Run

RUN_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


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


def sweep(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tinylm", "sweep", *map(str, arguments)]
    return subprocess.run(command, env=RUN_ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False)


def document(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    loaded: dict[str, Any] = json.loads(done.stdout)
    return loaded


def test_a_terminated_sweep_continues_and_matches_uninterrupted_runs(recipe_file: Path, tmp_path: Path) -> None:
    arguments = (recipe_file, "--set", "seed=1,2", "--set", "training.steps=6", "--json")
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "tinylm", "sweep", *map(str, arguments), "--out", str(folder)]
    process = subprocess.Popen(command, env=RUN_ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not (folder / "seed=1" / "checkpoints" / "last").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 143
    assert Run.open(folder / "seed=1").checkpoints()

    resumed = document(sweep(*arguments, "--out", folder, "--jobs", "2"))
    losses = {}
    for seed in (1, 2):
        recipe = load(recipe_file, (f"seed={seed}", "training.steps=6"))
        losses[seed] = train(recipe, tmp_path / str(seed), device="cpu").metrics["loss"]
    assert {row["values"]["seed"]: row["val_loss"] for row in resumed["rows"]} == losses
    assert resumed["best"]["values"] == {"training.steps": 6}, "the seeds of one setting are averaged"
    assert not (folder / "logs" / "seed=1.stdout").exists()


def test_a_search_runs_the_requested_trials_and_repeats_the_best_with_more_seeds(recipe_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    search = (recipe_file, "--range", "training.optimizer.lr=1e-4..1e-1:log", "--json", "--out", tmp_path / "s")
    first = document(sweep(*search, "--trials", "1", "--seeds", "2"))
    assert [row["status"] for row in first["rows"]] == ["done", "done"]
    assert first["best"]["runs"] == 2
    second = document(sweep(*search, "--trials", "2", "--seeds", "1"))
    assert second["rows"][0] == first["rows"][0], "the first trial must not be trained again"
    rates = [row["values"]["training.optimizer.lr"] for row in second["rows"][:2]]
    assert len(set(rates)) == 2
    assert all(1e-4 <= rate <= 1e-1 for rate in rates)

    other = sweep(recipe_file, "--range", "training.optimizer.lr=1e-4..1:log", "--trials", "1", "--out", tmp_path / "s")
    assert other.returncode == 2
    assert "a search over different values" in other.stderr

"""Sweeps: real training runs in separate processes, stored outcomes, repeated settings and repeated seeds."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import COMMAND, CommandResult, RunCli, environment, error_of

from tinylm.errors import InputError
from tinylm.pipeline import train
from tinylm.recipe import load
from tinylm.run import Run
from tinylm.sweep.runner import Outcome, Sweep, Training, last_error
from tinylm.sweep.search import run_trials
from tinylm.sweep.settings import parse_axis


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


def interrupt(arguments: Sequence[str | Path], started: Path, number: signal.Signals) -> int:
    """Start a command, send a signal to it as soon as the path `started` exists, and return the exit code."""
    command = [*COMMAND, *map(str, arguments)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    return process.wait(120)


def test_a_terminated_and_killed_sweep_continues_and_matches_uninterrupted_runs(
    run_cli: RunCli, recipe_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    arguments = ("sweep", recipe_file, "--set", "seed=1,2", "--set", "training.steps=6", "--json", "--out", folder)
    assert interrupt(arguments, folder / "seed=1" / "checkpoints" / "last", signal.SIGTERM) == 143
    assert Run.open(folder / "seed=1").checkpoints()
    (folder / "logs" / "seed=1.stdout").unlink(missing_ok=True)
    assert interrupt(arguments, folder / "logs" / "seed=1.stdout", signal.SIGKILL) == -signal.SIGKILL

    resumed = document(run_cli(*arguments, "--jobs", "2"))
    losses = {}
    for seed in (1, 2):
        recipe = load(recipe_file, (f"seed={seed}", "training.steps=6"))
        losses[seed] = train(recipe, tmp_path / str(seed), device="cpu").metrics["loss"]
    assert {row["values"]["seed"]: row["val_loss"] for row in resumed["rows"]} == losses
    assert resumed["best"]["values"] == {"training.steps": 6}, "the seeds of one setting are averaged"
    assert not (folder / "logs" / "seed=1.stdout").exists()
    stored = json.loads((folder / "results" / "seed=1.json").read_text(encoding="utf-8"))
    assert stored["text_fingerprint"] == Run.open(folder / "seed=1").checkpoint("last").state["fingerprints"]["data"]


def test_a_stopped_sweep_says_how_to_continue(recipe_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    command = [*COMMAND, "sweep", str(recipe_file), "--set", "training.steps=2000,3000", "--out", str(folder)]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    before = [process.stderr.readline() for _ in range(2)]
    assert before == [f"2 runs in {folder}\n", "steps=2000: started\n"]
    while not (folder / "steps=2000" / "recipe.yaml").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.stderr.read() == "stopped; run the same command again to continue\n"
    assert process.wait(120) == 130


def test_the_error_of_a_failed_run_includes_its_indented_lines(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text(
        "error: an earlier one\nerror: a run: the recipe differs:\n  seed: 1 -> 2\naccept it\nwarning: x\n", encoding="utf-8"
    )
    assert last_error(log) == "a run: the recipe differs: seed: 1 -> 2"


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


def store(sweep: Sweep, training: Training, **changed: str) -> None:
    """Write the result of a training run without training it."""
    digest = hashlib.sha256(sweep.recipe(training.values).to_yaml().encode()).hexdigest()
    outcome = Outcome(training.name, "runs/elsewhere", training.values, digest, {"val_loss": 2.0}, **changed)  # type: ignore[arg-type]
    run, results = sweep.run_folder(training.name), sweep.folder / "results"
    for folder in (run, results):
        folder.mkdir(parents=True, exist_ok=True)
    (run / "recipe.yaml").touch()
    (results / f"{training.name}.json").write_text(json.dumps(asdict(outcome)), encoding="utf-8")


def test_a_finished_run_is_found_in_a_moved_sweep_unless_its_folder_was_removed(recipe_file: Path, tmp_path: Path) -> None:
    training = Training("a", {"seed": "1"})
    store(Sweep(tmp_path / "first", recipe_file), training)
    moved = Sweep((tmp_path / "first").rename(tmp_path / "moved"), recipe_file)
    [outcome] = moved.run([training])
    assert outcome.run == str(tmp_path / "moved" / "a")
    shutil.rmtree(outcome.run)
    assert moved.finished(training) is None


def test_results_of_different_texts_are_not_mixed(recipe_file: Path, tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "s", recipe_file)
    trainings = [Training(name, {"seed": str(number)}) for number, name in enumerate("abc")]
    for training, (settings, text) in zip(trainings, (("x", "1"), ("y", "2"), ("x", "3")), strict=True):
        store(sweep, training, text_settings=settings, text_fingerprint=text)
    assert len(list(sweep.run(trainings[:2]))) == 2
    with pytest.raises(InputError, match=r"c: the text is not the same as when a was trained"):
        list(sweep.run(trainings[2:]))


def test_two_processes_cannot_train_the_same_sweep(recipe_file: Path, tmp_path: Path) -> None:
    first, second = (Sweep(tmp_path / "s", recipe_file) for _ in range(2))
    with first.locked(), pytest.raises(InputError, match="another process is training the runs in this folder"):
        list(second.run([]))
    assert list(second.run([])) == []


def instant_runs(losses: dict[tuple[str, str], float], trained: list[str]) -> Any:
    """Return a `Sweep.run` that does not train. `losses` contains the loss for a dropout and a seed."""

    def run(self: Sweep, planned: Sequence[Training], monitor: object = None) -> Iterator[Outcome]:
        for training in planned:
            trained.append(training.name)
            loss = losses[training.values["model.dropout"], str(self.recipe(training.values).seed)]
            yield Outcome(training.name, str(self.run_folder(training.name)), training.values, "", {"best_val_loss": loss})

    return run


def test_a_search_does_not_train_the_same_values_twice(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    trained: list[str] = []
    monkeypatch.setattr(Sweep, "run", instant_runs({("0", "1"): 2.0, ("0.1", "1"): 3.0}, trained))
    axes = [parse_axis("model.dropout=0,0.1"), parse_axis("seed=1")]
    outcomes = list(run_trials(Sweep(tmp_path / "s", recipe_file, jobs=2), axes, [], 5, 0))
    assert [outcome.name for outcome in outcomes] == [f"trial-{number:03}" for number in range(5)]
    assert {outcome.run for outcome in outcomes} == {str(tmp_path / "s" / name) for name in trained}
    assert len(trained) == 2


def test_the_best_setting_has_the_requested_number_of_seeds(
    run_cli: RunCli, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {(dropout, str(seed)): loss for dropout, loss in (("0", 2.6), ("0.1", 2.5)) for seed in range(2, 5)}
    losses |= {("0", "1"): 2.2, ("0.1", "1"): 2.1}
    trained: list[str] = []
    monkeypatch.setattr(Sweep, "run", instant_runs(losses, trained))
    command = ("sweep", recipe_file, "--set", "model.dropout=0,0.1", "--set", "seed=1.0", "--seeds", "3", "--out", tmp_path / "s")
    result = document(run_cli(*command, "--json"))
    assert [name for name in trained if "seed" in name] == [
        f"dropout={dropout},seed={seed}" for dropout in ("0.1", "0") for seed in (2, 3)
    ], "one lucky run of dropout 0 is not enough to be the best"
    assert result["best"]["values"] == {"model.dropout": 0.1}
    assert [group["runs"] for group in result["groups"]] == [3, 3]

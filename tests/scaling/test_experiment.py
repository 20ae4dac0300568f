"""A scaling experiment chooses a grid, trains each run once, leaves out unusable runs, predicts a larger run, and scores it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from command import RunCli, error_of
from conftest import tiny_recipe

from tinylm.cost.cpu import Processor
from tinylm.errors import InputError, WorkError
from tinylm.pipeline import train
from tinylm.recipe import Recipe, load
from tinylm.run import Run
from tinylm.scaling import experiment
from tinylm.scaling.grid import (
    FAMILY,
    SHAPES,
    Cell,
    Grid,
    Request,
    law_parameters,
    max_tokens,
    open_or_plan,
    plan_grid,
    resized,
    store,
)
from tinylm.sweep.runner import Outcome, Training

FAST = Processor(350e9, 27e9, 14e9, cores=2, has_amx=True)
SLOW = Processor(3.5e9, 5e9, 3e9, cores=2, has_amx=False)
VOCABULARY, BATCH_TOKENS = 400, 64


def make_grid(base: Recipe, unique_tokens: int = 10**9, steps: Sequence[int] = (100, 200, 400, 800)) -> Grid:
    cells = [
        Cell(*size, length, law_parameters(resized(base, *size, length), VOCABULARY), length * BATCH_TOKENS)
        for size in FAMILY[:4]
        for length in steps
    ]
    return Grid(Request(("text.txt",), 1.0), VOCABULARY, unique_tokens, BATCH_TOKENS, tuple(cells))


def law_loss(parameters: float, tokens: float) -> float:
    return 1.2 + 20 / parameters**0.3 + 15 / tokens**0.25


def synthetic(grid: Grid, **changed: dict[str, object]) -> list[Outcome]:
    """Return outcomes with losses from `law_loss`. `changed` replaces values of the results of some runs, by name."""
    outcomes = []
    for cell in grid.cells:
        loss = law_loss(cell.parameters, cell.tokens)
        result = {"val_loss": loss, "val_bits_per_byte": loss / 2, "train_seconds": cell.flops / 1e9, "stopped": "done"}
        name = cell.training.name
        outcomes.append(Outcome(name, name, cell.training.values, "", {**result, **changed.get(name, {})}))
    return outcomes


@pytest.fixture
def base(text_file: Path) -> Recipe:
    return tiny_recipe(text_file)


def test_the_grid_fits_the_time_and_every_run_has_its_own_schedule(english: str, tmp_path: Path) -> None:
    text = tmp_path / "english.txt"
    text.write_text(english, encoding="utf-8")
    request = Request((str(text),), 5, ("seed=7",))
    grid = open_or_plan(tmp_path, request, processor=FAST)
    lengths = {size: [cell.steps for cell in grid.cells if cell.n_embd == size] for size in {cell.n_embd for cell in grid.cells}}
    for steps in lengths.values():
        assert (len(lengths), len(steps)) in SHAPES
        assert steps[-1] / steps[0] == pytest.approx(2 ** (len(steps) - 1), rel=0.05)
    longest = [lengths[size][-1] for size in sorted(lengths)]
    assert longest == sorted(longest, reverse=True), "small models train for more steps with the same compute"
    assert all(cell.tokens <= max_tokens(cell.parameters, grid.unique_tokens) for cell in grid.cells), "no run overfits"
    for training in grid.planned:
        recipe = experiment.sweep(tmp_path).recipe(training.values)
        assert (recipe.training.steps, recipe.seed) == (int(training.values["training.steps"]), 7)
        assert recipe.training.schedule.name == "wsd"
    assert open_or_plan(tmp_path, request, processor=SLOW) == grid, "a stored grid does not depend on the measured speed"
    with pytest.raises(InputError, match="with a different --minutes"):
        open_or_plan(tmp_path, Request((str(text),), 6, ("seed=7",)))


def test_too_little_time_or_text_is_rejected_before_training(text_file: Path) -> None:
    with pytest.raises(InputError, match=r"--minutes 1: not enough time .*the smallest experiment takes about"):
        plan_grid(Request((str(text_file),), 1), processor=SLOW)
    with pytest.raises(InputError, match="even the smallest models would overfit"):
        plan_grid(Request((str(text_file),), 60), processor=FAST)
    with pytest.raises(InputError, match="chooses the sizes and training lengths"):
        plan_grid(Request((str(text_file),), 60, ("model.n_embd=64",)), processor=FAST)


def test_the_prediction_is_for_four_times_the_compute_and_its_recipe_can_be_trained(base: Recipe, tmp_path: Path) -> None:
    grid = make_grid(base)
    result = experiment.analyze(tmp_path, grid, base, synthetic(grid))
    prediction = result.prediction
    largest = max(cell.flops for cell in grid.cells)
    assert prediction.flops == pytest.approx(4 * largest, rel=0.01)
    assert prediction.seconds == pytest.approx(4 * largest / 1e9, rel=0.01)
    assert prediction.loss.value == pytest.approx(law_loss(prediction.parameters, prediction.tokens), rel=1e-4)
    assert prediction.bits_per_byte.value == pytest.approx(prediction.loss.value / 2)
    sizes = [law_parameters(resized(base, *size, 1), VOCABULARY) for size in FAMILY]
    losses = [law_loss(size, 4 * largest / (6 * size)) for size in sizes]
    assert FAMILY[int(np.argmin(losses))] == (prediction.n_layer, prediction.n_embd), "the best size for this compute"
    recipe = load(tmp_path / experiment.PREDICTED_FILE)
    assert recipe.model.n_embd == prediction.n_embd  # type: ignore[attr-defined]
    assert recipe.training.steps == prediction.steps
    longer = experiment.analyze(tmp_path, grid, base, synthetic(grid), predict_minutes=largest / 1e9 / 6)
    assert longer.prediction.flops == pytest.approx(10 * largest, rel=0.01), "the runs are trained at 1 GFLOP/s"


def test_diverged_failed_and_overfitted_runs_are_left_out_visibly(base: Recipe, tmp_path: Path) -> None:
    grid = make_grid(base)
    names = [cell.training.name for cell in grid.cells]
    changed: list[dict[str, object]] = [{"val_loss": math.nan}, {"val_loss": 9.0}, {"val_loss": 5.9}, {"stopped": "time"}]
    outcomes = synthetic(grid, **dict(zip([names[index] for index in (0, 1, 7, 8)], changed, strict=True)))
    outcomes[9] = Outcome(names[9], names[9], {}, "", error="out of memory")
    del outcomes[10]
    result = experiment.analyze(tmp_path, grid, base, outcomes)
    left_out = {row.cell.training.name: row.left_out for row in result.rows if row.left_out is not None}
    assert list(left_out) == [names[index] for index in (0, 1, 7, 8, 9, 10)]
    reasons = ("diverged", "diverged", "overfitted or diverged", "stopped early", "failed: out of memory", "not finished")
    for reason, expected in zip(left_out.values(), reasons, strict=True):
        assert reason.startswith(expected)
    assert result.prediction.loss.value == pytest.approx(law_loss(result.prediction.parameters, result.prediction.tokens), rel=1e-3)
    assert abs(result.largest_error[1]) < 0.01
    outcomes = synthetic(grid, **{names[4]: {"val_loss": law_loss(grid.cells[4].parameters, grid.cells[4].tokens) * 1.2}})
    unusual, error = experiment.analyze(tmp_path, grid, base, outcomes).largest_error
    assert (unusual.cell.training.name, error) == (names[4], pytest.approx(1 / 1.2 - 1, abs=0.05))
    with pytest.raises(WorkError, match=r"6 usable runs .*Left out: .*: not finished"):
        experiment.analyze(tmp_path, grid, base, synthetic(grid)[:6])


def train_in_process(folder: Path, training: Training) -> None:
    """Train a run and save its outcome as a sweep does, but without the seconds that a new process takes to start."""
    runner = experiment.sweep(folder)
    recipe, run = runner.recipe(training.values), runner.run_folder(training.name)
    digest = hashlib.sha256(recipe.to_yaml().encode()).hexdigest()
    outcome = Outcome(training.name, str(run), training.values, digest, train(recipe, run, device="cpu").as_dict())
    (folder / "results").mkdir(exist_ok=True)
    (folder / "results" / f"{training.name}.json").write_text(json.dumps(asdict(outcome)), encoding="utf-8")


def test_an_interrupted_experiment_trains_only_the_missing_run_and_its_prediction_can_be_checked(
    base: Recipe, text_file: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    folder = tmp_path / "scale"
    batch_tokens = base.training.global_batch_size * base.model.context_length
    cells = []
    for width in (16, 24, 32):
        for steps in (10, 20, 40):
            recipe = resized(base, 1, width, steps)
            cells.append(Cell(1, width, steps, law_parameters(recipe, VOCABULARY), steps * batch_tokens))
    grid = Grid(Request((str(text_file),), 60.0), VOCABULARY, 20_000, batch_tokens, tuple(cells))
    folder.mkdir()
    store(folder, grid, base)
    for training in grid.planned[1:]:
        train_in_process(folder, training)
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("*/metrics.jsonl")}
    command = ("scale", text_file, "--out", folder, "--device", "cpu")
    first = run_cli(*command, "--json", "--plot", tmp_path / "plot.svg")
    assert first.code == 0, first.err
    assert len(finished) == 8
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "finished runs are not trained again"
    rows = first.json["rows"]
    assert [row["left_out"] for row in rows] == [None] * 9
    for row in rows:
        assert row["val_loss"] == [line for line in Run.open(row["run"]).metrics() if line["kind"] == "eval"][-1]["val_loss"]
    assert (tmp_path / "plot.svg").read_text().startswith("<?xml")
    table = run_cli(*command)
    assert "predicted loss" in table.out
    assert "tinylm train" in table.err

    predicted = first.json["prediction"]
    run = tmp_path / "larger"
    done = train(load(first.json["recipe"]), run, device="cpu")
    checked = run_cli("scale", "--check", run, "--out", folder, "--json")
    assert checked.code == 0, checked.err
    assert checked.json["predicted_loss"] == pytest.approx(predicted["val_loss"], rel=1e-9)
    assert checked.json["predicted_loss_ci95"] == pytest.approx(predicted["val_loss_ci95"], rel=1e-9)
    assert checked.json["val_loss"] == done.metrics["loss"]
    assert checked.json["relative_error"] == pytest.approx(predicted["val_loss"] / done.metrics["loss"] - 1)  # type: ignore[operator]
    low, high = predicted["val_loss_ci95"]
    assert checked.json["inside_interval"] == (low <= checked.json["val_loss"] <= high)
    assert checked.json["differing_keys"] == []
    assert "relative error" in run_cli("scale", "--check", run, "--out", folder).out

    other = tmp_path / "other"
    train(tiny_recipe(text_file, "modern", "training.steps=2", "evaluation.max_tokens=100"), other, device="cpu")
    assert "has a different evaluation.max_tokens" in error_of(run_cli("scale", "--check", other, "--out", folder))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "SOURCE: is required"),
        (["text.txt", "--minutes", "0"], "--minutes: must be a positive duration"),
        (["text.txt", "--plot", "plot.txt"], "--plot: must end in"),
        (["text.txt", "--check", "run"], "SOURCE: cannot be combined with --check"),
        (["--check", "run", "--minutes", "5"], "--minutes: cannot be combined with --check"),
        (["--check", "run"], "does not contain a scaling experiment"),
        (["text.txt", "--out", __file__], "is a file, not a folder"),
    ],
)
def test_invalid_arguments_are_rejected(
    arguments: list[str], message: str, run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in error_of(run_cli("scale", *arguments))
    assert not list(tmp_path.iterdir())

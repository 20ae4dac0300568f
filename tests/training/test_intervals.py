"""The intervals of evaluations, samples and checkpoints can be a number of steps or a fraction of the run."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest
from conftest import tiny_recipe

from tinylm.pipeline import train
from tinylm.run import Run
from tinylm.training import trainer
from tinylm.training_summary import read_samples

FAST = ("model.n_embd=16", "model.n_layer=1", "evaluation.max_tokens=100", "sampling.max_new_tokens=1", "training.compile=off")


def evaluated_steps(folder: Path) -> list[int]:
    return [line["step"] for line in Run.open(folder).metrics() if line["kind"] == "eval"]


def test_intervals_can_be_fractions_of_the_number_of_steps(short_file: Path, tmp_path: Path) -> None:
    shares = ("evaluation.every=0.25", "sampling.every=0.5", "checkpoint.every=0.2", "checkpoint.keep=20", "training.steps=10")
    train(tiny_recipe(short_file, "modern", *FAST, *shares), tmp_path / "run", device="cpu")
    assert evaluated_steps(tmp_path / "run") == [3, 5, 8, 10]
    assert [sample.step for sample in read_samples(Run.open(tmp_path / "run"))] == [5, 10]
    assert [checkpoint.step for checkpoint in Run.open(tmp_path / "run").checkpoints()] == [2, 3, 4, 5, 6, 8, 10]


@pytest.mark.parametrize(("keep_every", "kept"), [("0.25", [2, 4, 6, 8]), ("3", [3, 6, 8])])
def test_permanent_checkpoints_are_never_removed(keep_every: str, kept: list[int], short_file: Path, tmp_path: Path) -> None:
    options = (
        "training.steps=8",
        "evaluation.every=8",
        "checkpoint.every=8",
        "checkpoint.keep=0",
        f"checkpoint.keep_every={keep_every}",
    )
    recipe = tiny_recipe(short_file, "modern", *FAST, *options)
    train(recipe, tmp_path / "run", device="cpu")
    assert [checkpoint.step for checkpoint in Run.open(tmp_path / "run").checkpoints()] == kept


def test_a_resumed_run_evaluates_at_the_same_steps(short_file: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(short_file, "modern", *FAST, "evaluation.every=0.25", "checkpoint.every=0.1", "training.steps=10")
    train(recipe, tmp_path / "run", device="cpu", stop_after=1e-9)
    for _ in range(9):
        train(recipe, tmp_path / "run", device="cpu", resume=True, stop_after=1e-9)
    assert evaluated_steps(tmp_path / "run") == [3, 5, 8, 10]


@pytest.mark.parametrize("seconds_per_call", [0.002, 0.01])
def test_a_run_with_a_time_limit_is_evaluated_about_eight_times(
    seconds_per_call: float, short_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each clock call advances the time by `seconds_per_call`, which determines the number of steps in a 1.8 s run."""
    ticks = count()
    monkeypatch.setattr(trainer, "perf_counter", lambda: seconds_per_call * next(ticks))
    options = ("training.steps=null", "training.minutes=0.03", "evaluation.every=0.125", "checkpoint.every=0.125")
    train(tiny_recipe(short_file, "modern", *FAST, *options), tmp_path / "run", device="cpu")
    lines = [line for line in Run.open(tmp_path / "run").metrics() if line["kind"] == "eval"]
    assert len({int(8 * min(line["seconds"], 1.8 - 1e-9) / 1.8) for line in lines}) >= 7
    assert 7 <= len(lines) <= 9
    assert lines[-1]["seconds"] >= 1.8


def test_with_a_time_limit_intervals_are_fractions_of_the_run_by_default(short_file: Path) -> None:
    from tinylm.recipe import loads

    text = f"data: {{train: {short_file}}}\ntraining: {{minutes: 2}}\ncheckpoint: {{keep: 1}}\n"
    by_time = loads(text)
    assert (by_time.evaluation.every, by_time.checkpoint.every, by_time.checkpoint.keep) == (0.125, 0.125, 1)
    by_steps = loads(text.replace("minutes: 2", "steps: 2"))
    assert (by_steps.evaluation.every, by_steps.checkpoint.every) == (100, 100)
    chosen = loads(text + "evaluation: {every: 30}\n")
    assert (chosen.evaluation.every, chosen.checkpoint.every) == (30, 0.125)

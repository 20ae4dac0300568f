"""Test that `tinylm sweep` rejects invalid options before it trains anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import RunCli, error_of
from tinylm_cli.train_summary import first_command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--set: is required"),
        (["--trials", "2"], "--trials: requires --range"),
        (["--range", "seed=1..2"], "requires --trials"),
        (["--set", "seed=1,2", "--set", "seed=3"], "seed is set twice"),
        (["--set", "model.n_head=2,5"], "is not divisible by 5 heads"),
        (["--set", "model.n_hed=2,4"], "did you mean n_head?"),
        (["--set", "model.dropout=0.1,0.10"], "--set: model.dropout=0.1 and model.dropout=0.10 give the same recipe"),
        (["--trials", "2", "--set", "model.n_layer=1,x"], "--set model.n_layer=x: model.n_layer: must be"),
        (["--trials", "2", "--range", "model.dropout=0..1.5"], "--range model.dropout=0..1.5: model.dropout: must be"),
        (["--trials", "2", "--set", "model.n_embd=16,16.0"], "give the same recipe"),
        (["--set", "seed=1,2", "--plot", "picture.txt"], "must end in .png, .svg or .pdf"),
    ],
)
def test_an_invalid_sweep_is_rejected(
    arguments: list[str], message: str, run_cli: RunCli, recipe_file: Path, tmp_path: Path
) -> None:
    result = run_cli("sweep", recipe_file, *arguments, "--out", tmp_path / "s", "--dry-run")
    assert result.code == 2
    assert message in result.err
    assert not (tmp_path / "s").exists()


def test_a_sweep_is_not_written_to_a_file_or_into_a_run_folder(run_cli: RunCli, recipe_file: Path, tmp_path: Path) -> None:
    command = ("sweep", recipe_file, "--set", "seed=1,2", "--out")
    assert error_of(run_cli(*command, recipe_file)).startswith(f"{recipe_file}: is a file, not a folder")
    (tmp_path / "recipe.yaml").touch()
    assert error_of(run_cli(*command, tmp_path)).startswith(f"{tmp_path}: is the folder of a single run")


def test_a_dry_run_lists_the_runs(run_cli: RunCli, recipe_file: Path, tmp_path: Path) -> None:
    result = run_cli("sweep", recipe_file, "--set", "seed=1,2", "--set", "model.n_layer=1", "--dry-run", "--out", tmp_path / "s")
    assert result.out.split() == [str(tmp_path / "s" / "seed=1"), str(tmp_path / "s" / "seed=2")]
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("task", "verb"), [("causal_lm", "sample"), ("chat", "chat"), ("masked_lm", "fill"), ("classification", "classify")]
)
def test_the_hint_after_a_sweep_is_the_command_for_the_task(task: str, verb: str) -> None:
    assert first_command("runs/a", task).startswith(f"tinylm {verb} ")

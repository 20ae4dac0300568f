"""Test `tinylm train --replay`, which recomputes a step from the report of a failed run."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import RunCli, error_of

DIVERGING = ("training.optimizer.lr=3e37", "training.optimizer.adamw_lr=3e37", "training.guards.patience=2", "training.steps=9")


@pytest.fixture
def report(run_cli: RunCli, recipe_file: Path, tmp_path: Path) -> Path:
    settings = [part for setting in DIVERGING for part in ("--set", setting)]
    result = run_cli("train", recipe_file, *settings, "--out", tmp_path / "run", "-q", "--device", "cpu")
    message = error_of(result, code=1)
    [folder] = (tmp_path / "run" / "reports").iterdir()
    assert f"tinylm train --replay {folder}" in message
    return folder


def test_replay_reproduces_a_step_bit_for_bit_and_lists_its_non_finite_parameters(run_cli: RunCli, report: Path) -> None:
    result = run_cli("train", "--replay", report)
    assert result.code == 0
    assert "reproduced    bit for bit" in result.out
    assert "non-finite" in result.out
    document = run_cli("train", "--replay", report, "--json").json
    assert document["agreement"] == "bits"
    assert document["non_finite"]
    assert len(document["sequence_losses"]) == 4


def test_a_folder_that_is_not_a_report_is_rejected(run_cli: RunCli, tmp_path: Path) -> None:
    assert "not a report" in error_of(run_cli("train", "--replay", tmp_path))
    assert "requires either a RECIPE or --replay REPORT" in error_of(run_cli("train", "quickstart", "--replay", tmp_path))

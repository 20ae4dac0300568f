"""`tinylm train --replay`: a report of a step that was beyond help, done again."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import Here, complaint

WILD = ("training.optimizer.lr=3e37", "training.optimizer.adamw_lr=3e37", "training.guards.patience=2", "training.steps=9")


@pytest.fixture
def report(here: Here, recipe_file: Path, tmp_path: Path) -> Path:
    settings = [part for setting in WILD for part in ("--set", setting)]
    answer = here("train", recipe_file, *settings, "--out", tmp_path / "run", "-q", "--device", "cpu")
    said = complaint(answer, code=1)
    [folder] = (tmp_path / "run" / "reports").iterdir()
    assert f"tinylm train --replay {folder}" in said
    return folder


def test_it_is_reproduced_to_the_bit_and_says_what_broke(here: Here, report: Path) -> None:
    answer = here("train", "--replay", report)
    assert answer.code == 0
    assert "reproduced   to the bit" in answer.out
    assert "not numbers" in answer.out
    document = here("train", "--replay", report, "--json").json
    assert document["same"] == "bits"
    assert document["broken"]
    assert len(document["sequence_losses"]) == 4


def test_what_is_no_report_is_told(here: Here, tmp_path: Path) -> None:
    assert "is no report" in complaint(here("train", "--replay", tmp_path))
    assert "give a RECIPE, or a report" in complaint(here("train", "quickstart", "--replay", tmp_path))

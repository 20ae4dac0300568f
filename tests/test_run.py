"""Opening a run folder: its checkpoints, its model, its metrics, and what is said when something is not there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tinylm.errors import InputError
from tinylm.run import Checkpoint, Run, all_runs

CPU = torch.device("cpu")


@pytest.fixture
def copied(tiny_run: Run, tmp_path: Path) -> Run:
    """A run folder elsewhere, to be written into."""
    shutil.copytree(tiny_run.path, tmp_path / "runs" / "copy")
    return Run.open(tmp_path / "runs" / "copy")


def test_a_run_opens_from_its_folder_and_from_a_checkpoint_in_it(tiny_run: Run) -> None:
    inside = Run.open(tiny_run.checkpoint("last").path)
    assert inside.path == tiny_run.path
    assert inside.checkpoint().name == inside.pinned == tiny_run.checkpoint("last").name
    assert inside.checkpoint("best").step == tiny_run.checkpoint("best").step


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such run"):
        Run.open(tmp_path / "nowhere")
    with pytest.raises(InputError, match="not a run folder"):
        Run.open(tmp_path)


def test_a_checkpoint_is_named_by_word_by_step_or_by_folder(tiny_run: Run) -> None:
    assert tiny_run.checkpoint().step == tiny_run.checkpoint("best").step
    assert tiny_run.checkpoint("last").step == 20
    assert tiny_run.checkpoint("20") == tiny_run.checkpoint("step-000020") == tiny_run.checkpoint("last")


@pytest.mark.parametrize(("which", "message"), [("7", "no checkpoint of step 7"), ("newest", "is not best, last or a step")])
def test_a_checkpoint_that_is_not_there_is_told_with_those_that_are(which: str, message: str, tiny_run: Run) -> None:
    with pytest.raises(InputError, match=message) as caught:
        tiny_run.checkpoint(which)
    assert caught.value.where == "--checkpoint"
    assert "20" in str(caught.value) or which == "newest"


def test_a_run_without_a_checkpoint_says_so(copied: Run) -> None:
    (copied.path / "checkpoints" / "best").unlink()
    with pytest.raises(InputError, match="no best checkpoint yet"):
        copied.checkpoint()


def test_the_network_has_the_checkpoints_weights_and_is_ready_to_evaluate(tiny_run: Run) -> None:
    checkpoint = tiny_run.checkpoint("last")
    network = tiny_run.network(checkpoint, CPU)
    stored = load_file(checkpoint.path / "model.safetensors")
    assert not network.training
    assert stored.keys() == network.state_dict().keys()
    assert all(torch.equal(value, stored[name]) for name, value in network.state_dict().items())


def test_a_copied_run_is_the_run(copied: Run, tiny_run: Run) -> None:
    assert copied.recipe == tiny_run.recipe
    assert copied.tokenizer.fingerprint == tiny_run.tokenizer.fingerprint
    assert copied.heldout().tokens.tolist() == tiny_run.heldout().tokens.tolist()
    assert copied.size() == tiny_run.size()
    assert copied.checkpoint("last").problem() is None


def test_a_run_opens_where_its_training_text_is_gone(copied: Run) -> None:
    recipe = (copied.path / "recipe.yaml").read_text()
    (copied.path / "recipe.yaml").write_text(recipe.replace("english.txt", "gone.txt"))
    assert Run.open(copied.path).recipe.data.train[0].endswith("gone.txt")


def test_metrics_leave_out_a_line_torn_by_a_crash(copied: Run, tiny_run: Run) -> None:
    with open(copied.path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "st')
    assert list(copied.metrics()) == list(tiny_run.metrics())
    (copied.path / "metrics.jsonl").unlink()
    assert list(copied.metrics()) == []


def test_damaged_weights_are_an_error_for_people(copied: Run) -> None:
    file = copied.checkpoint("last").path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="damaged"):
        copied.network(copied.checkpoint("last"), CPU)


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_a_damaged_state_is_an_error_for_people(content: str, copied: Run) -> None:
    folder = copied.checkpoint("last").path
    (folder / "state.json").write_text(content)
    with pytest.raises(InputError, match=r"state\.json"):
        _ = Checkpoint(folder).state


def test_find_takes_the_named_run_else_the_most_recently_trained(
    copied: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(copied.path, tmp_path / "runs" / "newer")
    (tmp_path / "runs" / "no-run").mkdir()
    os.utime(tmp_path / "runs" / "copy" / "metrics.jsonl", (1, 1))
    assert [run.name for run in all_runs(Path("runs"))] == ["copy", "newer"]
    assert Run.find().name == "newer"
    os.utime(tmp_path / "runs" / "newer" / "metrics.jsonl", (0, 0))
    assert Run.find().name == "copy"
    monkeypatch.setenv("TINYLM_RUN", str(tmp_path / "runs" / "newer"))
    assert Run.find().name == "newer"


def test_find_without_runs_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="tinylm train quickstart"):
        Run.find()

"""Opening a run folder: its checkpoints, model and metrics, and the errors for missing or damaged parts."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tinylm.errors import InputError, TinylmWarning
from tinylm.pipeline import train
from tinylm.run import FORMAT, Checkpoint, Run, all_runs, experiment_runs

CPU = torch.device("cpu")


@pytest.fixture
def copied(tiny_run: Run, tmp_path: Path) -> Run:
    """Return a copy of the tiny run that the test can modify."""
    shutil.copytree(tiny_run.path, tmp_path / "runs" / "copy")
    return Run.open(tmp_path / "runs" / "copy")


def test_a_run_opens_from_its_folder_and_from_a_checkpoint_in_it(tiny_run: Run) -> None:
    inside = Run.open(tiny_run.checkpoint("last").path)
    assert inside.path == tiny_run.path
    assert inside.checkpoint().name == inside.pinned == tiny_run.checkpoint("last").name
    assert inside.checkpoint("best").step == tiny_run.checkpoint("best").step


def test_a_path_that_is_not_a_run_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such run"):
        Run.open(tmp_path / "nowhere")
    with pytest.raises(InputError, match="not a run folder"):
        Run.open(tmp_path)


def test_the_name_of_a_run_in_runs_suggests_its_path(copied: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"copy: no such run \(did you mean runs/copy\?\)"):
        Run.open("copy")


def test_a_checkpoint_is_selected_by_pointer_step_or_folder_name(tiny_run: Run) -> None:
    assert tiny_run.checkpoint().step == tiny_run.checkpoint("best").step
    assert tiny_run.checkpoint("last").step == 20
    assert tiny_run.checkpoint("20") == tiny_run.checkpoint("step-000020") == tiny_run.checkpoint("last")


@pytest.mark.parametrize(("which", "message"), [("7", "no checkpoint for step 7"), ("newest", "is not best, last or a step")])
def test_the_error_for_a_missing_checkpoint_lists_the_existing_checkpoints(which: str, message: str, tiny_run: Run) -> None:
    with pytest.raises(InputError, match=message) as caught:
        tiny_run.checkpoint(which)
    assert caught.value.where == "--checkpoint"
    assert "20" in str(caught.value) or which == "newest"


def test_a_missing_best_checkpoint_is_reported(copied: Run) -> None:
    (copied.path / "checkpoints" / "best").unlink()
    with pytest.raises(InputError, match="no best checkpoint yet"):
        copied.checkpoint("best")


def test_before_the_first_evaluation_the_default_checkpoint_is_the_newest_with_a_warning(copied: Run) -> None:
    (copied.path / "checkpoints" / "best").unlink()
    newest = copied.checkpoints()[-1]
    with pytest.raises(InputError, match="no best checkpoint yet"):  # a file was deleted, because the run was evaluated
        copied.checkpoint()
    metrics = copied.path / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if json.loads(line)["kind"] != "eval"), encoding="utf-8")
    with pytest.warns(TinylmWarning, match=f"no best checkpoint yet.*using the newest, {newest.name}"):
        assert copied.checkpoint() == newest
    assert copied.checkpoint() == newest, "warns only once"
    shutil.rmtree(copied.path / "checkpoints")
    with pytest.raises(InputError, match="no best checkpoint yet"):
        copied.checkpoint()


def test_the_network_has_the_checkpoints_weights_and_is_in_eval_mode(tiny_run: Run) -> None:
    checkpoint = tiny_run.checkpoint("last")
    network = tiny_run.network(checkpoint, CPU)
    stored = load_file(checkpoint.path / "model.safetensors")
    assert not network.training
    assert stored.keys() == network.state_dict().keys()
    assert all(torch.equal(value, stored[name]) for name, value in network.state_dict().items())


def test_a_copied_run_equals_the_original(copied: Run, tiny_run: Run) -> None:
    assert copied.recipe == tiny_run.recipe
    assert copied.tokenizer.fingerprint == tiny_run.tokenizer.fingerprint
    assert copied.heldout().tokens.tolist() == tiny_run.heldout().tokens.tolist()
    assert copied.size() == tiny_run.size()
    assert copied.checkpoint("last").problem() is None


def test_a_run_opens_without_its_training_text(copied: Run) -> None:
    recipe = (copied.path / "recipe.yaml").read_text()
    (copied.path / "recipe.yaml").write_text(recipe.replace("english.txt", "gone.txt"))
    assert Run.open(copied.path).recipe.data.train[0].endswith("gone.txt")


def test_metrics_skip_a_truncated_last_line(copied: Run, tiny_run: Run) -> None:
    with open(copied.path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "st')
    assert list(copied.metrics()) == list(tiny_run.metrics())
    (copied.path / "metrics.jsonl").unlink()
    assert list(copied.metrics()) == []


def test_damaged_weights_raise_an_input_error(copied: Run) -> None:
    file = copied.checkpoint("last").path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="damaged"):
        copied.network(copied.checkpoint("last"), CPU)


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_a_damaged_state_raises_an_input_error(content: str, copied: Run) -> None:
    folder = copied.checkpoint("last").path
    (folder / "state.json").write_text(content)
    with pytest.raises(InputError, match=r"state\.json"):
        _ = Checkpoint(folder).state


def test_a_run_saved_in_an_older_checkpoint_format_is_rejected_before_its_recipe_is_read(
    copied: Run, tiny_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older formats have different recipe keys, which would otherwise be reported as mistakes in recipe.yaml."""
    for checkpoint in copied.checkpoints():
        state = json.loads((checkpoint.path / "state.json").read_text())
        (checkpoint.path / "state.json").write_text(json.dumps(state | {"format": FORMAT - 1, "version": "0.1"}))
    recipe = copied.path / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "key_of_an_older_version: 1\n")
    monkeypatch.chdir(copied.path.parent.parent)
    message = rf"saved in checkpoint format {FORMAT - 1} by tinylm 0\.1; this version reads format {FORMAT} \(train the model again"
    for action in (
        lambda: Run.open(copied.path),
        lambda: Run.open(copied.checkpoint("last").path),
        Run.find,
        lambda: train(tiny_run.recipe, copied.path, resume=True, device="cpu"),
    ):
        with pytest.raises(InputError, match=message):
            action()


def test_find_returns_the_run_in_the_environment_or_the_most_recently_trained_run(
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
    monkeypatch.delenv("TINYLM_RUN")
    shutil.move(tmp_path / "runs" / "copy" / "heldout", tmp_path / "outside")
    (tmp_path / "runs" / "copy" / "heldout").symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match="is a link to a target outside the run folder"):  # the same error as `Run.open`
        Run.find()


def test_the_default_run_is_never_a_run_of_a_sweep(copied: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "tiny-sweep" / "results").mkdir(parents=True)
    shutil.copytree(copied.path, tmp_path / "runs" / "tiny-sweep" / "seed=1")
    assert [str(run.path) for run in experiment_runs(Path("runs"))] == ["runs/tiny-sweep/seed=1"]
    os.utime(tmp_path / "runs" / "copy" / "metrics.jsonl", (1, 1))
    assert Run.find().name == "copy"
    shutil.rmtree(copied.path)
    message = r"the runs are in runs/tiny-sweep \(select one with --run; `tinylm runs runs/tiny-sweep` lists them"
    with pytest.raises(InputError, match=message):
        Run.find()
    with pytest.raises(InputError, match=r"no recipe\.yaml.*`tinylm runs runs/tiny-sweep` lists the runs"):
        Run.open("runs/tiny-sweep")


def test_find_without_runs_suggests_how_to_train_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="tinylm train quickstart"):
        Run.find()

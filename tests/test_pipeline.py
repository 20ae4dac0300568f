"""Training a recipe in a run folder: the folder's contents, invalid input, and resuming after damage."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_recipe
from safetensors import safe_open

from tinylm.errors import InputError
from tinylm.evaluation.evaluate_run import evaluate_run
from tinylm.pipeline import train
from tinylm.recipe import Recipe, load
from tinylm.reporting import CollectingReporter
from tinylm.run import Run
from tinylm.training.compilation import Trial


def _short(text: Path, *overrides: str, steps: int = 10) -> Recipe:
    small = ("model.n_embd=16", "evaluation.max_tokens=200", "evaluation.every=5")
    return tiny_recipe(text, "modern", f"training.steps={steps}", *small, *overrides)


@pytest.fixture
def text(short_file: Path, tmp_path: Path) -> Path:
    """Return a copy of `short_file` that the test can modify."""
    return Path(shutil.copy(short_file, tmp_path / "text.txt"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "mine"


def _train_one_step(recipe: Recipe, folder: Path) -> None:
    """Train for a single step, to create a checkpoint that training can resume from."""
    train(recipe, folder, device="cpu", stop_after=0.0)


def _last_weights(folder: Path) -> bytes:
    return (Run(folder).checkpoint("last").path / "model.safetensors").read_bytes()


def _evaluations(folder: Path) -> dict[int, float]:
    return {line["step"]: line["val_loss"] for line in Run(folder).metrics() if line["kind"] == "eval"}


# The contents of a run folder


def test_a_run_folder_contains_the_documented_files_and_no_pickle(tiny_run: Run) -> None:
    files = {path.relative_to(tiny_run.path).as_posix() for path in tiny_run.path.rglob("*") if path.is_file()}
    top = {"recipe.yaml", "tokenizer.json", "metrics.jsonl", "environment.json", "heldout/heldout.npy", "heldout/heldout.json"}
    assert files >= top | {"checkpoints/best", "checkpoints/last"}
    files -= {".lock"}
    inside = {"model.safetensors", "training-00001.safetensors", "state.json", "manifest.json"}
    texts = {name for name in files if re.fullmatch(r"training_text/(ngrams-\d+\.safetensors|\w+\.json)", name)}
    for name in files - top - texts - {"checkpoints/best", "checkpoints/last"}:
        assert Path(name).name in inside, name
    for name in files:
        path = tiny_run.path / name
        start = path.read_bytes()[:2]
        assert start not in (b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK"), f"{name} looks like a pickle"
        if name.endswith(".safetensors"):
            with safe_open(path, "pt") as opened:
                assert list(opened.keys())
        elif name.endswith(".npy"):
            assert np.load(path, allow_pickle=False).dtype == np.uint16
        elif name.endswith((".json", ".jsonl")):
            for line in path.read_text().splitlines() if name.endswith("l") else [path.read_text()]:
                json.loads(line)


def test_the_saved_recipe_contains_no_auto_values_and_trains_the_same_model(text: Path, folder: Path) -> None:
    recipe = _short(text, "training.micro_batch_size=auto", "training.precision=auto", "training.optimizer=auto", steps=3)
    train(recipe, folder, device="cpu")
    saved = load(folder / "recipe.yaml")
    assert isinstance(saved.training.micro_batch_size, int)
    assert 8 % saved.training.micro_batch_size == 0
    assert saved.training.precision in ("fp32", "bf16")
    assert saved.training.compile is False
    train(saved, folder.with_name("again"), device="cpu")
    assert _last_weights(folder.with_name("again")) == _last_weights(folder)


def test_the_result_agrees_with_the_run_folder(text: Path, folder: Path) -> None:
    result = train(_short(text), folder, device="cpu")
    evaluations = _evaluations(folder)
    assert (result.run, result.step, result.steps, result.tokens) == (str(folder), 10, 10, 10 * 8 * 32)
    assert (result.stopped, result.signal_number, result.device, result.precision) == ("done", None, "cpu", "fp32")
    assert result.metrics["loss"] == evaluations[10]
    assert result.metrics["perplexity"] == pytest.approx(np.exp(evaluations[10]))
    assert result.best_value == min(evaluations.values())
    assert evaluations[result.best_step] == result.best_value
    assert result.parameters == sum(
        p.numel() for p in Run(folder).network(Run(folder).checkpoint(), torch.device("cpu")).parameters()
    )
    assert 0 < result.train_seconds <= result.seconds
    assert result.tokens_per_second == pytest.approx(result.tokens / result.train_seconds)


def test_best_is_the_checkpoint_with_the_lowest_held_out_loss_and_last_is_the_newest(text: Path, folder: Path) -> None:
    """The learning rate rises until training diverges, so an early checkpoint is the best."""
    schedule = (
        "training.optimizer={name: adamw, lr: 3.0}",
        "training.schedule={name: constant, warmup: 12}",
        "evaluation.every=2",
    )
    result = train(_short(text, *schedule, "checkpoint.keep=0", steps=12), folder, device="cpu")
    evaluations = _evaluations(folder)
    assert len(evaluations) == 6
    best = min(evaluations, key=lambda step: evaluations[step])
    assert best != 12
    assert Run(folder).checkpoint("best").step == best == result.best_step
    assert Run(folder).checkpoint("last").step == 12
    assert {checkpoint.step for checkpoint in Run(folder).checkpoints()} == {best, 12}


def test_a_copied_run_can_be_evaluated_without_its_training_text(tiny_run: Run, tmp_path: Path) -> None:
    shutil.copytree(tiny_run.path, tmp_path / "copy")
    recipe_file = tmp_path / "copy" / "recipe.yaml"
    recipe_file.write_text(recipe_file.read_text().replace("english.txt", "gone.txt"))
    copy = Run.open(tmp_path / "copy")
    assert not Path(copy.recipe.data.train[0]).exists()
    logged = _evaluations(tiny_run.path)[copy.checkpoint("best").step]
    assert evaluate_run(copy, device="cpu").perplexity.loss == pytest.approx(logged, rel=1e-12)


# Invalid input


def test_a_folder_that_is_not_a_run_is_rejected_and_unchanged(text: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "precious.txt").write_text("mine")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(InputError, match="not empty and not a run folder"):
            train(_short(text), folder, device="cpu", **options)
    assert (folder / "precious.txt").read_text() == "mine"


def test_a_file_is_rejected_as_a_run_folder(text: Path) -> None:
    with pytest.raises(InputError, match="is a file"):
        train(_short(text), text, device="cpu")


def test_a_run_is_neither_overwritten_nor_resumed_without_an_option(text: Path, folder: Path) -> None:
    _train_one_step(_short(text), folder)
    with pytest.raises(InputError, match="--resume continues it, --overwrite replaces it"):
        train(_short(text), folder, device="cpu")
    with pytest.raises(InputError, match="mutually exclusive"):
        train(_short(text), folder, device="cpu", resume=True, overwrite=True)
    train(_short(text, "seed=5", steps=2), folder, device="cpu", overwrite=True)
    assert Run(folder).recipe.seed == 5
    assert [checkpoint.step for checkpoint in Run(folder).checkpoints()] == [2]


def test_overwriting_with_an_invalid_recipe_removes_no_files(text: Path, folder: Path) -> None:
    _train_one_step(_short(text), folder)
    before = _last_weights(folder)
    with pytest.raises(InputError):
        train(_short(text, f"tokenizer={{path: {text}}}"), folder, device="cpu", overwrite=True)
    assert _last_weights(folder) == before


def test_overwriting_removes_only_the_files_of_the_old_run(text: Path, folder: Path) -> None:
    train(_short(text, "sampling.every=5", "sampling.max_new_tokens=2"), folder, device="cpu")
    (folder / "notes").mkdir()
    (folder / "notes" / "precious.txt").write_text("mine")
    (folder / "text.txt").write_bytes(text.read_bytes())
    train(_short(folder / "text.txt", "seed=5", steps=2), folder, device="cpu", overwrite=True)
    assert (folder / "notes" / "precious.txt").read_text() == "mine"
    assert (folder / "text.txt").exists()
    assert not (folder / "samples.md").exists()
    assert [checkpoint.step for checkpoint in Run(folder).checkpoints()] == [2]
    assert {line["step"] for line in Run(folder).metrics()} == {1, 2}


def test_resuming_with_a_changed_recipe_is_rejected_with_a_list_of_the_changes(text: Path, folder: Path) -> None:
    _train_one_step(_short(text), folder)
    changed = _short(text, "seed=9", "training.optimizer.lr=0.5", "training.schedule.cooldown=0.1", "name=other")
    with pytest.raises(InputError) as caught:
        train(changed, folder, device="cpu", resume=True)
    message = str(caught.value)
    for line in ("seed: 1 -> 9", "training.optimizer.lr: 0.02 -> 0.5", "training.schedule.cooldown: 0.6 -> 0.1"):
        assert line in message
    assert "name:" not in message
    assert "--allow-change" in message
    assert f"`tinylm train {folder} --resume`" in message


def test_changes_are_listed_in_the_notation_of_recipes(text: Path, folder: Path) -> None:
    _train_one_step(_short(text), folder)
    with pytest.raises(InputError, match=r"training\.steps: 10 -> null\n  training\.epochs: null -> 2\.0"):
        train(_short(text, "training.steps=null", "training.epochs=2"), folder, device="cpu", resume=True)


def test_an_allowed_change_is_applied_and_others_are_still_rejected(text: Path, folder: Path) -> None:
    _train_one_step(_short(text), folder)
    longer = _short(text, "training.optimizer.lr=0.5", steps=12)
    with pytest.raises(InputError, match=r"training\.optimizer\.lr"):
        train(longer, folder, device="cpu", resume=True, allow_change=["training.steps"])
    result = train(longer, folder, device="cpu", resume=True, allow_change=["training.steps", "training.optimizer.lr"])
    assert result.step == 12
    assert Run(folder).recipe.training.optimizer.lr == 0.5
    assert max(line["lr"] for line in Run(folder).metrics() if line["kind"] == "step") > 0.4


def test_keys_that_are_safe_to_change_on_resume_do_not_change_the_model(text: Path, folder: Path) -> None:
    _train_one_step(_short(text), folder)
    changes = ("name=new", "training.log_every=3", "checkpoint.keep=5", "checkpoint.every=1", "sampling.every=2")
    train(_short(text, *changes), folder, device="cpu", resume=True)
    assert Run(folder).recipe.name == "new"
    assert len(Run(folder).checkpoints()) >= 5
    train(_short(text), folder.with_name("uninterrupted"), device="cpu")
    assert _last_weights(folder) == _last_weights(folder.with_name("uninterrupted"))


def test_resuming_keeps_an_automatic_precision(text: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = _short(text, "training.precision=auto", steps=3)
    for gain in (9.0, 0.1):  # bf16 is fast at first and slow when the run is resumed
        monkeypatch.setattr("tinylm.training.precision.bf16_speedup", lambda device, gain=gain: gain)
        seconds = {"fp32": 1.0, "bf16": 1 / gain}
        monkeypatch.setattr(Trial, "run", lambda trial, seconds=seconds: seconds[trial.settings.precision.name])
        result = train(recipe, folder, device="cpu", resume=True, stop_after=0.0)
        assert result.precision == "bf16"
    result = train(recipe, folder, device="cpu", resume=True, allow_change=["training.precision"])
    assert result.precision == "fp32"


def test_an_fp32_run_continues_in_fp16_if_allowed(text: Path, folder: Path) -> None:
    _train_one_step(_short(text, steps=3), folder)
    half = _short(text, "training.precision=fp16", steps=3)
    result = train(half, folder, device="cpu", resume=True, allow_change=["training.precision"])
    assert (result.precision, result.step) == ("fp16", 3)
    assert Run(folder).checkpoint("last").state["scaler"]["scale"] > 0


@pytest.mark.parametrize("key", ["training.compile=on", "training.micro_batch_size=2"])
def test_keys_that_affect_dropout_masks_cannot_change_in_a_run_with_dropout(key: str, text: Path, folder: Path) -> None:
    _train_one_step(_short(text, "model.dropout=0.1"), folder)
    with pytest.raises(InputError, match=key.partition("=")[0]):
        train(_short(text, "model.dropout=0.1", key), folder, device="cpu", resume=True)


def test_resuming_with_a_changed_text_is_rejected(text: Path, folder: Path) -> None:
    _train_one_step(_short(text), folder)
    before = _last_weights(folder)
    text.write_text(text.read_text() + "One more sentence. " * 20)
    with pytest.raises(InputError, match="the text is not the one that this run was trained on"):
        train(_short(text), folder, device="cpu", resume=True)
    assert _last_weights(folder) == before


def test_a_changed_text_is_reported_even_if_the_tokenizer_is_the_same(text: Path, folder: Path) -> None:
    recipe = _short(text, "tokenizer=byte", "evaluation.max_tokens=100")
    _train_one_step(recipe, folder)
    text.write_text(text.read_text().replace("the", "eht", 1))
    with pytest.raises(InputError, match="the text is not the one"):
        train(recipe, folder, device="cpu", resume=True)


def test_a_changed_tokenizer_file_is_reported(text: Path, folder: Path, tiny_run: Run, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes((tiny_run.path / "tokenizer.json").read_bytes())
    recipe = _short(text, f"tokenizer={{path: {file}}}")
    _train_one_step(recipe, folder)
    changed = json.loads(file.read_text())
    changed["model"]["merges"].pop()
    file.write_text(json.dumps(changed))
    with pytest.raises(InputError, match="the tokenizer is not the one"):
        train(recipe, folder, device="cpu", resume=True)


def test_a_text_shorter_than_one_sequence_is_rejected(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "tiny.txt"
    path.write_text("pneumonoultramicroscopicsilicovolcanoconiosis " * 20)  # many bytes, but one token per word
    recipe = tiny_recipe(path, "modern", "model.context_length=80")
    with pytest.raises(InputError, match="context_length"):
        train(recipe, folder, device="cpu")
    assert not folder.exists()


# Damage


def test_if_the_newest_checkpoint_is_damaged_resuming_from_the_previous_one_trains_the_same_model(text: Path, folder: Path) -> None:
    recipe = _short(text, "checkpoint.keep=3", steps=12)
    train(recipe, folder, device="cpu")
    weights, evaluations = _last_weights(folder), _evaluations(folder)
    file = Run(folder).checkpoint("last").path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    reporter = CollectingReporter()
    result = train(recipe, folder, device="cpu", resume=True, reporter=reporter)
    assert any("step-000012 is damaged" in warning for warning in reporter.warnings)
    assert any("resuming after step 10" in note for note in reporter.notes)
    assert result.step == 12
    assert _last_weights(folder) == weights
    assert _evaluations(folder) == evaluations


def test_best_never_points_to_a_removed_checkpoint(text: Path, folder: Path) -> None:
    """Step 9 is saved while step 5 is the best. Step 10 is better, so step 5 is removed. Then step 10 is damaged."""
    recipe = _short(text, "checkpoint.every=3", "checkpoint.keep=2", steps=10)
    train(recipe, folder, device="cpu")
    assert [checkpoint.step for checkpoint in Run(folder).checkpoints()] == [9, 10]
    assert Run(folder).checkpoint("best").step == 10
    (Run(folder).checkpoint("last").path / "state.json").unlink()
    longer = _short(text, "checkpoint.every=3", "checkpoint.keep=2", steps=20)
    train(longer, folder, device="cpu", resume=True, allow_change=["training.steps"], stop_after=0.0)
    assert Run(folder).checkpoint("last").step == 10
    with pytest.raises(InputError, match="no best checkpoint yet"):
        Run(folder).checkpoint("best")
    result = train(longer, folder, device="cpu", resume=True)
    assert Run(folder).checkpoint("best").step == result.best_step


def test_a_run_stopped_before_its_first_checkpoint_starts_from_scratch(text: Path, folder: Path) -> None:
    recipe = _short(text, steps=2)
    _train_one_step(recipe, folder)
    for checkpoint in (folder / "checkpoints").iterdir():
        if checkpoint.is_dir():
            for file in checkpoint.iterdir():
                file.unlink()
            checkpoint.rmdir()
    reporter = CollectingReporter()
    assert train(recipe, folder, device="cpu", resume=True, reporter=reporter).step == 2
    assert any("starting from step 0" in note for note in reporter.notes)

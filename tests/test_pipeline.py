"""From a recipe to a run folder: what is left behind, what is refused, and what survives being killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_recipe
from safetensors import safe_open

from tinylm.errors import InputError
from tinylm.pipeline import train
from tinylm.recipe import Recipe, load
from tinylm.reporting import CollectingReporter
from tinylm.run import Run
from tinylm.training.compilation import Trial


def _short(text: Path, *overrides: str, steps: int = 10) -> Recipe:
    small = ("model.n_embd=16", "evaluation.max_tokens=200", "evaluation.every=5")
    return tiny_recipe(text, "modern", f"training.steps={steps}", *small, *overrides)


@pytest.fixture
def text(english: str, tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(english[1000:7000], encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "mine"


def _halfway(recipe: Recipe, folder: Path) -> None:
    """Stopped after step 1 and resumed to nowhere further: there is a checkpoint to go on from."""
    train(recipe, folder, device="cpu", stop_after=0.0)


def _last_weights(folder: Path) -> bytes:
    return (Run(folder).checkpoint("last").path / "model.safetensors").read_bytes()


def _evaluations(folder: Path) -> dict[int, float]:
    return {line["step"]: line["val_loss"] for line in Run(folder).metrics() if line["kind"] == "eval"}


# What is left behind.


def test_a_run_folder_holds_what_it_says_and_no_pickle(tiny_run: Run) -> None:
    files = {path.relative_to(tiny_run.path).as_posix() for path in tiny_run.path.rglob("*") if path.is_file()}
    top = {"recipe.yaml", "tokenizer.json", "metrics.jsonl", "environment.json", "heldout/heldout.npy", "heldout/heldout.json"}
    assert files >= top | {"checkpoints/best", "checkpoints/last"}
    files -= {".lock"}
    inside = {"model.safetensors", "training-00001.safetensors", "state.json", "manifest.json"}
    for name in files - top - {"checkpoints/best", "checkpoints/last"}:
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


def test_the_recipe_left_behind_has_every_auto_decided_and_trains_the_same_model(text: Path, folder: Path) -> None:
    recipe = _short(text, "training.micro_batch_size=auto", "training.precision=auto", "training.optimizer=auto", steps=3)
    train(recipe, folder, device="cpu")
    left = load(folder / "recipe.yaml")
    assert isinstance(left.training.micro_batch_size, int)
    assert 8 % left.training.micro_batch_size == 0
    assert left.training.precision in ("fp32", "bf16")
    assert left.training.compile is False
    train(left, folder.with_name("again"), device="cpu")
    assert _last_weights(folder.with_name("again")) == _last_weights(folder)


def test_the_result_says_what_the_folder_says(text: Path, folder: Path) -> None:
    result = train(_short(text), folder, device="cpu")
    evaluations = _evaluations(folder)
    assert (result.run, result.step, result.steps, result.tokens) == (str(folder), 10, 10, 10 * 8 * 32)
    assert (result.stopped, result.signal_number, result.device, result.precision) == ("done", None, "cpu", "fp32")
    assert result.val_loss == evaluations[10]
    assert result.val_perplexity == pytest.approx(np.exp(evaluations[10]))
    assert result.best_val_loss == min(evaluations.values())
    assert evaluations[result.best_step] == result.best_val_loss
    assert result.parameters == sum(
        p.numel() for p in Run(folder).network(Run(folder).checkpoint(), torch.device("cpu")).parameters()
    )
    assert 0 < result.train_seconds <= result.seconds
    assert result.tokens_per_second == pytest.approx(result.tokens / result.train_seconds)


def test_best_is_the_lowest_held_out_loss_and_last_the_newest(text: Path, folder: Path) -> None:
    """A rate that rises with the warm-up until it spoils the model makes an early checkpoint the best."""
    spoiling = ("training.optimizer={name: adamw, lr: 3.0}", "training.schedule={name: constant, warmup: 12}", "evaluation.every=2")
    result = train(_short(text, *spoiling, "checkpoint.keep=0", steps=12), folder, device="cpu")
    evaluations = _evaluations(folder)
    assert len(evaluations) == 6
    best = min(evaluations, key=lambda step: evaluations[step])
    assert best != 12
    assert Run(folder).checkpoint("best").step == best == result.best_step
    assert Run(folder).checkpoint("last").step == 12
    assert {checkpoint.step for checkpoint in Run(folder).checkpoints()} == {best, 12}


def test_the_library_leaves_the_training_text_unread_when_measuring_a_copied_run(tiny_run: Run) -> None:
    held = tiny_run.heldout()
    assert held.counts.tokens == len(held) - held.counts.documents - 1


# What is refused.


def test_a_folder_that_is_no_run_is_left_alone(text: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "precious.txt").write_text("mine")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(InputError, match="not empty and not a run"):
            train(_short(text), folder, device="cpu", **options)
    assert (folder / "precious.txt").read_text() == "mine"


def test_a_file_is_no_folder(text: Path) -> None:
    with pytest.raises(InputError, match="is a file"):
        train(_short(text), text, device="cpu")


def test_a_run_is_neither_overwritten_nor_resumed_without_being_told(text: Path, folder: Path) -> None:
    _halfway(_short(text), folder)
    with pytest.raises(InputError, match="--resume goes on with it, --overwrite begins anew"):
        train(_short(text), folder, device="cpu")
    with pytest.raises(InputError, match="both"):
        train(_short(text), folder, device="cpu", resume=True, overwrite=True)
    train(_short(text, "seed=5", steps=2), folder, device="cpu", overwrite=True)
    assert Run(folder).recipe.seed == 5
    assert [checkpoint.step for checkpoint in Run(folder).checkpoints()] == [2]


def test_overwriting_with_what_cannot_be_trained_removes_nothing(text: Path, folder: Path) -> None:
    _halfway(_short(text), folder)
    before = _last_weights(folder)
    with pytest.raises(InputError):
        train(_short(text, f"tokenizer={{path: {text}}}"), folder, device="cpu", overwrite=True)
    assert _last_weights(folder) == before


def test_overwriting_removes_the_old_run_and_nothing_else(text: Path, folder: Path) -> None:
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


def test_a_changed_recipe_is_refused_with_the_list_of_changes(text: Path, folder: Path) -> None:
    _halfway(_short(text), folder)
    changed = _short(text, "seed=9", "training.optimizer.lr=0.5", "training.schedule.cooldown=0.1", "name=other")
    with pytest.raises(InputError) as caught:
        train(changed, folder, device="cpu", resume=True)
    message = str(caught.value)
    for line in ("seed: 1 -> 9", "training.optimizer.lr: 0.02 -> 0.5", "training.schedule.cooldown: 0.6 -> 0.1"):
        assert line in message
    assert "name:" not in message
    assert "--allow-change" in message


def test_an_allowed_change_is_taken_over_and_others_are_still_refused(text: Path, folder: Path) -> None:
    _halfway(_short(text), folder)
    longer = _short(text, "training.optimizer.lr=0.5", steps=12)
    with pytest.raises(InputError, match=r"training\.optimizer\.lr"):
        train(longer, folder, device="cpu", resume=True, allow_change=["training.steps"])
    result = train(longer, folder, device="cpu", resume=True, allow_change=["training.steps", "training.optimizer.lr"])
    assert result.step == 12
    assert Run(folder).recipe.training.optimizer.lr == 0.5
    assert max(line["lr"] for line in Run(folder).metrics() if line["kind"] == "step") > 0.4


def test_harmless_keys_may_change_and_the_model_stays_the_same(text: Path, folder: Path) -> None:
    _halfway(_short(text), folder)
    harmless = ("name=new", "training.log_every=3", "checkpoint.keep=5", "checkpoint.every=1", "sampling.every=2")
    train(_short(text, *harmless), folder, device="cpu", resume=True)
    assert Run(folder).recipe.name == "new"
    assert len(Run(folder).checkpoints()) >= 5
    train(_short(text), folder.with_name("whole"), device="cpu")
    assert _last_weights(folder) == _last_weights(folder.with_name("whole"))


def test_a_precision_left_to_auto_stays_what_the_run_began_with(text: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = _short(text, "training.precision=auto", steps=3)
    for gain in (9.0, 0.1):  # as if the processor had changed its mind
        monkeypatch.setattr("tinylm.training.precision._bf16_speed_up", lambda device, gain=gain: gain)
        monkeypatch.setattr(
            Trial, "seconds", lambda trial, repeat=2, gain=gain: 1 / gain if trial._precision.name == "bf16" else 1.0
        )
        result = train(recipe, folder, device="cpu", resume=True, stop_after=0.0)
        assert result.precision == "bf16"
    result = train(recipe, folder, device="cpu", resume=True, allow_change=["training.precision"])
    assert result.precision == "fp32"


def test_a_run_in_fp32_goes_on_in_fp16_when_that_is_allowed(text: Path, folder: Path) -> None:
    _halfway(_short(text, steps=3), folder)
    half = _short(text, "training.precision=fp16", steps=3)
    result = train(half, folder, device="cpu", resume=True, allow_change=["training.precision"])
    assert (result.precision, result.step) == ("fp16", 3)
    assert Run(folder).checkpoint("last").state["scaler"]["scale"] > 0


@pytest.mark.parametrize("key", ["training.compile=on", "training.micro_batch_size=2"])
def test_what_decides_how_dropout_is_drawn_may_change_only_without_dropout(key: str, text: Path, folder: Path) -> None:
    _halfway(_short(text, "model.dropout=0.1"), folder)
    with pytest.raises(InputError, match=key.partition("=")[0]):
        train(_short(text, "model.dropout=0.1", key), folder, device="cpu", resume=True)


def test_a_changed_text_is_refused(text: Path, folder: Path) -> None:
    _halfway(_short(text), folder)
    before = _last_weights(folder)
    text.write_text(text.read_text() + "One more sentence. " * 20)
    with pytest.raises(InputError, match="is not the one this run was trained on"):
        train(_short(text), folder, device="cpu", resume=True)
    assert _last_weights(folder) == before


def test_a_changed_text_under_an_unchanged_tokenizer_is_told_as_the_text(text: Path, folder: Path) -> None:
    recipe = _short(text, "tokenizer=byte", "evaluation.max_tokens=100")
    _halfway(recipe, folder)
    text.write_text(text.read_text().replace("the", "eht", 1))
    with pytest.raises(InputError, match="the text is not the one"):
        train(recipe, folder, device="cpu", resume=True)


def test_a_changed_tokenizer_file_is_told_as_the_tokenizer(text: Path, folder: Path, tiny_run: Run, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes((tiny_run.path / "tokenizer.json").read_bytes())
    recipe = _short(text, f"tokenizer={{path: {file}}}")
    _halfway(recipe, folder)
    changed = json.loads(file.read_text())
    changed["model"]["merges"].pop()
    file.write_text(json.dumps(changed))
    with pytest.raises(InputError, match="the tokenizer is not the one"):
        train(recipe, folder, device="cpu", resume=True)


def test_a_text_shorter_than_one_sequence_is_refused(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "tiny.txt"
    path.write_text("pneumonoultramicroscopicsilicovolcanoconiosis " * 20)  # long enough in bytes, one token a word
    recipe = tiny_recipe(path, "modern", "model.context_length=80")
    with pytest.raises(InputError, match="context_length"):
        train(recipe, folder, device="cpu")
    assert not folder.exists()


# What survives.


def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_trains_to_the_same_end(text: Path, folder: Path) -> None:
    recipe = _short(text, "checkpoint.keep=3", steps=12)
    train(recipe, folder, device="cpu")
    whole, evaluations = _last_weights(folder), _evaluations(folder)
    file = Run(folder).checkpoint("last").path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    reporter = CollectingReporter()
    result = train(recipe, folder, device="cpu", resume=True, reporter=reporter)
    assert any("step-000012 is damaged" in warning for warning in reporter.warnings)
    assert any("resuming after step 10" in note for note in reporter.notes)
    assert result.step == 12
    assert _last_weights(folder) == whole
    assert _evaluations(folder) == evaluations


def test_best_never_names_a_checkpoint_that_is_gone(text: Path, folder: Path) -> None:
    """Step 9 is saved while 5 is best; 10 is better, so that 5 goes; then 10 turns out to be damaged."""
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


def test_a_run_stopped_before_its_first_checkpoint_begins_again(text: Path, folder: Path) -> None:
    recipe = _short(text, steps=2)
    _halfway(recipe, folder)
    for checkpoint in (folder / "checkpoints").iterdir():
        if checkpoint.is_dir():
            for file in checkpoint.iterdir():
                file.unlink()
            checkpoint.rmdir()
    reporter = CollectingReporter()
    assert train(recipe, folder, device="cpu", resume=True, reporter=reporter).step == 2
    assert any("beginning at step 0" in note for note in reporter.notes)


def _started(recipe: Recipe, folder: Path, tmp_path: Path) -> subprocess.Popen[bytes]:
    """`tinylm train` in a process of its own, with as many threads as this one: their number decides how sums round."""
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    threads = str(torch.get_num_threads())
    command = [sys.executable, "-m", "tinylm", "train", str(file), "--out", str(folder), "--device", "cpu", "--threads", threads]
    return subprocess.Popen([*command, "--json", "--quiet"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ))


def _wait(process: subprocess.Popen[bytes], condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def _logged(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_a_signal_finishes_the_step_saves_and_says_so(
    number: signal.Signals, code: int, text: Path, folder: Path, tmp_path: Path
) -> None:
    recipe = _short(text, "checkpoint.every=100000", "evaluation.every=100000", "training.compile=off", steps=100000)
    process = _started(recipe, folder, tmp_path)
    _wait(process, lambda: _logged(folder) >= 3)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert b"Traceback" not in err
    answer = json.loads(out)
    assert answer["stopped"] == "signal"
    saved = Run(folder).checkpoint("last")
    assert saved.problem() is None
    assert saved.step == answer["step"] == max(line["step"] for line in Run(folder).metrics())
    assert train(recipe, folder, device="cpu", resume=True, stop_after=0.0).step == saved.step + 1

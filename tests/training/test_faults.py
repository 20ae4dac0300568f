"""Training reports full disks, deleted folders and concurrent processes, handles signals, and preserves saved checkpoints."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import training_processes
from command import COMMAND, environment
from conftest import tiny_recipe

from tinylm.errors import InputError, WorkError
from tinylm.pipeline import train
from tinylm.recipe import Recipe
from tinylm.run import LOCK, Run
from tinylm.training import checkpoint as checkpoint_module
from tinylm.training.metrics import Observer

pytestmark = pytest.mark.skipif(os.name == "nt", reason="requires POSIX signals and resource limits")


def _recipe(text: Path, *overrides: str) -> Recipe:
    training = ("training.steps=12", "training.compile=off", "checkpoint.every=4")
    evaluation = ("evaluation.max_tokens=200", "evaluation.every=100")
    return tiny_recipe(text, "modern", "model.n_embd=16", *training, *evaluation, *overrides)


def _steps(folder: Path) -> list[int]:
    return [checkpoint.step for checkpoint in Run(folder).checkpoints()]


class _ActionAfterSaving(Observer):
    """Calls `action` when the checkpoint for step 4 is complete, and collects notes."""

    def __init__(self, action: Any) -> None:
        self.action, self.notes = action, []

    def saved(self, step: int) -> None:
        if step == 4:
            self.action()

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize(("on_failure", "code", "saved"), [("stop", 1, 4), ("continue", 0, 12)])
def test_a_full_disk_preserves_the_last_checkpoint_and_stops_or_continues_as_configured(
    on_failure: str, code: int, saved: int, text_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    recipe = _recipe(text_file, f"checkpoint.on_failure={on_failure}", "training.log_every=5")
    assert training_processes.wait(training_processes.start(recipe, folder, observer=training_processes.FullDisk())) == [code]
    last = Run(folder).checkpoint("last")
    assert (last.step, last.problem()) == (saved, None)
    assert 8 not in _steps(folder)
    assert not training_processes.is_saving(folder)
    if code:
        message = training_processes.error_file(folder).read_text().replace("[Errno 27] ", "")
        assert "step 8 could not be saved: File too large" in message
    training_processes.run(recipe, folder, resume=True)
    assert Run(folder).checkpoint("last").step == 12


@pytest.mark.parametrize("on_failure", ["stop", "continue"])
def test_a_run_folder_deleted_during_training_is_not_recreated(on_failure: str, text_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    remover = _ActionAfterSaving(lambda: shutil.rmtree(folder))
    with pytest.raises(
        WorkError, match=f"step {8 if on_failure == 'stop' else 12} could not be saved: the run folder no longer exists"
    ):
        train(_recipe(text_file, f"checkpoint.on_failure={on_failure}"), folder, device="cpu", observer=remover)
    assert not folder.exists()
    assert bool(remover.notes) == (on_failure == "continue")


def test_a_disk_that_becomes_read_only_is_reported(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate the error, because root can write to read-only folders."""
    folder = tmp_path / "run"

    def fail(*_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    breaker = _ActionAfterSaving(lambda: monkeypatch.setattr(checkpoint_module, "save_file", fail))
    with pytest.raises(WorkError, match=r"step 8 could not be saved.*Read-only file system"):
        train(_recipe(text_file), folder, device="cpu", observer=breaker)
    assert _steps(folder) == [4]


def test_a_second_process_cannot_train_in_the_same_folder(text_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe = _recipe(text_file, "training.steps=100000")
    [first] = training_processes.start(recipe, folder)
    while training_processes.logged_lines(folder) < 3:
        assert first.is_alive()
        time.sleep(0.01)
    recipe_before = (folder / "recipe.yaml").read_bytes()
    for options in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(InputError, match="another process is training in this folder") as caught:
            train(_recipe(text_file), folder, device="cpu", **options)
        assert caught.value.exit_code == 2
    assert (folder / "recipe.yaml").read_bytes() == recipe_before
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    training_processes.wait([first])
    logged = training_processes.logged_lines(folder)
    train(recipe, folder, device="cpu", resume=True, stop_after=0.0)  # The killed process no longer holds the lock.
    assert training_processes.logged_lines(folder) <= logged + 1


def test_a_locked_folder_is_rejected_before_the_text_is_prepared(tmp_path: Path, text_file: Path) -> None:
    import filelock

    folder = tmp_path / "new" / "run"
    folder.mkdir(parents=True)
    with filelock.FileLock(folder / LOCK), pytest.raises(InputError, match="another process is training"):
        train(_recipe(text_file), folder, device="cpu")
    assert [path.name for path in folder.iterdir()] == [LOCK]


def test_a_failure_before_the_first_write_leaves_no_folder(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("too short " * 20)
    with pytest.raises(InputError, match="context_length"):
        train(tiny_recipe(text, "modern", "model.context_length=90"), tmp_path / "new" / "run", device="cpu")
    assert not (tmp_path / "new").exists()


def test_each_resume_adds_an_entry_to_environment_json(text_file: Path, tmp_path: Path) -> None:
    for _ in range(3):
        train(_recipe(text_file), tmp_path / "run", device="cpu", resume=True, stop_after=0.0)
    environment_json = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert "resumed_step" not in environment_json
    assert [entry["resumed_step"] for entry in environment_json["resumed"]] == [1, 2]
    assert all(entry["torch"] == environment_json["torch"] for entry in environment_json["resumed"])


def test_partial_files_from_a_killed_process_are_removed(text_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(_recipe(text_file), folder, device="cpu", stop_after=0.0)
    (folder / "checkpoints" / ".step-000004.partial").mkdir()
    (folder / "checkpoints" / ".step-000002.removed").mkdir()
    (folder / "checkpoints" / ".last.0123456789ab.tmp").write_text("partial")
    (folder / ".metrics.jsonl.0123456789ab.tmp").write_text("partial")
    (folder / ".mine").write_text("not ours")
    train(_recipe(text_file), folder, device="cpu", resume=True, stop_after=0.0)
    assert sorted(path.name for path in folder.rglob(".*")) == [LOCK, ".mine"]


# Changing the recipe when resuming


def test_allow_change_accepts_a_section_and_a_new_optimizer_starts_with_fresh_state(text_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(_recipe(text_file), folder, device="cpu", stop_after=0.0)
    other = _recipe(text_file, "training.optimizer={name: adamw, lr: 1e-3}", "training.steps=4")
    with pytest.raises(InputError, match=r"training\.steps"):
        train(other, folder, device="cpu", resume=True, allow_change=["training.optimizer"])
    with pytest.raises(InputError, match=r"data has not changed"):
        train(other, folder, device="cpu", resume=True, allow_change=["data"])
    train(other, folder, device="cpu", resume=True, allow_change=["training"])
    train(other, folder, device="cpu", resume=True)
    assert Run(folder).recipe.training.optimizer.name == "adamw"
    last = Run(folder).checkpoint("last")
    assert last.step == 4
    with open(last.path / "training-00001.safetensors", "rb") as file:
        header = file.read(20_000)
    assert b"muon/" not in header, "the previous optimizer's state must be removed"
    assert b"adamw/blocks.0.attention.qkv.weight/exp_avg" in header


@pytest.mark.parametrize("length", ["tokens=1000", "epochs=0.05"])
def test_a_warmup_that_is_longer_than_training_is_rejected(length: str, text_file: Path, tmp_path: Path) -> None:
    recipe = _recipe(text_file, "training.steps=null", f"training.{length}", "training.schedule.warmup=50")
    with pytest.raises(InputError, match=r"50 warmup steps exceed the \d+ training steps"):
        train(recipe, tmp_path / "run", device="cpu")


# Signals


def _command(text: Path, folder: Path, *overrides: str) -> list[str]:
    file = folder.with_suffix(".yaml")
    file.write_text(_recipe(text, *overrides).to_yaml(), encoding="utf-8")
    return [*COMMAND, "train", str(file), "--out", str(folder), "--device", "cpu", "--threads", "1", "--quiet"]


def _send_signals_when(
    command: list[str], condition: Any, *numbers: signal.Signals, cache: Path | None = None
) -> tuple[int, bytes]:
    """Run a command, send it signals as soon as `condition` is true, and return its exit code and stdout.

    If there are several signals, they must differ. They are sent at once, and Python handles them in numerical order.
    """
    variables = {**environment(), **({"TINYLM_CACHE": str(cache)} if cache else {})}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=variables) as process:
        while not condition():
            assert process.poll() is None, process.communicate()[1].decode()
            time.sleep(0.002)
        for number in numbers:
            process.send_signal(number)
        out, err = process.communicate(timeout=600)
    assert b"Traceback" not in err
    return process.returncode, out


def test_sigterm_while_preparing_the_text_leaves_no_files(english: str, tmp_path: Path) -> None:
    text, cache, folder = tmp_path / "long.txt", tmp_path / "cache", tmp_path / "run"
    text.write_text(english * 12)
    command = _command(text, folder, "tokenizer={kind: char}")
    code, _ = _send_signals_when(command, lambda: any(cache.glob("tokens/*/.*")), signal.SIGTERM, cache=cache)
    assert code == 143
    assert not folder.exists()
    assert not list(cache.rglob(".*"))


def test_a_second_sigterm_exits_immediately_with_its_own_code(text_file: Path, tmp_path: Path) -> None:
    """Both signals arrive during an evaluation with slow batches. The second one interrupts the current batch."""
    folder = tmp_path / "run"
    slow = ("evaluation.every=2", "evaluation.stride=1", "evaluation.max_tokens=null", "model.n_layer=6", "model.n_embd=128")
    command = _command(text_file, folder, *slow)
    code, out = _send_signals_when(command, (folder / "checkpoints" / "last").exists, signal.SIGINT, signal.SIGTERM)
    assert code == 143
    assert out == b"", "the first signal alone would have printed the run folder"
    assert Run(folder).checkpoint("last").problem() is None

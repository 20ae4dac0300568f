"""Disks that refuse, folders that vanish, second trainers, signals anywhere: what was saved stays, and what went wrong is said."""

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

import lives
import pytest
from command import COMMAND, environment
from conftest import tiny_recipe

from tinylm.errors import InputError, WorkError
from tinylm.pipeline import train
from tinylm.recipe import Recipe
from tinylm.run import LOCK, Run
from tinylm.training import checkpoint as room
from tinylm.training.metrics import Observer

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals and limits")


def _recipe(text: Path, *overrides: str) -> Recipe:
    small = ("model.n_embd=16", "evaluation.max_tokens=200", "evaluation.every=100", "checkpoint.every=4", "training.steps=12")
    small = (*small, "training.compile=off")
    return tiny_recipe(text, "modern", *small, *overrides)


def _steps(folder: Path) -> list[int]:
    return [checkpoint.step for checkpoint in Run(folder).checkpoints()]


class _AfterSaving(Observer):
    """Does something once the checkpoint of step 4 is whole."""

    def __init__(self, action: Any) -> None:
        self.action, self.notes = action, []

    def saved(self, step: int) -> None:
        if step == 4:
            self.action()

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize(("on_failure", "code", "saved"), [("stop", 1, 4), ("continue", 0, 12)])
def test_a_full_disk_leaves_the_checkpoint_before_and_ends_or_goes_on(
    on_failure: str, code: int, saved: int, text_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    recipe = _recipe(text_file, f"checkpoint.on_failure={on_failure}", "training.log_every=5")
    assert lives.ended(lives.started(recipe, folder, observer=lives.FullDisk())) == [code]
    last = Run(folder).checkpoint("last")
    assert (last.step, last.problem()) == (saved, None)
    assert 8 not in _steps(folder)
    assert not lives.saving(folder)
    if code:
        assert "step 8 could not be saved: File too large" in (tmp_path / "run.error-0").read_text().replace("[Errno 27] ", "")
    lives.run(recipe, folder, resume=True)
    assert Run(folder).checkpoint("last").step == 12


@pytest.mark.parametrize("on_failure", ["stop", "continue"])
def test_a_folder_removed_while_training_does_not_come_back(on_failure: str, text_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    remover = _AfterSaving(lambda: shutil.rmtree(folder))
    with pytest.raises(WorkError, match=f"step {8 if on_failure == 'stop' else 12} could not be saved: the run folder is gone"):
        train(_recipe(text_file, f"checkpoint.on_failure={on_failure}"), folder, device="cpu", observer=remover)
    assert not folder.exists()
    assert bool(remover.notes) == (on_failure == "continue")


def test_a_disk_that_turns_read_only_is_told(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere, so that the system's answer is imitated."""
    folder = tmp_path / "run"

    def refuse(*_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    spoiler = _AfterSaving(lambda: monkeypatch.setattr(room, "_new_folder", refuse))
    with pytest.raises(WorkError, match=r"step 8 could not be saved.*Read-only file system"):
        train(_recipe(text_file), folder, device="cpu", observer=spoiler)
    assert _steps(folder) == [4]


def test_a_second_trainer_is_refused_and_the_first_is_not_disturbed(text_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe = _recipe(text_file, "training.steps=100000")
    [first] = lives.started(recipe, folder)
    while lives.lines(folder) < 3:
        assert first.is_alive()
        time.sleep(0.01)
    before = (folder / "recipe.yaml").read_bytes()
    for options in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(InputError, match="another process trains into this folder") as caught:
            train(_recipe(text_file), folder, device="cpu", **options)
        assert caught.value.exit_code == 2
    assert (folder / "recipe.yaml").read_bytes() == before
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    lives.ended([first])
    done = lives.lines(folder)
    train(recipe, folder, device="cpu", resume=True, stop_after=0.0)  # the lock went with the process
    assert lives.lines(folder) <= done + 1


def test_a_lock_held_elsewhere_is_noticed_before_anything_is_prepared(tmp_path: Path, text_file: Path) -> None:
    import filelock

    folder = tmp_path / "new" / "run"
    folder.mkdir(parents=True)
    with filelock.FileLock(folder / LOCK), pytest.raises(InputError, match="another process"):
        train(_recipe(text_file), folder, device="cpu")
    assert [path.name for path in folder.iterdir()] == [LOCK]


def test_what_fails_before_anything_is_written_leaves_no_folder(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("too short " * 20)
    with pytest.raises(InputError, match="context_length"):
        train(tiny_recipe(text, "modern", "model.context_length=90"), tmp_path / "new" / "run", device="cpu")
    assert not (tmp_path / "new").exists()


def test_the_environment_of_the_first_training_is_kept_and_later_ones_are_added(text_file: Path, tmp_path: Path) -> None:
    for _ in range(3):
        train(_recipe(text_file), tmp_path / "run", device="cpu", resume=True, stop_after=0.0)
    noted = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert "resumed_step" not in noted
    assert [each["resumed_step"] for each in noted["resumed"]] == [1, 2]
    assert all(each["torch"] == noted["torch"] for each in noted["resumed"])


def test_what_a_killed_process_left_half_written_is_removed(text_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(_recipe(text_file), folder, device="cpu", stop_after=0.0)
    (folder / "checkpoints" / ".step-000004.partial").mkdir()
    (folder / "checkpoints" / ".step-000002.removed").mkdir()
    (folder / "checkpoints" / ".last.abc").write_text("torn")
    (folder / ".metrics.jsonl.abc").write_text("torn")
    (folder / ".mine").write_text("not ours")
    train(_recipe(text_file), folder, device="cpu", resume=True, stop_after=0.0)
    assert sorted(path.name for path in folder.rglob(".*")) == [LOCK, ".mine"]


# Changes on resuming.


def test_a_section_may_be_allowed_to_change_and_another_optimizer_begins_anew(text_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(_recipe(text_file), folder, device="cpu", stop_after=0.0)
    other = _recipe(text_file, "training.optimizer={name: adamw, lr: 1e-3}", "training.steps=4")
    with pytest.raises(InputError, match=r"training\.steps"):
        train(other, folder, device="cpu", resume=True, allow_change=["training.optimizer"])
    with pytest.raises(InputError, match=r"is the same as before"):
        train(other, folder, device="cpu", resume=True, allow_change=["data"])
    train(other, folder, device="cpu", resume=True, allow_change=["training"])
    train(other, folder, device="cpu", resume=True)
    assert Run(folder).recipe.training.optimizer.name == "adamw"
    last = Run(folder).checkpoint("last")
    assert last.step == 4
    with open(last.path / "training-00001.safetensors", "rb") as file:
        header = file.read(20_000)
    assert b"muon/" not in header, "no stray state of the optimizer before"
    assert b"adamw/blocks.0.attention.qkv.weight/exp_avg" in header


@pytest.mark.parametrize("length", ["tokens=1000", "epochs=0.05"])
def test_a_warm_up_longer_than_tokens_or_epochs_is_refused(length: str, text_file: Path, tmp_path: Path) -> None:
    recipe = _recipe(text_file, "training.steps=null", f"training.{length}", "training.schedule.warmup=50")
    with pytest.raises(InputError, match="50 steps of warm-up are more than the"):
        train(recipe, tmp_path / "run", device="cpu")


# Signals.


def _command(text: Path, folder: Path, *overrides: str) -> list[str]:
    file = folder.with_suffix(".yaml")
    file.write_text(_recipe(text, *overrides).to_yaml(), encoding="utf-8")
    return [*COMMAND, "train", str(file), "--out", str(folder), "--device", "cpu", "--threads", "1", "--quiet"]


def _stopped(command: list[str], moment: Any, *numbers: signal.Signals, cache: Path | None = None) -> int:
    there = {**environment(), **({"TINYLM_CACHE": str(cache)} if cache else {})}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=there) as process:
        while not moment():
            assert process.poll() is None, process.communicate()[1].decode()
            time.sleep(0.002)
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.05)
        _, err = process.communicate(timeout=60)
    assert b"Traceback" not in err
    return process.returncode


def test_sigterm_while_the_text_is_prepared_leaves_nothing(english: str, tmp_path: Path) -> None:
    text, cache, folder = tmp_path / "long.txt", tmp_path / "cache", tmp_path / "run"
    text.write_text(english * 12)
    command = _command(text, folder, "tokenizer={kind: char}")
    assert _stopped(command, lambda: any(cache.glob("tokens/*/.*")), signal.SIGTERM, cache=cache) == 143
    assert not folder.exists()
    assert not list(cache.rglob(".*"))


def test_a_second_sigterm_stops_at_once_with_its_own_code(text_file: Path, tmp_path: Path) -> None:
    """The first is heard in an evaluation that takes minutes, whose batches are long: the second does not wait for one."""
    folder = tmp_path / "run"
    slow = ("evaluation.every=2", "evaluation.stride=1", "evaluation.max_tokens=null", "model.n_layer=6", "model.n_embd=128")
    command = _command(text_file, folder, *slow)
    moment = lambda: (folder / "checkpoints" / "last").exists()  # noqa: E731
    began = time.monotonic()
    assert _stopped(command, moment, signal.SIGTERM, signal.SIGTERM) == 143
    assert time.monotonic() - began < 60
    assert Run(folder).checkpoint("last").problem() is None

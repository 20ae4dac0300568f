"""Lock, clean and write a run folder: recipe, tokenizer, held-out tokens and environment.

`training.checkpoint` writes the checkpoints. `training.metrics` writes the metrics and samples.
"""

from __future__ import annotations

import json
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock
import safetensors
import tokenizers
import torch

import tinylm
from tinylm.data import training_text
from tinylm.data.prepared import PreparedData
from tinylm.data.training_text import TrainingText, save_training_texts
from tinylm.errors import InputError
from tinylm.paths import atomic_file, atomic_write_text, remove_abandoned
from tinylm.recipe import Recipe
from tinylm.run import LOCK, check_run_folder, run_files
from tinylm.tokenizer.chat_template import CHAT_TEMPLATE_FILE


@contextmanager
def locked_run_folder(folder: Path, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Create `folder` and lock it, so that no other process trains in it. On exit, remove `folder` if it is new and still empty.

    The operating system releases the lock when the process ends, even if the process is killed. Raises `InputError` if another
    process holds the lock, or if `check_run_folder` rejects the folder.
    """
    check_run_folder(folder, resume, overwrite)
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / LOCK, blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise InputError(
            "another process is training in this folder",
            where=str(folder),
            hint="wait for it, or choose another folder with --out",
        ) from None
    try:
        check_run_folder(folder, resume, overwrite)  # another process may have written a run before the lock was acquired
        _remove_temporary_files(folder)
        yield
    finally:
        lock.release()
        if created and folder.exists() and all(path.name == LOCK for path in folder.iterdir()):
            shutil.rmtree(folder)
            with suppress(OSError):  # the parent is not empty: another run may have been created in it
                for parent in created[1:]:
                    parent.rmdir()


def _remove_temporary_files(folder: Path) -> None:
    """Remove the temporary files of atomic writes that were interrupted because the process was killed."""
    for place in (folder, folder / "heldout", folder / "reports"):
        remove_abandoned(place)


def remove_run(folder: Path) -> None:
    """Remove the files of the previous run, and keep all other files. recipe.yaml stays until the new recipe replaces it."""
    for name in run_files(folder):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif name not in (LOCK, "recipe.yaml"):
            path.unlink(missing_ok=True)


def write_run(
    folder: Path,
    recipe: Recipe,
    prepared: PreparedData,
    facts: dict[str, Any],
    training_texts: Sequence[TrainingText] | None = None,
) -> None:
    """Write recipe.yaml, tokenizer.json, heldout/, environment.json and, if `training_texts` is not None, training_text/.

    The recipe is written first, because it marks the folder as a run folder. The run can then be resumed or overwritten even if
    this process is killed. `facts` are added to environment.json. In a resumed run, environment.json keeps the original
    environment, and the current one is appended.
    """
    atomic_write_text(folder / "recipe.yaml", recipe.to_yaml())
    prepared.tokenizer.save(folder / "tokenizer.json")
    if prepared.chat_template is not None:
        atomic_write_text(folder / CHAT_TEMPLATE_FILE, prepared.chat_template)
    for name in prepared.heldout_files:
        with atomic_file(folder / "heldout" / name) as temporary:
            shutil.copyfile(prepared.folder / name, temporary)
    if training_texts is not None:
        save_training_texts(folder / training_text.FOLDER, training_texts, prepared.tokenizer)
    _write_environment(folder / "environment.json", {**_environment(), **facts})


def _write_environment(file: Path, current: dict[str, Any]) -> None:
    try:
        first = json.loads(file.read_text(encoding="utf-8"))
        resumed = [*first.pop("resumed", []), current]
    except (OSError, ValueError, AttributeError, TypeError):  # missing or damaged
        first, resumed = current, []
    atomic_write_text(file, json.dumps({**first, "resumed": resumed}, indent=1) + "\n")


def _environment() -> dict[str, Any]:
    return {
        "tinylm": tinylm.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tokenizers": tokenizers.__version__,
        "safetensors": safetensors.__version__,
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "threads": torch.get_num_threads(),
        "git_commit": _git_commit(),
        "command": sys.argv,
        "folder": str(Path.cwd()),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _git_commit() -> str | None:
    """Return the commit that is checked out in the working directory, or None outside a git repository."""
    try:
        result = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None

"""Who may write into a run folder, and what is written there beside checkpoints and metrics."""

from __future__ import annotations

import json
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock
import safetensors
import tokenizers
import torch

import tinylm
from tinylm.data.prepare import Prepared
from tinylm.errors import InputError
from tinylm.paths import whole_file, write_whole
from tinylm.recipe import Recipe
from tinylm.run import LOCK, OWN, claim


@contextmanager
def claimed(folder: Path, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Nobody else may train into `folder` meanwhile. Raises `InputError` where somebody does, or as `claim` does.

    The system lets go of the lock when the process ends, however it ends. A folder in which nothing was written disappears.
    """
    claim(folder, resume, overwrite)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / LOCK, blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise InputError(
            "another process trains into this folder", where=str(folder), hint="wait for it, or choose another with --out"
        ) from None
    try:
        claim(folder, resume, overwrite)  # somebody may have been here in between
        _sweep(folder)
        yield
    finally:
        lock.release()
        if made and folder.exists() and all(path.name == LOCK for path in folder.iterdir()):
            shutil.rmtree(folder)
            with suppress(OSError):  # another run may lie there by now
                for parent in made[1:]:
                    parent.rmdir()


def _sweep(folder: Path) -> None:
    """Remove the temporary files of a process that was killed while it replaced one of the folder's own."""
    for name in OWN:
        for left in folder.glob(f".{name}.*"):
            left.unlink()


def remove_run(folder: Path) -> None:
    """Remove what an earlier training wrote, and nothing else that lies there. The recipe stays until the new one replaces it."""
    for name in OWN:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif name not in (LOCK, "recipe.yaml"):
            path.unlink(missing_ok=True)


def write_run(folder: Path, recipe: Recipe, prepared: Prepared, facts: dict[str, Any]) -> None:
    """The recipe first: with it the folder is a run, which can be resumed or overwritten whatever happens next.

    `facts` join what is known of the environment. A resumed run keeps what its first training wrote there and adds its own.
    """
    write_whole(folder / "recipe.yaml", recipe.to_yaml())
    prepared.tokenizer.save(folder / "tokenizer.json")
    for name in ("heldout.npy", "heldout.json"):
        with whole_file(folder / "heldout" / name) as temporary:
            shutil.copyfile(prepared.folder / name, temporary)
    _write_environment(folder / "environment.json", {**_environment(), **facts})


def _write_environment(file: Path, here: dict[str, Any]) -> None:
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        resumed = [*before.pop("resumed", []), here]
    except (OSError, ValueError, AttributeError, TypeError):  # none yet, or not ours any more
        before, resumed = here, []
    write_whole(file, json.dumps({**before, "resumed": resumed}, indent=1) + "\n")


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
    """The commit of the repository one works in, if any."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None

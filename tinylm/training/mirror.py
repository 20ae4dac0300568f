"""Copy the run folder to the URL in `checkpoint.mirror` after each checkpoint, in a background thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from tinylm.errors import InputError, WorkError
from tinylm.recipe import Recipe
from tinylm.remote_runs import RemoteRun
from tinylm.reporting import Reporter
from tinylm.run import RUN_FILES, Run
from tinylm.training.metrics import Observer

NOT_MIRRORED = (".lock", "tensorboard", "wandb")
"""Files and folders of a run folder that are not copied. The trackers have their own way to other machines."""
MIRRORED = tuple(name for name in RUN_FILES if name not in NOT_MIRRORED)
LAST_COPY_SECONDS = 900.0
"""How long the end of training waits for the last copy."""


class Mirror(Observer):
    """Updates the copy after each checkpoint and at the end of training.

    If the store cannot be reached, reports it with `note`, and tries again after the next checkpoint. If checkpoints are saved more
    often than they can be copied, some of them are left out.
    """

    def __init__(self, remote: RemoteRun, folder: Path, note: Callable[[str], None]) -> None:
        self._remote = remote
        self._folder = folder
        self._note = note
        self._requested = threading.Event()
        self._closing = False
        self._problem: str | None = None
        # With a daemon thread, a second signal ends the process without waiting for the store.
        self._thread = threading.Thread(target=self._copy, name="tinylm-mirror", daemon=True)

    def saved(self, step: int) -> None:
        if self._thread.ident is None:
            self._thread.start()
        self._report()
        self._requested.set()

    def close(self) -> None:
        if self._thread.ident is None:
            return  # nothing has been saved
        self._closing = True
        self._requested.set()
        self._thread.join(LAST_COPY_SECONDS)
        if self._thread.is_alive():
            self._problem = f"{self._remote.url}: the last copy took longer than {LAST_COPY_SECONDS / 60:.0f} minutes"
        self._report(final=True)

    def _copy(self) -> None:
        last = False
        while not last:
            self._requested.wait()
            self._requested.clear()
            last = self._closing  # what is copied from here on is complete
            try:
                self._remote.push(self._folder, MIRRORED)
                self._problem = None
            except (OSError, InputError, WorkError) as error:  # `OSError`: a file of the run cannot be read
                self._problem = str(error)

    def _report(self, *, final: bool = False) -> None:
        problem, self._problem = self._problem, None
        if problem is not None:
            then = "the copy is incomplete" if final else "training continues, and the next checkpoint tries again"
            self._note(f"checkpoint.mirror: {problem}; {then}")


def mirrors(recipe: Recipe, folder: Path, note: Callable[[str], None]) -> list[Mirror]:
    """Return the observer that updates the copy, or an empty list without `checkpoint.mirror`."""
    remote = _remote_run(recipe, folder)
    return [] if remote is None else [Mirror(remote, folder, note)]


def synchronize(recipe: Recipe, folder: Path, reporter: Reporter, *, resume: bool, overwrite: bool) -> None:
    """Before training, compare the run folder with its copy.

    With `resume`, downloads the copy if it is newer or if there is no run in the folder. With `overwrite`, removes the copy.
    Otherwise, raises `InputError` if there is a run at the URL, or if no installed package supports its protocol. Raises
    `WorkError` if the run folder does not exist and the store cannot be reached. In other cases, this is only reported.
    """
    remote = _remote_run(recipe, folder)
    if remote is None:
        return
    has_run = (folder / "recipe.yaml").exists()
    try:
        if overwrite:
            remote.clear()
        elif not remote.exists:
            return
        elif not resume:
            hint = "--resume continues it, --overwrite replaces it"
            raise InputError("this URL already contains a run", where=remote.url, hint=hint)
        else:
            newest = max((checkpoint.step for checkpoint in Run(folder).checkpoints()), default=-1)
            if not has_run or max(remote.steps(), default=-1) > newest:
                remote.pull(folder, MIRRORED)
                reporter.note(f"downloaded the run from {remote.url}")
    except WorkError as error:
        if resume and not has_run:
            raise
        reporter.warn(f"checkpoint.mirror: {error}; training continues, and the next checkpoint tries again")


def _remote_run(recipe: Recipe, folder: Path) -> RemoteRun | None:
    url = recipe.checkpoint.mirror
    return None if url is None else RemoteRun(f"{url.rstrip('/')}/{folder.absolute().name}", where="checkpoint.mirror")

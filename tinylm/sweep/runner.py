"""Train the runs of a sweep in separate processes. An interrupted sweep resumes where it stopped.

SWEEP/NAME/                the run folder of each training run
SWEEP/results/NAME.json    the outcome of a finished training run
SWEEP/logs/NAME.log        stderr of the training run
SWEEP/.lock                locked while a process trains the runs
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import filelock

from tinylm.cpu_load import available_cores
from tinylm.errors import InputError, TinylmWarning
from tinylm.paths import atomic_write_text
from tinylm.recipe import Recipe, load
from tinylm.run import LOCK, Run
from tinylm.sweep.settings import Values, overrides

_POLL_SECONDS = 0.1
_STOP_SECONDS = 60.0
"""Maximum number of seconds that a training run may take to save a checkpoint and stop."""


@dataclass(frozen=True)
class Training:
    """One training run of a sweep: its name, and the values of its recipe keys."""

    name: str
    values: dict[str, str]


@dataclass(frozen=True)
class Outcome:
    """The result of one training run. `result` is the document of `tinylm train --json`, or empty if training failed."""

    name: str
    run: str
    values: dict[str, str]
    digest: str
    """A hash of the recipe."""
    result: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    """The error message, or None if training did not fail."""
    pruned: bool = False
    """Whether the run was stopped early because it was worse than the others."""
    text_settings: str = ""
    """A hash of the recipe's settings for the text and the tokenizer."""
    text_fingerprint: str = ""
    """The hash of the encoded text in the run's checkpoints, or empty if there is none."""


Monitor = Callable[[Training, Path], bool]
"""Called repeatedly during training with the training run and its folder. Returning True stops the run early."""


def _never_prune(training: Training, folder: Path) -> bool:
    return False


def _ignore_start(training: Training) -> None:
    pass


def check_sweep_folder(folder: Path) -> None:
    """Raise `InputError` if a sweep cannot be written to `folder`, because it is a file or a run folder."""
    hint = "choose another folder with --out"
    if folder.exists() and not folder.is_dir():
        raise InputError("is a file, not a folder", where=str(folder), hint=hint)
    if (folder / "recipe.yaml").exists():
        raise InputError("is the folder of a single run", where=str(folder), hint=hint)


def check_trained_on_same_text(outcomes: Iterable[Outcome]) -> None:
    """Raise `InputError` if two runs have the same settings for the text and the tokenizer, but were trained on different texts."""
    first: dict[str, Outcome] = {}
    for outcome in outcomes:
        if outcome.text_fingerprint:
            other = first.setdefault(outcome.text_settings, outcome)
            if other.text_fingerprint != outcome.text_fingerprint:
                raise InputError(
                    f"the text is not the same as when {other.name} was trained, so the results are not comparable",
                    where=outcome.run,
                    hint="train all runs again in another folder with --out",
                )


class OtherRecipeError(InputError):
    """A result in the folder comes from another recipe."""


class Sweep:
    """A folder with the runs and results of a sweep."""

    def __init__(
        self,
        folder: Path,
        recipe_file: Path,
        *,
        jobs: int = 1,
        device: str = "auto",
        on_start: Callable[[Training], None] = _ignore_start,
    ) -> None:
        """`jobs` runs are trained at the same time. The CPU cores are divided equally among them.

        `on_start` is called when the training of a run starts or resumes.
        """
        self.folder = folder
        self._recipe_file = recipe_file
        self.jobs = jobs
        self._device = device
        self._on_start = on_start
        self._lock = filelock.FileLock(folder / LOCK, blocking=False)
        self._outcomes: list[Outcome] = []

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder and hold a lock on it. Can be nested.

        Raises `InputError` if another process holds the lock, or if `check_sweep_folder` rejects the folder.
        """
        check_sweep_folder(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except filelock.Timeout:
            hint = "wait for it, or choose another folder with --out"
            raise InputError("another process is training the runs in this folder", where=str(self.folder), hint=hint) from None
        try:
            yield
        finally:
            self._lock.release()

    def recipe(self, values: Values) -> Recipe:
        """Load the recipe with `values`. Raises `InputError` if they are invalid."""
        return load(self._recipe_file, overrides(values))

    def check(self, settings: Iterable[Values]) -> None:
        """Raise `InputError` if one of the settings is invalid, or if two of them give the same recipe."""
        known: dict[str, Values] = {}
        for values in settings:
            other = known.setdefault(_digest(self.recipe(values)), values)
            if other is not values:
                differing = [key for key in values if values[key] != other[key]]
                first, second = (", ".join(f"{key}={each[key]}" for key in differing) for each in (other, values))
                raise InputError(f"{first} and {second} give the same recipe", where="--set", hint="remove one of them")

    def run_folder(self, name: str) -> Path:
        return self.folder / name

    def finished(self, training: Training) -> Outcome | None:
        """Return the outcome of a training run, or None if it is not finished or its run folder was removed.

        Raises `InputError` if the result file is damaged or belongs to another recipe.
        """
        file = self._result_file(training.name)
        try:
            outcome = Outcome(**json.loads(file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"not a sweep result: {error}", where=str(file), hint="remove it to train again") from None
        if outcome.digest != _digest(self.recipe(training.values)):
            hint = "choose another folder with --out"
            raise OtherRecipeError("the folder contains a sweep of another recipe", where=str(self.folder), hint=hint)
        folder = self.run_folder(training.name)  # the sweep may have been moved since
        return replace(outcome, run=str(folder)) if (folder / "recipe.yaml").exists() else None

    def run(self, planned: Sequence[Training], monitor: Monitor = _never_prune) -> Iterator[Outcome]:
        """Train all runs that are not finished, and yield each outcome as soon as it is known.

        If this process is interrupted, all active runs save a checkpoint and stop. Raises `InputError` if another process trains
        the runs of this folder, or if `check_trained_on_same_text` rejects the outcomes.
        """
        with self.locked():
            for outcome in self._run(planned, monitor):
                self._outcomes.append(outcome)
                check_trained_on_same_text(self._outcomes)
                yield outcome

    def _run(self, planned: Sequence[Training], monitor: Monitor) -> Iterator[Outcome]:
        waiting: list[Training] = []
        for training in planned:
            outcome = self.finished(training)
            if outcome is None:
                waiting.append(training)
            else:
                yield outcome
        running: list[tuple[Training, subprocess.Popen[bytes]]] = []
        pruned: set[str] = set()
        for training in waiting:
            if _is_locked(self.run_folder(training.name)):
                text = "another process is training in this folder; waiting for it"
                warnings.warn(f"{self.run_folder(training.name)}: {text}", TinylmWarning, stacklevel=2)
        try:
            while waiting or running:
                for training in list(waiting):
                    if len(running) < self.jobs and not _is_locked(self.run_folder(training.name)):
                        waiting.remove(training)
                        running.append((training, self._start(training)))
                        self._on_start(training)
                time.sleep(_POLL_SECONDS)
                for training, process in list(running):
                    if process.poll() is not None:
                        running.remove((training, process))
                        yield self._finish(training, process, pruned=training.name in pruned)
                    elif training.name not in pruned and monitor(training, self.run_folder(training.name)):
                        pruned.add(training.name)
                        process.send_signal(signal.SIGTERM)
        finally:
            _stop_all([process for _, process in running])

    def _start(self, training: Training) -> subprocess.Popen[bytes]:
        folder = self.run_folder(training.name)
        command = [sys.executable, "-m", "tinylm", "train", str(self._recipe_file), "--out", str(folder), "--json"]
        command += ["--device", self._device]
        if self.jobs > 1:
            command += ["--threads", str(max(1, available_cores() // self.jobs))]
        for override in overrides(training.values):
            command += ["--set", override]
        if (folder / "recipe.yaml").exists():
            command.append("--resume")
        for file in (self._log_file(training.name), self._output_file(training.name)):
            file.parent.mkdir(parents=True, exist_ok=True)
        with open(self._output_file(training.name), "wb") as output, open(self._log_file(training.name), "ab") as log:
            # In a session of its own, the child does not receive Ctrl-C. This process sends SIGTERM instead, so that the child
            # saves a checkpoint before it exits, and Linux does so if this process is killed.
            return subprocess.Popen(
                command,
                stdout=output,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=_stop_with_parent(),
            )

    def _finish(self, training: Training, process: subprocess.Popen[bytes], *, pruned: bool) -> Outcome:
        result: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            result = json.loads(self._output_file(training.name).read_text(encoding="utf-8"))
        error = None
        if process.returncode and not pruned:
            error = last_error(self._log_file(training.name)) or f"ended with exit code {process.returncode}"
        folder = self.run_folder(training.name)
        outcome = Outcome(training.name, str(folder), training.values, "", result, error, pruned)
        if error is None:  # if the run failed, its recipe may be invalid
            recipe = self.recipe(training.values)
            outcome = replace(
                outcome, digest=_digest(recipe), text_settings=_digest_of_text(recipe), text_fingerprint=_text_fingerprint(folder)
            )
            atomic_write_text(self._result_file(training.name), json.dumps(asdict(outcome), indent=1) + "\n")
        self._output_file(training.name).unlink(missing_ok=True)
        return outcome

    def _result_file(self, name: str) -> Path:
        return self.folder / "results" / f"{name}.json"

    def _output_file(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.stdout"

    def _log_file(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"


def _digest(recipe: Recipe) -> str:
    return hashlib.sha256(recipe.to_yaml().encode()).hexdigest()


def _digest_of_text(recipe: Recipe) -> str:
    """Return a hash of the settings that determine how the text is encoded."""
    document = recipe.as_dict()
    adds_control_tokens = recipe.model.bidirectional
    settings = [document["data"], document.get("tokenizer"), document["model"].get("init_from"), adds_control_tokens]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _text_fingerprint(folder: Path) -> str:
    checkpoints = Run(folder).checkpoints()
    return str(checkpoints[-1].state["fingerprints"]["data"]) if checkpoints else ""


def _is_locked(run_folder: Path) -> bool:
    """Whether another process trains in a run folder, for example the training run of a sweep that was killed."""
    if not (run_folder / LOCK).exists():
        return False
    try:
        with filelock.FileLock(run_folder / LOCK, blocking=False):
            return False
    except filelock.Timeout:
        return True


def _stop_with_parent() -> Callable[[], None] | None:
    """Return a function that makes Linux send SIGTERM to a new child when this process is killed. None on other systems."""
    if sys.platform != "linux":
        return None
    import ctypes

    prctl, set_death_signal = ctypes.CDLL(None).prctl, 1  # PR_SET_PDEATHSIG of linux/prctl.h
    parent = os.getpid()

    def prepare_child() -> None:
        prctl(set_death_signal, signal.SIGTERM)
        if os.getppid() != parent:  # it was killed before
            os._exit(1)

    return prepare_child


def _stop_all(processes: list[subprocess.Popen[bytes]]) -> None:
    """Ask the processes to save a checkpoint and stop. Kill those that are still running after a minute."""
    for process in processes:
        process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + _STOP_SECONDS
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def last_error(log: Path) -> str | None:
    """Return the last error message in a log without the prefix `error:`, with its indented lines joined to its first line."""
    messages = re.findall(r"^error: (.*(?:\n[ ]+.*)*)", log.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return " ".join(messages[-1].split()) if messages else None

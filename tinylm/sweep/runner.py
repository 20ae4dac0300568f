"""Train the runs of a sweep in separate processes. An interrupted sweep resumes where it stopped.

SWEEP/NAME/                the run folder of each training run
SWEEP/results/NAME.json    the outcome of a finished training run
SWEEP/logs/NAME.log        stderr of the training run
"""

from __future__ import annotations

import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tinylm.cpu_load import available_cores
from tinylm.errors import InputError
from tinylm.paths import atomic_write_text
from tinylm.recipe import Recipe, load
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


Monitor = Callable[[Training, Path], bool]
"""Called repeatedly during training with the training run and its folder. Returning True stops the run early."""


def _never_prune(training: Training, folder: Path) -> bool:
    return False


class Sweep:
    """A folder with the runs and results of a sweep."""

    def __init__(self, folder: Path, recipe_file: Path, *, jobs: int = 1, device: str = "auto") -> None:
        """`jobs` runs are trained at the same time. The CPU cores are divided equally among them."""
        self.folder = folder
        self._recipe_file = recipe_file
        self.jobs = jobs
        self._device = device

    def recipe(self, values: Values) -> Recipe:
        """Load the recipe with `values`. Raises `InputError` if they are invalid."""
        return load(self._recipe_file, overrides(values))

    def run_folder(self, name: str) -> Path:
        return self.folder / name

    def finished(self, training: Training) -> Outcome | None:
        """Return the outcome of a training run, or None if it is not finished.

        Raises `InputError` if the result file is damaged or belongs to another recipe.
        """
        file = self._result_file(training.name)
        try:
            outcome = Outcome(**json.loads(file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"not a sweep result: {error}", where=str(file), hint="remove it to train again") from None
        if outcome.digest != self._digest(training.values):
            hint = "choose another folder with --out"
            raise InputError("the folder contains a sweep of another recipe", where=str(self.folder), hint=hint)
        return outcome

    def run(self, planned: Sequence[Training], monitor: Monitor = _never_prune) -> Iterator[Outcome]:
        """Train all runs that are not finished, and yield each outcome as soon as it is known.

        If this process is interrupted, all active runs save a checkpoint and stop.
        """
        waiting: list[Training] = []
        for training in planned:
            outcome = self.finished(training)
            if outcome is None:
                waiting.append(training)
            else:
                yield outcome
        running: list[tuple[Training, subprocess.Popen[bytes]]] = []
        pruned: set[str] = set()
        try:
            while waiting or running:
                while waiting and len(running) < self.jobs:
                    training = waiting.pop(0)
                    running.append((training, self._start(training)))
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
            # saves a checkpoint before it exits.
            return subprocess.Popen(command, stdout=output, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)

    def _finish(self, training: Training, process: subprocess.Popen[bytes], *, pruned: bool) -> Outcome:
        result: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            result = json.loads(self._output_file(training.name).read_text(encoding="utf-8"))
        error = None
        if process.returncode and not pruned:
            error = _last_error(self._log_file(training.name)) or f"ended with exit code {process.returncode}"
        digest = "" if error else self._digest(training.values)  # if the run failed, its recipe may be invalid
        run = str(self.run_folder(training.name))
        outcome = Outcome(training.name, run, training.values, digest, result, error, pruned)
        if error is None:
            atomic_write_text(self._result_file(training.name), json.dumps(asdict(outcome), indent=1) + "\n")
        self._output_file(training.name).unlink(missing_ok=True)
        return outcome

    def _digest(self, values: Values) -> str:
        return hashlib.sha256(self.recipe(values).to_yaml().encode()).hexdigest()

    def _result_file(self, name: str) -> Path:
        return self.folder / "results" / f"{name}.json"

    def _output_file(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.stdout"

    def _log_file(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"


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


def _last_error(log: Path) -> str | None:
    """Return the last error message in a log, without the prefix `error:`."""
    messages = re.findall(r"^error: (.*)$", log.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return messages[-1] if messages else None

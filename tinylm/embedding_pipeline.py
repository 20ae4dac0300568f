"""Train embeddings in a run folder from a recipe with `kind: embeddings`. `tinylm embed train` and notebooks call this module.

The run folder contains:

recipe.yaml         the resolved recipe             vectors.safetensors   names, vectors and counts, written at the end
metrics.jsonl       about 100 lines: loss, lr       checkpoints/          the newest checkpoint, for resuming
neighbours.jsonl    nearest neighbors of the probe words during training
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file

import tinylm
from tinylm.device import peak_memory_bytes
from tinylm.embedding.encoded_text import EncodedText, encode_corpus
from tinylm.embedding.glove import Glove
from tinylm.embedding.vectors import Vectors
from tinylm.embedding.word2vec import StepResult, Word2Vec
from tinylm.errors import InputError, WorkError
from tinylm.paths import atomic_write_text
from tinylm.recipe import EmbeddingRecipe, changes, load_any
from tinylm.recipe.embeddings import GloveMethod
from tinylm.recipe.notation import yaml_value
from tinylm.reporting import SILENT, Reporter
from tinylm.run import EMBEDDINGS_MARKER, VECTORS_FILE, Checkpoint, Run
from tinylm.training.checkpoint import CheckpointWriter, Snapshot, newest_complete_checkpoint
from tinylm.training.jsonl_log import JsonLinesLog
from tinylm.training.run_folder import locked_run_folder, remove_run
from tinylm.training.signals import StopRequest

RESUME_SAFE_KEYS = ("name", "watch.", "checkpoint.")
"""Keys and sections that can be changed when training is resumed, because they do not affect the vectors."""
_LOG_LINES = 100
"""Approximate number of lines in metrics.jsonl after a complete training run."""
_DEFAULT_PROBES = 5


class Learner(Protocol):
    """A method that learns vectors step by step. The result of a step depends only on its number and the current tables."""

    unit: str
    """The unit of `StepResult.tokens`."""
    steps: int
    steps_per_epoch: int

    def step(self, number: int) -> StepResult: ...

    def tables(self) -> dict[str, np.ndarray]: ...

    def vectors(self) -> np.ndarray: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class ProgressEvent:
    """A progress report, sent about 100 times during training."""

    step: int
    steps: int
    epoch: float
    tokens: int
    loss: float
    """Mean loss since the last event: nats per pair or position (word2vec), or weighted squared error per cell (GloVe)."""
    lr: float
    tokens_per_second: float
    seconds: float


@dataclass(frozen=True)
class NeighborsEvent:
    """The nearest neighbors of each probe word after a step."""

    step: int
    neighbors: dict[str, list[str]]


class EmbeddingObserver:
    """Callbacks for embedding training. Subclasses override the methods they need."""

    unit = "tokens"

    def begin(self, unit: str) -> None:
        """Called when training starts. Throughput is measured in `unit` per second."""

    def progress(self, event: ProgressEvent) -> None: ...

    def neighbors(self, event: NeighborsEvent) -> None: ...

    def stopping(self) -> None:
        """Called from the signal handler when a signal arrives. Training will then save and stop."""


@dataclass(frozen=True)
class EmbeddingResult:
    """The result of training. The field names are the keys of `tinylm embed train --json`."""

    run: str
    vectors: str | None
    """Path to the vectors file. None if training stopped early."""
    names: int
    dimensions: int
    step: int
    steps: int
    tokens: int
    loss: float | None
    seconds: float
    train_seconds: float
    tokens_per_second: float
    peak_memory_bytes: int | None
    stopped: str
    """Why training ended: `done`, `time` or `signal`."""
    signal_number: int | None = None


@dataclass(frozen=True)
class _Job:
    """The arguments of `train_embeddings`."""

    recipe: EmbeddingRecipe
    folder: Path
    resume: bool
    overwrite: bool
    threads: int
    start: float
    stop_after: float | None
    reporter: Reporter
    observer: EmbeddingObserver


def train_embeddings(
    recipe: EmbeddingRecipe,
    folder: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    stop_after: float | None = None,
    reporter: Reporter = SILENT,
    observer: EmbeddingObserver | None = None,
) -> EmbeddingResult:
    """Train vectors and save them in `folder`. The result does not depend on `threads`, which defaults to one per core.

    If `folder` is not empty, `resume` or `overwrite` is required. After `stop_after` seconds, training saves and stops.
    Raises `InputError` for problems that the user can fix, and `WorkError` if training fails.
    """
    start = time.monotonic()
    folder = Path(folder)
    with locked_run_folder(folder, resume=resume, overwrite=overwrite):
        job = _Job(
            recipe=recipe,
            folder=folder,
            resume=resume and (folder / "recipe.yaml").exists(),
            overwrite=overwrite,
            threads=threads or torch.get_num_threads(),
            start=start,
            stop_after=stop_after,
            reporter=reporter,
            observer=observer or EmbeddingObserver(),
        )
        return _train(job)


def _train(job: _Job) -> EmbeddingResult:
    """Train in the locked run folder."""
    if job.resume:
        Run.open(job.folder, embeddings=True)  # raises if a link points outside the folder
        _check_resumable(job.folder, job.recipe)
    text = encode_corpus(job.recipe.data, job.recipe.vocabulary, job.reporter)
    probes = _probes(job.recipe, text)
    learner = _learner(job, text)
    try:
        training = _Training(job, text, learner, probes)
        if job.resume:
            training.restore()
        with _translate_write_errors(job.folder):
            if job.overwrite:
                remove_run(job.folder)
            atomic_write_text(job.folder / "recipe.yaml", job.recipe.to_yaml())
            return training.run()
    finally:
        learner.close()


@contextmanager
def _translate_write_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = str(error.filename or folder)
        hint = "free some disk space and resume with --resume"
        raise WorkError(f"cannot be written: {error.strerror or error}", where=where, hint=hint) from None


def _learner(job: _Job, text: EncodedText) -> Learner:
    method = job.recipe.method
    if isinstance(method, GloveMethod):
        return Glove(text, method, job.recipe.seed, job.threads, job.reporter)
    return Word2Vec(text, method, job.recipe.seed, job.threads)


def _check_resumable(folder: Path, recipe: EmbeddingRecipe) -> None:
    """Raise `InputError` if the run in `folder` was trained with a recipe that produces different vectors."""
    before = load_any(folder / "recipe.yaml", check_files=False)
    if not isinstance(before, EmbeddingRecipe):
        raise InputError("this folder contains a language model, not embeddings", where=str(folder), hint="choose another --out")
    changed = [
        f"{key}: {yaml_value(old)} -> {yaml_value(new)}"
        for key, (old, new) in changes(before, recipe).items()
        if not key.startswith(RESUME_SAFE_KEYS)
    ]
    if changed:
        raise InputError(
            f"cannot resume because these recipe keys changed: {'; '.join(changed)}",
            where=str(folder),
            hint="undo the changes, or choose another --out",
        )


def _probes(recipe: EmbeddingRecipe, text: EncodedText) -> list[str]:
    """Return the recipe's probe words, or five frequent words if the recipe lists none.

    Raises `InputError` if a probe word has no vector.
    """
    vocabulary = text.vocabulary
    names = Vectors(vocabulary.names, np.zeros((len(vocabulary.names), 1), np.float32), byte_mapped=vocabulary.byte_mapped)
    if recipe.watch.probes:
        for probe in recipe.watch.probes:
            try:
                names.row(probe)
            except InputError as error:
                raise InputError(error.message, where="watch.probes", hint=error.hint) from None
        return list(recipe.watch.probes)
    frequent = [names.display_name(row) for row in range(min(len(names), 2000))]
    words = [name for name in frequent if len(name.strip()) >= 5 and name.strip().isalpha()]
    # The most frequent words, such as "which", have uninformative neighbors, so skip the first 20.
    return words[20 :: max(1, (len(words) - 20) // _DEFAULT_PROBES)][:_DEFAULT_PROBES] or frequent[:_DEFAULT_PROBES]


@dataclass
class _Progress:
    """Training progress, saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    train_seconds: float = 0.0
    loss: float | None = None


@dataclass
class _Interval:
    """Sums over the steps since the last line of metrics.jsonl."""

    loss: float = 0.0
    terms: int = 0
    tokens: int = 0
    lr: float = 0.0
    seconds: float = 0.0

    def add(self, result: StepResult) -> None:
        self.loss += result.loss
        self.terms += result.terms
        self.tokens += result.tokens
        self.lr = result.lr


class _Training:
    """The training loop: runs the steps of a learner, logs them, and saves checkpoints and the vectors."""

    def __init__(self, job: _Job, text: EncodedText, learner: Learner, probes: Sequence[str]) -> None:
        self._job, self._text, self._learner, self._probes = job, text, learner, probes
        self._checkpoints = CheckpointWriter(job.folder, keep=1)
        self._progress = _Progress()
        self._log_every = max(1, learner.steps // _LOG_LINES)

    def restore(self) -> None:
        """Load the newest complete checkpoint, if there is one. Raises `InputError` if it was trained on a different text."""
        run = Run(self._job.folder)
        if not run.checkpoints():
            self._job.reporter.note("no checkpoint yet; starting from step 0")
            return
        checkpoint = newest_complete_checkpoint(run, self._job.reporter)
        state = checkpoint.state
        numbers = [state.get("tokens"), state.get("train_seconds"), state.get("loss", 0.0) or 0.0]
        if "fingerprint" not in state or any(type(number) not in (int, float) for number in numbers):
            raise InputError("state.json has an unexpected structure", where=str(checkpoint.path))
        if state["fingerprint"] != self._text.fingerprint:
            raise InputError(
                "cannot resume because the text changed", where=str(self._job.folder), hint="train from scratch with --overwrite"
            )
        self._load_tables(checkpoint)
        self._progress = _Progress(int(state["step"]), int(state["tokens"]), float(state["train_seconds"]), state["loss"])
        self._job.reporter.note(f"resuming after step {self._progress.step:,} of {self._learner.steps:,}")

    def _load_tables(self, checkpoint: Checkpoint) -> None:
        file = checkpoint.path / "model.safetensors"
        try:
            saved = load_file(file)
            for name, table in self._learner.tables().items():
                if saved[name].shape != table.shape:
                    raise ValueError(f"{name} has shape {saved[name].shape} instead of {table.shape}")
                table[:] = saved[name]
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"cannot be read: {error}", where=str(file)) from None

    def run(self) -> EmbeddingResult:
        """Train until the last step, a signal or the time limit."""
        job, progress, steps = self._job, self._progress, self._learner.steps
        watch_every = _share_of_steps(job.recipe.watch.every, steps)
        save_every = _share_of_steps(job.recipe.checkpoint.every, steps) if job.recipe.checkpoint.every else steps
        self._checkpoints.prepare()
        job.observer.begin(self._learner.unit)
        with (
            StopRequest(job.observer.stopping) as request,
            JsonLinesLog(job.folder / "metrics.jsonl", self._already_trained) as metrics,
            JsonLinesLog(job.folder / EMBEDDINGS_MARKER, self._already_trained) as neighbors,
        ):
            stopped = "done" if progress.step == steps else None
            while stopped is None:
                interval = self._train_interval(request)
                stopped = self._stop_reason(request)
                self._log(interval, metrics)
                if stopped or self._due(watch_every):
                    self._log_neighbors(neighbors)
                if stopped or self._due(save_every):
                    self._save()
        if stopped == "done":
            self._current_vectors().save(job.folder / VECTORS_FILE)
        return self._result(stopped, request.signal_number if stopped == "signal" else None)

    def _train_interval(self, request: StopRequest) -> _Interval:
        """Run steps until the next log line is due or training has to stop. Runs at least one step."""
        interval, start = _Interval(), time.monotonic()
        while True:
            interval.add(self._learner.step(self._progress.step))
            self._progress.step += 1
            if self._progress.step % self._log_every == 0 or self._stop_reason(request):
                interval.seconds = time.monotonic() - start
                return interval

    def _stop_reason(self, request: StopRequest) -> str | None:
        """Return `done` after the last step, `signal` after a signal, `time` after the time limit, and None otherwise."""
        if self._progress.step == self._learner.steps:
            return "done"
        if request.signal_number is not None:
            return "signal"
        if self._job.stop_after is not None and time.monotonic() - self._job.start >= self._job.stop_after:
            return "time"
        return None

    def _due(self, every: int) -> bool:
        """Whether a multiple of `every` steps has been reached since the previous log line."""
        return self._progress.step % every < self._log_every

    def _already_trained(self, record: Mapping[str, Any]) -> bool:
        """Whether the restored checkpoint already includes the step of a log record."""
        return bool(record["step"] <= self._progress.step)

    def _log(self, interval: _Interval, metrics: JsonLinesLog) -> None:
        """Log an interval of steps. Raises `WorkError` if the loss is non-finite."""
        progress = self._progress
        progress.tokens += interval.tokens
        progress.train_seconds += interval.seconds
        progress.loss = interval.loss / interval.terms if interval.terms else None
        if progress.loss is not None and not np.isfinite(progress.loss):
            raise WorkError(f"the loss is {progress.loss} at step {progress.step:,}", hint="lower method.lr (--lr)")
        event = ProgressEvent(
            step=progress.step,
            steps=self._learner.steps,
            epoch=progress.step / self._learner.steps_per_epoch,
            tokens=progress.tokens,
            loss=progress.loss if progress.loss is not None else float("nan"),
            lr=interval.lr,
            tokens_per_second=interval.tokens / max(interval.seconds, 1e-9),
            seconds=progress.train_seconds,
        )
        metrics.write({"kind": "step", **asdict(event)})
        self._job.observer.progress(event)

    def _current_vectors(self) -> Vectors:
        vocabulary, recipe = self._text.vocabulary, self._job.recipe
        notes = {"method": recipe.method.name, "tinylm": tinylm.__version__, "seed": recipe.seed}
        return Vectors(vocabulary.names, self._learner.vectors(), vocabulary.counts, vocabulary.byte_mapped, notes)

    def _log_neighbors(self, log: JsonLinesLog) -> None:
        vectors, count = self._current_vectors(), self._job.recipe.watch.neighbours
        nearest = {probe: [neighbor.token for neighbor in vectors.nearest(probe, count)] for probe in self._probes}
        log.write({"step": self._progress.step, "neighbours": nearest})
        self._job.observer.neighbors(NeighborsEvent(self._progress.step, nearest))

    def _save(self) -> None:
        tables = {name: torch.from_numpy(table) for name, table in self._learner.tables().items()}
        self._checkpoints.save(Snapshot(tables, {}, {**asdict(self._progress), "fingerprint": self._text.fingerprint}))
        self._checkpoints.prune()

    def _result(self, stopped: str, signal_number: int | None) -> EmbeddingResult:
        job, progress = self._job, self._progress
        return EmbeddingResult(
            run=str(job.folder),
            vectors=str(job.folder / VECTORS_FILE) if stopped == "done" else None,
            names=len(self._text.vocabulary.names),
            dimensions=job.recipe.method.dimensions,
            step=progress.step,
            steps=self._learner.steps,
            tokens=progress.tokens,
            loss=progress.loss,
            seconds=time.monotonic() - job.start,
            train_seconds=progress.train_seconds,
            tokens_per_second=progress.tokens / max(progress.train_seconds, 1e-9),
            peak_memory_bytes=peak_memory_bytes(torch.device("cpu")),
            stopped=stopped,
            signal_number=signal_number,
        )


def _share_of_steps(share: float, steps: int) -> int:
    """Convert a fraction of the total steps to a number of steps. The minimum is 1."""
    return max(1, round(share * steps))

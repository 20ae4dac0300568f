"""From a recipe of `kind: embeddings` to a folder of vectors: what `tinylm embed train` does, callable from a notebook.

recipe.yaml         the resolved recipe             vectors.safetensors   names, vectors and counts, when done
metrics.jsonl       a line per percent: loss, rate  checkpoints/          the newest, to resume from
neighbours.jsonl    what stood near the probes as the vectors formed
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file

import tinylm
from tinylm.device import peak_memory_bytes
from tinylm.embedding.glove import Glove
from tinylm.embedding.text import Text, prepare
from tinylm.embedding.vectors import Neighbour, Vectors
from tinylm.embedding.word2vec import StepResult, Word2Vec, kernels
from tinylm.errors import InputError, WorkError
from tinylm.paths import write_whole
from tinylm.recipe import EmbeddingRecipe, changes, load_any
from tinylm.recipe.embeddings import GloveMethod
from tinylm.reporting import SILENT, Reporter
from tinylm.run import EMBEDDINGS_MARK, VECTORS_FILE, Checkpoint, Run
from tinylm.training.checkpoint import CheckpointWriter, Snapshot, newest_whole
from tinylm.training.run_folder import claimed, remove_run
from tinylm.training.signals import StopRequest

RESUME_SAFE_KEYS = ("name", "watch.", "checkpoint.")
"""Keys (or sections) that may change on resuming: they do not change the vectors."""
_LINES = 100
"""Lines of metrics.jsonl in a whole training."""
_PROBES = 5


class Learner(Protocol):
    """What learns vectors step by step; a step depends on its number and the tables alone."""

    unit: str
    steps: int
    steps_per_epoch: int

    def step(self, number: int) -> StepResult: ...

    def tables(self) -> dict[str, np.ndarray]: ...

    def vectors(self) -> np.ndarray: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class ProgressEvent:
    """About a hundredth of the training. `loss`: its mean since the last event, in the method's own measure."""

    step: int
    steps: int
    epoch: float
    tokens: int
    loss: float
    lr: float
    tokens_per_second: float
    seconds: float


@dataclass(frozen=True)
class NeighboursEvent:
    """What stands nearest to each probe now."""

    step: int
    neighbours: dict[str, list[str]]


class EmbeddingObserver:
    """Hears what happens in a training of vectors. Every method may be left as it is."""

    unit = "tokens"

    def begin(self, unit: str) -> None: ...

    def progress(self, event: ProgressEvent) -> None: ...

    def neighbours(self, event: NeighboursEvent) -> None: ...

    def stopping(self) -> None: ...


@dataclass(frozen=True)
class EmbeddingResult:
    """The names are the keys of `tinylm embed train --json`."""

    run: str
    vectors: str | None
    """The file; None when stopped before the end."""
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
    signal_number: int | None = None


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
    """Learn vectors into `folder`; the result does not depend on `threads` (None: one per core).

    A folder that is not empty needs `resume` or `overwrite`. `stop_after` seconds ends early, saved. Raises `InputError` for
    what the user can mend and `WorkError` when the training fails.
    """
    start = time.monotonic()
    folder = Path(folder)
    with claimed(folder, resume=resume, overwrite=overwrite):
        resume = resume and (folder / "recipe.yaml").exists()
        return _train(recipe, folder, resume, overwrite, threads, start, stop_after, reporter, observer or EmbeddingObserver())


def _train(
    recipe: EmbeddingRecipe,
    folder: Path,
    resume: bool,
    overwrite: bool,
    threads: int | None,
    start: float,
    stop_after: float | None,
    reporter: Reporter,
    observer: EmbeddingObserver,
) -> EmbeddingResult:
    """The training, once the folder is its own."""
    kernels()
    if resume:
        Run.open(folder, embeddings=True)  # which refuses links that lead out of it
        _check_same(folder, recipe)
    text = prepare(recipe.data, recipe.vocabulary, reporter)
    probes = _probes(recipe, text)
    workers = threads or torch.get_num_threads()
    method = recipe.method
    learner: Learner
    if isinstance(method, GloveMethod):
        learner = Glove(text, method, recipe.seed, workers, reporter)
    else:
        learner = Word2Vec(text, method, recipe.seed, workers)
    try:
        training = _Training(recipe, folder, text, learner, probes, observer)
        if resume:
            training.restore(reporter)
        if overwrite:
            remove_run(folder)
        write_whole(folder / "recipe.yaml", recipe.to_yaml())
        return training.run(start, stop_after)
    finally:
        learner.close()


def _check_same(folder: Path, recipe: EmbeddingRecipe) -> None:
    before = load_any(folder / "recipe.yaml", check_files=False)
    if not isinstance(before, EmbeddingRecipe):
        raise InputError("a language model was trained here, not embeddings", where=str(folder), hint="choose another with --out")
    refused = [
        f"{key}: {old} -> {new}" for key, (old, new) in changes(before, recipe).items() if not key.startswith(RESUME_SAFE_KEYS)
    ]
    if refused:
        listed = "; ".join(refused)
        raise InputError(
            f"the recipe is not the one these vectors were begun with: {listed}", where=str(folder), hint="train into another --out"
        )


def _probes(recipe: EmbeddingRecipe, text: Text) -> list[str]:
    """The recipe's, or five of the frequent names of at least four letters. Raises `InputError` for one without a vector."""
    names = Vectors(text.units.names, np.zeros((len(text.units.names), 1), np.float32), byte_mapped=text.units.byte_mapped)
    if recipe.watch.probes:
        for probe in recipe.watch.probes:
            try:
                names.row(probe)
            except InputError as error:
                raise InputError(error.message, where="watch.probes", hint=error.hint) from None
        return list(recipe.watch.probes)
    shown = [names.shown(row) for row in range(min(len(names), 2000))]
    telling = [name for name in shown if len(name.strip()) >= 5 and name.strip().isalpha()]
    return telling[20 :: max(1, (len(telling) - 20) // _PROBES)][:_PROBES] or shown[:_PROBES]


class _Training:
    """One training: where it is, what it writes."""

    def __init__(
        self,
        recipe: EmbeddingRecipe,
        folder: Path,
        text: Text,
        learner: Learner,
        probes: Sequence[str],
        observer: EmbeddingObserver,
    ) -> None:
        self._recipe, self._folder, self._text = recipe, folder, text
        self._learner, self._probes, self._observer = learner, probes, observer
        self._checkpoints = CheckpointWriter(folder, keep=1)
        self._done = self._tokens = 0
        self._train_seconds = 0.0
        self._loss: float | None = None

    def restore(self, reporter: Reporter) -> None:
        """Go on from the newest whole checkpoint, if there is one."""
        run = Run(self._folder)
        if not run.checkpoints():
            reporter.note("no checkpoint yet: beginning at step 0")
            return
        checkpoint = newest_whole(run, reporter)
        state = checkpoint.state
        if state["fingerprint"] != self._text.fingerprint:
            raise InputError("the text is not the one these vectors were begun on", where=str(self._folder))
        self._fill(checkpoint)
        self._done, self._tokens = int(state["step"]), int(state["tokens"])
        self._train_seconds, self._loss = float(state["train_seconds"]), state["loss"]
        reporter.note(f"resuming after step {self._done:,} of {self._learner.steps:,}")

    def _fill(self, checkpoint: Checkpoint) -> None:
        file = checkpoint.path / "model.safetensors"
        try:
            saved = load_file(file)
            for name, table in self._learner.tables().items():
                if saved[name].shape != table.shape:
                    raise ValueError(f"{name} is {saved[name].shape} instead of {table.shape}")
                table[:] = saved[name]
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"cannot be read: {error}", where=str(file)) from None

    def run(self, start: float, stop_after: float | None) -> EmbeddingResult:
        learner, recipe = self._learner, self._recipe
        self._checkpoints.prepare()
        self._observer.begin(learner.unit)
        look = _every(recipe.watch.every, learner.steps)
        save = _every(recipe.checkpoint.every, learner.steps) if recipe.checkpoint.every else learner.steps
        line = max(1, learner.steps // _LINES)
        stopped = "done"
        with (
            StopRequest(self._observer.stopping) as request,
            _Lines(self._folder / "metrics.jsonl", self._done) as metrics,
            _Lines(self._folder / EMBEDDINGS_MARK, self._done) as near,
        ):
            loss, terms, tokens, since = 0.0, 0, 0, time.monotonic()
            while self._done < learner.steps:
                result = learner.step(self._done)
                self._done += 1
                loss, terms, tokens = loss + result.loss, terms + result.terms, tokens + result.tokens
                late = stop_after is not None and time.monotonic() - start >= stop_after
                ends = self._done == learner.steps or late or request.signal_number is not None
                if self._done % line == 0 or ends:
                    self._advance(metrics, loss, terms, tokens, result.lr, time.monotonic() - since)
                    loss, terms, tokens = 0.0, 0, 0
                    if self._done % look < line or ends:
                        self._look(near)
                    if self._done % save < line or ends:
                        self._save()
                    since = time.monotonic()
                if ends and self._done < learner.steps:
                    stopped = "signal" if request.signal_number is not None else "time"
                    break
        if stopped == "done":
            self._vectors().save(self._folder / VECTORS_FILE)
        return self._result(start, stopped, request.signal_number)

    def _advance(self, metrics: _Lines, loss: float, terms: int, tokens: int, lr: float, seconds: float) -> None:
        self._tokens += tokens
        self._train_seconds += seconds
        self._loss = loss / terms if terms else None
        if self._loss is not None and not np.isfinite(self._loss):
            raise WorkError(f"the loss is no longer a number at step {self._done:,}", hint="lower method.lr")
        event = ProgressEvent(
            step=self._done,
            steps=self._learner.steps,
            epoch=self._done / self._learner.steps_per_epoch,
            tokens=self._tokens,
            loss=self._loss if self._loss is not None else float("nan"),
            lr=lr,
            tokens_per_second=tokens / max(seconds, 1e-9),
            seconds=self._train_seconds,
        )
        metrics.write({"kind": "step", **asdict(event), "loss": self._loss})
        self._observer.progress(event)

    def _vectors(self) -> Vectors:
        units = self._text.units
        notes = {"method": self._recipe.method.name, "tinylm": tinylm.__version__, "seed": self._recipe.seed}
        return Vectors(units.names, self._learner.vectors(), units.counts, units.byte_mapped, notes)

    def _look(self, near: _Lines) -> None:
        vectors = self._vectors()
        found: dict[str, list[Neighbour]] = {one: vectors.nearest(one, self._recipe.watch.neighbours) for one in self._probes}
        event = NeighboursEvent(self._done, {one: [other.token for other in others] for one, others in found.items()})
        near.write(asdict(event))
        self._observer.neighbours(event)

    def _save(self) -> None:
        tables = {name: torch.from_numpy(table) for name, table in self._learner.tables().items()}
        state = {
            "step": self._done,
            "tokens": self._tokens,
            "train_seconds": self._train_seconds,
            "loss": self._loss,
            "fingerprint": self._text.fingerprint,
        }
        self._checkpoints.save(Snapshot(tables, {}, state))
        self._checkpoints.prune()

    def _result(self, start: float, stopped: str, signal_number: int | None) -> EmbeddingResult:
        return EmbeddingResult(
            run=str(self._folder),
            vectors=str(self._folder / VECTORS_FILE) if stopped == "done" else None,
            names=len(self._text.units.names),
            dimensions=self._recipe.method.dimensions,
            step=self._done,
            steps=self._learner.steps,
            tokens=self._tokens,
            loss=self._loss,
            seconds=time.monotonic() - start,
            train_seconds=self._train_seconds,
            tokens_per_second=self._tokens / max(self._train_seconds, 1e-9),
            peak_memory_bytes=peak_memory_bytes(torch.device("cpu")),
            stopped=stopped,
            signal_number=signal_number if stopped == "signal" else None,
        )


def _every(share: float, steps: int) -> int:
    return max(1, round(share * steps))


class _Lines:
    """A .jsonl file that a resumed training goes on with: lines of later steps are forgotten."""

    def __init__(self, path: Path, step: int) -> None:
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
                except (ValueError, KeyError, TypeError):
                    continue  # torn by a crash
        write_whole(path, "".join(kept))
        self._file: IO[str] = open(path, "a", encoding="utf-8", newline="\n")  # noqa: SIM115  closed on leaving

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, event: dict[str, object]) -> None:
        self._file.write(json.dumps(event) + "\n")
        self._file.flush()

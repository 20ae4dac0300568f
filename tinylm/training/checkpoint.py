"""Saving and restoring a training: a checkpoint folder is whole or absent, and nothing in it can execute.

    model.safetensors              all weights; of embeddings, all tables
    training-00001.safetensors     the optimiser's state if there is one, a file per process that saved, each with its part
    state.json                     where the training stood: step, cursor, scaler, guards, best so far, fingerprints
    manifest.json                  size and SHA-256 of each file; written last

Everything goes into a folder with a temporary name; files and folder are synced, the manifest comes last, then a rename makes it a
checkpoint. That happens in a thread, on copies of the tensors, while the training goes on. The tensors are written and read by
torch.distributed.checkpoint in its safetensors format, whose headers say which part of a tensor a file holds: any number of
processes can read what any other number wrote, and the pickle that its default format has for that does not exist.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import tinylm
from tinylm.errors import InputError, TinylmError, WorkError
from tinylm.model.transformer import Transformer
from tinylm.optim.groups import Optimizers
from tinylm.paths import sync_folder, write_whole
from tinylm.processes import SINGLE_PROCESS, Processes
from tinylm.reporting import Reporter
from tinylm.run import FORMAT, Checkpoint, Run, seal
from tinylm.training.parallel import named_weights


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint will hold, in tensors that nobody changes any more."""

    weights: Mapping[str, Tensor]
    """Of the whole model, in the main process."""
    training: Mapping[str, Tensor]
    """The optimiser's state, or this process's part of it."""
    state: Mapping[str, Any]
    """What JSON can hold; `state["step"]` names the checkpoint."""


class CheckpointWriter:
    """Writes the checkpoints of one run and removes those no longer wanted. All processes hold one and call it alike."""

    def __init__(self, run_folder: Path, keep: int, processes: Processes = SINGLE_PROCESS) -> None:
        self.run = Run(run_folder)
        self.folder = run_folder / "checkpoints"
        self._keep = keep
        self._main = processes.main
        self._line = processes.line()
        self._pending: tuple[threading.Thread, list[BaseException | Checkpoint]] | None = None

    def prepare(self) -> None:
        """Make the folder, and remove what a killed process left half-written there."""
        if not self._main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".*"):
            if left.name.startswith(".step-") and left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            elif left.name.startswith((".best.", ".last.", ".step-")):
                left.unlink()

    def begin(self, snapshot: Snapshot) -> None:
        """Start saving the step that `snapshot.state["step"]` names; when it is whole it becomes `last`. One at a time."""
        assert self._pending is None, "the save before is not finished"
        outcome: list[BaseException | Checkpoint] = []

        def write() -> None:
            try:
                outcome.append(self.save(snapshot))
            except BaseException as error:
                outcome.append(error)

        thread = threading.Thread(target=write, name="tinylm-save", daemon=True)  # a second signal must not wait for a disk
        self._pending = thread, outcome
        thread.start()

    @property
    def done(self) -> bool:
        """Whether `finish` would have nothing to wait for."""
        return self._pending is None or not self._pending[0].is_alive()

    def finish(self) -> Checkpoint | None:
        """Wait for what is being saved: that checkpoint, or None for nothing. Raises `WorkError` when the disk refused it."""
        if self._pending is None:
            return None
        (thread, outcome), self._pending = self._pending, None
        thread.join()
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]

    def save(self, snapshot: Snapshot) -> Checkpoint:
        """The same at once, for who has nothing to do meanwhile. Raises `WorkError` when the disk refuses."""
        final = self.folder / f"step-{snapshot.state['step']:06d}"
        partial = self.folder / f".{final.name}.partial"
        try:
            with _told(f"the checkpoint of step {snapshot.state['step']}", self.folder):
                self._line.run_on_main(lambda: _new_folder(partial))
                _write_tensors(partial, snapshot.training, self._line)
                self._line.run_on_main(lambda: self._seal(partial, final, snapshot))
        except BaseException:
            if self._main:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        return Checkpoint(final)

    def _seal(self, partial: Path, final: Path, snapshot: Snapshot) -> None:
        """Add what one process writes alone, and the manifest; then make it a checkpoint."""
        for number, file in enumerate(sorted(partial.iterdir()), 1):
            os.replace(file, partial / f"training-{number:05d}.safetensors")
        save_file(dict(snapshot.weights), partial / "model.safetensors", {"format": "pt"})
        note = {"format": FORMAT, "version": tinylm.__version__, **snapshot.state}
        (partial / "state.json").write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
        seal(partial)
        if final.exists():
            self._remove(Checkpoint(final))
        os.replace(partial, final)
        sync_folder(self.folder)
        self.point("last", final.name)

    def point(self, name: str, checkpoint: str) -> None:
        """Make `best` or `last` name a checkpoint. Raises `WorkError` when the disk refuses."""
        if self._main:
            with _told(f"which checkpoint is {name}", self.folder):
                write_whole(self.folder / name, checkpoint + "\n")

    def prune(self) -> None:
        """Remove all but best, last and the newest `keep`."""
        if not self._main:
            return
        pointers = [self.folder / name for name in ("best", "last")]
        with _told("which checkpoints are kept", self.folder):
            wanted = {pointer.read_text(encoding="utf-8").strip() for pointer in pointers if pointer.exists()}
            found = self.run.checkpoints()
            wanted |= {checkpoint.name for checkpoint in found[max(0, len(found) - self._keep) :]}
            for checkpoint in found:
                if checkpoint.name not in wanted:
                    self._remove(checkpoint)

    def forget_after(self, kept: Checkpoint, best_step: int) -> bool:
        """Remove the checkpoints after `kept`, which is the last again. Whether the one of `best_step` is there, and so best."""
        if self._main:
            for later in self.run.checkpoints():
                if later.step > kept.step:
                    self._remove(later)
            self.point("last", kept.name)
        best = self.folder / f"step-{best_step:06d}"
        there = bool(best_step) and best_step <= kept.step and best.exists()
        if self._main:
            if there:
                self.point("best", best.name)
            else:
                (self.folder / "best").unlink(missing_ok=True)
        return there

    def _remove(self, checkpoint: Checkpoint) -> None:
        """By a rename first: whoever is killed in between leaves no torn checkpoint."""
        doomed = checkpoint.path.with_name(f".{checkpoint.name}.removed")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(checkpoint.path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _new_folder(folder: Path) -> None:
    """Not its parents: a run folder that is gone does not come back."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def _write_tensors(folder: Path, tensors: Mapping[str, Tensor], processes: Processes) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _quiet():
        save(dict(tensors), storage_writer=writer, process_group=processes.group, no_dist=processes.group is None)


@contextmanager
def _told(what: str, folder: Path) -> Iterator[None]:
    """The ways in which a disk refuses, and the engine tells it, as one error for people."""
    try:
        yield
    except TinylmError:
        raise
    except (OSError, SafetensorError) as error:
        raise _refused(what, folder, error) from None
    except BaseException as error:
        if _is_engines(error):
            raise _refused(what, folder, next(iter(error.failures.values()))[0]) from None  # type: ignore[attr-defined]
        raise


def _refused(what: str, folder: Path, error: BaseException) -> WorkError:
    why = error if folder.exists() else "the run folder is gone"
    return WorkError(f"{what} could not be saved: {why}", where=str(folder))


def _is_engines(error: BaseException) -> bool:
    """The engine's exception is no `Exception`, and holds each process's own."""
    from torch.distributed.checkpoint.api import CheckpointException

    return isinstance(error, CheckpointException)


@contextmanager
def _quiet() -> Iterator[None]:
    """The engine warns that it works in one process where it was told so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def newest_whole(run: Run, reporter: Reporter) -> Checkpoint:
    """The newest checkpoint that is what was saved; damaged ones are told and passed over. Raises `InputError` when none is."""
    for checkpoint in reversed(run.checkpoints()):
        problem = checkpoint.problem()
        if problem is None:
            return checkpoint
        reporter.warn(f"{checkpoint.path} is damaged ({problem}); going back to the one before")
    raise InputError("no whole checkpoint to resume from", where=str(run.path), hint="train it anew with --overwrite")


def restore(
    checkpoint: Checkpoint,
    network: Transformer,
    optimizers: Optimizers,
    processes: Processes = SINGLE_PROCESS,
    *,
    moments: bool = True,
) -> dict[str, Any]:
    """Put weights and optimiser back as they were saved; the rest of the state is returned.

    Each process reads what it holds. Without `moments` the optimiser starts anew. Raises `InputError` for what does not fit.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    state = checkpoint.state
    weights = named_weights(network)
    try:
        reader = HuggingFaceStorageReader(str(checkpoint.path))
        stored = reader.read_metadata().state_dict_metadata
        shapes = {name: _shape(name, entry) for name, entry in stored.items()}
        for name, tensor in weights.items():
            if shapes.get(name) != tensor.shape:
                found = "not there" if name not in shapes else f"{tuple(shapes[name])} instead of {tuple(tensor.shape)}"
                raise ValueError(f"it does not fit the recipe: {name} is {found}")
        training = {name: shape for name, shape in shapes.items() if "/" in name and moments}
        blank = optimizers.blank_state(training)
        with _quiet():
            load({**weights, **blank}, storage_reader=reader, process_group=processes.group, no_dist=processes.group is None)
        optimizers.load_state(blank)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, IndexError, OverflowError, RuntimeError) as error:
        what = f"no such state: {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise InputError(f"cannot be restored: {what}", where=str(checkpoint.path)) from None
    except BaseException as error:
        if _is_engines(error):
            raise InputError("cannot be restored: its files do not agree", where=str(checkpoint.path)) from None
        raise
    return state


def _shape(name: str, entry: Any) -> Any:
    """The shape that the headers say a tensor has. Raises `ValueError` when their parts do not make up a whole one."""
    parts = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
    if parts != math.prod(entry.size) or any(offset < 0 for chunk in entry.chunks for offset in chunk.offsets):
        raise ValueError(f"the parts of {name} do not make up a whole")
    return entry.size

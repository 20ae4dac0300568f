"""Save and restore the state of a training run. Checkpoint folders are written atomically, and loading one never executes code.

    model.safetensors              all weights
    training-00001.safetensors     the optimizer state, if any: one file per process, with that process's shard
    state.json                     progress: step, cursor, gradient scaler, guards, best result so far, fingerprints
    manifest.json                  size and SHA-256 of every file; written last

A checkpoint is written to a folder with a temporary name. The files are synced, the manifest is written last, and then the folder
is renamed. A background thread writes copies of the tensors while training continues.

torch.distributed.checkpoint writes the optimizer state in its safetensors format, and reads all tensors. The headers of these files
record which part of a tensor each file contains, so that a run can resume with a different number of processes. The default format
of torch.distributed.checkpoint is not used, because it stores this information in a pickle.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import tinylm
from tinylm.errors import InputError, TinylmError, WorkError
from tinylm.model.base import Model
from tinylm.optim.ema import EMA
from tinylm.optim.groups import Optimizers
from tinylm.paths import atomic_write_text, sync_folder
from tinylm.processes import SINGLE_PROCESS, Processes
from tinylm.reporting import Reporter
from tinylm.run import FORMAT, OPTIMIZER_FILES, POINTERS, Checkpoint, Run, drop_optimizer_state, write_manifest
from tinylm.training.file_transfer import FileTransfer


@dataclass(frozen=True)
class Snapshot:
    """The contents of a checkpoint. The tensors must not change while the checkpoint is being saved."""

    weights: Mapping[str, Tensor]
    """All weights of the model. Only the main process writes them. In other processes, this may be empty."""
    optimizer_state: Mapping[str, Tensor]
    """This process's shard of the optimizer state."""
    state: Mapping[str, Any]
    """Everything else, as JSON values. The folder is named after `state["step"]`."""


class CheckpointWriter:
    """Writes the checkpoints of one run and removes old ones. All processes must call the same methods in the same order."""

    def __init__(self, run_folder: Path, keep: int, processes: Processes = SINGLE_PROCESS) -> None:
        """Create a writer. `run_folder` must exist in the main process."""
        self.run = Run(run_folder)
        self.folder = run_folder / "checkpoints"
        self._keep = keep
        self._is_main = processes.is_main
        self._processes = processes.new_group()
        self.transfer = FileTransfer.detect(run_folder, processes)
        """Copies checkpoints to machines that do not share the run folder."""
        self._saved_parts = self.transfer.with_processes(self._processes)
        self._pending: Future[Checkpoint] | None = None

    def prepare(self) -> None:
        """Create the checkpoints folder, and remove partial files left behind by a killed process."""
        if not self._is_main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".*"):
            if leftover.name.startswith(".step-") and leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            elif leftover.name.startswith((*(f".{pointer}." for pointer in POINTERS), ".step-")):
                leftover.unlink()

    def start_save(self, snapshot: Snapshot) -> None:
        """Save in a background thread. When the checkpoint is complete, `last` points to it. Call `wait` before the next save."""
        assert self._pending is None, "call wait before the next save"
        pending: Future[Checkpoint] = Future()

        def save() -> None:
            try:
                pending.set_result(self.save(snapshot))
            except BaseException as error:
                pending.set_exception(error)

        # With a daemon thread, a second signal ends the process without waiting for the disk.
        threading.Thread(target=save, name="tinylm-save", daemon=True).start()
        self._pending = pending

    @property
    def idle(self) -> bool:
        """Whether `wait` would return immediately."""
        return self._pending is None or self._pending.done()

    def wait(self) -> Checkpoint | None:
        """Wait for the pending save, if any, and return its checkpoint. Raises `WorkError` if the save failed."""
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        return pending.result()

    def save(self, snapshot: Snapshot) -> Checkpoint:
        """Save synchronously. Raises `WorkError` if the checkpoint cannot be written."""
        step = snapshot.state["step"]
        final = self.folder / f"step-{step:06d}"
        partial = self.folder / f".{final.name}.partial"
        try:
            with _translate_write_errors(f"the checkpoint for step {step} could not be saved", self.folder):
                self._processes.run_on_main(lambda: _recreate_folder(partial))
                self._saved_parts.recreate(partial)
                _write_tensors(partial, snapshot.optimizer_state, self._processes)
                self._saved_parts.collect(partial)
                self._processes.run_on_main(lambda: self._complete(partial, final, snapshot))
        except BaseException:
            if self._is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        return Checkpoint(final)

    def _complete(self, partial: Path, final: Path, snapshot: Snapshot) -> None:
        """Write the main process's files, with the manifest last, and rename the folder."""
        for number, file in enumerate(sorted(partial.iterdir()), 1):
            os.replace(file, partial / f"{OPTIMIZER_FILES}{number:05d}.safetensors")
        save_file(dict(snapshot.weights), partial / "model.safetensors", {"format": "pt"})
        state = {"format": FORMAT, "version": tinylm.__version__, **snapshot.state}
        (partial / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        write_manifest(partial)
        if final.exists():
            _remove(Checkpoint(final))
        os.replace(partial, final)
        sync_folder(self.folder)
        self.set_pointer("last", final.name)

    def set_pointer(self, pointer: str, checkpoint: str) -> None:
        """Write the name of a checkpoint into `best` or `last`. Raises `WorkError` if the file cannot be written."""
        if self._is_main:
            with _translate_write_errors(f"the name of the {pointer} checkpoint could not be saved", self.folder):
                atomic_write_text(self.folder / pointer, checkpoint + "\n")

    def prune(self) -> None:
        """Remove all checkpoints except the best, the last, the `keep` newest and permanent ones. Raises `WorkError` on failure."""
        if not self._is_main:
            return
        pointers = [self.folder / name for name in POINTERS]
        with _translate_write_errors("old checkpoints could not be removed", self.folder):
            wanted = {pointer.read_text(encoding="utf-8").strip() for pointer in pointers if pointer.exists()}
            checkpoints = self.run.checkpoints()
            wanted |= {checkpoint.name for checkpoint in checkpoints[max(0, len(checkpoints) - self._keep) :]}
            for checkpoint in checkpoints:
                if checkpoint.name not in wanted and not checkpoint.is_permanent:
                    _remove(checkpoint)

    def drop_optimizer_states(self) -> None:
        """Remove the optimizer state from all complete checkpoints. Raises `WorkError` on failure."""
        if not self._is_main:
            return
        with _translate_write_errors("the optimizer state could not be removed", self.folder):
            for checkpoint in self.run.checkpoints():
                if checkpoint.problem() is None:
                    drop_optimizer_state(checkpoint)

    def discard_after(self, kept: Checkpoint, best_step: int) -> bool:
        """Remove all checkpoints newer than `kept`, and point `last` to `kept`.

        Returns whether the checkpoint for `best_step` still exists. If so, `best` points to it. Otherwise, `best` is removed.
        Raises `WorkError` on failure.
        """

        def discard() -> bool:
            with _translate_write_errors(f"the checkpoints after step {kept.step} could not be removed", self.folder):
                for checkpoint in self.run.checkpoints():
                    if checkpoint.step > kept.step:
                        _remove(checkpoint)
                self.set_pointer("last", kept.name)
                best = self.folder / f"step-{best_step:06d}"
                best_exists = bool(best_step) and best_step <= kept.step and best.exists()
                if best_exists:
                    self.set_pointer("best", best.name)
                else:
                    (self.folder / "best").unlink(missing_ok=True)
            return best_exists

        return self._processes.run_on_main(discard)  # the other processes must not read the folder while it is being changed


def _remove(checkpoint: Checkpoint) -> None:
    """Remove a checkpoint. The folder is renamed first, so that an interruption does not leave a partial checkpoint behind."""
    removed = checkpoint.path.with_name(f".{checkpoint.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    os.replace(checkpoint.path, removed)
    shutil.rmtree(removed, ignore_errors=True)


def _recreate_folder(folder: Path) -> None:
    """Create an empty folder, but not its parents. If the user has removed the run folder, saving must fail."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def _write_tensors(folder: Path, tensors: Mapping[str, Tensor], processes: Processes) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _ignore_warnings():
        save(dict(tensors), storage_writer=writer, process_group=processes.group, no_dist=processes.group is None)


@contextmanager
def _translate_write_errors(problem: str, folder: Path) -> Iterator[None]:
    """Convert file system, safetensors and torch.distributed.checkpoint errors to a `WorkError` that reports `problem`."""
    try:
        yield
    except TinylmError:
        raise
    except (OSError, SafetensorError) as error:
        raise _write_error(problem, folder, error) from None
    except BaseException as error:
        if _is_distributed_checkpoint_error(error):
            first = next(iter(error.failures.values()))[0]  # type: ignore[attr-defined]
            raise _write_error(problem, folder, first) from None
        raise


def _write_error(problem: str, folder: Path, error: BaseException) -> WorkError:
    cause = error if folder.exists() else "the run folder no longer exists"
    return WorkError(f"{problem}: {cause}", where=str(folder))


def _is_distributed_checkpoint_error(error: BaseException) -> bool:
    """Whether `error` is a `CheckpointException`, which is not an `Exception` and contains one error per failed process."""
    from torch.distributed.checkpoint.api import CheckpointException

    return isinstance(error, CheckpointException)


@contextmanager
def _ignore_warnings() -> Iterator[None]:
    """Suppress a warning that torch.distributed.checkpoint assumes a single process, which it issues even with `no_dist`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def newest_complete_checkpoint(run: Run, reporter: Reporter) -> Checkpoint:
    """Return the newest undamaged checkpoint, and warn about newer damaged ones. Raises `InputError` if all are damaged."""
    for checkpoint in reversed(run.checkpoints()):
        problem = checkpoint.problem()
        if problem is None:
            return checkpoint
        reporter.warn(f"{checkpoint.path} is damaged ({problem}); trying the previous checkpoint")
    raise InputError("no complete checkpoint to resume from", where=str(run.path), hint="train from scratch with --overwrite")


def restore(
    checkpoint: Checkpoint,
    network: Model,
    optimizers: Optimizers,
    processes: Processes = SINGLE_PROCESS,
    *,
    load_optimizer: bool = True,
) -> dict[str, Any]:
    """Load the weights and the optimizer state from a checkpoint, and return the contents of its state.json.

    Each process reads its own shard. Without `load_optimizer`, the optimizer state stays empty, but trained weights are loaded in
    place of their averages. Raises `InputError` if the
    checkpoint does not match the network or the optimizers.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    state = checkpoint.state
    weights = network.stored_weights()
    try:
        reader = HuggingFaceStorageReader(str(checkpoint.path))
        shapes = {name: _stored_shape(name, entry) for name, entry in reader.read_metadata().state_dict_metadata.items()}
        _check_weights(weights, shapes)
        loaded = "" if load_optimizer else f"{EMA}/"
        optimizer_shapes = {name: shape for name, shape in shapes.items() if "/" in name and name.startswith(loaded)}
        optimizer_state = optimizers.empty_state(optimizer_shapes)
        with _ignore_warnings():
            load(
                {**weights, **optimizer_state},
                storage_reader=reader,
                process_group=processes.group,
                no_dist=processes.group is None,
            )
        optimizers.load_state(optimizer_state)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, IndexError, OverflowError, RuntimeError) as error:
        cause = (
            f"the optimizer has no parameter for the saved state {error}"
            if isinstance(error, KeyError)
            else str(error).splitlines()[0]
        )
        raise InputError(f"cannot be restored: {cause}", where=str(checkpoint.path)) from None
    except BaseException as error:
        if _is_distributed_checkpoint_error(error):
            raise InputError("cannot be restored: its files are inconsistent", where=str(checkpoint.path)) from None
        raise
    return state


def _check_weights(weights: Mapping[str, Tensor], stored: Mapping[str, torch.Size]) -> None:
    for name, tensor in weights.items():
        if stored.get(name) != tensor.shape:
            actual = f"{tuple(stored[name])} instead of {tuple(tensor.shape)}" if name in stored else "missing"
            raise ValueError(f"it does not match the recipe: {name} is {actual}")


def _stored_shape(name: str, entry: Any) -> Any:
    """Return the shape of a saved tensor. Raises `ValueError` if the saved parts do not cover the tensor exactly."""
    covered = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
    if covered != math.prod(entry.size) or any(offset < 0 for chunk in entry.chunks for offset in chunk.offsets):
        raise ValueError(f"the parts of {name} do not cover the tensor")
    return entry.size

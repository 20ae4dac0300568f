"""Saving and restoring a training: a checkpoint folder is whole or absent, and nothing in it can execute.

Weights and optimiser state are safetensors, the rest is JSON. Everything goes into a folder with a temporary name; files
and folder are synced, the manifest with their SHA-256 comes last, then a rename makes it a checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import tinylm
from tinylm.errors import InputError, WorkError
from tinylm.model.transformer import Transformer
from tinylm.optim.groups import Optimizers
from tinylm.paths import sync_folder, write_whole
from tinylm.reporting import Reporter
from tinylm.run import FORMAT, Checkpoint, Run, load_weights, sha256


class CheckpointWriter:
    """Writes the checkpoints of one run and removes those no longer wanted."""

    def __init__(self, run_folder: Path, keep: int) -> None:
        self.run = Run(run_folder)
        self.folder = run_folder / "checkpoints"
        self._keep = keep

    def save(self, network: Transformer, optimizers: Optimizers, state: Mapping[str, Any]) -> Checkpoint:
        """Save the step that `state["step"]` names and make it `last`. Raises `WorkError` when the disk refuses."""
        weights = _contiguous(network.state_dict(), network.model.tie_embeddings)
        return self.write({"model": weights, "training": _contiguous(optimizers.state())}, state)

    def write(self, files: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Checkpoint:
        """Like `save`, for any tensors: a .safetensors file for each name."""
        final = self.folder / f"step-{state['step']:06d}"
        temporary = self.folder / f".{final.name}.partial"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            for name, tensors in files.items():
                save_file(dict(tensors), temporary / f"{name}.safetensors", {"format": "pt"})
            note = {"format": FORMAT, "version": tinylm.__version__, **state}
            (temporary / "state.json").write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
            self._seal(temporary)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
            sync_folder(self.folder)
            self.point("last", final.name)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise WorkError(f"the checkpoint of step {state['step']} could not be saved: {error}", where=str(self.folder)) from None
        return Checkpoint(final)

    def _seal(self, folder: Path) -> None:
        files = {}
        for file in sorted(folder.iterdir()):
            with open(file, "rb+") as written:
                os.fsync(written.fileno())
            files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
        write_whole(folder / "manifest.json", json.dumps({"files": files}, indent=1) + "\n")
        sync_folder(folder)

    def point(self, name: str, checkpoint: str) -> None:
        """Make `best` or `last` name a checkpoint."""
        write_whole(self.folder / name, checkpoint + "\n")

    def prune(self) -> None:
        """Remove all but best, last and the newest `keep`."""
        pointers = [self.folder / name for name in ("best", "last")]
        wanted = {pointer.read_text(encoding="utf-8").strip() for pointer in pointers if pointer.exists()}
        found = self.run.checkpoints()
        wanted |= {checkpoint.name for checkpoint in found[max(0, len(found) - self._keep) :]}
        for checkpoint in found:
            if checkpoint.name not in wanted:
                shutil.rmtree(checkpoint.path, ignore_errors=True)


def _contiguous(tensors: Mapping[str, Tensor], tied: bool = False) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if not (tied and name == "head.weight")}


def newest_whole(run: Run, reporter: Reporter) -> Checkpoint:
    """The newest checkpoint that is what was saved; damaged ones are told and passed over. Raises `InputError` when none is."""
    for checkpoint in reversed(run.checkpoints()):
        problem = checkpoint.problem()
        if problem is None:
            return checkpoint
        reporter.warn(f"{checkpoint.path} is damaged ({problem}); going back to the one before")
    raise InputError("no whole checkpoint to resume from", where=str(run.path), hint="train it anew with --overwrite")


def restore(checkpoint: Checkpoint, network: Transformer, optimizers: Optimizers) -> dict[str, Any]:
    """Put weights and optimiser back as they were saved; the rest of the state is returned."""
    load_weights(network, checkpoint)
    file = checkpoint.path / "training.safetensors"
    try:
        optimizers.load_state(load_file(file))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"cannot be read: {error}", where=str(file)) from None
    return checkpoint.state

"""Checkpoints are written atomically, verified, pruned and restored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import causal_batch, ids, model

from tinylm import run as run_module
from tinylm.errors import InputError, WorkError
from tinylm.model.transformer import Transformer
from tinylm.optim import groups
from tinylm.optim.groups import Optimizers
from tinylm.recipe.schema import MuonOptimizer
from tinylm.reporting import CollectingReporter
from tinylm.run import Checkpoint, Run
from tinylm.training import checkpoint as checkpoint_module
from tinylm.training.checkpoint import CheckpointWriter, Snapshot, newest_complete_checkpoint, restore
from tinylm.training.objectives import CausalLM
from tinylm.training.parallel import Parallel

FILES = ("model.safetensors", "training-00001.safetensors", "state.json", "manifest.json")


def _trained(preset: str = "modern", steps: int = 1) -> tuple[Transformer, Optimizers]:
    network = model(preset, n_embd=16).train()
    optimizers = groups.build(MuonOptimizer(name="muon"), network)
    objective = CausalLM()
    for seed in range(steps):
        optimizers.zero_grad()
        objective.losses(network, causal_batch(ids(2, 9, seed=seed))).mean().backward()
        optimizers.step()
    return network, optimizers


def _save_and_wait(writer: CheckpointWriter, network: Transformer, optimizers: Optimizers, state: dict[str, Any]) -> Checkpoint:
    """Save a checkpoint in the background thread and wait until it is complete."""
    parallel = Parallel(network)
    writer.start_save(Snapshot(parallel.full_weights(), parallel.cpu_copies(optimizers.state()), state))
    checkpoint = writer.wait()
    assert checkpoint is not None
    return checkpoint


def _writer(folder: Path, keep: int = 1) -> CheckpointWriter:
    writer = CheckpointWriter(folder, keep)
    writer.prepare()
    return writer


def _save_steps(folder: Path, *steps: int, keep: int = 2, preset: str = "modern") -> CheckpointWriter:
    writer, trained = _writer(folder, keep), _trained(preset)
    for step in steps:
        _save_and_wait(writer, *trained, {"step": step})
    return writer


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize("preset", ["modern", "gpt2"])
def test_restoring_reproduces_the_saved_state_bit_for_bit(preset: str, tmp_path: Path) -> None:
    network, optimizers = _trained(preset, steps=2)
    saved = _save_and_wait(_writer(tmp_path), network, optimizers, {"step": 7, "note": [1.5, None]})
    restored, restored_optimizers = _trained(preset, steps=1)
    state = restore(saved, restored, restored_optimizers)
    assert (state["step"], state["note"]) == (7, [1.5, None])
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), restored.parameters(), strict=True))
    assert all(torch.equal(value, restored_optimizers.state()[name]) for name, value in optimizers.state().items())
    assert (restored.head.weight is restored.embedding.weight) == (preset == "gpt2")


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    saved = _save_and_wait(_writer(tmp_path), *_trained("gpt2"), {"step": 1})
    weights = load_file(saved.path / "model.safetensors")
    assert "embedding.weight" in weights
    assert "head.weight" not in weights


def test_the_manifest_lists_every_file_with_its_size_and_hash(tmp_path: Path) -> None:
    _save_steps(tmp_path, 5)
    folder = tmp_path / "checkpoints" / "step-000005"
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == set(FILES) - {"manifest.json"}
    assert Checkpoint(folder).problem() is None
    assert (tmp_path / "checkpoints" / "last").read_text() == "step-000005\n"


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


@pytest.mark.parametrize("damage", [_flip, _truncate, Path.unlink], ids=["flipped bit", "truncated", "deleted"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_detected_and_the_previous_checkpoint_is_used(name: str, damage: Any, tmp_path: Path) -> None:
    _save_steps(tmp_path, 5, 10)
    damage(tmp_path / "checkpoints" / "step-000010" / name)
    reporter = CollectingReporter()
    assert newest_complete_checkpoint(Run(tmp_path), reporter).step == 5
    [warning] = reporter.warnings
    assert "step-000010 is damaged" in warning


def test_links_and_paths_outside_the_folder_are_rejected(tmp_path: Path) -> None:
    _save_steps(tmp_path, 5, 10)
    folder = tmp_path / "checkpoints" / "step-000010"
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "checkpoints" / "step-000005" / "model.safetensors")
    assert "does not belong" in str(Checkpoint(folder).problem())
    (tmp_path / "checkpoints" / "step-000005" / "manifest.json").write_text('{"files": {"../../x": {"bytes": 1, "sha256": ""}}}')
    assert "does not belong" in str(Checkpoint(tmp_path / "checkpoints" / "step-000005").problem())


def test_the_error_for_a_run_without_a_complete_checkpoint_suggests_overwriting(tmp_path: Path) -> None:
    _save_steps(tmp_path, 5)
    _flip(tmp_path / "checkpoints" / "step-000005" / "state.json")
    with pytest.raises(InputError, match=r"no complete checkpoint.*--overwrite"):
        newest_complete_checkpoint(Run(tmp_path), CollectingReporter())


def test_a_checkpoint_in_another_format_is_rejected(tmp_path: Path) -> None:
    _save_steps(tmp_path, 5)
    file = tmp_path / "checkpoints" / "step-000005" / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99, "version": "7.0"}))
    with pytest.raises(InputError, match=r"format 99 by tinylm 7\.0"):
        _ = Checkpoint(file.parent).state


@pytest.mark.parametrize(("keep", "expected"), [(0, {10, 30}), (1, {10, 30}), (2, {10, 25, 30}), (9, {5, 10, 15, 20, 25, 30})])
def test_pruning_keeps_the_best_last_and_newest_checkpoints(keep: int, expected: set[int], tmp_path: Path) -> None:
    writer = _save_steps(tmp_path, 5, 10, 15, 20, 25, 30, keep=keep)
    writer.set_pointer("best", "step-000010")
    writer.prune()
    assert {checkpoint.step for checkpoint in Run(tmp_path).checkpoints()} == expected


@pytest.mark.parametrize("failing", ["save_file", "atomic_write_text", "sync_folder"])
def test_a_failed_save_does_not_change_earlier_checkpoints(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = _save_steps(tmp_path, 5)
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}

    def disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for module in (checkpoint_module, run_module):
        monkeypatch.setattr(module, failing, disk_full, raising=False)
    with pytest.raises(WorkError, match=r"step 10 could not be saved.*No space left") as caught:
        _save_and_wait(writer, *_trained(), {"step": 10})
    assert caught.value.exit_code == 1
    assert all(path.read_bytes() == content for path, content in before.items())
    assert _names(tmp_path) == ["last", "step-000005"]
    monkeypatch.undo()
    assert newest_complete_checkpoint(Run(tmp_path), CollectingReporter()).step == 5
    _save_and_wait(writer, *_trained(), {"step": 10})
    assert newest_complete_checkpoint(Run(tmp_path), CollectingReporter()).step == 10


def test_a_partial_checkpoint_from_a_crashed_process_is_ignored_and_replaced(tmp_path: Path) -> None:
    writer = _save_steps(tmp_path, 5)
    shutil.copytree(tmp_path / "checkpoints" / "step-000005", tmp_path / "checkpoints" / ".step-000010.partial")
    assert [checkpoint.step for checkpoint in Run(tmp_path).checkpoints()] == [5]
    _save_and_wait(writer, *_trained(), {"step": 10})
    assert _names(tmp_path) == ["last", "step-000005", "step-000010"]


def test_weights_with_a_different_shape_are_rejected(tmp_path: Path) -> None:
    saved = _save_and_wait(_writer(tmp_path), *_trained(), {"step": 1})
    other = model(n_embd=24)
    with pytest.raises(InputError, match="does not match the recipe"):
        restore(saved, other, groups.build(MuonOptimizer(name="muon"), other))


def test_state_from_another_optimizer_is_rejected(tmp_path: Path) -> None:
    saved = _save_and_wait(_writer(tmp_path), *_trained(), {"step": 1})
    network, _ = _trained()
    adam = groups.Optimizers({"adamw": torch.optim.AdamW(network.parameters())}, {p: n for n, p in network.named_parameters()})
    with pytest.raises(InputError, match="the optimizer has no parameter for the saved state"):
        restore(saved, network, adam)

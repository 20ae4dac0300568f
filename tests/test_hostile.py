"""Malicious run folders are rejected without executing code, writing outside the folder or allocating memory for forged sizes."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ids, model

from tinylm.errors import InputError, TinylmError
from tinylm.evaluation.evaluate_run import evaluate_run
from tinylm.pipeline import train
from tinylm.reporting import SILENT
from tinylm.run import Checkpoint, Run
from tinylm.training.checkpoint import newest_complete_checkpoint


class _Bomb:
    """An object that creates a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


@pytest.fixture
def run(tiny_run: Run, tmp_path: Path) -> Run:
    shutil.copytree(tiny_run.path, tmp_path / "untrusted")
    return Run(tmp_path / "untrusted")


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def _forge_manifest(checkpoint: Checkpoint) -> None:
    """Update the manifest to match the files, because an attacker who forges a file also forges its hash."""
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in checkpoint.path.iterdir()
        if file.name != "manifest.json"
    }
    (checkpoint.path / "manifest.json").write_text(json.dumps({"files": files}))


def _resume(run: Run) -> None:
    train(run.recipe, run.path, device="cpu", resume=True)


def _evaluate(run: Run) -> None:
    evaluate_run(Run.open(run.path), checkpoint="last", device="cpu")


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


FILES = ["model.safetensors", "training-00001.safetensors", "state.json", "manifest.json"]


@pytest.mark.parametrize("use", [_evaluate, _resume])
@pytest.mark.parametrize("name", [*FILES, ".metadata", "../../metrics.jsonl", "../../tokenizer.json", "../../heldout/heldout.npy"])
def test_a_pickle_in_place_of_any_file_is_never_loaded(name: str, use: Callable[[Run], None], run: Run, canary: Path) -> None:
    for checkpoint in run.checkpoints():
        (checkpoint.path / name).write_bytes(pickle.dumps(_Bomb(canary)))
        if name != "manifest.json":
            _forge_manifest(checkpoint)
    ignored = name.endswith(("metrics.jsonl", ".metadata")) or (use is _evaluate and name.startswith("training"))
    rewritten = use is _resume and name.startswith("../../")
    if ignored or rewritten:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pickle, "loads", None)
            patch.setattr(pickle, "load", None)
            use(run)
    else:
        with pytest.raises(TinylmError):
            use(run)
    assert not canary.exists()


def test_unpickling_the_bomb_creates_its_file(canary: Path) -> None:
    pickle.loads(pickle.dumps(_Bomb(canary)))
    assert canary.exists()


def test_held_out_tokens_stored_as_an_array_of_objects_are_rejected(run: Run, canary: Path) -> None:
    np.save(run.path / "heldout" / "heldout.npy", np.array([_Bomb(canary)], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="the tokens are missing or damaged"):
        _evaluate(run)
    assert not canary.exists()


@pytest.mark.parametrize("name", ["../../../outside", "/etc/passwd", "..", ".", ""])
def test_a_manifest_that_lists_files_outside_the_folder_is_rejected(name: str, run: Run) -> None:
    checkpoint = run.checkpoint("last")
    manifest = json.loads((checkpoint.path / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": "0"}
    (checkpoint.path / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint.problem() is not None
    with pytest.raises(InputError, match="no complete checkpoint"):
        newest_complete_checkpoint(run, SILENT)


@pytest.mark.parametrize("pointer", ["../../outside", "step-1/../../..", "/", "step-000020/../../x", "\0", "best" * 10_000])
def test_a_pointer_that_does_not_name_a_checkpoint_is_rejected(pointer: str, run: Run) -> None:
    (run.path / "checkpoints" / "last").write_text(pointer)
    with pytest.raises(InputError, match="does not contain the name of a checkpoint"):
        _evaluate(run)


@pytest.mark.parametrize(
    "link",
    ["checkpoints", "metrics.jsonl", "samples.md", "recipe.yaml", "heldout", "reports", "environment.json", "tokenizer.json"],
)
def test_a_symlink_out_of_the_folder_is_rejected_and_nothing_is_written_through_it(link: str, run: Run, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    original = run.path / link
    if original.exists():
        shutil.move(original, outside)
    original.symlink_to(outside)  # dangling for samples.md and reports
    before = _contents(outside) if outside.is_dir() else outside.read_bytes() if outside.exists() else None
    with pytest.raises(InputError, match="is a link to a target outside the run folder"):
        _resume_with_resolved_recipe(run)
    with pytest.raises(InputError, match="is a link to a target outside the run folder"):
        _evaluate(run)
    after = _contents(outside) if outside.is_dir() else outside.read_bytes() if outside.exists() else None
    assert after == before


def _resume_with_resolved_recipe(run: Run) -> None:
    from tinylm.recipe import load

    recipe = load((run.path / "recipe.yaml").resolve(), check_files=False)
    train(recipe, run.path, device="cpu", resume=True)


def test_a_checkpoint_folder_that_is_a_symlink_is_rejected(run: Run, tmp_path: Path) -> None:
    checkpoint = run.checkpoint("last")
    shutil.move(checkpoint.path, tmp_path / "outside")
    checkpoint.path.symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match="is a link to a target outside"):
        _evaluate(run)
    assert Checkpoint(checkpoint.path).problem() == "it is a symbolic link"


def _header(entries: dict[str, Any], size: int = 64) -> bytes:
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + b"\0" * size


FORGED_HEADERS = {
    "a shape of terabytes": _header({"embedding.weight": {"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 64]}}),
    "offsets of 10 GB": _header(
        {"embedding.weight": {"dtype": "F32", "shape": [2_500_000_000], "data_offsets": [0, 10_000_000_000]}}
    ),
    "a negative offset": _header({"embedding.weight": {"dtype": "F32", "shape": [16], "data_offsets": [-64, 0]}}),
    "a header of 2**60 bytes": struct.pack("<Q", 1 << 60) + b"{}",
    "no header": b"",
    "overlaps": _header({name: {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]} for name in ("a", "b")}),
}


@pytest.mark.parametrize("use", [_evaluate, _resume])
@pytest.mark.parametrize("header", FORGED_HEADERS)
@pytest.mark.parametrize("file", ["model.safetensors", "training-00001.safetensors"])
def test_a_forged_header_is_rejected_without_allocating_memory(
    file: str, header: str, use: Callable[[Run], None], run: Run
) -> None:
    for checkpoint in run.checkpoints():
        (checkpoint.path / file).write_bytes(FORGED_HEADERS[header])
        _forge_manifest(checkpoint)
    if use is _evaluate and file != "model.safetensors":
        use(run)  # evaluation does not open this file
        return
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError):
        use(run)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


@pytest.mark.parametrize("shape", [(1 << 20, 4), (4,), ()])
@pytest.mark.parametrize(
    ("file", "use", "message"),
    [
        ("model.safetensors", _evaluate, "does not match the recipe"),
        ("model.safetensors", _resume, "does not match the recipe"),
        ("training-00001.safetensors", _resume, "cannot be restored"),
    ],
)
def test_tensors_with_the_wrong_shape_are_rejected(
    file: str, use: Callable[[Run], None], message: str, shape: tuple[int, ...], run: Run
) -> None:
    for checkpoint in run.checkpoints():
        tensors = load_file(checkpoint.path / file)
        name = sorted(name for name in tensors if not name.endswith("/step"))[0]
        save_file({**tensors, name: torch.zeros(shape)}, checkpoint.path / file)
        _forge_manifest(checkpoint)
    with pytest.raises(InputError, match=message):
        use(run)


@pytest.mark.parametrize("offsets", [[1 << 50, 0], [-3, 0], [5], "x", None])
def test_shards_that_do_not_cover_their_tensor_are_rejected(offsets: Any, run: Run) -> None:
    for checkpoint in run.checkpoints():
        file = checkpoint.path / "training-00001.safetensors"
        tensors = load_file(file)
        name = next(name for name in tensors if name.endswith("qkv.weight/momentum"))
        metadata = {key: {"saved_offsets": offsets if key == name else [0] * tensor.ndim} for key, tensor in tensors.items()}
        save_file(tensors, file, {"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(metadata)})
        _forge_manifest(checkpoint)
    with pytest.raises(InputError, match="cannot be restored"):
        _resume(run)


def test_a_manifest_that_declares_ten_gigabytes_is_rejected(run: Run) -> None:
    checkpoint = run.checkpoint("last")
    manifest = json.loads((checkpoint.path / "manifest.json").read_text())
    manifest["files"]["model.safetensors"]["bytes"] = 10_000_000_000
    (checkpoint.path / "manifest.json").write_text(json.dumps(manifest))
    assert "instead of 10,000,000,000" in str(checkpoint.problem())


def test_held_out_tokens_that_declare_ten_gigabytes_are_rejected(run: Run) -> None:
    file = run.path / "heldout" / "heldout.npy"
    content = file.read_bytes()
    start = content.index(b"'shape': (") + len(b"'shape': (")
    end = content.index(b",", start)
    file.write_bytes(content[:start] + b"9" * (end - start) + b"9999999999"[: 128 - end] + content[end:])
    with pytest.raises(InputError):
        _evaluate(run)


@pytest.mark.parametrize("change", ["n_layer: 2000000000", "n_embd: 1048576", "context_length: 2000000000", "n_layer: 3"])
def test_a_recipe_for_a_huge_or_mismatched_model_is_rejected(change: str, run: Run) -> None:
    recipe = (run.path / "recipe.yaml").read_text()
    key = change.partition(":")[0]
    old = recipe[recipe.index(f"{key}: ") :].split(",")[0].split("\n")[0].rstrip("}")
    (run.path / "recipe.yaml").write_text(recipe.replace(old, change))
    assert old != change
    for use in (_evaluate, _resume):
        with pytest.raises(InputError):
            use(Run(run.path))


@pytest.mark.parametrize("length", [65_537, 16_777_216])
def test_a_forged_context_length_does_not_allocate_memory(length: int, run: Run) -> None:
    _evaluate(run)
    recipe = (run.path / "recipe.yaml").read_text()
    (run.path / "recipe.yaml").write_text(recipe.replace("context_length: 32", f"context_length: {length}"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    evaluation = evaluate_run(Run.open(run.path), checkpoint="last", device="cpu")
    assert Run.open(run.path).recipe.model.context_length == length
    assert evaluation.perplexity.tokens > 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KiB


def test_positions_beyond_the_initial_tables_are_computed_on_demand() -> None:
    length = 65_536 + 8
    parts = {"n_layer": 1, "n_head": 1, "n_embd": 2, "attention_window": 4}
    long, short = (model("llama", context_length=context, **parts) for context in (length, 64))
    assert long.table_length < length
    tokens = ids(1, length, vocab_size=61)
    with torch.no_grad():
        hidden = long.hidden(tokens, n_last=4)
        assert long.table_length == length
        # Rotary positions are relative, and a single block with a window of 4 depends only on nearby tokens.
        torch.testing.assert_close(hidden, short.hidden(tokens[:, -64:], n_last=4), atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="context"):
        long.hidden(ids(1, length + 1, vocab_size=61))


def test_a_file_that_the_manifest_does_not_list_is_rejected(run: Run) -> None:
    checkpoint = run.checkpoint("last")
    save_file({"embedding.weight": torch.full((400, 32), 9.0)}, checkpoint.path / "training-00000.safetensors")
    assert "does not list training-00000.safetensors" in str(checkpoint.problem())

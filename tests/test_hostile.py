"""A run folder from somebody who means harm: refused, nothing executed, nothing written outside, no memory spent on lies."""

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

from tinylm.errors import InputError, TinylmError
from tinylm.evaluation.measure import measure
from tinylm.pipeline import train
from tinylm.reporting import SILENT
from tinylm.run import Checkpoint, Run
from tinylm.training.checkpoint import newest_whole


class _Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


@pytest.fixture
def run(tiny_run: Run, tmp_path: Path) -> Run:
    shutil.copytree(tiny_run.path, tmp_path / "theirs")
    return Run(tmp_path / "theirs")


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def _sealed(checkpoint: Checkpoint) -> None:
    """The manifest made to fit whatever lies there: whoever forges files forges sums."""
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in checkpoint.path.iterdir()
        if file.name != "manifest.json"
    }
    (checkpoint.path / "manifest.json").write_text(json.dumps({"files": files}))


def _resume(run: Run) -> None:
    train(run.recipe, run.path, device="cpu", resume=True)


def _use(run: Run) -> None:
    measure(Run.open(run.path), checkpoint="last", device="cpu")


def _everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


FILES = ["model.safetensors", "training-00001.safetensors", "state.json", "manifest.json"]


@pytest.mark.parametrize("use", [_use, _resume])
@pytest.mark.parametrize("name", [*FILES, ".metadata", "../../metrics.jsonl", "../../tokenizer.json", "../../heldout/heldout.npy"])
def test_a_pickle_in_any_place_is_never_run(name: str, use: Callable[[Run], None], run: Run, canary: Path) -> None:
    for checkpoint in run.checkpoints():
        (checkpoint.path / name).write_bytes(pickle.dumps(_Bomb(canary)))
        if name != "manifest.json":
            _sealed(checkpoint)
    harmless = name.endswith(("metrics.jsonl", ".metadata")) or (use is _use and name.startswith("training"))
    written_anew = use is _resume and name.startswith("../../")
    if harmless or written_anew:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pickle, "loads", None)
            patch.setattr(pickle, "load", None)
            use(run)
    else:
        with pytest.raises(TinylmError):
            use(run)
    assert not canary.exists()


def test_the_bomb_would_have_gone_off(canary: Path) -> None:
    pickle.loads(pickle.dumps(_Bomb(canary)))
    assert canary.exists()


def test_an_array_of_objects_is_not_read_as_held_out_tokens(run: Run, canary: Path) -> None:
    np.save(run.path / "heldout" / "heldout.npy", np.array([_Bomb(canary)], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="no readable tokens"):
        _use(run)
    assert not canary.exists()


@pytest.mark.parametrize("name", ["../../../outside", "/etc/passwd", "..", ".", ""])
def test_a_manifest_that_names_files_elsewhere_is_refused(name: str, run: Run) -> None:
    checkpoint = run.checkpoint("last")
    manifest = json.loads((checkpoint.path / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": "0"}
    (checkpoint.path / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint.problem() is not None
    with pytest.raises(InputError, match="no whole checkpoint"):
        newest_whole(run, SILENT)


@pytest.mark.parametrize("pointer", ["../../outside", "step-1/../../..", "/", "step-000020/../../x", "\0", "best" * 10_000])
def test_a_pointer_that_names_no_checkpoint_is_refused(pointer: str, run: Run) -> None:
    (run.path / "checkpoints" / "last").write_text(pointer)
    with pytest.raises(InputError, match="names no checkpoint"):
        _use(run)


@pytest.mark.parametrize(
    "link",
    ["checkpoints", "metrics.jsonl", "samples.md", "recipe.yaml", "heldout", "reports", "environment.json", "tokenizer.json"],
)
def test_a_link_out_of_the_folder_is_refused_and_nothing_is_written_there(link: str, run: Run, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    original = run.path / link
    if original.exists():
        shutil.move(original, outside)
    original.symlink_to(outside)  # for samples.md and reports it leads to nothing yet
    before = _everything(outside) if outside.is_dir() else outside.read_bytes() if outside.exists() else None
    with pytest.raises(InputError, match="leads out of the run folder"):
        _resume_unread(run)
    with pytest.raises(InputError, match="leads out of the run folder"):
        _use(run)
    after = _everything(outside) if outside.is_dir() else outside.read_bytes() if outside.exists() else None
    assert after == before


def _resume_unread(run: Run) -> None:
    from tinylm.recipe import load

    recipe = load((run.path / "recipe.yaml").resolve(), check_files=False)
    train(recipe, run.path, device="cpu", resume=True)


def test_a_checkpoint_folder_that_is_a_link_is_refused(run: Run, tmp_path: Path) -> None:
    checkpoint = run.checkpoint("last")
    shutil.move(checkpoint.path, tmp_path / "outside")
    checkpoint.path.symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match="leads out"):
        _use(run)
    assert Checkpoint(checkpoint.path).problem() == "it is a link"


def _header(entries: dict[str, Any], size: int = 64) -> bytes:
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + b"\0" * size


LIES = {
    "a shape of terabytes": _header({"embedding.weight": {"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 64]}}),
    "offsets of 10 GB": _header(
        {"embedding.weight": {"dtype": "F32", "shape": [2_500_000_000], "data_offsets": [0, 10_000_000_000]}}
    ),
    "a negative offset": _header({"embedding.weight": {"dtype": "F32", "shape": [16], "data_offsets": [-64, 0]}}),
    "a header of 2**60 bytes": struct.pack("<Q", 1 << 60) + b"{}",
    "no header": b"",
    "overlaps": _header({name: {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]} for name in ("a", "b")}),
}


@pytest.mark.parametrize("use", [_use, _resume])
@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("file", ["model.safetensors", "training-00001.safetensors"])
def test_a_header_that_lies_is_refused_without_spending_memory(file: str, lie: str, use: Callable[[Run], None], run: Run) -> None:
    for checkpoint in run.checkpoints():
        (checkpoint.path / file).write_bytes(LIES[lie])
        _sealed(checkpoint)
    if use is _use and file != "model.safetensors":
        use(run)  # which measuring does not open
        return
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError):
        use(run)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


@pytest.mark.parametrize("shape", [(1 << 20, 4), (4,), ()])
@pytest.mark.parametrize(
    ("file", "use", "why"),
    [
        ("model.safetensors", _use, "does not fit the recipe"),
        ("model.safetensors", _resume, "does not fit the recipe"),
        ("training-00001.safetensors", _resume, "cannot be restored"),
    ],
)
def test_true_headers_of_tensors_that_do_not_fit_are_refused(
    file: str, use: Callable[[Run], None], why: str, shape: tuple[int, ...], run: Run
) -> None:
    for checkpoint in run.checkpoints():
        tensors = load_file(checkpoint.path / file)
        name = sorted(name for name in tensors if not name.endswith("/step"))[0]
        save_file({**tensors, name: torch.zeros(shape)}, checkpoint.path / file)
        _sealed(checkpoint)
    with pytest.raises(InputError, match=why):
        use(run)


@pytest.mark.parametrize("offsets", [[1 << 50, 0], [-3, 0], [5], "x", None])
def test_parts_that_do_not_make_up_a_whole_are_refused(offsets: Any, run: Run) -> None:
    for checkpoint in run.checkpoints():
        file = checkpoint.path / "training-00001.safetensors"
        tensors = load_file(file)
        name = next(name for name in tensors if name.endswith("qkv.weight/momentum"))
        places = {each: {"saved_offsets": offsets if each == name else [0] * tensor.ndim} for each, tensor in tensors.items()}
        save_file(tensors, file, {"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(places)})
        _sealed(checkpoint)
    with pytest.raises(InputError, match="cannot be restored"):
        _resume(run)


def test_a_declared_size_of_ten_gigabytes_is_noticed(run: Run) -> None:
    checkpoint = run.checkpoint("last")
    manifest = json.loads((checkpoint.path / "manifest.json").read_text())
    manifest["files"]["model.safetensors"]["bytes"] = 10_000_000_000
    (checkpoint.path / "manifest.json").write_text(json.dumps(manifest))
    assert "instead of 10,000,000,000" in str(checkpoint.problem())


def test_held_out_tokens_of_a_declared_ten_gigabytes_are_refused(run: Run) -> None:
    file = run.path / "heldout" / "heldout.npy"
    content = file.read_bytes()
    start = content.index(b"'shape': (") + len(b"'shape': (")
    end = content.index(b",", start)
    file.write_bytes(content[:start] + b"9" * (end - start) + b"9999999999"[: 128 - end] + content[end:])
    with pytest.raises(InputError):
        _use(run)


@pytest.mark.parametrize("change", ["n_layer: 2000000000", "n_embd: 1048576", "context_length: 2000000000", "n_layer: 3"])
def test_a_recipe_that_describes_a_monster_is_refused_before_it_is_built(change: str, run: Run) -> None:
    recipe = (run.path / "recipe.yaml").read_text()
    key = change.partition(":")[0]
    old = recipe[recipe.index(f"{key}: ") :].split(",")[0].split("\n")[0].rstrip("}")
    (run.path / "recipe.yaml").write_text(recipe.replace(old, change))
    assert old != change
    for use in (_use, _resume):
        with pytest.raises(InputError):
            use(Run(run.path))


def test_a_file_that_the_manifest_does_not_name_is_not_read(run: Run) -> None:
    checkpoint = run.checkpoint("last")
    save_file({"embedding.weight": torch.full((400, 32), 9.0)}, checkpoint.path / "training-00000.safetensors")
    assert "does not list training-00000.safetensors" in str(checkpoint.problem())

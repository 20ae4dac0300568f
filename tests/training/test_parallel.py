"""Several processes train what one would: the same global batches, the same model up to rounding, resumable by any number."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import lives
import pytest
import torch
from conftest import tiny_recipe
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageReader, load

from tinylm.recipe import Recipe
from tinylm.run import Run

pytestmark = pytest.mark.skipif(os.name == "nt", reason="gloo, and POSIX signals")
STEPS = 7


@pytest.fixture(scope="module")
def short_file(english: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text(english[1000:7000], encoding="utf-8")
    return path


def recipe_of(text: Path, *overrides: str) -> Recipe:
    """Dropout on, parts of every kind, a step in eight micro-batches, and Muon's iteration in float32, whose rounding is small."""
    model = ("model.dropout=0.2", "model.n_embd=24", "model.value_residual=on", "model.embedding_shortcut=on", "model.n_kv_head=1")
    more = (
        "model.ngram_embeddings=[2]",
        "model.ngram_rows=50",
        "model.ngram_width=8",
        "training.optimizer.newton_schulz_dtype=fp32",
    )
    rest = ("training.micro_batch_size=1", "training.compile=off", f"training.steps={STEPS}", "evaluation.every=4")
    return tiny_recipe(text, "modern", *model, *more, *rest, "checkpoint.every=3", "evaluation.max_tokens=300", *overrides)


@pytest.fixture(scope="module")
def alone(short_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "alone"
    lives.run(recipe_of(short_file), folder)
    return folder


def _lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def _near(folder: Path, other: Path) -> None:
    """The same global batches, and losses, gradients, held-out numbers and weights that differ by rounding only."""
    steps, others = _lines(folder, "step"), _lines(other, "step")
    assert [line["batch"] for line in steps] == [line["batch"] for line in others]
    assert len({line["batch"] for line in steps}) == STEPS
    assert [line["loss"] for line in steps] == pytest.approx([line["loss"] for line in others], abs=1e-4)
    assert [line["grad_norm"] for line in steps] == pytest.approx([line["grad_norm"] for line in others], rel=1e-3)
    held = [[line["val_loss"] for line in _lines(each, "eval")] for each in (folder, other)]
    assert held[0] == pytest.approx(held[1], abs=1e-4)
    weights = [load_file(Run(each).checkpoint("last").path / "model.safetensors") for each in (folder, other)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], atol=2e-3, rtol=1e-2, msg=name)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_the_model_of_one(kind: str, alone: Path, short_file: Path, tmp_path: Path) -> None:
    lives.run(recipe_of(short_file, f"training.parallel={kind}"), tmp_path / "run", count=2)
    _near(tmp_path / "run", alone)
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert (environment["processes"], environment["parallel"]) == (2, kind)
    last = Run(tmp_path / "run").checkpoint("last")
    parts = sorted(path.name for path in last.path.glob("training-*"))
    assert parts == ["training-00001.safetensors", "training-00002.safetensors"], "each process saved its part"


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_leave_out_the_same_step_before_they_know_it(kind: str, short_file: Path, tmp_path: Path) -> None:
    """As on GPUs, which tell of a step when the next is under way; every process, and each part of a spread weight."""
    recipe = recipe_of(short_file, f"training.parallel={kind}", "training.log_every=3")
    for late in (False, True):
        lives.run(recipe, tmp_path / str(late), count=2, spoiled=[2], late=late)
    kept = [load_file(Run(tmp_path / str(late)).checkpoint("last").path / "model.safetensors") for late in (False, True)]
    assert all(torch.equal(tensor, kept[1][name]) for name, tensor in kept[0].items())
    events = [[*_lines(tmp_path / str(late), "skipped"), *_lines(tmp_path / str(late), "step")] for late in (False, True)]
    assert [(event["kind"], event["step"]) for event in events[1]] == [("skipped", 2), *(("step", n) for n in (1, 3, 4, 6, 7))]
    assert [event.get("loss") for event in events[0]] == [event.get("loss") for event in events[1]]


def test_saved_by_two_resumed_by_one_and_then_by_four(alone: Path, short_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for kind, count, steps in (("ddp", 2, 3), ("auto", 1, 6), ("fsdp", 4, None)):
        processes = lives.started(recipe_of(short_file, f"training.parallel={kind}"), folder, count=count, resume=True)
        if steps is None:
            assert set(lives.ended(processes)) == {0}
        else:
            assert lives.killed_when(processes, lambda steps=steps: (folder / "checkpoints" / f"step-{steps:06d}").exists())
    _near(folder, alone)
    began = json.loads((folder / "environment.json").read_text())
    assert [began["processes"], *(each["processes"] for each in began["resumed"])] == [2, 1, 4]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_killed_and_resumed_are_the_same_run_to_the_bit(kind: str, short_file: Path, tmp_path: Path) -> None:
    recipe = recipe_of(
        short_file, f"training.parallel={kind}", "training.precision=bf16" if kind == "fsdp" else "checkpoint.every=2"
    )
    lives.run(recipe, tmp_path / "whole", count=2)
    processes = lives.started(recipe, tmp_path / "run", count=2)
    assert lives.killed_when(processes, lambda: lives.lines(tmp_path / "run") >= 5, victim=1)
    assert processes[0].exitcode == 1, "the other one notices and ends"
    lives.run(recipe, tmp_path / "run", count=2, resume=True)
    for kind_of_line, key in (("step", "loss"), ("step", "grad_norm"), ("eval", "val_loss")):
        assert [line[key] for line in _lines(tmp_path / "run", kind_of_line)] == [
            line[key] for line in _lines(tmp_path / "whole", kind_of_line)
        ]
    ours, theirs = (_tensors(Run(folder).checkpoint("last").path) for folder in (tmp_path / "run", tmp_path / "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_signal_to_one_process_stops_all_saved(short_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    processes = lives.started(recipe_of(short_file, "training.steps=100000"), folder, count=2)
    while lives.lines(folder) < 2:
        assert all(process.is_alive() for process in processes)
        time.sleep(0.01)
    assert processes[1].pid is not None
    os.kill(processes[1].pid, signal.SIGTERM)
    assert lives.ended(processes) == [143, 143]
    last = Run(folder).checkpoint("last")
    assert (last.step, last.problem()) == (_lines(folder, "step")[-1]["step"], None)


def test_a_batch_that_does_not_split_ends_all(short_file: Path, tmp_path: Path) -> None:
    recipe = recipe_of(short_file, "training.global_batch_size=9", "training.micro_batch_size=3")
    assert lives.ended(lives.started(recipe, tmp_path / "run", count=2)) == [2, 2]
    assert not (tmp_path / "run").exists()


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state put together from the parts of all processes."""
    reader = HuggingFaceStorageReader(str(checkpoint))
    stored = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.zeros(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}
    load(tensors, storage_reader=reader, no_dist=True)
    assert any("/" in name for name in tensors)
    return tensors

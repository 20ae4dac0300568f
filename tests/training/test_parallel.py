"""Several processes train the same model as one, up to rounding, and a run can resume with a different number of processes."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import training_processes
from conftest import tiny_recipe
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageReader, load

from tinylm.recipe import Recipe
from tinylm.run import Run

pytestmark = pytest.mark.skipif(os.name == "nt", reason="requires gloo and POSIX signals")
STEPS = 7


def recipe_of(text: Path, *overrides: str) -> Recipe:
    """Return a recipe with dropout, optional model parts and four micro-batches per step.

    Muon runs in float32 to reduce rounding errors.
    """
    model = ("model.dropout=0.2", "model.n_embd=24", "model.value_residual=on", "model.embedding_shortcut=on", "model.n_kv_head=1")
    ngrams = (
        "model.ngram_embeddings=[2]",
        "model.ngram_rows=50",
        "model.ngram_width=8",
        "training.optimizer.newton_schulz_dtype=fp32",
    )
    batch = ("training.global_batch_size=4", "training.micro_batch_size=1")
    training = ("training.compile=off", f"training.steps={STEPS}", "evaluation.every=4", "checkpoint.every=3")
    return tiny_recipe(text, "modern", *model, *ngrams, *batch, *training, "evaluation.max_tokens=300", *overrides)


@pytest.fixture(scope="module")
def single(short_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "single"
    training_processes.run(recipe_of(short_file), folder)
    return folder


@pytest.fixture(scope="module")
def ddp(short_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "ddp"
    training_processes.run(recipe_of(short_file, "training.parallel=ddp"), folder, world_size=2)
    return folder


@pytest.fixture(scope="module")
def fsdp(short_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "fsdp"
    training_processes.run(recipe_of(short_file, "training.parallel=fsdp"), folder, world_size=2)
    return folder


def _lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def _assert_same_up_to_rounding(folder: Path, other: Path) -> None:
    """Check that the global batches are equal and that losses, gradient norms, evaluations and weights differ only by rounding."""
    steps, others = _lines(folder, "step"), _lines(other, "step")
    assert [line["batch"] for line in steps] == [line["batch"] for line in others]
    assert len({line["batch"] for line in steps}) == STEPS
    assert [line["loss"] for line in steps] == pytest.approx([line["loss"] for line in others], abs=1e-4)
    assert [line["grad_norm"] for line in steps] == pytest.approx([line["grad_norm"] for line in others], rel=1e-3)
    val_losses = [[line["val_loss"] for line in _lines(each, "eval")] for each in (folder, other)]
    assert val_losses[0] == pytest.approx(val_losses[1], abs=1e-4)
    weights = [load_file(Run(each).checkpoint("last").path / "model.safetensors") for each in (folder, other)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], atol=2e-3, rtol=1e-2, msg=name)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_the_same_model_as_one(kind: str, single: Path, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    _assert_same_up_to_rounding(folder, single)
    environment = json.loads((folder / "environment.json").read_text())
    assert (environment["processes"], environment["parallel"]) == (2, kind)
    last = Run(folder).checkpoint("last")
    shards = sorted(path.name for path in last.path.glob("training-*"))
    assert shards == ["training-00001.safetensors", "training-00002.safetensors"], "each process must save its shard"


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_skip_the_same_step_if_results_are_deferred(kind: str, short_file: Path, tmp_path: Path) -> None:
    """Simulate GPUs, which start the next step before the host reads a result. All shards must skip the same update."""
    recipe = recipe_of(short_file, f"training.parallel={kind}", "training.log_every=3")
    for deferred in (False, True):
        training_processes.run(recipe, tmp_path / str(deferred), world_size=2, nan_steps=[2], defer_results=deferred)
    weights = [load_file(Run(tmp_path / str(deferred)).checkpoint("last").path / "model.safetensors") for deferred in (False, True)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    events = [
        [*_lines(tmp_path / str(deferred), "skipped"), *_lines(tmp_path / str(deferred), "step")] for deferred in (False, True)
    ]
    assert [(event["kind"], event["step"]) for event in events[1]] == [("skipped", 2), *(("step", n) for n in (1, 3, 4, 6, 7))]
    assert [event.get("loss") for event in events[0]] == [event.get("loss") for event in events[1]]


def test_a_run_with_two_processes_can_be_resumed_with_one_and_then_four(single: Path, short_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for kind, count, steps in (("ddp", 2, 3), ("auto", 1, 6), ("fsdp", 4, None)):
        processes = training_processes.start(
            recipe_of(short_file, f"training.parallel={kind}"), folder, world_size=count, resume=True
        )
        if steps is None:
            assert set(training_processes.wait(processes)) == {0}
        else:
            assert training_processes.kill_when(
                processes, lambda steps=steps: (folder / "checkpoints" / f"step-{steps:06d}").exists()
            )
    _assert_same_up_to_rounding(folder, single)
    environment = json.loads((folder / "environment.json").read_text())
    assert [environment["processes"], *(each["processes"] for each in environment["resumed"])] == [2, 1, 4]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_killing_and_resuming_two_processes_is_bitwise_exact(kind: str, ddp: Path, short_file: Path, tmp_path: Path) -> None:
    """The uninterrupted run is on one machine, and the other one on two machines that do not share the run folder."""
    if kind == "ddp":
        recipe, uninterrupted = recipe_of(short_file, "training.parallel=ddp"), ddp
    else:
        recipe = recipe_of(short_file, "training.parallel=fsdp", "training.precision=bf16")
        uninterrupted = tmp_path / "uninterrupted"
        training_processes.run(recipe, uninterrupted, world_size=2)
    processes = training_processes.start(recipe, tmp_path / "run", world_size=2, separate_machines=True)
    assert training_processes.kill_when(processes, lambda: training_processes.logged_lines(tmp_path / "run") >= 5, rank=1)
    assert processes[0].exitcode == 1, "the other process must exit with an error"
    training_processes.run(recipe, tmp_path / "run", world_size=2, resume=True, separate_machines=True)
    assert list((tmp_path / "machine-1").rglob("*.safetensors")) == [], "the second machine keeps no copy"
    for line_kind, key in (("step", "loss"), ("step", "grad_norm"), ("eval", "val_loss")):
        assert [line[key] for line in _lines(tmp_path / "run", line_kind)] == [
            line[key] for line in _lines(uninterrupted, line_kind)
        ]
    resumed, expected = (_tensors(Run(folder).checkpoint("last").path) for folder in (tmp_path / "run", uninterrupted))
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.items())


def test_a_signal_to_one_process_stops_all_processes_after_saving(short_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    processes = training_processes.start(recipe_of(short_file, "training.steps=100000"), folder, world_size=2)
    while training_processes.logged_lines(folder) < 2:
        assert all(process.is_alive() for process in processes)
        time.sleep(0.01)
    assert processes[1].pid is not None
    os.kill(processes[1].pid, signal.SIGTERM)
    assert training_processes.wait(processes) == [143, 143]
    last = Run(folder).checkpoint("last")
    assert (last.step, last.problem()) == (_lines(folder, "step")[-1]["step"], None)


def test_all_processes_reject_a_global_batch_that_does_not_divide_evenly(short_file: Path, tmp_path: Path) -> None:
    recipe = recipe_of(short_file, "training.global_batch_size=9", "training.micro_batch_size=3")
    assert training_processes.wait(training_processes.start(recipe, tmp_path / "run", world_size=2)) == [2, 2]
    assert not (tmp_path / "run").exists()


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Assemble the weights and optimizer state from the shards of all processes."""
    reader = HuggingFaceStorageReader(str(checkpoint))
    stored = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.zeros(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}
    load(tensors, storage_reader=reader, no_dist=True)
    assert any("/" in name for name in tensors)
    return tensors

"""Models are compiled only if compilation pays off. If it fails, training continues in eager mode or stops with an error."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_recipe
from encoders import classifier_recipe
from tiny import causal_batch, ids, model

from tinylm.errors import WorkError
from tinylm.generation.engine import generate
from tinylm.generation.sampling import SamplingOptions
from tinylm.model.transformer import Transformer
from tinylm.pipeline import train
from tinylm.recipe import load
from tinylm.reporting import CollectingReporter
from tinylm.run import Run
from tinylm.training import compilation
from tinylm.training.compilation import Trial, available_compiler, compile_units
from tinylm.training.feed import LocalBatch
from tinylm.training.metrics import Observer, StepEvent
from tinylm.training.objectives import CausalLM
from tinylm.training.precision import Precision
from tinylm.training.step import GradientSettings, accumulate

CPU, CUDA, MPS = (torch.device(kind) for kind in ("cpu", "cuda", "mps"))
FP32 = Precision("fp32", CPU)
needs_a_compiler = pytest.mark.skipif(available_compiler(CPU) is None, reason="requires a C++ compiler")


@pytest.mark.parametrize("has_triton", [True, False])
def test_compilation_on_a_gpu_requires_triton(has_triton: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if has_triton and name == "triton" else None)
    assert available_compiler(CUDA) == ("triton" if has_triton else None)


@pytest.mark.parametrize(
    ("installed", "variable", "expected"),
    [
        (("g++", "clang++"), None, "g++"),
        (("clang++",), None, "clang++"),
        (("g++", "mine"), "mine", "mine"),
        (("g++",), "missing", "g++"),
        ((), None, None),
        ((), "missing", None),
    ],
)
def test_compilation_on_a_cpu_requires_a_cpp_compiler(
    installed: tuple[str, ...], variable: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name in installed else None)
    monkeypatch.delenv("CXX", raising=False)
    if variable is not None:
        monkeypatch.setenv("CXX", variable)
    assert available_compiler(CPU) == expected


def test_models_cannot_be_compiled_on_other_devices() -> None:
    assert available_compiler(MPS) is None


class _StopAfterFirstStep(Observer):
    def step(self, event: StepEvent) -> None:
        signal.raise_signal(signal.SIGINT)


def _trial(network: Transformer, micro_batch_size: int = 2) -> Trial:
    batch = LocalBatch.whole(causal_batch(ids(6, 9)))
    return Trial(network, batch, GradientSettings(micro_batch_size, FP32, CausalLM()))


def test_a_trial_runs_one_micro_batch_at_a_time_and_clears_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    network, batches = model(n_embd=16).train(), []

    def recording_accumulate(*arguments: Any, **options: Any) -> torch.Tensor:
        batches.append(arguments[1])
        return accumulate(*arguments, **options)

    monkeypatch.setattr(compilation, "accumulate", recording_accumulate)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    assert _trial(network).seconds(repeat=3) > 0
    assert len(batches) == 1 + 3
    assert all(torch.equal(batch.share.inputs, ids(6, 9)[:2, :-1]) for batch in batches)
    assert all(torch.equal(batch.share.targets, ids(6, 9)[:2, 1:]) for batch in batches)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_a_trial_returns_the_shortest_time_after_a_warmup_run(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 9.0, 10.0, 15.0, 20.0, 23.0])  # The warm-up takes 9 seconds, and the other runs take 5 and 3 seconds.
    monkeypatch.setattr(compilation.time, "perf_counter", lambda: next(times))
    assert _trial(model(n_embd=16)).seconds(repeat=2) == 3.0


def test_a_trial_ends_after_the_warmup_run_if_that_is_fast_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, expected in ((10.0, 9.0), (8.0, 5.0)):
        times = iter([0.0, 9.0, 10.0, 15.0])
        monkeypatch.setattr(compilation.time, "perf_counter", lambda times=times: next(times))
        assert _trial(model(n_embd=16)).seconds(repeat=1, is_fast_enough=limit.__gt__) == expected


@pytest.fixture
def _broken_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch.compile use a backend that always fails."""

    def fail(graph: Any, inputs: Any) -> None:
        raise RuntimeError("the compiler crashed\nwith a long message")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=fail))
    torch.compiler.reset()


def _assert_runs_eagerly(network: Transformer) -> None:
    tokens = ids(2, 9)
    torch.testing.assert_close(network(tokens), model(n_embd=16)(tokens), atol=0, rtol=0)
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.usefixtures("_broken_compiler")
def test_training_continues_eagerly_with_a_warning_if_compilation_fails() -> None:
    network, reporter = model(n_embd=16), CollectingReporter()
    assert compile_units(network, _trial(network), required=False, reporter=reporter) == 0.0
    [warning] = reporter.warnings
    assert "cannot be compiled" in warning
    assert "training.compile: off" in warning
    assert "\n" not in warning
    _assert_runs_eagerly(network)


@pytest.mark.usefixtures("_broken_compiler")
def test_a_compilation_failure_is_an_error_if_compilation_is_required() -> None:
    network, reporter = model(n_embd=16), CollectingReporter()
    with pytest.raises(WorkError, match="cannot be compiled") as caught:
        compile_units(network, _trial(network), required=True, reporter=reporter)
    assert "training.compile: off" in str(caught.value.hint)
    assert reporter.warnings == []
    _assert_runs_eagerly(network)


@pytest.mark.usefixtures("_broken_compiler")
def test_auto_records_in_the_recipe_that_compilation_failed(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinylm.cost.step_time.compilation_pays_off", lambda *_: True)
    monkeypatch.setattr(compilation, "available_compiler", lambda device: "g++")
    reporter = CollectingReporter()
    recipe = tiny_recipe(text_file, "modern", "training.steps=2", "evaluation.max_tokens=100")
    assert train(recipe, tmp_path / "run", device="cpu", reporter=reporter).step == 2
    assert any("cannot be compiled" in warning for warning in reporter.warnings)
    assert load(tmp_path / "run" / "recipe.yaml").training.compile is False
    with pytest.raises(WorkError, match="cannot be compiled"):
        train(tiny_recipe(text_file, "modern", "training.compile=on"), tmp_path / "other", device="cpu")


@pytest.mark.parametrize("pays_off", [True, False])
def test_auto_compiles_only_if_compilation_pays_off(
    pays_off: bool, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[float, float | None, float | None]] = []

    def compilation_pays_off(step_seconds: float, seconds: float | None, steps: float | None, device_type: str) -> bool:
        calls.append((step_seconds, seconds, steps))
        return pays_off

    compiled: list[bool] = []
    monkeypatch.setattr("tinylm.cost.step_time.compilation_pays_off", compilation_pays_off)
    monkeypatch.setattr(compilation, "available_compiler", lambda device: "g++")
    monkeypatch.setattr(Trial, "seconds", lambda trial, **options: 0.25)  # A step has two micro-batches, so it takes 0.5 seconds.
    monkeypatch.setattr(compilation, "compile_units", lambda *_, required, **options: compiled.append(required) or 1.5)
    recipe = tiny_recipe(text_file, "modern", "training.steps=2", "evaluation.max_tokens=100")
    train(recipe, tmp_path / "run", device="cpu")
    assert set(calls) == {(0.5, None, 2)}
    assert compiled == ([False] if pays_off else [])
    assert load(tmp_path / "run" / "recipe.yaml").training.compile is pays_off


def test_auto_does_not_compile_if_batches_have_different_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinylm.cost.step_time.compilation_pays_off", lambda *_: True)
    monkeypatch.setattr(compilation, "available_compiler", lambda device: "g++")
    dynamic_code: list[bool] = []
    monkeypatch.setattr(compilation, "compile_units", lambda *_, dynamic, **options: dynamic_code.append(dynamic) or 1.5)
    recipe = classifier_recipe(tmp_path)
    for compiled, expected in (("auto", []), (True, [True])):
        training = recipe.training.model_copy(update={"compile": compiled})
        train(recipe.model_copy(update={"training": training}), tmp_path / str(compiled), device="cpu")
        assert dynamic_code == expected, "code for batches of any length is compiled only if the recipe requires it"


@pytest.mark.parametrize(
    ("length", "options", "expected"),
    [
        ("training.steps=9", {}, (None, 9)),
        ("training.steps=9", {"stop_after": 5.0}, (5.0, 9)),
        ("training.minutes=2", {}, (120.0, None)),
        ("training.minutes=2", {"stop_after": 5.0}, (5.0, None)),
    ],
)
def test_auto_considers_the_training_time_of_this_process(
    length: str,
    options: dict[str, float],
    expected: tuple[float | None, float | None],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[float | None, float | None]] = []

    def compilation_pays_off(step_seconds: float, seconds: float | None, steps: float | None, device_type: str) -> bool:
        calls.append((seconds, steps))
        return False

    monkeypatch.setattr("tinylm.cost.step_time.compilation_pays_off", compilation_pays_off)
    monkeypatch.setattr(compilation, "available_compiler", lambda device: "g++")
    recipe = tiny_recipe(text_file, "modern", length, "evaluation.max_tokens=100")
    train(recipe, tmp_path / "run", device="cpu", observer=_StopAfterFirstStep(), **options)
    assert set(calls) == {expected}


def _losses(folder: Path) -> list[float]:
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss" if line["kind"] == "step" else "val_loss"] for line in lines]


@needs_a_compiler
def test_compiled_and_eager_losses_match_and_only_the_trial_compiles(text_file: Path, tmp_path: Path) -> None:
    """This is the only test that runs the real compiler, which takes about ten seconds."""
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    graphs: list[tuple[str, int]] = []

    class GraphCounter(Observer):
        def phase(self, name: str) -> None:
            graphs.append((name, counters["stats"]["unique_graphs"]))

    options = ("training.steps=6", "evaluation.every=2", "evaluation.stride=7", "sampling.every=3", "sampling.max_new_tokens=5")
    for compiled in ("on", "off"):
        recipe = tiny_recipe(text_file, "modern", f"training.compile={compiled}", "evaluation.max_tokens=300", *options)
        observer = GraphCounter() if compiled == "on" else None
        train(recipe, tmp_path / compiled, device="cpu", observer=observer)
    assert _losses(tmp_path / "on") == pytest.approx(_losses(tmp_path / "off"), rel=1e-4)
    assert {"first step", "training", "evaluating", "sampling"} <= {name for name, _ in graphs}
    assert graphs[0][1] > 0, "the trial must compile"
    assert len({count for _, count in graphs}) == 1, "nothing may be compiled after the trial"
    run = Run.open(tmp_path / "on")
    assert run.recipe.training.compile is True
    network = run.network(run.checkpoint(), CPU)
    assert generate(network, run.tokenizer, "The", SamplingOptions(max_new_tokens=3))[0].token_ids
    assert counters["stats"]["unique_graphs"] == graphs[0][1]


TRAIN_AND_LIST_MODULES = """
import sys
from tinylm.pipeline import train
from tinylm.recipe import load
train(load(sys.argv[1]), sys.argv[2], device="cpu")
print("torch._dynamo" in sys.modules)
"""


@pytest.mark.parametrize("options", [["training.precision=bf16"], ["training.optimizer.name=adamw", "training.precision=fp32"]])
def test_training_without_compilation_does_not_import_the_compiler(options: list[str], text_file: Path, tmp_path: Path) -> None:
    """The import takes about a second and 100 MB of memory."""
    options = [*options, "training.compile=off", "evaluation.every=2", "sampling.every=2", "sampling.max_new_tokens=2"]
    recipe = tiny_recipe(text_file, "modern", "training.steps=4", *options)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    command = [sys.executable, "-c", TRAIN_AND_LIST_MODULES, tmp_path / "recipe.yaml", tmp_path / "run"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout.split()[-1:] == ["False"], result.stderr

"""Compiling: when it is worth it, what happens where it fails, and that it changes no result."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_recipe
from tiny import ids, model

from tinylm.errors import WorkError
from tinylm.generation.engine import generate
from tinylm.generation.sampling import SamplingOptions
from tinylm.model.objective import CausalObjective
from tinylm.model.transformer import Transformer
from tinylm.pipeline import train
from tinylm.recipe import load
from tinylm.reporting import CollectingReporter
from tinylm.run import Run
from tinylm.training import compilation
from tinylm.training.compilation import Trial, compile_blocks, compiler
from tinylm.training.feed import GlobalBatch
from tinylm.training.metrics import Observer, StepEvent
from tinylm.training.precision import Precision
from tinylm.training.step import accumulate

CPU, CUDA, MPS = (torch.device(kind) for kind in ("cpu", "cuda", "mps"))
FP32 = Precision("fp32", CPU)
needs_a_compiler = pytest.mark.skipif(compiler(CPU) is None, reason="needs a C++ compiler")


@pytest.mark.parametrize("found", [True, False])
def test_a_gpu_needs_triton(found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if found and name == "triton" else None)
    assert compiler(CUDA) == ("triton" if found else None)


@pytest.mark.parametrize(
    ("here", "variable", "expected"),
    [
        (("g++", "clang++"), None, "g++"),
        (("clang++",), None, "clang++"),
        (("g++", "mine"), "mine", "mine"),
        (("g++",), "missing", "g++"),
        ((), None, None),
        ((), "missing", None),
    ],
)
def test_a_cpu_needs_a_cpp_compiler_that_is_there(
    here: tuple[str, ...], variable: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name in here else None)
    monkeypatch.delenv("CXX", raising=False)
    if variable is not None:
        monkeypatch.setenv("CXX", variable)
    assert compiler(CPU) == expected


def test_other_devices_are_not_compiled_for() -> None:
    assert compiler(MPS) is None


class _StopAtOnce(Observer):
    def step(self, event: StepEvent) -> None:
        signal.raise_signal(signal.SIGINT)


# The trial.


def _trial(network: Transformer, micro_batch_size: int = 2) -> Trial:
    example = CausalObjective().example(ids(6, 9))
    return Trial(network, CausalObjective(), GlobalBatch(example, 6 * 8), micro_batch_size, FP32)


def test_a_trial_runs_one_micro_batch_and_leaves_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    network, seen = model(n_embd=16).train(), []

    def noted(*arguments: Any, **options: Any) -> torch.Tensor:
        seen.append(arguments[2])
        return accumulate(*arguments, **options)

    monkeypatch.setattr(compilation, "accumulate", noted)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    assert _trial(network).seconds(repeat=3) > 0
    assert len(seen) == 1 + 3
    assert all(torch.equal(batch.example.inputs, ids(6, 9)[:2, :-1]) for batch in seen)
    assert all(torch.equal(batch.example.targets, ids(6, 9)[:2, 1:]) for batch in seen)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(one, two) for one, two in zip(before, network.parameters(), strict=True))


def test_a_trial_takes_the_best_time_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 10.0, 15.0, 20.0, 23.0])  # the first one's end is nobody's concern, then 5 and 3 seconds
    monkeypatch.setattr(compilation.time, "perf_counter", lambda: next(times))
    assert _trial(model(n_embd=16)).seconds(repeat=2) == 3.0


# Where it fails.


@pytest.fixture
def _broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real machinery, with a backend that cannot compile."""

    def refuse(graph: Any, inputs: Any) -> None:
        raise RuntimeError("the compiler has gone home\nwith a long story")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=refuse))
    torch.compiler.reset()


def _runs_plainly(network: Transformer) -> None:
    tokens = ids(2, 9)
    torch.testing.assert_close(network(tokens), model(n_embd=16)(tokens), atol=0, rtol=0)
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.usefixtures("_broken")
def test_where_it_fails_the_training_goes_on_without_and_says_so() -> None:
    network, reporter = model(n_embd=16), CollectingReporter()
    assert compile_blocks(network, _trial(network), demanded=False, reporter=reporter) == 0.0
    [warning] = reporter.warnings
    assert "cannot be compiled here" in warning
    assert "training.compile: off" in warning
    assert "\n" not in warning
    _runs_plainly(network)


@pytest.mark.usefixtures("_broken")
def test_where_it_fails_and_was_demanded_that_is_an_error() -> None:
    network, reporter = model(n_embd=16), CollectingReporter()
    with pytest.raises(WorkError, match="cannot be compiled here") as caught:
        compile_blocks(network, _trial(network), demanded=True, reporter=reporter)
    assert "training.compile: off" in str(caught.value.hint)
    assert reporter.warnings == []
    _runs_plainly(network)


@pytest.mark.usefixtures("_broken")
def test_a_run_whose_compiler_fails_is_trained_and_its_recipe_says_how(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinylm.cost.plan.compiling_pays", lambda *_: True)
    monkeypatch.setattr(compilation, "compiler", lambda device: "g++")
    reporter = CollectingReporter()
    recipe = tiny_recipe(text_file, "modern", "training.steps=2", "evaluation.max_tokens=100")
    assert train(recipe, tmp_path / "run", device="cpu", reporter=reporter).step == 2
    assert any("cannot be compiled here" in warning for warning in reporter.warnings)
    assert load(tmp_path / "run" / "recipe.yaml").training.compile is False
    with pytest.raises(WorkError, match="cannot be compiled here"):
        train(tiny_recipe(text_file, "modern", "training.compile=on"), tmp_path / "other", device="cpu")


@pytest.mark.parametrize("worth", [True, False])
def test_auto_compiles_only_where_it_pays(worth: bool, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, float | None, float | None]] = []

    def noted(step_seconds: float, seconds: float | None, steps: float | None, device_type: str) -> bool:
        asked.append((step_seconds, seconds, steps))
        return worth

    compiled: list[bool] = []
    monkeypatch.setattr("tinylm.cost.plan.compiling_pays", noted)
    monkeypatch.setattr(compilation, "compiler", lambda device: "g++")
    monkeypatch.setattr(Trial, "seconds", lambda trial: 0.25)  # a micro-batch of 4, two to a step
    monkeypatch.setattr(compilation, "compile_blocks", lambda *_, demanded, reporter: compiled.append(demanded) or 1.5)
    recipe = tiny_recipe(text_file, "modern", "training.steps=2", "evaluation.max_tokens=100")
    train(recipe, tmp_path / "run", device="cpu")
    assert asked == [(0.5, None, 2)]
    assert compiled == ([False] if worth else [])
    assert load(tmp_path / "run" / "recipe.yaml").training.compile is worth


@pytest.mark.parametrize(
    ("length", "options", "expected"),
    [
        ("training.steps=9", {}, (None, 9)),
        ("training.steps=9", {"stop_after": 5.0}, (5.0, 9)),
        ("training.minutes=2", {}, (120.0, None)),
        ("training.minutes=2", {"stop_after": 5.0}, (5.0, None)),
    ],
)
def test_auto_asks_for_what_is_left_in_this_process(
    length: str,
    options: dict[str, float],
    expected: tuple[float | None, float | None],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[float | None, float | None]] = []

    def noted(step_seconds: float, seconds: float | None, steps: float | None, device_type: str) -> bool:
        asked.append((seconds, steps))
        return False

    monkeypatch.setattr("tinylm.cost.plan.compiling_pays", noted)
    monkeypatch.setattr(compilation, "compiler", lambda device: "g++")
    recipe = tiny_recipe(text_file, "modern", length, "evaluation.max_tokens=100")
    train(recipe, tmp_path / "run", device="cpu", observer=_StopAtOnce(), **options)
    assert asked == [expected]


# Where it works.


def _losses(folder: Path) -> list[float]:
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss" if line["kind"] == "step" else "val_loss"] for line in lines]


@needs_a_compiler
def test_a_compiled_training_is_the_plain_one_and_measuring_and_sampling_compile_nothing(text_file: Path, tmp_path: Path) -> None:
    """Some ten seconds: the only test that runs the real compiler."""
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    graphs: list[tuple[str, int]] = []

    class Ear(Observer):
        def phase(self, name: str) -> None:
            graphs.append((name, counters["stats"]["unique_graphs"]))

    options = ("training.steps=6", "evaluation.every=2", "evaluation.stride=7", "sampling.every=3", "sampling.max_new_tokens=5")
    for compiled in ("on", "off"):
        recipe = tiny_recipe(text_file, "modern", f"training.compile={compiled}", "evaluation.max_tokens=300", *options)
        observer = Ear() if compiled == "on" else None
        train(recipe, tmp_path / compiled, device="cpu", observer=observer)
    assert _losses(tmp_path / "on") == pytest.approx(_losses(tmp_path / "off"), rel=1e-4)
    assert {"first step", "training", "evaluating", "sampling"} <= {name for name, _ in graphs}
    assert graphs[0][1] > 0, "the trial compiled"
    assert len({count for _, count in graphs}) == 1, "and nothing did after it"
    run = Run.open(tmp_path / "on")
    assert run.recipe.training.compile is True
    network = run.network(run.checkpoint(), CPU)
    assert generate(network, run.tokenizer, "The", SamplingOptions(max_new_tokens=3))[0].token_ids
    assert counters["stats"]["unique_graphs"] == graphs[0][1]

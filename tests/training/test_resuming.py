"""Resuming rejects a shorter training length, warns about jumps in the learning rate, and requires the optimizer state."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from conftest import tiny_recipe

from tinylm.errors import InputError, TinylmWarning
from tinylm.model import layers
from tinylm.model.foreign_code import foreign_code
from tinylm.model.transformer import Transformer
from tinylm.pipeline import train
from tinylm.recipe.schema import DecoderSection
from tinylm.reporting import Reporter
from tinylm.run import Run
from tinylm.training.metrics import EvaluationEvent, Observer, StepEvent


class _Warnings(Reporter):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


class _Stopper(Observer):
    """Request a stop at one event in step 6."""

    def __init__(self, event: str) -> None:
        self.event = event

    def _on_event(self, event: str, step: int) -> None:
        if event == self.event and step == 6:
            self.request_stop()

    def step(self, event: StepEvent) -> None:
        self._on_event("logged", event.step)

    def evaluation(self, event: EvaluationEvent) -> None:
        self._on_event("evaluated", event.step)

    def saved(self, step: int) -> None:
        self._on_event("saved", step)


@pytest.mark.parametrize("length", ["steps=7", "tokens=1500", "epochs=0.01", "minutes=0.0001"])
def test_a_length_that_the_run_has_already_exceeded_is_rejected(text_file: Path, tmp_path: Path, length: str) -> None:
    train(tiny_recipe(text_file, "modern", "training.steps=10"), tmp_path / "run", device="cpu")
    shorter = tiny_recipe(text_file, "modern", f"training.{length}")
    with pytest.raises(InputError) as caught:
        train(shorter, tmp_path / "run", resume=True, allow_change=("training",), device="cpu")
    key = length.partition("=")[0]
    assert "the run has already trained " in str(caught.value)
    assert f"in training.{key} (increase it" in str(caught.value)
    assert Run.open(tmp_path / "run").recipe.training.steps == 10


def test_the_error_for_fewer_steps_does_not_suggest_allowing_the_change(text_file: Path, tmp_path: Path) -> None:
    train(tiny_recipe(text_file, "modern", "training.steps=10"), tmp_path / "run", device="cpu")
    with pytest.raises(InputError, match="has already trained for 10 steps, which is more than the 7 steps"):
        train(tiny_recipe(text_file, "modern", "training.steps=7"), tmp_path / "run", resume=True, device="cpu")


def test_extending_a_run_warns_about_the_jump_in_the_learning_rate(text_file: Path, tmp_path: Path) -> None:
    train(tiny_recipe(text_file, "modern", "training.steps=10"), tmp_path / "run", device="cpu")
    reporter = _Warnings()
    longer = tiny_recipe(text_file, "modern", "training.steps=40")
    train(longer, tmp_path / "run", resume=True, allow_change=("training.steps",), device="cpu", reporter=reporter)
    rates = {line["step"]: line["lr"] for line in Run.open(tmp_path / "run").metrics() if line["kind"] == "step"}
    assert rates[11] > 5 * rates[10]
    expected = f"changes from {rates[10]:.3g} in step 10 to {rates[11]:.3g} in step 11"
    assert [warning for warning in reporter.warnings if expected in warning and "from 100% to 25%" in warning]


def test_resuming_with_an_unchanged_recipe_causes_no_warning(text_file: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(text_file, "modern", "training.steps=12")
    assert train(recipe, tmp_path / "run", device="cpu", observer=_Stopper("logged")).step == 6
    reporter = _Warnings()
    train(recipe, tmp_path / "run", resume=True, device="cpu", reporter=reporter)
    assert reporter.warnings == []


@pytest.mark.parametrize(("event", "every"), [("logged", 1000), ("logged", 6), ("saved", 6), ("evaluated", 6)])
def test_a_run_stopped_by_a_callback_resumes_to_the_same_weights(text_file: Path, tmp_path: Path, event: str, every: int) -> None:
    recipe = tiny_recipe(text_file, "modern", f"checkpoint.every={every}", f"evaluation.every={every}", "training.steps=12")
    result = train(recipe, tmp_path / "run", device="cpu", observer=_Stopper(event))
    last = Run.open(tmp_path / "run").checkpoint("last")
    assert (result.stopped, result.signal_number, last.problem()) == ("callback", None, None)
    assert last.step == result.step < 12
    train(recipe, tmp_path / "run", resume=True, device="cpu")
    train(recipe, tmp_path / "uninterrupted", device="cpu")
    digests = [
        json.loads((tmp_path / name / "checkpoints" / "step-000012" / "manifest.json").read_text())["files"]["model.safetensors"]
        for name in ("run", "uninterrupted")
    ]
    assert digests[0] == digests[1]


def test_a_finished_run_without_optimizer_state_is_valid_but_cannot_be_extended(text_file: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(text_file, "modern", "training.steps=10", "checkpoint.optimizer=drop")
    train(recipe, tmp_path / "run", device="cpu")
    run = Run.open(tmp_path / "run")
    assert [(checkpoint.problem(), checkpoint.has_optimizer_state) for checkpoint in run.checkpoints()] == [(None, False)]
    longer = tiny_recipe(text_file, "modern", "training.steps=20")
    with pytest.raises(InputError, match="no optimizer state, so it cannot be resumed"):
        train(longer, tmp_path / "run", resume=True, allow_change=("training.steps",), device="cpu")


def test_the_optimizer_state_of_a_finished_run_can_be_dropped_later(text_file: Path, tmp_path: Path) -> None:
    train(tiny_recipe(text_file, "modern", "training.steps=10"), tmp_path / "run", device="cpu")
    before = Run.open(tmp_path / "run").size()
    train(
        tiny_recipe(text_file, "modern", "training.steps=10", "checkpoint.optimizer=drop"),
        tmp_path / "run",
        resume=True,
        device="cpu",
    )
    assert Run.open(tmp_path / "run").size() < before / 1.5


def test_a_stopped_run_keeps_its_optimizer_state(text_file: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(text_file, "modern", "training.steps=12", "checkpoint.optimizer=drop")
    train(recipe, tmp_path / "run", device="cpu", observer=_Stopper("logged"))
    assert Run.open(tmp_path / "run").checkpoint("last").has_optimizer_state
    assert train(recipe, tmp_path / "run", resume=True, device="cpu").step == 12


def test_opening_a_run_trained_with_a_patched_layer_causes_a_warning(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = layers.FeedForward.forward
    with monkeypatch.context() as patch:
        patch.setattr(layers.FeedForward, "forward", lambda self, x: 0.5 * original(self, x))
        train(tiny_recipe(text_file, "modern", "training.steps=2"), tmp_path / "patched", device="cpu")
    train(tiny_recipe(text_file, "modern", "training.steps=2"), tmp_path / "plain", device="cpu")
    with pytest.warns(TinylmWarning, match="trained with code outside tinylm \\(tinylm.model.layers.FeedForward.forward\\)"):
        Run.open(tmp_path / "patched")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Run.open(tmp_path / "plain").foreign_code == []


def test_a_compiled_block_is_not_custom_code() -> None:
    network = Transformer(DecoderSection(n_layer=1, n_head=1, n_embd=8, context_length=8), 16)
    for block in network.compile_units():
        block.compile()
    assert foreign_code(network) == []
    network.blocks[0].forward = lambda x: x
    assert foreign_code(network) == ["blocks.0.forward"]

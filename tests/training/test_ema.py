"""The saved model is the moving average of the weights, and averaging changes neither training nor its exact resumption."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import training_processes
from conftest import StopAt, tiny_recipe
from safetensors.torch import load_file
from torch import Tensor, nn

from tinylm.cost.micro_batch import estimate_memory
from tinylm.errors import InputError
from tinylm.evaluation.evaluate_run import evaluate_run
from tinylm.evaluation.perplexity import EvaluationOptions
from tinylm.model import registry
from tinylm.optim.ema import WeightAverage
from tinylm.pipeline import train
from tinylm.recipe import Recipe, loads
from tinylm.run import Run

STEPS = 12
SMALL = (
    "model.n_layer=1",
    "model.dropout=0.1",
    "training.optimizer.newton_schulz_dtype=fp32",
    f"training.steps={STEPS}",
    "evaluation.every=4",
    "evaluation.max_tokens=100",
)


def _recipe(text: Path, *overrides: str) -> Recipe:
    return tiny_recipe(text, "modern", *SMALL, *overrides)


@pytest.fixture(scope="module")
def trajectory(short_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run without averages that keeps the weights after every step."""
    folder = tmp_path_factory.mktemp("runs") / "trajectory"
    train(_recipe(short_file, "checkpoint.every=1", "checkpoint.keep_every=1"), folder, device="cpu")
    return Run.open(folder)


@pytest.fixture(scope="module")
def averaged(short_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "averaged"
    train(_recipe(short_file, "training.ema=0.6"), folder, device="cpu")
    return Run.open(folder)


def _weights(run: Run, step: str = "last") -> dict[str, Tensor]:
    return load_file(run.checkpoint(step).path / "model.safetensors")


def _state(run: Run) -> dict[str, Tensor]:
    return load_file(run.checkpoint("last").path / "training-00001.safetensors")


def _reference(trajectory: Run, decay: float) -> dict[str, Tensor]:
    """Average the saved weights of a run without averages in float64."""
    network = registry.build(trajectory.recipe.model, trajectory.tokenizer.vocab_size, trajectory.recipe.seed)
    average = {name: weight.double() for name, weight in network.stored_weights().items()}
    for step in range(1, STEPS + 1):
        beta = min(decay, (1 + step) / (10 + step))
        for name, weight in _weights(trajectory, str(step)).items():
            average[name] = beta * average[name] + (1 - beta) * weight.double()
    return average


def test_the_saved_weights_are_the_moving_average_of_the_weights_after_every_step(trajectory: Run, averaged: Run) -> None:
    expected = _reference(trajectory, 0.6)
    actual = _weights(averaged)
    assert actual.keys() == expected.keys()
    for name, weight in actual.items():
        torch.testing.assert_close(weight, expected[name].float(), rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(weight, _weights(trajectory)[name]) for name, weight in actual.items())


def test_averaging_does_not_change_training(trajectory: Run, averaged: Run) -> None:
    trained = {name.split("/")[1]: weight for name, weight in _state(averaged).items() if name.startswith("ema/")}
    assert trained.keys() == _weights(trajectory).keys()
    assert all(torch.equal(weight, _weights(trajectory)[name]) for name, weight in trained.items())
    losses = [[line["loss"] for line in run.metrics() if line["kind"] == "step"] for run in (trajectory, averaged)]
    assert losses[0] == losses[1]


def test_the_logged_evaluation_is_that_of_the_averaged_weights(averaged: Run) -> None:
    logged = [line["val_loss"] for line in averaged.metrics() if line["kind"] == "eval"]
    result = evaluate_run(averaged, checkpoint="last", device="cpu", options=EvaluationOptions(max_tokens=100))
    assert logged[-1] == pytest.approx(result.perplexity.loss, rel=1e-5)


def test_a_resumed_run_equals_an_uninterrupted_one(short_file: Path, averaged: Run, tmp_path: Path) -> None:
    recipe = _recipe(short_file, "training.ema=0.6")
    first = train(recipe, tmp_path / "run", device="cpu", observer=StopAt(7))
    assert (first.stopped, first.step) == ("callback", 7)
    train(recipe, tmp_path / "run", device="cpu", resume=True)
    run = Run.open(tmp_path / "run")
    assert all(torch.equal(weight, _weights(averaged)[name]) for name, weight in _weights(run).items())
    assert all(torch.equal(tensor, _state(averaged)[name]) for name, tensor in _state(run).items())


@pytest.mark.skipif(os.name == "nt", reason="requires gloo")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_save_the_same_averages_up_to_rounding(
    short_file: Path, averaged: Run, tmp_path: Path, parallel: str
) -> None:
    """Evaluations use the averages, and training continues with the trained weights, even if both are sharded."""
    training_processes.run(_recipe(short_file, "training.ema=0.6", f"training.parallel={parallel}"), tmp_path / "two", world_size=2)
    both = Run.open(tmp_path / "two")
    for name, weight in _weights(both).items():
        torch.testing.assert_close(weight, _weights(averaged)[name], rtol=1e-3, atol=1e-4)
    for kind, key in (("step", "loss"), ("eval", "val_loss")):
        logged = [[line[key] for line in run.metrics() if line["kind"] == kind] for run in (averaged, both)]
        assert logged[1] == pytest.approx(logged[0], abs=1e-4)


def test_removing_the_key_continues_with_the_trained_weights(short_file: Path, trajectory: Run, tmp_path: Path) -> None:
    recipe = _recipe(short_file, "training.ema=0.6")
    train(recipe, tmp_path / "run", device="cpu", stop_after=0.0)
    train(_recipe(short_file), tmp_path / "run", device="cpu", resume=True, allow_change=["training.ema"])
    assert all(torch.equal(w, _weights(trajectory)[name]) for name, w in _weights(Run.open(tmp_path / "run")).items())


def test_a_skipped_step_leaves_the_averages_unchanged() -> None:
    layer = nn.Linear(3, 2)
    average = WeightAverage(layer, {parameter: name for name, parameter in layer.named_parameters()}, 0.9)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.add_(1)
    average.update(1, torch.tensor(False))
    with average.applied():
        assert torch.equal(layer.weight, before)
    assert torch.equal(layer.weight, before + 1)
    average.update(1, torch.tensor(True))
    with average.applied():
        torch.testing.assert_close(layer.weight.detach(), before + 9 / 11)


def test_the_memory_estimate_includes_the_averages(short_file: Path) -> None:
    plain, averaged = (estimate_memory(_recipe(short_file, *more), 400, 4, on_gpu=True) for more in ((), ("training.ema=0.9",)))
    assert averaged.optimizer - plain.optimizer == averaged.total - plain.total == plain.weights


def test_models_that_count_have_no_weights_to_average() -> None:
    recipe = "data: {train: x}\nmodel: {architecture: ngram}\ntraining: {epochs: 1, ema: 0.9}"
    with pytest.raises(InputError, match=r"training\.ema: has no effect with the ngram architecture"):
        loads(recipe, check_files=False)

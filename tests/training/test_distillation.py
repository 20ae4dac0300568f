"""Test distillation: the loss equals a plain reference, and its guarantees are those of the ordinary loss."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bigram import BigramSection, registered
from conftest import StopAt, tiny_recipe
from tiny import add_noise_, causal_batch, ids, model, section
from torch import Tensor

from tinylm.data.batch import IGNORE_INDEX, Batch
from tinylm.errors import InputError
from tinylm.model import registry
from tinylm.model.base import Model
from tinylm.model.functions import summed_cross_entropy
from tinylm.model.transformer import Transformer
from tinylm.pipeline import train
from tinylm.recipe import loads
from tinylm.recipe.fixed_context import FeedForwardSection, NgramSection
from tinylm.recipe.recurrent import GruSection
from tinylm.recipe.schema import ModelVariant
from tinylm.run import Run
from tinylm.training.distillation import Distillation, Teachers
from tinylm.training.feed import LocalBatch
from tinylm.training.objectives import CausalLM
from tinylm.training.precision import Precision
from tinylm.training.step import GradientSettings, accumulate

VOCAB = 61
FP32 = Precision("fp32", torch.device("cpu"))


def _teachers() -> list[Model]:
    networks = [Transformer(section(preset), VOCAB, seed=5) for preset in ("modern", "gpt2")]
    return [add_noise_(network, seed).eval() for seed, network in enumerate(networks)]


def _batch(rows: int = 6) -> Batch:
    tokens = ids(rows, 13)
    for row in range(rows):  # a different number of ignored targets in each row
        tokens[row, 5 + row % 5 :] = IGNORE_INDEX
    return causal_batch(tokens)


def _reference(network: Model, teachers: list[Model], batch: Batch, weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, the cross-entropy and the divergence, computed from all logits of all models."""
    counted = batch.targets >= 0
    logprobs = network(batch.inputs)[counted].log_softmax(-1)
    with torch.no_grad():
        mean = torch.stack([teacher(batch.inputs)[counted].to(logprobs.dtype).softmax(-1) for teacher in teachers]).mean(0)
    cross_entropy = F.nll_loss(logprobs, batch.targets[counted], reduction="sum")
    divergence = F.kl_div(logprobs, mean, reduction="sum")
    return (1 - weight) * cross_entropy + weight * divergence, cross_entropy, divergence


def _student(kind: str) -> Model:
    if kind == "softcap":
        return model(n_embd=16, logit_softcap=3.0)
    sections: dict[str, ModelVariant] = {
        "gru": GruSection(n_layer=1, n_embd=16, context_length=16, burn_in=0),
        "feed_forward": FeedForwardSection(n_embd=8, n_hidden=16, context_length=16),
    }
    return model(n_embd=16) if kind == "decoder" else registry.build(sections[kind], VOCAB, 0)


@pytest.mark.parametrize("weight", [0.3, 1.0])
@pytest.mark.parametrize("kind", ["decoder", "softcap", "gru", "feed_forward"])
def test_the_loss_and_its_gradient_equal_a_plain_reference(kind: str, weight: float) -> None:
    network, teachers, batch = _student(kind).double(), [teacher.double() for teacher in _teachers()], _batch()
    expected = _reference(network, teachers, batch, weight)
    gradients = torch.autograd.grad(expected[0], list(network.parameters()))
    sums = Distillation(teachers, weight).loss_sum(network, batch)
    torch.testing.assert_close(sums, torch.stack(expected))
    sums[0].backward()
    for parameter, gradient in zip(network.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_a_network_without_its_own_loss_can_be_distilled() -> None:
    with registered():
        network = registry.build(BigramSection(), VOCAB, 0).double()
        teachers, batch = [teacher.double() for teacher in _teachers()], _batch()
        expected = _reference(network, teachers, batch, 0.5)
        sums = Distillation(teachers, 0.5).loss_sum(network, batch)
        torch.testing.assert_close(sums, torch.stack(expected))
        [gradient] = torch.autograd.grad(expected[0], list(network.parameters()))
        sums[0].backward()
        torch.testing.assert_close(next(network.parameters()).grad, gradient)


class _FixedTeacher:
    weight = 0.6

    def __init__(self, probabilities: Tensor) -> None:
        self._probabilities = probabilities

    def probabilities(self, rows: slice) -> Tensor:
        return self._probabilities[rows]


@pytest.mark.parametrize("chunk", [2, 100])
def test_the_gradient_matches_finite_differences(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((5, 4), (7, 4)))
    teacher = _FixedTeacher(torch.randn(5, 7, generator=generator, dtype=torch.float64).softmax(-1))
    targets = torch.tensor([0, 6, -1, 3, 3])

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return summed_cross_entropy(hidden, weight, targets, 2.0, chunk, teacher=teacher)[0]

    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    loss(*inputs).backward()
    for tensor in inputs:
        numeric = torch.zeros_like(tensor)
        with torch.no_grad():
            for index in range(tensor.numel()):
                values = []
                for step in (1e-5, -1e-5):
                    tensor.view(-1)[index] += step
                    values.append(float(loss(*inputs)))
                    tensor.view(-1)[index] -= step
                numeric.view(-1)[index] = (values[0] - values[1]) / 2e-5
        torch.testing.assert_close(tensor.grad, numeric, rtol=1e-6, atol=1e-7)


def test_the_gradient_does_not_depend_on_micro_batches_or_processes() -> None:
    objective, batch = Distillation(_teachers(), 0.5), _batch(8)

    def step(micro_batch_size: int, shares: list[Batch]) -> tuple[Tensor, Tensor]:
        network = model(n_embd=16)
        settings = GradientSettings(micro_batch_size, FP32, objective)
        whole = LocalBatch.whole(batch)
        losses = sum(accumulate(network, replace(whole, share=share), settings) for share in shares)
        return losses, torch.cat([parameter.grad.flatten() for parameter in network.parameters()])

    losses, gradient = step(8, [batch])
    for micro_batch_size, shares in ((2, [batch]), (4, [batch.rows(slice(4)), batch.rows(slice(4, 8))])):
        other_losses, other_gradient = step(micro_batch_size, shares)
        torch.testing.assert_close(other_losses, losses)
        torch.testing.assert_close(other_gradient, gradient)


def test_the_reported_loss_is_the_cross_entropy_and_the_teachers_stay_fixed() -> None:
    teachers, batch = _teachers(), _batch()
    before = [parameter.clone() for teacher in teachers for parameter in teacher.parameters()]
    ordinary, distilled = model(n_embd=16), model(n_embd=16)
    [loss, divergence] = accumulate(distilled, LocalBatch.whole(batch), GradientSettings(6, FP32, Distillation(teachers, 0.5)))
    assert float(loss) == pytest.approx(
        float(accumulate(ordinary, LocalBatch.whole(batch), GradientSettings(6, FP32, CausalLM()))), rel=1e-6
    )
    assert float(divergence) > 0
    for parameter, value in zip((p for teacher in teachers for p in teacher.parameters()), before, strict=True):
        assert parameter.grad is None
        assert torch.equal(parameter, value)


def test_a_model_is_no_different_from_itself() -> None:
    network = model(n_embd=16)
    sums = Distillation([network], 0.5).loss_sum(network, _batch())
    assert sums[2].item() == pytest.approx(0, abs=1e-4)


def test_an_ngram_model_can_be_a_teacher() -> None:
    teacher = registry.build(NgramSection(order=2), VOCAB, 0)  # without counts, its distribution is uniform
    network, batch = model(n_embd=16), _batch()
    sums = Distillation([teacher], 0.5).loss_sum(network, batch)
    torch.testing.assert_close(sums, torch.stack(_reference(network, [teacher], batch, 0.5)))


def _recipe(text: Path, *teachers: Path, **settings: object) -> Any:
    listed = ", ".join(map(str, teachers))
    values = {"training.steps": 6, "checkpoint.every": 3, "evaluation.every": 6, "seed": 8, **settings}
    return tiny_recipe(text, "modern", f"objective.teacher=[{listed}]", *(f"{key}={value}" for key, value in values.items()))


def _lines(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in ("step", "loss", "distillation_loss")} for line in lines if line["kind"] == "step"]


@pytest.fixture(scope="module")
def distilled(tiny_run: Run, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "distilled"
    train(_recipe(text_file, tiny_run.path), folder, device="cpu")
    return Run.open(folder)


def test_a_resumed_run_equals_an_uninterrupted_one(distilled: Run, tiny_run: Run, text_file: Path, tmp_path: Path) -> None:
    recipe = _recipe(text_file, tiny_run.path)
    assert train(recipe, tmp_path / "a", device="cpu", observer=StopAt(3)).step < 6
    assert train(recipe, tmp_path / "a", device="cpu", resume=True).step == 6
    assert _lines(tmp_path / "a") == _lines(distilled.path)
    weights = "checkpoints/step-000006/model.safetensors"
    assert (tmp_path / "a" / weights).read_bytes() == (distilled.path / weights).read_bytes()


def test_the_run_folder_records_its_teachers(distilled: Run, tiny_run: Run) -> None:
    [teacher] = json.loads((distilled.path / "environment.json").read_text())["teachers"]
    assert teacher["run"] == str(tiny_run.path)
    assert distilled.checkpoint("last").state["fingerprints"]["teachers"] == teacher["sha256"]
    assert [text.run for text in distilled.training_texts()] == [None]  # the teacher was trained on the same text
    assert all(0 < line["distillation_loss"] < line["loss"] for line in _lines(distilled.path))


def test_resuming_with_other_teachers_is_refused(distilled: Run, tiny_run: Run, text_file: Path, tmp_path: Path) -> None:
    shutil.copytree(distilled.path, tmp_path / "run")
    recipe = _recipe(text_file, distilled.path, **{"training.steps": 7})
    with pytest.raises(InputError, match=r"objective\.teacher: "):
        train(recipe, tmp_path / "run", device="cpu", resume=True)
    changes = ["objective.teacher", "training.steps"]
    with pytest.raises(InputError, match=r"the teachers .* are not the ones that this run was trained with"):
        train(recipe, tmp_path / "run", device="cpu", resume=True, allow_change=changes)
    shutil.copytree(tiny_run.path, tmp_path / "moved")  # the same weights in another folder
    moved = _recipe(text_file, tmp_path / "moved", **{"training.steps": 7})
    assert train(moved, tmp_path / "run", device="cpu", resume=True, allow_change=changes).step == 7


def test_the_texts_of_teachers_are_recorded(tiny_run: Run, short_file: Path, tmp_path: Path) -> None:
    tokenizer = tiny_run.path / "tokenizer.json"
    recipe = _recipe(short_file, tiny_run.path, tokenizer=f"{{path: {tokenizer}}}", **{"training.steps": 1})
    train(recipe, tmp_path / "run", device="cpu")
    assert [text.run for text in Run.open(tmp_path / "run").training_texts()] == [None, tiny_run.name]


def test_unsuitable_teachers_are_refused_before_training(tiny_run: Run, text_file: Path, tmp_path: Path) -> None:
    def open_teachers(run: Path, folder: Path = tmp_path / "run", **settings: object) -> None:
        Teachers.open(_recipe(text_file, run, **settings), folder)

    with pytest.raises(InputError, match="a run cannot be its own teacher"):
        open_teachers(tiny_run.path, tiny_run.path)
    with pytest.raises(InputError, match="context length of 32, but the model is trained on sequences of 48 tokens"):
        open_teachers(tiny_run.path, **{"model.context_length": 48})
    shutil.copytree(tiny_run.path, tmp_path / "masked")
    masked = loads("data: {train: a.txt}\nmodel: {architecture: encoder}\ntraining: {steps: 1}\n", check_files=False)
    (tmp_path / "masked" / "recipe.yaml").write_text(masked.to_yaml())
    with pytest.raises(InputError, match="was trained with the masked_lm objective, so it does not predict the next token"):
        open_teachers(tmp_path / "masked")
    with pytest.raises(InputError, match=r"the tokenizer of .* differs from this run's"):
        train(_recipe(text_file, tiny_run.path, **{"tokenizer.vocab_size": 300}), tmp_path / "run", device="cpu")

"""Micro-batches that run as graphs have the same gradients. A backend that records operations replaces CUDA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import tiny_recipe
from recorded_graphs import NoGraphs, RecordedGraphs
from tiny import causal_batch, ids, model
from torch import Tensor

from tinylm.model.transformer import Transformer
from tinylm.pipeline import train
from tinylm.run import Run
from tinylm.training import auto_settings, graphed, trainer
from tinylm.training.distillation import Distillation
from tinylm.training.feed import LocalBatch
from tinylm.training.graphed import GraphedMicroBatches, unsupported_reason
from tinylm.training.objectives import CausalLM, Objective
from tinylm.training.precision import Precision
from tinylm.training.step import GradientSettings, accumulate

FP32 = Precision("fp32", torch.device("cpu"))


def _batch(seed: int, length: int = 9) -> LocalBatch:
    """Return a batch of six sequences in which some targets are ignored, so that batches have different numbers of targets."""
    tokens = ids(6, length, seed=seed)
    tokens[seed, 4:] = -100
    return LocalBatch.whole(causal_batch(tokens))


def _gradient(network: Transformer) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in network.parameters() if parameter.grad is not None])


def _assert_same_gradients(objective: Objective, backend: RecordedGraphs | NoGraphs, batches: list[LocalBatch]) -> None:
    """Compute the gradients of several batches, and change the weights and discard the gradients in between, like a trainer."""
    networks = [model("modern", n_layer=1).train().requires_grad_(True) for _ in range(2)]
    for network in networks:
        network.embedding.requires_grad_(False)
    settings = GradientSettings(2, FP32, objective)
    graphs = GraphedMicroBatches(networks[0], settings, backend)
    for batch in batches:
        for network in networks:
            network.zero_grad()
        losses, expected = graphs.accumulate(batch), accumulate(networks[1], batch, settings)
        torch.testing.assert_close(losses, expected)
        torch.testing.assert_close(_gradient(networks[0]), _gradient(networks[1]), atol=1e-6, rtol=1e-5)
        with torch.no_grad():
            for network in networks:
                for parameter in network.parameters():
                    parameter -= 0.1 * (0 if parameter.grad is None else parameter.grad)


def test_gradients_of_graphed_and_plain_micro_batches_match() -> None:
    backend = RecordedGraphs()
    _assert_same_gradients(CausalLM(), backend, [_batch(0), _batch(1), _batch(2, length=7)])
    assert backend.captures == 2, "one graph for each length"


def test_the_losses_of_distillation_match() -> None:
    _assert_same_gradients(Distillation([model("gpt2", n_layer=1)], 0.4), RecordedGraphs(), [_batch(0), _batch(1)])


def test_more_shapes_than_graphs_run_without_a_graph() -> None:
    backend = RecordedGraphs()
    _assert_same_gradients(CausalLM(), backend, [_batch(0, length) for length in range(6, 11)])
    assert backend.captures == 4


def test_training_continues_without_graphs_after_one_warning_if_a_micro_batch_cannot_be_captured() -> None:
    with pytest.warns(UserWarning, match=r"without CUDA graphs.*\(operation not permitted") as warned:
        _assert_same_gradients(CausalLM(), NoGraphs(), [_batch(0), _batch(1)])
    assert len(warned) == 1


def test_a_run_with_graphs_has_the_losses_of_a_run_without(
    short_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "CUDAGraphs", lambda device: RecordedGraphs())
    monkeypatch.setattr(graphed, "unsupported_reason", lambda *_: None)
    monkeypatch.setattr(auto_settings.compilation, "compile_units", lambda *_, **__: 1.0)
    losses = {}
    for mode in ("graph", "off"):
        recipe = tiny_recipe(short_file, "modern", "training.steps=4", f"training.compile={mode}", "evaluation.max_tokens=50")
        train(recipe, tmp_path / mode, device="cpu")
        run = Run.open(tmp_path / mode)
        losses[run.recipe.training.compile] = [line["loss"] for line in run.metrics() if line["kind"] == "step"]
    assert losses["graph"] == pytest.approx(losses[False], rel=1e-5)


@pytest.mark.parametrize(
    ("device", "precision", "dropout", "processes", "reason"),
    [
        ("cuda", "bf16", 0.0, 1, None),
        ("cpu", "fp32", 0.0, 1, "requires a CUDA GPU"),
        ("cuda", "fp16", 0.0, 1, "fp16"),
        ("cuda", "bf16", 0.1, 1, "dropout"),
        ("cuda", "bf16", 0.0, 2, "several processes"),
    ],
)
def test_the_reason_says_what_graphs_do_not_support(
    device: str, precision: str, dropout: float, processes: int, reason: str | None, short_file: Path
) -> None:
    recipe = tiny_recipe(short_file, "modern", f"model.dropout={dropout}")
    actual = unsupported_reason(recipe, Precision(precision, torch.device(device)), processes)
    assert actual is None if reason is None else actual is not None and reason in actual

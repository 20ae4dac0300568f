"""With gradient accumulation, the gradient of a step does not depend on the micro-batch size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import causal_batch, ids, model
from torch import Tensor

from tinylm.data.batch import IGNORE_INDEX
from tinylm.model.transformer import Transformer
from tinylm.training.feed import LocalBatch
from tinylm.training.objectives import CausalLM
from tinylm.training.precision import Precision
from tinylm.training.step import GradientSettings, accumulate

CPU = torch.device("cpu")
FP32 = Precision("fp32", CPU)


def _sequences(ignored: bool) -> Tensor:
    """Return 64 sequences. If `ignored` is true, mask a different number of final targets in each sequence."""
    sequences = ids(64, 13)
    if ignored:
        for row in range(64):
            sequences[row, 1 + (row * 5) % 13 :] = IGNORE_INDEX
    return sequences


def _batch(sequences: Tensor) -> LocalBatch:
    return LocalBatch.whole(causal_batch(sequences))


def _accumulated(network: Transformer, sequences: Tensor, micro: int, precision: Precision = FP32) -> tuple[float, Tensor]:
    network.zero_grad()
    scaler = precision.scaler()
    loss = accumulate(network, _batch(sequences), GradientSettings(micro, precision, CausalLM(), scaler))
    return float(loss), torch.cat([parameter.grad.flatten() for parameter in network.parameters()])


@pytest.mark.parametrize("ignored", [False, True], ids=["all targets", "ignored targets"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_gradient_is_the_same_for_every_micro_batch_size(dtype: torch.dtype, ignored: bool) -> None:
    network, sequences = model(n_embd=16).to(dtype), _sequences(ignored)
    expected_loss, expected = _accumulated(network, sequences, 64)
    for micro in (16, 4):
        loss, gradient = _accumulated(network, sequences, micro)
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert float((gradient - expected).norm() / expected.norm()) < 1e-6


def test_the_gradient_matches_the_mean_loss_over_all_targets() -> None:
    network, sequences = model(n_embd=16).double(), _sequences(ignored=True)
    targets = sequences[:, 1:]
    logits = network(sequences[:, :-1].clamp_min(0))
    counted = targets != IGNORE_INDEX
    mean = F.cross_entropy(logits[counted], targets[counted])  # This is one mean over all targets that are not ignored.
    expected = torch.autograd.grad(mean, list(network.parameters()))
    loss, gradient = _accumulated(network, sequences, 4)
    assert loss == pytest.approx(mean.item(), rel=1e-6)
    torch.testing.assert_close(gradient, torch.cat([part.flatten() for part in expected]))


def test_a_batch_without_targets_does_not_cause_a_division_by_zero() -> None:
    network = model(n_embd=16)
    sequences = ids(4, 9)
    sequences[:, 1:] = IGNORE_INDEX
    loss, gradient = _accumulated(network, sequences, 2)
    assert loss == 0.0
    assert not gradient.any()


def test_dropout_depends_only_on_the_seeds() -> None:
    network, sequences = model(n_embd=16, dropout=0.3).train(), ids(8, 9)

    def gradient(seeds: list[int]) -> Tensor:
        network.zero_grad()
        accumulate(network, _batch(sequences), GradientSettings(4, FP32, CausalLM()), iter(seeds))
        return network.head.weight.grad.clone()

    torch.manual_seed(1)
    first = gradient([7, 8])
    torch.manual_seed(2)
    assert torch.equal(gradient([7, 8]), first)
    assert not torch.equal(gradient([7, 9]), first)


@pytest.mark.parametrize("preset", ["modern", "gpt2", "llama"])
def test_bf16_gradients_are_close_to_fp32(preset: str) -> None:
    network, sequences = model(preset, n_embd=16), _sequences(ignored=False)[:8]
    loss, gradient = _accumulated(network, sequences, 4)
    half_loss, half = _accumulated(network, sequences, 4, Precision("bf16", CPU))
    assert half_loss == pytest.approx(loss, rel=0.01)
    assert half_loss != loss  # Equal losses would mean that nothing was computed in bf16.
    assert half.dtype == torch.float32
    assert F.cosine_similarity(half, gradient, dim=0) > 0.99


@pytest.mark.parametrize("preset", ["modern", "gpt2", "llama"])
def test_fp16_gradients_are_scaled_and_close_to_fp32(preset: str) -> None:
    network, sequences = model(preset, n_embd=16), _sequences(ignored=False)[:8]
    loss, gradient = _accumulated(network, sequences, 4)
    half_loss, scaled = _accumulated(network, sequences, 4, Precision("fp16", CPU))
    assert half_loss == pytest.approx(loss, rel=0.005)
    assert float(scaled.norm() / gradient.norm()) == pytest.approx(65536, rel=0.02)
    assert F.cosine_similarity(scaled, gradient, dim=0) > 0.999

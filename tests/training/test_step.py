"""Gradient accumulation: what one step adds to the gradient does not depend on how it is cut."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import ids, model
from torch import Tensor

from tinylm.model.objective import IGNORED, CausalObjective
from tinylm.model.transformer import Transformer
from tinylm.training.feed import GlobalBatch
from tinylm.training.precision import Precision
from tinylm.training.step import accumulate

CPU = torch.device("cpu")
FP32 = Precision("fp32", CPU)


def _sequences(ignored: bool) -> Tensor:
    """64 sequences; with `ignored`, each loses another number of its last targets, some of them all."""
    sequences = ids(64, 13)
    if ignored:
        for row in range(64):
            sequences[row, 1 + (row * 5) % 13 :] = IGNORED
    return sequences


def _batch(sequences: Tensor) -> GlobalBatch:
    example = CausalObjective().example(sequences)
    return GlobalBatch(example, int((sequences[:, 1:] != IGNORED).sum()))


def _accumulated(network: Transformer, sequences: Tensor, micro: int, precision: Precision = FP32) -> tuple[float, Tensor]:
    network.zero_grad()
    scaler = precision.scaler()
    loss = accumulate(network, CausalObjective(), _batch(sequences), micro, precision, scaler)
    return float(loss), torch.cat([parameter.grad.flatten() for parameter in network.parameters()])


@pytest.mark.parametrize("ignored", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_gradient_is_the_same_in_one_piece_and_in_many(dtype: torch.dtype, ignored: bool) -> None:
    network, sequences = model(n_embd=16).to(dtype), _sequences(ignored)
    whole_loss, whole = _accumulated(network, sequences, 64)
    for micro in (16, 4):
        loss, gradient = _accumulated(network, sequences, micro)
        assert loss == pytest.approx(whole_loss, rel=1e-6)
        assert float((gradient - whole).norm() / whole.norm()) < 1e-6


def test_the_gradient_is_that_of_the_mean_over_all_targets() -> None:
    network, sequences = model(n_embd=16).double(), _sequences(ignored=True)
    targets = sequences[:, 1:]
    logits = network(sequences[:, :-1].clamp_min(0))
    mean = F.cross_entropy(logits[targets != IGNORED], targets[targets != IGNORED])  # one mean, over what counts
    expected = torch.autograd.grad(mean, list(network.parameters()))
    loss, gradient = _accumulated(network, sequences, 4)
    assert loss == pytest.approx(mean.item(), rel=1e-6)
    torch.testing.assert_close(gradient, torch.cat([part.flatten() for part in expected]))


def test_a_batch_without_a_target_is_no_division_by_zero() -> None:
    network = model(n_embd=16)
    sequences = ids(4, 9)
    sequences[:, 1:] = IGNORED
    loss, gradient = _accumulated(network, sequences, 2)
    assert loss == 0.0
    assert not gradient.any()


def test_seeds_decide_dropout() -> None:
    network, sequences = model(n_embd=16, dropout=0.3).train(), ids(8, 9)

    def gradient(seeds: list[int]) -> Tensor:
        network.zero_grad()
        accumulate(network, CausalObjective(), _batch(sequences), 4, FP32, FP32.scaler(), iter(seeds))
        return network.head.weight.grad.clone()

    torch.manual_seed(1)
    first = gradient([7, 8])
    torch.manual_seed(2)
    assert torch.equal(gradient([7, 8]), first)
    assert not torch.equal(gradient([7, 9]), first)


@pytest.mark.parametrize("preset", ["modern", "gpt2", "llama"])
def test_bf16_is_near_fp32(preset: str) -> None:
    network, sequences = model(preset, n_embd=16), _sequences(ignored=False)[:8]
    loss, gradient = _accumulated(network, sequences, 4)
    rough_loss, rough = _accumulated(network, sequences, 4, Precision("bf16", CPU))
    assert rough_loss == pytest.approx(loss, rel=0.01)
    assert rough_loss != loss  # it did compute in bf16
    assert rough.dtype == torch.float32
    assert F.cosine_similarity(rough, gradient, dim=0) > 0.99


@pytest.mark.parametrize("preset", ["modern", "gpt2", "llama"])
def test_fp16_scales_the_loss_and_is_near_fp32(preset: str) -> None:
    network, sequences = model(preset, n_embd=16), _sequences(ignored=False)[:8]
    loss, gradient = _accumulated(network, sequences, 4)
    rough_loss, scaled = _accumulated(network, sequences, 4, Precision("fp16", CPU))
    assert rough_loss == pytest.approx(loss, rel=0.005)
    assert float(scaled.norm() / gradient.norm()) == pytest.approx(65536, rel=0.02)
    assert F.cosine_similarity(scaled, gradient, dim=0) > 0.999

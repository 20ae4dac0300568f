"""Compare the rational function with singular value decompositions in float64 and with its defining property."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tinylm.optim import rational
from tinylm.optim.muon import Muon
from tinylm.optim.rational import ALPHA, BETA, GAMMA, LOWER_BOUND, SHIFT, orthogonalize


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _function(values: Tensor) -> Tensor:
    return values * (ALPHA + GAMMA * values**2 + BETA / (values**2 + SHIFT))


def _expected(matrix: Tensor) -> Tensor:
    """Apply the function to the singular values in float64."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return left * _function(values / values.pow(4).sum() ** 0.25) @ right


def test_the_function_is_the_best_of_its_form() -> None:
    """The error of the best function with four coefficients reaches its maximum, with alternating signs, at five points."""
    values = torch.logspace(torch.tensor(LOWER_BOUND).log10().item(), 0, 20_001, dtype=torch.float64)
    errors = _function(values) - 1
    inner = (errors[1:-1] - errors[:-2]) * (errors[2:] - errors[1:-1]) < 0
    extrema = torch.cat([errors[:1], errors[1:-1][inner], errors[-1:]])
    assert len(extrema) == 5
    torch.testing.assert_close(extrema.abs(), torch.full_like(extrema, 0.18105), atol=1e-4, rtol=0)
    assert (extrema[1:] * extrema[:-1] < 0).all()


@pytest.mark.parametrize("shape", [(48, 48), (96, 24), (101, 203), (1, 7), (5, 3)], ids=str)
def test_matrices_agree_with_a_singular_value_decomposition(shape: tuple[int, int]) -> None:
    matrices = [_random(*shape, seed=seed) for seed in range(8)]
    for matrix, result in zip(matrices, orthogonalize(matrices), strict=True):
        torch.testing.assert_close(result.double(), _expected(matrix), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(96, 96), (192, 64)], ids=str)
def test_ill_conditioned_matrices_are_accurate_to_one_percent(shape: tuple[int, int]) -> None:
    matrix = _random(*shape) * torch.logspace(0, -6, shape[1])
    expected = _expected(matrix)
    [result] = orthogonalize([matrix])
    assert (result - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("size", [40, 64, 200])
def test_a_dominant_singular_value_does_not_reduce_the_accuracy(size: int) -> None:
    left, _, right = torch.linalg.svd(_random(size, size).double())
    values = torch.logspace(0, -6, size, dtype=torch.float64)
    values[0] = 30
    matrix = (left * values @ right).float()
    [result] = orthogonalize([matrix])
    assert torch.linalg.matrix_norm(result.double() - _expected(matrix), 2) < 1e-3


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e12])
def test_the_scale_of_a_matrix_does_not_matter_unless_it_is_nearly_zero(scale: float) -> None:
    matrix = _random(12, 20)
    [expected], [result] = orthogonalize([matrix]), orthogonalize([scale * matrix])
    if scale > 1e-7:
        torch.testing.assert_close(result, expected)
    else:
        assert result.norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_batch_size_gives_the_same_results(monkeypatch: pytest.MonkeyPatch, batch_size: int) -> None:
    matrices = [
        _random(*shape, seed=seed) for seed, shape in enumerate([(8, 8), (4, 9), (20, 8), (8, 12), (9, 4), (8, 8), (8, 30)])
    ]
    monkeypatch.setattr(rational, "rational_batch", lambda n: batch_size)
    for matrix, result in zip(matrices, orthogonalize(matrices), strict=True):
        torch.testing.assert_close(result.double(), _expected(matrix), atol=1e-4, rtol=0)


def test_a_zero_matrix_stays_zero() -> None:
    [result] = orthogonalize([torch.zeros(4, 6)])
    assert torch.equal(result, torch.zeros(4, 6))


@pytest.mark.parametrize("cautious", [False, True])
def test_muon_subtracts_the_orthogonalized_update_of_each_stacked_matrix(cautious: bool) -> None:
    lr, decay, rows = 0.05, 0.2, (8, 4, 4)
    parameter = nn.Parameter(_random(16, 8))
    options = {"momentum": 0.0, "weight_decay": decay, "cautious": cautious, "orthogonalization": "rational"}
    optimizer = Muon([parameter], {parameter: rows}, lr=lr, **options)
    before, gradient = parameter.detach().clone(), _random(16, 8, seed=1)
    parameter.grad = gradient.clone()
    optimizer.step()
    update = torch.cat([_expected(part) for part in gradient.split(rows)]).float()
    decayed = (before * update > 0) | (not cautious)
    torch.testing.assert_close(parameter.detach(), before - lr * decay * before * decayed - lr * update, atol=1e-5, rtol=1e-4)


def test_a_skipped_step_leaves_weights_and_momentum_unchanged() -> None:
    plain, flagged = nn.Parameter(_random(12, 5)), nn.Parameter(_random(12, 5))
    plain_muon, flagged_muon = (Muon([p], orthogonalization="rational", weight_decay=0.2) for p in (plain, flagged))
    for step in range(3):
        plain.grad = _random(12, 5, seed=step + 1)
        flagged.grad = plain.grad.clone()
        plain_muon.step()
        for value, gradient in ((0.0, flagged.grad), (1.0, torch.full_like(flagged, torch.inf))):
            flagged.grad, flagged_muon.found_inf = gradient, torch.tensor(value)
            flagged_muon.step()
        torch.testing.assert_close(plain, flagged)

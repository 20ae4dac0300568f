"""Compare Muon with a plain implementation of the published algorithm and with `torch.optim.Muon`."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tinylm.optim.muon import COEFFICIENTS, Muon, orthogonalize, orthogonalize_all


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _newton_schulz(gradient: Tensor, steps: int = 5) -> Tensor:
    """Apply `zeropower_via_newtonschulz5` from Jordan et al. 2024 to one matrix in its own dtype."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = gradient.T if gradient.shape[0] > gradient.shape[1] else gradient
    x = x / max(float(x.norm()), 1e-7)
    for _ in range(steps):
        square = x @ x.T
        x = a * x + b * (square @ x) + c * (square @ square @ x)
    return x.T if gradient.shape[0] > gradient.shape[1] else x


class _PlainMuon:
    """`torch.optim.Muon` as documented, for one float64 matrix: Nesterov momentum, weight decay and a scaled orthogonal update."""

    def __init__(self, weight: Tensor, lr: float, momentum: float, decay: float) -> None:
        self.weight, self.buffer = weight.double().clone(), torch.zeros_like(weight).double()
        self.lr, self.momentum, self.decay = lr, momentum, decay

    def step(self, gradient: Tensor) -> None:
        gradient = gradient.double()
        self.buffer = self.momentum * self.buffer + (1 - self.momentum) * gradient
        update = (1 - self.momentum) * gradient + self.momentum * self.buffer
        rows, columns = self.weight.shape
        self.weight = self.weight * (1 - self.lr * self.decay)
        self.weight -= self.lr * math.sqrt(max(1.0, rows / columns)) * _newton_schulz(update)


SHAPES = [(6, 6), (12, 5), (5, 12), (6, 6), (12, 5), (1, 7)]


def _train(
    shapes: list[tuple[int, ...]],
    steps: int,
    optimizer: type[torch.optim.Optimizer],
    precision: torch.dtype = torch.float32,
    **options: object,
) -> list[Tensor]:
    parameters = [nn.Parameter(_random(*shape, seed=index).to(precision)) for index, shape in enumerate(shapes)]
    instance = optimizer(parameters, **options)
    for step in range(steps):
        for index, parameter in enumerate(parameters):
            parameter.grad = _random(*parameter.shape, seed=100 * step + index + 50).to(precision)
        instance.step()
    return [parameter.detach() for parameter in parameters]


@pytest.mark.parametrize("steps", [1, 6])
def test_steps_equal_the_published_algorithm(steps: int) -> None:
    ours = _train(SHAPES, steps, Muon, lr=0.05, momentum=0.9, weight_decay=0.2)
    for index, (shape, weight) in enumerate(zip(SHAPES, ours, strict=True)):
        plain = _PlainMuon(_random(*shape, seed=index), 0.05, 0.9, 0.2)
        for step in range(steps):
            plain.step(_random(*shape, seed=100 * step + index + 50))
        torch.testing.assert_close(weight.double(), plain.weight, atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon requires torch 2.9")
def test_steps_are_close_to_torchs_muon_which_computes_in_bfloat16() -> None:
    options = {"lr": 0.05, "momentum": 0.95, "weight_decay": 0.1}
    ours = _train(SHAPES, 4, Muon, **options)
    theirs = _train(SHAPES, 4, torch.optim.Muon, adjust_lr_fn="original", **options)
    for index, (actual, expected) in enumerate(zip(ours, theirs, strict=True)):
        moved = (expected - _random(*expected.shape, seed=index)).norm()
        assert (actual - expected).norm() < 0.05 * moved


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon requires torch 2.9")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
def test_steps_equal_torchs_muon_without_its_rounding_to_bfloat16(
    dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch first casts the update to bfloat16. Without this cast, the results must agree up to the precision of `dtype`."""
    options = {"lr": 0.05, "momentum": 0.95, "weight_decay": 0.1}
    ours = _train(SHAPES, 4, Muon, precision=dtype, dtype=dtype, **options)
    monkeypatch.setattr(Tensor, "bfloat16", lambda tensor: tensor.clone())
    theirs = _train(SHAPES, 4, torch.optim.Muon, precision=dtype, adjust_lr_fn="original", **options)
    for index, (actual, expected) in enumerate(zip(ours, theirs, strict=True)):
        moved = (expected - _random(*expected.shape, seed=index)).norm()
        assert (actual - expected).norm() < tolerance * moved


def test_newton_schulz_in_bfloat16_is_close_to_float32() -> None:
    matrices = [_random(*shape, seed=index) for index, shape in enumerate([(24, 24), (48, 20), (20, 48), (24, 24)])]
    exact = orthogonalize_all(matrices, 5, "classic", torch.float32)
    half = orthogonalize_all(matrices, 5, "classic", torch.bfloat16)
    for expected, actual in zip(exact, half, strict=True):
        assert actual.dtype == torch.bfloat16
        assert not torch.equal(expected, actual.float())
        assert (expected - actual).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(("steps", "error"), [(3, 0.275), (4, 0.0135), (5, 2e-4)])
def test_the_polar_express_brings_singular_values_as_close_to_one_as_documented(steps: int, error: float) -> None:
    """Apply the polynomials to numbers in [0.01, 1]."""
    values = torch.linspace(0.01, 1, 20_001, dtype=torch.float64)
    for a, b, c in COEFFICIENTS["polar_express"][:steps]:
        values = a * values + b * values**3 + c * values**5
    assert (values - 1).abs().max() < error


@pytest.mark.parametrize("shape", [(1, 12, 12), (2, 9, 30), (2, 30, 9)], ids=str)
@pytest.mark.parametrize("steps", [3, 7])
def test_the_polar_express_applies_its_polynomials_to_the_singular_values(steps: int, shape: tuple[int, ...]) -> None:
    """If there are more steps than polynomials, the last polynomial is repeated."""
    matrices = _random(*shape).double()
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    values = values / values.norm(dim=-1, keepdim=True)
    polynomials = COEFFICIENTS["polar_express"]
    for step in range(steps):
        a, b, c = polynomials[min(step, len(polynomials) - 1)]
        values = a * values + b * values**3 + c * values**5
    torch.testing.assert_close(orthogonalize(matrices, steps, "polar_express"), left * values[:, None] @ right)


def test_orthogonalizing_several_matrices_keeps_their_order() -> None:
    matrices = [_random(*shape, seed=index) for index, shape in enumerate(SHAPES)]
    for matrix, result in zip(matrices, orthogonalize_all(matrices, 5, "classic", torch.float32), strict=True):
        torch.testing.assert_close(result, _newton_schulz(matrix), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("warmup", [0, 1, 4, 100])
def test_the_momentum_rises_linearly_from_0_85(warmup: int) -> None:
    ours = _train(SHAPES[:2], 7, Muon, lr=0.05, momentum=0.97, momentum_warmup=warmup)
    for index, shape in enumerate(SHAPES[:2]):
        plain = _PlainMuon(_random(*shape, seed=index), 0.05, 0.97, 0.0)
        for step in range(7):
            plain.momentum = 0.85 + (0.97 - 0.85) * step / warmup if step < warmup else 0.97
            plain.step(_random(*shape, seed=100 * step + index + 50))
        torch.testing.assert_close(ours[index].double(), plain.weight, atol=1e-5, rtol=1e-4)


def test_cautious_decay_shrinks_only_weights_that_the_update_shrinks_too() -> None:
    """Compare each weight with the rule in Chen et al. 2025."""
    lr, decay, rows = 0.05, 0.4, (3, 5)
    parameter = nn.Parameter(_random(8, 4))
    optimizer = Muon([parameter], {parameter: rows}, lr=lr, momentum=0.0, weight_decay=decay, cautious=True)
    for step in range(3):
        before, gradient = parameter.detach().clone(), _random(8, 4, seed=step + 1)
        parameter.grad = gradient.clone()
        optimizer.step()
        decayed = 0
        for start, count in ((0, 3), (3, 5)):
            direction = _newton_schulz(gradient[start : start + count]) * math.sqrt(max(1, count / 4))
            for i in range(count):
                for j in range(4):
                    weight, update = float(before[start + i, j]), float(direction[i, j])
                    expected = weight - lr * update
                    if weight * update > 0:
                        expected -= lr * decay * weight
                        decayed += 1
                    assert parameter[start + i, j].item() == pytest.approx(expected, abs=1e-5)
        assert 0 < decayed < 8 * 4


def test_updating_matrices_together_matches_updating_them_separately() -> None:
    together = _train(SHAPES, 3, Muon)
    for index, shape in enumerate(SHAPES):
        parameter = nn.Parameter(_random(*shape, seed=index))
        separate = Muon([parameter])
        for step in range(3):
            parameter.grad = _random(*shape, seed=100 * step + index + 50)
            separate.step()
        torch.testing.assert_close(together[index], parameter.detach(), atol=1e-6, rtol=1e-5)


def test_matrices_stacked_in_one_parameter_are_updated_like_separate_parameters() -> None:
    rows = (8, 4, 4)
    stacked = nn.Parameter(_random(16, 8))
    parts = [nn.Parameter(part.clone()) for part in stacked.detach().split(rows)]
    stacked_muon, parts_muon, whole_muon = (
        Muon([stacked], {stacked: rows}),
        Muon(parts),
        Muon([whole := nn.Parameter(stacked.detach().clone())]),
    )
    for step in range(3):
        gradient = _random(16, 8, seed=step + 1)
        stacked.grad, whole.grad = gradient, gradient.clone()
        for part, part_gradient in zip(parts, gradient.split(rows), strict=True):
            part.grad = part_gradient.clone()
        for optimizer in (stacked_muon, parts_muon, whole_muon):
            optimizer.step()
    torch.testing.assert_close(stacked.detach(), torch.cat([part.detach() for part in parts]), atol=1e-6, rtol=1e-5)
    assert (stacked - whole).abs().max() > 1e-2


def test_an_orthogonalized_matrix_has_singular_values_near_one_and_the_same_singular_vectors() -> None:
    matrix = _random(10, 24)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    values = left.T @ orthogonalize(matrix[None], 5)[0] @ right.T
    assert 0.6 < values.diagonal().min() < values.diagonal().max() < 1.3
    assert (values - values.diagonal().diag()).abs().max() < 1e-4


def test_a_zero_gradient_only_decays_the_weight_and_a_missing_gradient_leaves_it_unchanged() -> None:
    zero, missing = nn.Parameter(_random(4, 4)), nn.Parameter(_random(4, 4, seed=1))
    zero.grad = torch.zeros(4, 4)
    Muon([zero, missing], weight_decay=0.5, lr=0.1).step()
    torch.testing.assert_close(zero.detach(), _random(4, 4) * 0.95)
    assert torch.equal(missing.detach(), _random(4, 4, seed=1))


@pytest.mark.parametrize("cautious", [False, True])
def test_a_skipped_step_leaves_weights_and_momentum_unchanged_even_if_gradients_are_non_finite(cautious: bool) -> None:
    options = {"lr": 0.05, "weight_decay": 0.2, "cautious": cautious}
    plain, flagged = ([nn.Parameter(_random(*shape, seed=index)) for index, shape in enumerate(SHAPES)] for _ in range(2))
    plain_muon, flagged_muon = Muon(plain, **options), Muon(flagged, **options)
    for step in range(3):
        for index, (a, b) in enumerate(zip(plain, flagged, strict=True)):
            a.grad = _random(*a.shape, seed=10 * step + index + 50)
            b.grad = a.grad.clone()
        plain_muon.step()
        flagged_muon.found_inf = torch.tensor(0.0)
        flagged_muon.step()
        for parameter in flagged:
            parameter.grad = torch.full_like(parameter, math.inf)
        flagged_muon.found_inf = torch.tensor(1.0)
        flagged_muon.step()
        for a, b in zip(plain, flagged, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(plain_muon.state[a]["momentum"], flagged_muon.state[b]["momentum"])

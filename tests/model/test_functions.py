"""Written-out backward passes against plain formulas, torch's own functions and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tinylm.model import functions
from tinylm.model.functions import relu_squared, rms_norm, rotate, summed_cross_entropy
from tinylm.model.positions import rope_table

CAPS = [None, 1.5]


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)


def _both(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """What `function` says, and the gradient of a weighted sum of it for each input that wants one."""
    leaves = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in inputs]
    said = function(*leaves)
    weights = torch.linspace(-1, 2, said.numel(), dtype=said.dtype).view_as(said)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return [said.detach(), *torch.autograd.grad((said * weights).sum(), wanted)]


def _near(found: list[Tensor], expected: list[Tensor], share: float) -> None:
    """Each within `share` of the expected one's length."""
    for one, two in zip(found, expected, strict=True):
        assert (one.double() - two.double()).norm() <= share * two.double().norm()


# Root-mean-square norm.


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 3, 2, 5)], ids=str)
@pytest.mark.parametrize("gain", [False, True], ids=["plain", "gain"])
def test_the_norm_is_its_formula_and_torchs(shape: tuple[int, ...], gain: bool) -> None:
    x, weight = _random(*shape), _random(5, seed=1) if gain else None
    expected = x / (x.square().mean(dim=-1, keepdim=True) + 0.3).sqrt()
    expected = expected * weight if weight is not None else expected
    torch.testing.assert_close(rms_norm(x, weight, 0.3), expected)
    torch.testing.assert_close(rms_norm(x, weight, 0.3), F.rms_norm(x, (5,), weight, 0.3))


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)], ids=str)
def test_the_norms_gradients_are_its_slopes(shape: tuple[int, ...]) -> None:
    x, gain = _random(*shape), _random(5, seed=1)
    assert gradcheck(lambda x: rms_norm(x, None, 0.3), (x,))
    assert gradcheck(lambda x, gain: rms_norm(x, gain, 0.3), (x, gain))
    assert gradcheck(lambda x: rms_norm(x, gain.detach(), 0.3), (x,))
    assert gradcheck(lambda gain: rms_norm(x.detach(), gain, 0.3), (gain,))


def test_a_zero_vector_has_a_norm_and_a_gradient() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    said = rms_norm(x, None, 1e-6)
    said.sum().backward()
    assert not said.any()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full((2, 4), 1e3))


def test_a_norm_of_large_halves_does_not_overflow() -> None:
    x = torch.full((2, 512), 300.0, dtype=torch.float16)
    assert torch.equal(rms_norm(x, None, 1e-6), torch.ones(2, 512, dtype=torch.float16))


def test_a_norm_is_in_the_type_of_what_it_reads_and_its_gain_learns_in_its_own() -> None:
    x, gain = _random(3, 5, dtype=torch.bfloat16), _random(5, dtype=torch.float32)
    said = rms_norm(x, gain, 1e-6)
    said.sum().backward()
    assert (said.dtype, x.grad.dtype, gain.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


# Rotation.


def test_turning_is_a_complex_product_and_its_gradient_turns_back() -> None:
    x = _random(2, 6, 3, 8)
    cosines, sines = (table[:, None].double() for table in rope_table(6, 8, 100.0))
    said, gradient = _both(lambda x: rotate(x, cosines, sines), x)
    turn = torch.complex(cosines, sines)
    expected = torch.complex(x[..., :4], x[..., 4:]) * turn
    torch.testing.assert_close(said, torch.cat((expected.real, expected.imag), dim=-1).detach())
    came = torch.linspace(-1, 2, said.numel(), dtype=torch.float64).view_as(said)
    back = torch.complex(came[..., :4], came[..., 4:]) * turn.conj()
    torch.testing.assert_close(gradient, torch.cat((back.real, back.imag), dim=-1))


def test_a_rotations_gradients_are_its_slopes() -> None:
    cosines, sines = (table[:, None] for table in rope_table(5, 4, 10.0))
    assert gradcheck(lambda x: rotate(x, cosines, sines), (_random(2, 5, 3, 4),))


def test_a_part_of_a_larger_tensor_is_turned_alone() -> None:
    whole = _random(2, 5, 6, 4, grad=False)
    before = whole.clone()
    cosines, sines = (table[:, None] for table in rope_table(5, 4, 10.0))
    turned = rotate(whole[:, :, 1:4], cosines, sines)
    torch.testing.assert_close(turned, rotate(whole[:, :, 1:4].contiguous(), cosines, sines))
    assert torch.equal(whole, before)


# Squared rectifier.


def test_the_squared_rectifier_is_its_formula_and_its_gradients_are_its_slopes() -> None:
    x = _random(7, 9)
    torch.testing.assert_close(relu_squared(x), torch.where(x > 0, x * x, 0.0))
    assert gradcheck(relu_squared, (x,))


# The summed loss over a vocabulary.

N, C, V = 7, 4, 11
TARGETS = torch.tensor([3, -100, 0, 10, -1, 3, 5])


def _plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor, cap: float | None) -> Tensor:
    logits = hidden @ weight.T
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    return F.cross_entropy(logits[targets >= 0], targets[targets >= 0], reduction="sum")


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_summed_loss_is_cross_entropy_over_the_targets_that_count(
    chunk: int, cap: float | None, elsewhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if elsewhere:
        monkeypatch.setattr(functions, "_left_to_others", lambda x: True)
    hidden, weight = _random(N, C), _random(V, C, seed=1)
    ours = _both(lambda h, w: summed_cross_entropy(h, w, TARGETS, cap, chunk), hidden, weight)
    _near(ours, _both(lambda h, w: _plain_loss(h, w, TARGETS, cap), hidden, weight), 1e-12)


def test_the_summed_loss_counted_by_hand() -> None:
    """Two words whose logits differ by log 3, so that their probabilities are 3/4 and 1/4."""
    hidden, weight = torch.ones(3, 1), torch.tensor([[math.log(3)], [0.0]])
    loss = summed_cross_entropy(hidden, weight, torch.tensor([0, 1, -100]), None, 2)
    assert float(loss) == pytest.approx(-math.log(3 / 4) - math.log(1 / 4))


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_the_summed_losss_gradients_are_its_slopes(chunk: int, cap: float | None) -> None:
    """Central differences, entry by entry: `gradcheck` calls a backward pass twice, and this one is for one use."""
    leaves = [_random(N, C), _random(V, C, seed=1)]
    loss = summed_cross_entropy(*leaves, TARGETS, cap, chunk)
    (2.5 * loss).backward()
    for leaf in leaves:
        values = leaf.detach()
        for entry in range(values.numel()):
            sides = []
            for change in (1e-6, -2e-6):
                values.view(-1)[entry] += change
                sides.append(float(summed_cross_entropy(*(each.detach() for each in leaves), TARGETS, cap, chunk)))
            values.view(-1)[entry] += 1e-6
            assert float(leaf.grad.view(-1)[entry]) == pytest.approx(2.5 * (sides[0] - sides[1]) / 2e-6, abs=1e-7)


@pytest.mark.parametrize("wanted", ["hidden", "weight"])
def test_one_gradient_alone_is_the_one_of_both(wanted: str) -> None:
    hidden, weight = _random(N, C), _random(V, C, seed=1)
    _, *both = _both(lambda h, w: summed_cross_entropy(h, w, TARGETS, 1.5, 3), hidden, weight)
    (hidden if wanted == "weight" else weight).requires_grad_(False)
    _, alone = _both(lambda h, w: summed_cross_entropy(h, w, TARGETS, 1.5, 3), hidden, weight)
    assert torch.equal(alone, both[("hidden", "weight").index(wanted)])


def test_a_tied_weight_gathers_both_of_its_gradients() -> None:
    tokens = torch.tensor([3, 1, 4, 1, 5, 9, 2])

    def tied(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda weight: loss(weight[tokens].tanh(), weight)

    weight = _random(V, C)
    ours = _both(tied(lambda h, w: summed_cross_entropy(h, w, TARGETS, 1.5, 3)), weight)
    _near(ours, _both(tied(lambda h, w: _plain_loss(h, w, TARGETS, 1.5)), weight), 1e-12)


def test_without_a_target_loss_and_gradients_are_zero() -> None:
    ours = _both(lambda h, w: summed_cross_entropy(h, w, torch.full((N,), -100), 1.5, 3), _random(N, C), _random(V, C, seed=1))
    assert not any(tensor.any() for tensor in ours)


def test_logits_that_would_overflow_an_exponential_give_a_finite_loss() -> None:
    hidden, weight = torch.ones(2, 1, requires_grad=True), torch.tensor([[2000.0], [-2000.0]], requires_grad=True)
    loss = summed_cross_entropy(hidden, weight, torch.tensor([0, 1]), None, 1)
    loss.backward()
    assert loss.item() == 4000.0
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("rows", [1000, 70_000])
def test_sixteen_bit_gradients_of_a_frequent_target_do_not_overflow(rows: int) -> None:
    """Made before a gradient scaler can shrink them: an infinity here would stay whatever the scale."""
    hidden = torch.full((rows, 2), 2.0, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(4, 2, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.float16):
        summed_cross_entropy(hidden, weight, torch.zeros(rows, dtype=torch.long), None, 100_000).backward()
    expected = torch.tensor([-0.75, 0.25, 0.25, 0.25])[:, None].expand(4, 2) * 2 * rows
    torch.testing.assert_close(weight.grad, expected, rtol=1e-3, atol=1e-3)


def test_its_backward_pass_cannot_run_twice() -> None:
    loss = summed_cross_entropy(_random(N, C), _random(V, C, seed=1), TARGETS, None, 3)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        loss.backward()


class _Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation returns."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.numbers = max([self.numbers, *sizes])
        return result


@pytest.mark.parametrize("cap", CAPS)
def test_no_more_than_a_chunk_of_logits_ever_exists_and_none_is_kept(cap: float | None) -> None:
    hidden, weight = _random(640, 8, dtype=torch.float32), _random(1000, 8, dtype=torch.float32, seed=1)
    targets = torch.arange(640)
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with _Largest() as ours, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        summed_cross_entropy(hidden, weight, targets, cap, 64).backward()
    with _Largest() as plain:
        _plain_loss(hidden, weight, targets, cap).backward()
    assert plain.numbers == 640 * 1000
    assert ours.numbers == 64 * 1000
    assert sum(kept) <= hidden.numel() + weight.numel()


def test_the_summed_loss_computes_its_products_in_what_autocast_says_and_adds_up_in_float32() -> None:
    hidden, weight = _random(64, 32, dtype=torch.float32), _random(100, 32, dtype=torch.float32, seed=1)
    targets = torch.arange(64)
    exact = _both(lambda h, w: summed_cross_entropy(h, w, targets, None, 10), hidden, weight)

    def rough(hidden: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return summed_cross_entropy(hidden, weight, targets, None, 10)

    half = _both(rough, hidden, weight)
    assert [tensor.dtype for tensor in half] == [torch.float32] * 3
    assert not torch.equal(half[1], exact[1])
    _near(half, exact, 0.02)


# All of them.

COSINES, SINES = (table[:, None] for table in rope_table(6, 8, 100.0))
CASES: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "norm": (lambda x: rms_norm(x, None, 1e-5), ((2, 6, 3, 8),)),
    "norm with gain": (lambda x, gain: rms_norm(x, gain, 1e-5), ((2, 6, 3, 8), (8,))),
    "rotation": (lambda x: rotate(x, COSINES, SINES), ((2, 6, 3, 8),)),
    "squared rectifier": (relu_squared, ((2, 6, 3, 8),)),
    "loss": (lambda h, w: summed_cross_entropy(h, w, torch.arange(30) % 20 - 1, 3.0, 7), ((30, 8), (20, 8))),
}


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_near_float32(name: str) -> None:
    function, shapes = CASES[name]
    exact = [_random(*shape, seed=index, dtype=torch.bfloat16) for index, shape in enumerate(shapes)]
    rough = _both(function, *exact)
    assert rough[1].dtype == torch.bfloat16
    _near(rough, _both(function, *(tensor.detach().float().requires_grad_() for tensor in exact)), 0.02)


@pytest.mark.parametrize("name", [name for name in CASES if name != "loss"])
def test_what_compilers_and_gpus_get_is_the_same_function(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, shapes = CASES[name]
    inputs = [_random(*shape, seed=index) for index, shape in enumerate(shapes)]
    here = _both(function, *inputs)
    monkeypatch.setattr(functions, "_left_to_others", lambda x: True)
    _near(_both(function, *inputs), here, 1e-12)


@pytest.mark.parametrize("name", CASES)
def test_a_second_derivative_is_refused_and_never_wrong(name: str) -> None:
    """The backward passes are written for one derivative."""
    function, shapes = CASES[name]
    inputs = [_random(*shape, seed=index) for index, shape in enumerate(shapes)]
    slope = torch.autograd.grad(function(*inputs).square().sum(), inputs[0], create_graph=True)[0]
    with pytest.raises(RuntimeError):
        slope.square().sum().backward()

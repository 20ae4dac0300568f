"""Compare hand-written backward passes with plain formulas, PyTorch functions and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import ids, model
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tinylm.cost import memory
from tinylm.model import functions
from tinylm.model.functions import relu_squared, rms_norm, rotate, select_targets, summed_cross_entropy
from tinylm.model.positions import rope_table

CAPS = [None, 1.5]


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)


def _output_and_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Return the output of `function`, and the gradients of a weighted sum of its elements for the inputs that require them."""
    leaves = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in inputs]
    output = function(*leaves)
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), [leaf for leaf in leaves if leaf.requires_grad])]


def _assert_near(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Check that the relative L2 error of each tensor is at most `tolerance`."""
    for ours, reference in zip(actual, expected, strict=True):
        assert (ours.double() - reference.double()).norm() <= tolerance * reference.double().norm()


# RMSNorm


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 3, 2, 5)], ids=str)
@pytest.mark.parametrize("gain", [False, True], ids=["plain", "gain"])
def test_rms_norm_matches_the_formula_and_torch(shape: tuple[int, ...], gain: bool) -> None:
    x, weight = _random(*shape), _random(5, seed=1) if gain else None
    expected = x / (x.square().mean(dim=-1, keepdim=True) + 0.3).sqrt()
    expected = expected * weight if weight is not None else expected
    torch.testing.assert_close(rms_norm(x, weight, 0.3), expected)
    torch.testing.assert_close(rms_norm(x, weight, 0.3), F.rms_norm(x, (5,), weight, 0.3))


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)], ids=str)
def test_rms_norm_passes_gradcheck(shape: tuple[int, ...]) -> None:
    x, gain = _random(*shape), _random(5, seed=1)
    assert gradcheck(lambda x: rms_norm(x, None, 0.3), (x,))
    assert gradcheck(lambda x, gain: rms_norm(x, gain, 0.3), (x, gain))
    assert gradcheck(lambda x: rms_norm(x, gain.detach(), 0.3), (x,))
    assert gradcheck(lambda gain: rms_norm(x.detach(), gain, 0.3), (gain,))


def test_rms_norm_of_zeros_is_finite_and_has_a_gradient() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    output = rms_norm(x, None, 1e-6)
    output.sum().backward()
    assert not output.any()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full((2, 4), 1e3))


def test_rms_norm_of_large_float16_inputs_does_not_overflow() -> None:
    x = torch.full((2, 512), 300.0, dtype=torch.float16)
    assert torch.equal(rms_norm(x, None, 1e-6), torch.ones(2, 512, dtype=torch.float16))


def test_rms_norm_and_its_gradients_keep_the_dtypes_of_their_inputs() -> None:
    x, gain = _random(3, 5, dtype=torch.bfloat16), _random(5, dtype=torch.float32)
    output = rms_norm(x, gain, 1e-6)
    output.sum().backward()
    assert (output.dtype, x.grad.dtype, gain.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


# Rotary position embeddings


def test_rotate_is_a_complex_product_and_its_gradient_is_the_conjugate_product() -> None:
    x = _random(2, 6, 3, 8)
    cosines, sines = (table[:, None].double() for table in rope_table(6, 8, 100.0))
    output, gradient = _output_and_gradients(lambda x: rotate(x, cosines, sines), x)
    rotation = torch.complex(cosines, sines)
    expected = torch.complex(x[..., :4], x[..., 4:]) * rotation
    torch.testing.assert_close(output, torch.cat((expected.real, expected.imag), dim=-1).detach())
    incoming = torch.linspace(-1, 2, output.numel(), dtype=torch.float64).view_as(output)
    back = torch.complex(incoming[..., :4], incoming[..., 4:]) * rotation.conj()
    torch.testing.assert_close(gradient, torch.cat((back.real, back.imag), dim=-1))


def test_rotate_passes_gradcheck() -> None:
    cosines, sines = (table[:, None] for table in rope_table(5, 4, 10.0))
    assert gradcheck(lambda x: rotate(x, cosines, sines), (_random(2, 5, 3, 4),))


def test_rotating_a_slice_leaves_the_rest_of_the_tensor_unchanged() -> None:
    x = _random(2, 5, 6, 4, grad=False)
    before = x.clone()
    cosines, sines = (table[:, None] for table in rope_table(5, 4, 10.0))
    rotated = rotate(x[:, :, 1:4], cosines, sines)
    torch.testing.assert_close(rotated, rotate(x[:, :, 1:4].contiguous(), cosines, sines))
    assert torch.equal(x, before)


# Squared ReLU


def test_relu_squared_matches_the_formula_and_passes_gradcheck() -> None:
    x = _random(7, 9)
    torch.testing.assert_close(relu_squared(x), torch.where(x > 0, x * x, 0.0))
    assert gradcheck(relu_squared, (x,))


# Summed cross-entropy

N, C, V = 7, 4, 11  # tokens, width, vocabulary size
TARGETS = torch.tensor([3, -100, 0, 10, -1, 3, 5])


def _reference_loss(hidden: Tensor, weight: Tensor, targets: Tensor, cap: float | None) -> Tensor:
    logits = hidden @ weight.T
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    return F.cross_entropy(logits[targets >= 0], targets[targets >= 0], reduction="sum")


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("composite", [False, True])
def test_summed_cross_entropy_matches_torch_and_skips_ignored_targets(
    chunk: int, cap: float | None, composite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if composite:
        monkeypatch.setattr(functions, "prefers_composite_ops", lambda x: True)
    hidden, weight = _random(N, C), _random(V, C, seed=1)
    ours = _output_and_gradients(lambda h, w: summed_cross_entropy(h, w, TARGETS, cap, chunk), hidden, weight)
    _assert_near(ours, _output_and_gradients(lambda h, w: _reference_loss(h, w, TARGETS, cap), hidden, weight), 1e-12)


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_loss_does_not_depend_on_the_block_size(
    dtype: torch.dtype, rows: int, cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last block has fewer rows. With one row, a block is smaller than the vocabulary."""
    hidden, weight = _random(50, 16, dtype=dtype), _random(300, 16, seed=1, dtype=dtype)
    targets = torch.arange(50) % 301 - 1
    whole = _output_and_gradients(lambda h, w: summed_cross_entropy(h, w, targets, cap, 20), hidden, weight)
    monkeypatch.setattr(memory, "LOSS_BLOCK", 299 if rows == 1 else 300 * rows)
    blocks = _output_and_gradients(lambda h, w: summed_cross_entropy(h, w, targets, cap, 20), hidden, weight)
    _assert_near(blocks, whole, 1e-6)


def _use_fused_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the fused loss as on CUDA, but do not compile it."""
    monkeypatch.setattr(functions.fused_loss, "function", lambda logits, device: functions.losses_and_logit_gradients)


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 0.003)], ids=str
)
def test_the_fused_loss_matches_torch_and_skips_ignored_targets(
    dtype: torch.dtype, tolerance: float, cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compute the loss in several chunks and compare it with a float64 reference for the same rounded inputs."""
    _use_fused_loss(monkeypatch)
    hidden, weight = _random(1200, 32, dtype=dtype), _random(300, 32, seed=1, dtype=dtype)
    targets = torch.arange(1200) % 301 - 1
    ours = _output_and_gradients(lambda h, w: summed_cross_entropy(h, w, targets, cap, 128), hidden, weight)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    _assert_near(ours, _output_and_gradients(lambda h, w: _reference_loss(h, w, targets, cap), *exact), tolerance)
    assert [tensor.dtype for tensor in ours] == [torch.promote_types(dtype, torch.float32), dtype, dtype]


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_fused_loss_is_as_accurate_under_autocast_as_the_unfused_loss(
    dtype: torch.dtype, cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight = _random(640, 32, dtype=torch.float32), _random(300, 32, seed=1, dtype=torch.float32)
    targets = torch.arange(640) % 301 - 1

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return summed_cross_entropy(hidden, weight, targets, cap, 128)

    exact = _output_and_gradients(lambda h, w: _reference_loss(h, w, targets, cap), hidden, weight)
    plain = _output_and_gradients(loss, hidden, weight)
    _use_fused_loss(monkeypatch)
    for ours, theirs, reference in zip(_output_and_gradients(loss, hidden, weight), plain, exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - reference).norm() <= 1.1 * (theirs - reference).norm() + 1e-6 * reference.norm()


@pytest.mark.parametrize("compiled", [True, False])
def test_the_fused_loss_is_used_only_if_compile_loss_is_set(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def fused(logits: Tensor, targets: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
        calls.append(len(targets))
        return functions.losses_and_logit_gradients(logits, targets, cap)

    monkeypatch.setattr(functions.fused_loss, "function", lambda logits, device: fused)
    network = model("gpt2")
    network.compile_loss = compiled
    tokens = ids()
    network(tokens, targets=tokens)
    assert bool(calls) == compiled


def test_the_fused_loss_is_zero_for_ignored_targets_and_finite_for_huge_logits() -> None:
    logits = torch.tensor([[2000.0, -2000.0], [2000.0, -2000.0], [3.0, 4.0]])
    losses, gradients = functions.losses_and_logit_gradients(logits, torch.tensor([0, 1, -100]), None)
    assert losses.tolist() == [0.0, 4000.0, 0.0]
    assert gradients.tolist() == [[0.0, 0.0], [1.0, -1.0], [0.0, 0.0]]


def test_a_loss_that_cannot_be_compiled_runs_eagerly_after_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(logits: Tensor, targets: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
        raise ValueError("no compiler\nand more")

    monkeypatch.setattr(functions, "_compiled_loss", lambda: broken)
    fused = functions.FusedLoss()
    monkeypatch.setattr(fused, "function", lambda logits, device: fused)
    monkeypatch.setattr(functions, "fused_loss", fused)
    hidden, weight = _random(N, C), _random(V, C, seed=1)
    with pytest.warns(UserWarning, match=r"the loss cannot be compiled \(no compiler\)") as warned:
        ours = _output_and_gradients(lambda h, w: summed_cross_entropy(h, w, TARGETS, 1.5, 3), hidden, weight)
    assert len(warned) == 1
    _assert_near(ours, _output_and_gradients(lambda h, w: _reference_loss(h, w, TARGETS, 1.5), hidden, weight), 1e-12)
    assert functions.FusedLoss.function(fused, 1 << 40, torch.device("cuda")) is None


def test_running_out_of_memory_is_not_mistaken_for_a_compilation_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(logits: Tensor, targets: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(functions, "_compiled_loss", lambda: too_large)
    with pytest.raises(torch.OutOfMemoryError):
        functions.FusedLoss()(torch.zeros(1, 2), torch.tensor([0]), None)


def test_the_loss_is_compiled_only_on_cuda_for_large_logits_with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, large = functions.FusedLoss(), 65_536 * 50_304
    for triton in (True, False):
        monkeypatch.setattr(functions, "has_triton", lambda triton=triton: triton)
        assert (fused.function(large, torch.device("cuda")) is fused) == triton
        assert fused.function(64 * 61, torch.device("cuda")) is None
        assert fused.function(large, torch.device("cpu")) is None


def test_summed_cross_entropy_matches_a_hand_computed_example() -> None:
    """Two tokens whose logits differ by log 3 have probabilities 3/4 and 1/4."""
    hidden, weight = torch.ones(3, 1), torch.tensor([[math.log(3)], [0.0]])
    loss = summed_cross_entropy(hidden, weight, torch.tensor([0, 1, -100]), None, 2)
    assert float(loss) == pytest.approx(-math.log(3 / 4) - math.log(1 / 4))


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_summed_cross_entropy_gradients_match_finite_differences(chunk: int, cap: float | None) -> None:
    """Compare each element with a central difference. `gradcheck` would run backward twice, which raises an error here."""
    leaves = [_random(N, C), _random(V, C, seed=1)]
    loss = summed_cross_entropy(*leaves, TARGETS, cap, chunk)
    (2.5 * loss).backward()
    for leaf in leaves:
        values = leaf.detach()
        for entry in range(values.numel()):
            losses = []
            for change in (1e-6, -2e-6):
                values.view(-1)[entry] += change
                losses.append(float(summed_cross_entropy(*(tensor.detach() for tensor in leaves), TARGETS, cap, chunk)))
            values.view(-1)[entry] += 1e-6
            assert float(leaf.grad.view(-1)[entry]) == pytest.approx(2.5 * (losses[0] - losses[1]) / 2e-6, abs=1e-7)


@pytest.mark.parametrize("required", ["hidden", "weight"])
def test_a_gradient_does_not_change_if_the_other_one_is_not_required(required: str) -> None:
    hidden, weight = _random(N, C), _random(V, C, seed=1)
    _, *gradients = _output_and_gradients(lambda h, w: summed_cross_entropy(h, w, TARGETS, 1.5, 3), hidden, weight)
    (hidden if required == "weight" else weight).requires_grad_(False)
    _, single = _output_and_gradients(lambda h, w: summed_cross_entropy(h, w, TARGETS, 1.5, 3), hidden, weight)
    assert torch.equal(single, gradients[("hidden", "weight").index(required)])


def test_a_tied_weight_accumulates_both_gradients() -> None:
    tokens = torch.tensor([3, 1, 4, 1, 5, 9, 2])

    def tied(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda weight: loss(weight[tokens].tanh(), weight)

    weight = _random(V, C)
    ours = _output_and_gradients(tied(lambda h, w: summed_cross_entropy(h, w, TARGETS, 1.5, 3)), weight)
    _assert_near(ours, _output_and_gradients(tied(lambda h, w: _reference_loss(h, w, TARGETS, 1.5)), weight), 1e-12)


def test_loss_and_gradients_are_zero_if_all_targets_are_ignored() -> None:
    ours = _output_and_gradients(
        lambda h, w: summed_cross_entropy(h, w, torch.full((N,), -100), 1.5, 3), _random(N, C), _random(V, C, seed=1)
    )
    assert not any(tensor.any() for tensor in ours)


def test_the_loss_for_huge_logits_is_finite() -> None:
    hidden, weight = torch.ones(2, 1, requires_grad=True), torch.tensor([[2000.0], [-2000.0]], requires_grad=True)
    loss = summed_cross_entropy(hidden, weight, torch.tensor([0, 1]), None, 1)
    loss.backward()
    assert loss.item() == 4000.0
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("rows", [1000, 70_000])
def test_float16_gradients_of_a_frequent_target_do_not_overflow(rows: int) -> None:
    """The gradients are computed before the loss is scaled, so a gradient scaler could not prevent an overflow."""
    hidden = torch.full((rows, 2), 2.0, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(4, 2, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.float16):
        summed_cross_entropy(hidden, weight, torch.zeros(rows, dtype=torch.long), None, 100_000).backward()
    expected = torch.tensor([-0.75, 0.25, 0.25, 0.25])[:, None].expand(4, 2) * 2 * rows
    torch.testing.assert_close(weight.grad, expected, rtol=1e-3, atol=1e-3)


def test_a_second_backward_pass_raises() -> None:
    loss = summed_cross_entropy(_random(N, C), _random(V, C, seed=1), TARGETS, None, 3)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        loss.backward()


class _LargestTensor(TorchDispatchMode):
    """Records the number of elements in the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


@pytest.mark.parametrize("cap", CAPS)
def test_only_one_chunk_of_logits_exists_at_a_time_and_no_chunk_is_saved(cap: float | None) -> None:
    hidden, weight = _random(640, 8, dtype=torch.float32), _random(1000, 8, dtype=torch.float32, seed=1)
    targets = torch.arange(640)
    saved: list[int] = []

    def record(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with _LargestTensor() as ours, torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        summed_cross_entropy(hidden, weight, targets, cap, 64).backward()
    with _LargestTensor() as plain:
        _reference_loss(hidden, weight, targets, cap).backward()
    assert plain.numel == 640 * 1000
    assert ours.numel == 64 * 1000
    assert sum(saved) <= hidden.numel() + weight.numel()


def test_summed_cross_entropy_multiplies_in_the_autocast_dtype_and_accumulates_in_float32() -> None:
    hidden, weight = _random(64, 32, dtype=torch.float32), _random(100, 32, dtype=torch.float32, seed=1)
    targets = torch.arange(64)
    exact = _output_and_gradients(lambda h, w: summed_cross_entropy(h, w, targets, None, 10), hidden, weight)

    def autocast(hidden: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return summed_cross_entropy(hidden, weight, targets, None, 10)

    half = _output_and_gradients(autocast, hidden, weight)
    assert [tensor.dtype for tensor in half] == [torch.float32] * 3
    assert not torch.equal(half[1], exact[1])
    _assert_near(half, exact, 0.02)


# All functions

COSINES, SINES = (table[:, None] for table in rope_table(6, 8, 100.0))
CASES: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "rms_norm": (lambda x: rms_norm(x, None, 1e-5), ((2, 6, 3, 8),)),
    "rms_norm with gain": (lambda x, gain: rms_norm(x, gain, 1e-5), ((2, 6, 3, 8), (8,))),
    "rotation": (lambda x: rotate(x, COSINES, SINES), ((2, 6, 3, 8),)),
    "relu_squared": (relu_squared, ((2, 6, 3, 8),)),
    "loss": (lambda h, w: summed_cross_entropy(h, w, torch.arange(30) % 20 - 1, 3.0, 7), ((30, 8), (20, 8))),
}


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_results_are_close_to_float32(name: str) -> None:
    function, shapes = CASES[name]
    inputs = [_random(*shape, seed=index, dtype=torch.bfloat16) for index, shape in enumerate(shapes)]
    in_bfloat16 = _output_and_gradients(function, *inputs)
    assert in_bfloat16[1].dtype == torch.bfloat16
    _assert_near(
        in_bfloat16, _output_and_gradients(function, *(tensor.detach().float().requires_grad_() for tensor in inputs)), 0.02
    )


@pytest.mark.parametrize("name", [name for name in CASES if name != "loss"])
def test_the_composite_version_matches_the_hand_written_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, shapes = CASES[name]
    inputs = [_random(*shape, seed=index) for index, shape in enumerate(shapes)]
    expected = _output_and_gradients(function, *inputs)
    monkeypatch.setattr(functions, "prefers_composite_ops", lambda x: True)
    _assert_near(_output_and_gradients(function, *inputs), expected, 1e-12)


@pytest.mark.parametrize("name", CASES)
def test_a_second_derivative_raises(name: str) -> None:
    """The backward passes support first derivatives only."""
    function, shapes = CASES[name]
    inputs = [_random(*shape, seed=index) for index, shape in enumerate(shapes)]
    gradient = torch.autograd.grad(function(*inputs).square().sum(), inputs[0], create_graph=True)[0]
    with pytest.raises(RuntimeError):
        gradient.square().sum().backward()


def test_select_targets_rounds_the_number_of_rows_up_only_under_autocast() -> None:
    hidden, targets = _random(2, 50, 4, grad=False), torch.arange(100).view(2, 50) - 30
    states, selected = select_targets(hidden, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded_states, rounded = select_targets(hidden, targets)
    assert selected.tolist() == list(range(70))
    assert rounded.tolist() == [*range(70), *[-1] * 58]
    assert torch.equal(states, hidden.flatten(0, 1)[30:])
    assert torch.equal(rounded_states[:70], states)

"""Attention in bfloat16 on a CPU has the same result and gradients as attention in float64, within the precision of bfloat16."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from tinylm.model import fused_attention as module
from tinylm.model.fused_attention import fused_attention

SHAPES = {  # B, H, K, T, S, D
    "short": (3, 2, 2, 5, 5, 8),
    "one position": (2, 2, 2, 1, 1, 8),
    "one block of queries": (2, 2, 2, 128, 128, 16),
    "several blocks of queries": (2, 2, 2, 300, 300, 16),
    "grouped": (2, 6, 2, 140, 140, 16),
    "cross-attention": (2, 4, 4, 7, 30, 8),
    "grouped cross-attention": (2, 4, 2, 30, 7, 8),
}


def _inputs(shape: tuple[int, ...], scale: float = 2.0) -> tuple[Tensor, ...]:
    """Return q, k, v and the gradient of the output in bfloat16, as transposed views like those in the model."""
    batch, heads, kv_heads, queries, keys, width = shape
    generator = torch.Generator().manual_seed(0)
    sizes = ((heads, queries), (kv_heads, keys), (kv_heads, keys), (heads, queries))
    tensors = (torch.randn(batch, length, count, width, generator=generator) for count, length in sizes)
    q, k, v, gradient = (tensor.bfloat16().transpose(1, 2) for tensor in tensors)
    return (q * scale).requires_grad_(), k.requires_grad_(), v.requires_grad_(), gradient


def _run(attention: Callable[..., Tensor], inputs: tuple[Tensor, ...], mask: Tensor | None, *, is_causal: bool) -> list[Tensor]:
    *inputs, gradient = inputs  # type: ignore[assignment]
    output = attention(*inputs, mask, is_causal=is_causal, grouped=inputs[0].shape[1] != inputs[1].shape[1])
    return [output, *torch.autograd.grad(output, inputs, gradient.to(output.dtype))]


def _reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, is_causal: bool, grouped: bool) -> Tensor:
    """Scores, softmax and weighted sum in separate steps. Queries without keys have an output of zero."""
    if grouped:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool)
    visible = (visible.tril() if is_causal else visible) if mask is None else mask
    return torch.nan_to_num(scores.masked_fill(~visible, -torch.inf).softmax(-1)) @ v


def _check(inputs: tuple[Tensor, ...], mask: Tensor | None, *, is_causal: bool) -> None:
    actual = _run(fused_attention, inputs, mask, is_causal=is_causal)
    double = tuple(tensor.detach().double().requires_grad_() for tensor in inputs)
    expected = _run(_reference, double, mask, is_causal=is_causal)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert ours.shape == theirs.shape
        assert torch.isfinite(ours).all()
        error = (ours.double() - theirs).norm() / theirs.norm().clamp_min(0.1)
        assert error < 0.012  # the rounding error of a bfloat16 number is up to 0.004


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_gradients_equal_those_in_float64(shape: tuple[int, ...], is_causal: bool) -> None:
    _check(_inputs(shape), None, is_causal=is_causal)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_inputs_may_have_any_layout(index: int) -> None:
    """torch's kernel reads wrong elements if those of a head are not contiguous."""
    inputs = list(_inputs(SHAPES["grouped"]))
    inputs[index] = inputs[index].detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_()
    _check(tuple(inputs), None, is_causal=True)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_only_some_inputs_may_need_a_gradient(index: int) -> None:
    *inputs, gradient = (tensor.detach() for tensor in _inputs(SHAPES["grouped"]))
    chosen = inputs[index].requires_grad_()
    output = fused_attention(*inputs, None, is_causal=True, grouped=True)
    assert "tinylm" in str(output.grad_fn)
    [actual] = torch.autograd.grad(output, chosen, gradient)
    expected = _run(fused_attention, _inputs(SHAPES["grouped"]), None, is_causal=True)[1 + index]
    assert torch.equal(actual, expected)


def test_long_sequences_and_sequences_without_keys_use_torchs_gradient() -> None:
    for keys in (0, 1025):
        *inputs, _ = _inputs((1, 1, 1, 3, keys, 4))
        assert "tinylm" not in str(fused_attention(*inputs, None, is_causal=False).grad_fn)
    _check(_inputs((1, 2, 2, 1024, 1024, 16)), None, is_causal=True)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("axes", [(0, 2, 3), (0, 3), (2, 3), (0, 1, 2, 3), (1, 2, 3)])
def test_masked_keys_have_no_influence(shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    """`axes` are the axes (B, H, T, S) of the mask that are not broadcast."""
    batch, heads, _, queries, keys, _ = shape
    size = [length if axis in axes else 1 for axis, length in enumerate((batch, heads, queries, keys))]
    mask = torch.rand(size, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[..., 0] = True
    _check(_inputs(shape), mask[0, 0] if axes == (2, 3) else mask, is_causal=False)


def test_queries_without_keys_have_no_gradient() -> None:
    inputs = _inputs(SHAPES["short"])
    mask = torch.ones(3, 1, 5, 5, dtype=torch.bool)
    mask[1, :, 2] = False
    _check(inputs, mask, is_causal=False)
    output, q_gradient, *_ = _run(fused_attention, inputs, mask, is_causal=False)
    assert not output[1, :, 2].any()
    assert not q_gradient[1, :, 2].any()


def test_large_scores_do_not_overflow() -> None:
    """A masked score may be far larger than the visible ones, and exp(score) would be infinite."""
    _check(_inputs(SHAPES["several blocks of queries"], scale=60.0), None, is_causal=True)


def test_the_custom_operators_support_torch_compile() -> None:
    for is_causal in (False, True):
        q, k, v, gradient = _inputs(SHAPES["grouped"])
        mask = None if is_causal else torch.rand(2, 1, 140, 140) < 0.9
        opcheck(module._attention, (q, k, v, mask, is_causal))
        attended, log_total = module._attention(q, k, v, mask, is_causal)
        saved = (x.detach() for x in (q, k, v, attended, log_total))
        opcheck(module._attention_gradients, (gradient, *saved, mask, is_causal))


@pytest.mark.parametrize(("dtype", "dropout"), [(torch.float32, 0.0), (torch.bfloat16, 0.5)])
def test_other_dtypes_and_dropout_use_torchs_gradient(dtype: torch.dtype, dropout: float) -> None:
    inputs = tuple(tensor.detach().to(dtype).requires_grad_() for tensor in _inputs(SHAPES["short"])[:3])
    torch.manual_seed(0)
    actual = fused_attention(*inputs, None, is_causal=True, dropout=dropout)
    torch.manual_seed(0)
    assert torch.equal(actual, F.scaled_dot_product_attention(*inputs, is_causal=True, dropout_p=dropout))

"""Weights packed for decoding: transposed float32, bfloat16 or int8.

Training multiplies each weight matrix by thousands of rows at once. Decoding multiplies it by only a few, so its speed is limited
by memory bandwidth. `pack` returns a copy of a network with smaller or faster linear layers. Embeddings, norms, attention and
residual sums keep the network's dtype.
"""

from __future__ import annotations

import copy
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylm.model.base import Model
from tinylm.model.lora import LoraLinear

_ModelT = TypeVar("_ModelT", bound=Model)
WeightKind = Literal["fp32", "bf16", "int8"]
WEIGHT_KINDS: tuple[WeightKind, ...] = ("fp32", "bf16", "int8")
_INT8_KERNEL_MAX_ROWS = 4
"""For up to this many rows, the int8 kernel is faster than a matrix product with a bfloat16 copy of the weights."""
_CACHED_COPY_MAX_ROWS = 64
"""For up to this many rows (a decoding batch), the bfloat16 copy is cached. A longer prompt amortizes the cost of a new copy."""


def _bias_of(linear: nn.Module) -> Tensor | None:
    bias = getattr(linear, "bias", None)
    return None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)


class TransposedLinear(nn.Module):
    """x W + b with W stored as (inputs, outputs), the fastest layout for matrix-vector products.

    With two or more rows, a row's result does not depend on the other rows. The usual layout does not guarantee this.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().t().contiguous(), requires_grad=False)
        self.bias = _bias_of(linear)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.t(), self.bias)


class BFloat16Linear(nn.Module):
    """A linear layer with bfloat16 weights, bfloat16 inputs and float32 accumulation. The output has the dtype of the input."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().bfloat16(), requires_grad=False)
        self.bias = _bias_of(linear)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x.bfloat16(), self.weight).to(x.dtype)
        return y if self.bias is None else y + self.bias


class Int8Linear(nn.Module):
    """Symmetric weight-only int8 quantization with one scale per output.

    Scales are rounded to bfloat16 before the weights are divided by them, because the kernel multiplies by bfloat16 scales. The
    kernel requires the number of inputs to be a multiple of 16, so weights and inputs are zero-padded.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(dim=1) / 127).clamp_min(1e-12).bfloat16()
        quantized = (weight / scale.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8)
        self.inputs = quantized.shape[1]
        self._padding = -self.inputs % 16
        self.register_buffer("weight", F.pad(quantized, (0, self._padding)))
        self.register_buffer("scale", scale)
        self.bias = _bias_of(linear)
        self._float_copy: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self._padding:
            rows = F.pad(rows, (0, self._padding))
        if len(rows) <= _INT8_KERNEL_MAX_ROWS and x.device.type == "cpu":
            y = torch._weight_int8pack_mm(rows.bfloat16(), self.weight, self.scale).to(x.dtype)
        else:
            weight = self._as_float(len(rows))
            y = F.linear(rows.to(weight.dtype), weight).to(x.dtype) * self.scale.to(x.dtype)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias

    def _as_float(self, rows: int) -> Tensor:
        """Return the int8 weights in a dtype with fast matrix products. bfloat16 represents every int8 exactly."""
        if self._float_copy is not None:
            return self._float_copy
        float_copy = self.weight.to(torch.bfloat16 if _has_native_bfloat16(self.weight.device) else torch.float32)
        if rows <= _CACHED_COPY_MAX_ROWS:
            self._float_copy = float_copy
        return float_copy


def _has_native_bfloat16(device: torch.device) -> bool:
    if device.type == "cpu":
        return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


_LAYERS = {"fp32": TransposedLinear, "bf16": BFloat16Linear, "int8": Int8Linear}


def pack(network: _ModelT, weights: WeightKind | None = "fp32") -> _ModelT:
    """Return a copy of `network` for inference, which shares all tensors outside linear layers. Do not train or save the copy.

    "fp32" changes only the order of summation. Measure how the other kinds affect the loss with `tinylm eval --weights`. None
    leaves linear layers unchanged. LoRA weights are always merged. On a GPU, "bf16" converts the whole network (see `to_bfloat16`).
    """
    if weights == "bf16" and network.device.type == "cuda":
        return to_bfloat16(network)
    memo = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    packed = copy.deepcopy(network, memo).eval()
    for parent in list(packed.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoraLinear):
                child = child.merged()
                setattr(parent, name, child)
            if weights is not None and type(child) is nn.Linear:
                setattr(parent, name, _LAYERS[weights](child))
    return packed


def round_to_bfloat16(network: _ModelT) -> _ModelT:
    """Return a copy of `network` for inference whose linear layers have weights that are rounded to bfloat16, stored in float32."""
    rounded = pack(network, None)
    for layer in rounded.modules():
        if type(layer) is nn.Linear:
            layer.weight = nn.Parameter(layer.weight.detach().bfloat16().float(), requires_grad=False)
    return rounded


def to_bfloat16(network: _ModelT) -> _ModelT:
    """Return a copy of `network` with all weights, and therefore also the residual stream and the KV cache, in bfloat16.

    On a GPU, this is faster than `BFloat16Linear`, which converts its inputs and outputs in separate kernels.
    """
    merged = pack(network, None)
    memo: dict[int, Any] = {}
    for tensor in (*merged.parameters(), *merged.buffers()):
        if tensor.is_floating_point():
            half = tensor.detach().bfloat16()
            memo[id(tensor)] = nn.Parameter(half, requires_grad=False) if isinstance(tensor, nn.Parameter) else half
    return copy.deepcopy(merged, memo)

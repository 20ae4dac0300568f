"""Weights laid out for reading them once per token, which is what decoding is.

A training step multiplies thousands of rows by a weight; a decoding step one row, or a few, and then the time is that of reading
the weight from memory. `pack` therefore replaces the linear layers of a copy of a network: float32 transposed, bfloat16 or int8.
Embeddings, norms, attention and sums stay in the network's own type.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylm.model.lora import LoraLinear
from tinylm.model.transformer import Transformer

WeightKind = Literal["fp32", "bf16", "int8"]
WEIGHT_KINDS: tuple[WeightKind, ...] = ("fp32", "bf16", "int8")
_FEW_ROWS = 4
"""Up to so many rows the int8 kernel beats a product with bfloat16 copies of the weight."""
_KEEP_UP_TO = 64
"""Rows of a decoding batch: more come from prompts, for which a copy made on the spot is paid once for many rows."""


def _bias_of(linear: nn.Module) -> Tensor | None:
    bias = getattr(linear, "bias", None)
    return None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)


class TransposedLinear(nn.Module):
    """x W + b with W stored (inputs, outputs): as fast as a matrix-vector product gets, and from two rows on every row's result is
    the same whatever rows stand beside it, which is not so of the usual layout.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().t().contiguous(), requires_grad=False)
        self.bias = _bias_of(linear)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.t(), self.bias)


class HalfLinear(nn.Module):
    """Weights and inputs in bfloat16, sums in float32 inside the kernel, outputs in the type of the input."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().bfloat16(), requires_grad=False)
        self.bias = _bias_of(linear)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x.bfloat16(), self.weight).to(x.dtype)
        return y if self.bias is None else y + self.bias


class Int8Linear(nn.Module):
    """Weight-only int8: one scale per output, 127 steps to its largest weight; inputs are not quantised.

    Scales are bfloat16 numbers, so that the kernel, which wants them so, multiplies by exactly what the weights were divided by.
    The kernel reads rows of a multiple of 16 numbers: shorter ones are filled up with zeros.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(dim=1) / 127).clamp_min(1e-12).bfloat16()
        steps = (weight / scale.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8)
        self.inputs = steps.shape[1]
        self._fill = -self.inputs % 16
        self.register_buffer("weight", F.pad(steps, (0, self._fill)))
        self.register_buffer("scale", scale)
        self.bias = _bias_of(linear)
        self._wide: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self._fill:
            rows = F.pad(rows, (0, self._fill))
        if len(rows) <= _FEW_ROWS and x.device.type == "cpu":
            y = torch._weight_int8pack_mm(rows.bfloat16(), self.weight, self.scale).to(x.dtype)
        else:
            wide = self._widened(len(rows))
            y = F.linear(rows.to(wide.dtype), wide).to(x.dtype) * self.scale.to(x.dtype)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias

    def _widened(self, rows: int) -> Tensor:
        """The steps in a type that matrix units multiply, kept for batches that decode. Every int8 is a bfloat16 exactly."""
        if self._wide is not None:
            return self._wide
        wide = self.weight.to(torch.bfloat16 if _native_bfloat16(self.weight.device) else torch.float32)
        if rows <= _KEEP_UP_TO:
            self._wide = wide
        return wide


def _native_bfloat16(device: torch.device) -> bool:
    if device.type == "cpu":
        return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


_LAYERS = {"fp32": TransposedLinear, "bf16": HalfLinear, "int8": Int8Linear}


def pack(network: Transformer, weights: WeightKind | None = "fp32") -> Transformer:
    """A network for inference that shares everything with `network` but its linear layers. Not to be trained or saved.

    float32 is bit for bit the same model up to the order of sums; for the others `tinylm eval --weights` tells what they cost.
    None leaves weights as they are: only additions of low rank are merged into them.
    """
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

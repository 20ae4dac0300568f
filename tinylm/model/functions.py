"""The element-wise work of a step, with backward passes written out: fewer kernels and fewer tensors kept than autograd's own.

On a CPU such work is a third of a small model's step when it is left to composite operations. A compiler, and GPUs,
whose kernels are already fused, get the plain formulas.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch.autograd.function import once_differentiable

from tinylm.cost.memory import LOSS_ROWS_OF_HALVES


def _left_to_others(x: Tensor) -> bool:
    return x.device.type != "cpu" or torch.compiler.is_compiling()


@library.custom_op("tinylm::kept", mutates_args=())
def _kept(like: Tensor, dropped: int) -> Tensor:
    """A mask in the shape of `like`, false for `dropped` of 65,536: 16 random bits each, where torch draws a float for each."""
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device).random_(-(1 << 63), None)
    mask: Tensor = words.view(torch.int16)[: like.numel()].view(like.shape) >= dropped - (1 << 15)
    return mask


@_kept.register_fake
def _(like: Tensor, dropped: int) -> Tensor:
    return torch.empty(like.shape, dtype=torch.bool, device=like.device)


class Dropout(torch.nn.Dropout):
    """Zero a share `p` (on a CPU the nearest of 65,536) of the numbers while training, and scale the others to keep the mean."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not self.p or input.device.type != "cpu":
            return super().forward(input)
        dropped = round(self.p * (1 << 16))
        if dropped == 1 << 16:
            return torch.zeros_like(input)
        return torch.where(_kept(input, dropped), input * ((1 << 16) / ((1 << 16) - dropped)), 0.0)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
        precise = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=precise)
        scale = length.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)
        normal = x * scale
        ctx.save_for_backward(normal, scale, gain)
        scaled: Tensor = normal if gain is None else normal * gain
        return scaled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """With n = x * scale: d/dx = scale * (g - n * mean(g * n))."""
        (g,) = gradients
        normal, scale, gain = ctx.saved_tensors
        along = g * normal
        gain_gradient = None
        if gain is not None:
            gain_gradient = along.flatten(0, -2).sum(0) if along.ndim > 1 else along.clone()
            along = along.mul_(gain)
            g = g * gain
        return torch.addcmul(g, normal, along.mean(dim=-1, keepdim=True), value=-1).mul_(scale), gain_gradient, None


def rms_norm(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * gain over the last axis (Zhang & Sennrich 2019), in the type of `x`."""
    if gain is not None:
        gain = gain.to(x.dtype)
    if _left_to_others(x):
        with torch.autocast(x.device.type, enabled=False):  # which would compute, and answer, in float32 on CUDA
            return F.rms_norm(x, x.shape[-1:], gain, eps)
    normal: Tensor = _RMSNorm.apply(x, gain, eps)  # type: ignore[no-untyped-call]
    return normal


def _turned(x: Tensor, cosines: Tensor, sines: Tensor, direction: int) -> Tensor:
    turned = torch.empty_like(x)
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    torch.mul(first, cosines, out=turned[..., :half]).addcmul_(second, sines, value=-direction)
    torch.mul(second, cosines, out=turned[..., half:]).addcmul_(first, sines, value=direction)
    return turned


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return _turned(x, cosines, sines, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """A rotation's transpose turns the other way."""
        cosines, sines = ctx.saved_tensors
        return _turned(gradients[0], cosines, sines, -1), None, None


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + D/2]) of x (..., D) by an angle; the tables (..., D/2) broadcast against it.

    The pairs are Llama's. Tables of another floating type are converted.
    """
    cosines, sines = cosines.to(x.dtype), sines.to(x.dtype)
    if _left_to_others(x):
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)
    turned: Tensor = _Rotation.apply(x, cosines, sines)  # type: ignore[no-untyped-call]
    return turned


class _ReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = x.relu()
        ctx.save_for_backward(positive)
        return positive.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        slope: Tensor = (gradients[0] * positive).mul_(2)
        return slope


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2 (So et al. 2021)."""
    if _left_to_others(x):
        return F.relu(x).square()
    squared: Tensor = _ReluSquared.apply(x)  # type: ignore[no-untyped-call]
    return squared


class _SummedCrossEntropy(torch.autograd.Function):
    """The gradient is made together with the loss, chunk by chunk: what is kept is as large as hidden states and weights."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, cap: float | None, chunk: int, dtype: torch.dtype
    ) -> Tensor:
        if dtype == torch.float16:
            chunk = min(chunk, LOSS_ROWS_OF_HALVES)
        matrix = weight.detach().to(dtype)
        total = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=hidden.device)
        hidden_gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        weight_gradient = torch.zeros_like(weight) if weight.requires_grad else None
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            states = hidden[part].to(dtype)
            losses, slopes = _losses_and_slopes(states @ matrix.T, targets[part], cap)
            total += losses.sum()
            slopes = slopes.to(dtype)
            if hidden_gradient is not None:
                hidden_gradient[part] = slopes @ matrix
            if weight_gradient is not None:
                if weight_gradient.dtype == dtype:
                    weight_gradient.addmm_(slopes.T, states)
                else:
                    weight_gradient += slopes.T @ states
            del slopes  # before the next chunk's logits are there
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Both were made for a gradient of one, and nobody else has them."""
        (g,) = gradients
        scaled = [None if saved is None else saved.mul_(g) for saved in ctx.saved_tensors]
        return (*scaled, None, None, None, None)


def _losses_and_slopes(logits: Tensor, targets: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
    """Losses (N,) of raw logits (N, V), and their derivatives (N, V), both times zero where the target is negative.

    On a CPU the derivatives take the place of the logits, where a second copy costs more than a pass of arithmetic.
    """
    counted = targets >= 0
    rows = targets.clamp_min(0).unsqueeze(1)
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    squashed = None
    if cap is not None:
        squashed = logits.div_(cap).tanh_()
        logits = squashed * cap
    if _left_to_others(logits):
        slopes = torch.log_softmax(logits, dim=-1)
        losses = slopes.gather(1, rows).squeeze(1).neg_().mul_(counted)
        slopes.exp_().mul_(counted.unsqueeze(1))
    else:
        logits.sub_(logits.amax(dim=-1, keepdim=True))
        wanted = logits.gather(1, rows)
        total = logits.exp_().sum(dim=-1, keepdim=True)
        losses = (total.log() - wanted).squeeze(1).mul_(counted)
        slopes = logits.mul_(counted.unsqueeze(1) / total)
    slopes.scatter_add_(1, rows, -counted.to(slopes.dtype).unsqueeze(1))
    if squashed is not None:
        slopes.mul_(squashed.square_().neg_().add_(1))
    return losses, slopes


def summed_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, cap: float | None, chunk: int) -> Tensor:
    """Sum of -log softmax(cap(hidden @ weight.T))[target] over the targets that are not negative, in nats, float32 at least.

    `hidden` (N, C), `weight` (V, C), `targets` (N,). At most `chunk` rows of logits exist at a time, and none is kept.
    `backward` can be called once.
    """
    dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else hidden.dtype
    total: Tensor = _SummedCrossEntropy.apply(hidden, weight, targets, cap, chunk, dtype)  # type: ignore[no-untyped-call]
    return total

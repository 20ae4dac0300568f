"""Elementwise operations and the loss, with hand-written backward passes.

They launch fewer kernels and save fewer tensors than composite operations under autograd, which would take a third of a small
model's training step on a CPU. Composite operations are used on GPUs and under torch.compile.

Legend: `N` rows, `C` width, `V` vocabulary, `D` head width.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinylm.cost.memory import FUSED_LOSS_FROM, LOSS_ROWS_FP16, fused_loss_rows, loss_block_rows
from tinylm.errors import first_line

_ROWS_MULTIPLE = 64
"""In bfloat16 on a CPU, the number of rows with a target is rounded up to a multiple of this number."""
_WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def prefers_composite_ops(x: Tensor) -> bool:
    """Whether to use composite operations: on a GPU, or while torch.compile traces the code."""
    return x.device.type != "cpu" or torch.compiler.is_compiling()


@library.custom_op("tinylm::keep_mask", mutates_args=())
def _keep_mask(like: Tensor, dropped: int) -> Tensor:
    """Return a boolean mask with the shape of `like`. Each element is False with probability `dropped` / 65,536.

    Draws 16 random bits per element, which is faster than drawing one float per element.
    """
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device).random_(-(1 << 63), None)
    mask: Tensor = words.view(torch.int16)[: like.numel()].view(like.shape) >= dropped - (1 << 15)
    return mask


@_keep_mask.register_fake
def _(like: Tensor, dropped: int) -> Tensor:
    return torch.empty(like.shape, dtype=torch.bool, device=like.device)


class Dropout(torch.nn.Dropout):
    """`nn.Dropout` with a cheaper mask on a CPU. There, `p` is rounded to the nearest multiple of 1 / 65,536."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not self.p or input.device.type != "cpu":
            return super().forward(input)
        dropped = round(self.p * (1 << 16))
        if dropped == 1 << 16:
            return torch.zeros_like(input)
        return torch.where(_keep_mask(input, dropped), input * ((1 << 16) / ((1 << 16) - dropped)), 0.0)


def attention_without_cudnn(device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which attention on CUDA does not use cuDNN. Use it where shapes vary, as in decoding and evaluation.

    cuDNN builds a plan for every new shape. For each new KV length, this took 60 ms on an H200, as long as 30 decoding steps.
    """
    return sdpa_kernel(_WITHOUT_CUDNN) if device.type == "cuda" else nullcontext()


def at_least_float32(x: Tensor) -> Tensor:
    """Convert 16-bit tensors to float32."""
    return x.float() if x.itemsize < 4 else x


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
        sum_dtype = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
        l2_norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=sum_dtype)
        scale = l2_norm.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)
        normed = x * scale
        ctx.save_for_backward(normed, scale, gain)
        output: Tensor = normed if gain is None else normed * gain
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """With n = x * scale: d/dx = scale * (g - n * mean(g * n))."""
        (g,) = gradients
        normed, scale, gain = ctx.saved_tensors
        product = g * normed
        gain_gradient = None
        if gain is not None:
            gain_gradient = product.flatten(0, -2).sum(0) if product.ndim > 1 else product.clone()
            product = product.mul_(gain)
            g = g * gain
        return torch.addcmul(g, normed, product.mean(dim=-1, keepdim=True), value=-1).mul_(scale), gain_gradient, None


def rms_norm(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * gain over the last axis (Zhang & Sennrich 2019), in the dtype of `x`."""
    if gain is not None:
        gain = gain.to(x.dtype)
    if prefers_composite_ops(x):
        with torch.autocast(x.device.type, enabled=False):  # on CUDA, autocast would return float32
            return F.rms_norm(x, x.shape[-1:], gain, eps)
    normed: Tensor = _RMSNorm.apply(x, gain, eps)  # type: ignore[no-untyped-call]
    return normed


def _rotate_pairs(x: Tensor, cosines: Tensor, sines: Tensor, direction: int) -> Tensor:
    """Rotate each pair by its angle in the tables, times `direction` (1 or -1)."""
    rotated = torch.empty_like(x)
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    torch.mul(first, cosines, out=rotated[..., :half]).addcmul_(second, sines, value=-direction)
    torch.mul(second, cosines, out=rotated[..., half:]).addcmul_(first, sines, value=direction)
    return rotated


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return _rotate_pairs(x, cosines, sines, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Rotate in the opposite direction: the transpose of a rotation is its inverse."""
        cosines, sines = ctx.saved_tensors
        return _rotate_pairs(gradients[0], cosines, sines, -1), None, None


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + D/2]) of x (..., D), as in Llama. The tables (..., D/2) broadcast against the pairs.

    Computes in the dtype of `x`.
    """
    cosines, sines = cosines.to(x.dtype), sines.to(x.dtype)
    if prefers_composite_ops(x):
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)
    rotated: Tensor = _Rotation.apply(x, cosines, sines)  # type: ignore[no-untyped-call]
    return rotated


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
        gradient: Tensor = (gradients[0] * positive).mul_(2)
        return gradient


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2 (So et al. 2021)."""
    if prefers_composite_ops(x):
        return F.relu(x).square()
    squared: Tensor = _ReluSquared.apply(x)  # type: ignore[no-untyped-call]
    return squared


LossFunction = Callable[[Tensor, Tensor, float | None], tuple[Tensor, Tensor]]
"""Logits (N, V), targets (N,) and the soft-cap -> losses (N,) and the gradients with respect to the logits (N, V)."""


def _add_chunks(
    sums: Tensor,
    hidden: Tensor,
    weight: Tensor,
    matrix: Tensor,
    chunk: int,
    compute: Callable[[Tensor, slice], tuple[Tensor, Tensor]],
) -> tuple[Tensor | None, Tensor | None]:
    """Add the losses to `sums` chunk by chunk, and return their gradients with respect to `hidden` (N, C) and `weight` (V, C).

    `matrix` is `weight` in the dtype of the matrix products. For the hidden states (chunk, C) of some rows, `compute` returns the
    losses (..., chunk) and their gradients with respect to the logits (chunk, V).
    """
    hidden_gradient = torch.empty_like(hidden) if hidden.requires_grad else None
    weight_gradient = torch.zeros_like(weight) if weight.requires_grad else None
    for start in range(0, hidden.shape[0], chunk):
        rows = slice(start, start + chunk)
        states = hidden[rows].to(matrix.dtype)  # (chunk, C)
        losses, logit_gradients = compute(states, rows)
        sums += losses.sum(dim=-1)
        logit_gradients = logit_gradients.to(matrix.dtype)  # (chunk, V)
        if hidden_gradient is not None:
            hidden_gradient[rows] = logit_gradients @ matrix
        if weight_gradient is not None:
            _add_product(weight_gradient, logit_gradients.T, states)
        del logit_gradients  # free it before the next chunk's logits are allocated
    return hidden_gradient, weight_gradient


class _SummedCrossEntropy(torch.autograd.Function):
    """Computes the loss and the gradients together, chunk by chunk. Saves only the gradients of the inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        cap: float | None,
        chunk: int,
        compiled: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        fused = fused_loss.function(hidden.shape[0] * weight.shape[0], hidden.device) if compiled else None
        if fused is not None:
            chunk = fused_loss_rows(hidden.shape[0], weight.shape[0], chunk)
        if dtype == torch.float16:
            chunk = min(chunk, LOSS_ROWS_FP16)
        matrix, loss_dtype = weight.detach().to(dtype), torch.promote_types(dtype, torch.float32)

        def compute(states: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
            if fused is not None:
                return fused(states @ matrix.T, targets[rows], cap)
            if not prefers_composite_ops(hidden):
                return _losses_and_logit_gradients_in_blocks(states @ matrix.T, targets[rows], cap)
            # Cast before the call. While torch.compile's frame evaluator is installed (even after a failed compilation), the
            # caller keeps a call's arguments alive until the call returns. A cast inside the function would therefore keep
            # the 16-bit product in memory together with its float32 copy.
            return _losses_and_logit_gradients((states @ matrix.T).to(loss_dtype), targets[rows], cap)

        total = torch.zeros((), dtype=loss_dtype, device=hidden.device)
        ctx.save_for_backward(*_add_chunks(total, hidden, weight, matrix, chunk, compute))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the saved gradients in place, which saves memory and makes a second backward pass raise an error."""
        (g,) = gradients
        scaled = [None if saved is None else saved.mul_(g) for saved in ctx.saved_tensors]
        return (*scaled, None, None, None, None, None)


class Teacher(Protocol):
    """The distribution that a model learns to predict in addition to the targets of one micro-batch (distillation)."""

    @property
    def weight(self) -> float:
        """The share of the teacher in the loss, in (0, 1]."""

    def probabilities(self, rows: slice) -> Tensor:
        """Return the probabilities (rows, V) at some positions of the micro-batch, whose positions (B, T) are flattened."""


class _SummedDistillation(torch.autograd.Function):
    """Like `_SummedCrossEntropy`, but for the loss with a teacher. The second output contains the terms of the loss."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        cap: float | None,
        chunk: int,
        teacher: Teacher,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        if dtype == torch.float16:
            chunk = min(chunk, LOSS_ROWS_FP16)
        matrix, loss_dtype = weight.detach().to(dtype), torch.promote_types(dtype, torch.float32)

        def compute(states: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
            probabilities = teacher.probabilities(rows).to(loss_dtype)
            logits = (states @ matrix.T).to(loss_dtype)
            return _distillation_losses_and_logit_gradients(logits, targets[rows], probabilities, teacher.weight, cap)

        terms = torch.zeros(2, dtype=loss_dtype, device=hidden.device)
        ctx.save_for_backward(*_add_chunks(terms, hidden, weight, matrix, chunk, compute))
        ctx.mark_non_differentiable(terms)
        return (1 - teacher.weight) * terms[0] + teacher.weight * terms[1], terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the saved gradients in place, as `_SummedCrossEntropy` does."""
        scaled = [None if saved is None else saved.mul_(gradients[0]) for saved in ctx.saved_tensors]
        return (*scaled, None, None, None, None, None)


def _distillation_losses_and_logit_gradients(
    logits: Tensor, targets: Tensor, teacher: Tensor, share: float, cap: float | None
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy and the divergence from the teacher of each row, (2, N), and the gradients of the loss, (N, V).

    The gradients are those of (1 - share) * cross-entropy + share * divergence w.r.t. the logits before soft-capping. With p the
    model's and q the teacher's probabilities, they are p - (1 - share) * onehot(target) - share * q. Everything is 0 for negative
    targets. Logits (N, V) and `teacher`, the probabilities q (N, V), must be float32 or float64. The gradients overwrite the
    logits.
    """
    valid = targets >= 0
    index = targets.clamp_min(0).unsqueeze(1)  # (N, 1)
    squashed = None
    if cap is not None:
        squashed = logits.div_(cap).tanh_()
        logits = squashed * cap
    logits.sub_(logits.amax(dim=-1, keepdim=True))
    target_logits = logits.gather(1, index).squeeze(1)
    expected_logits = torch.einsum("nv,nv->n", teacher, logits)  # under the teacher's distribution
    total = logits.exp_().sum(dim=-1, keepdim=True)
    normalizer = total.log().squeeze(1)
    negative_entropy = torch.xlogy(teacher, teacher).sum(dim=-1)
    losses = torch.stack((normalizer - target_logits, negative_entropy + normalizer - expected_logits)) * valid
    gradients = logits.div_(total).sub_(teacher, alpha=share)
    gradients.scatter_add_(1, index, torch.full_like(index, share - 1, dtype=gradients.dtype))
    if squashed is not None:
        gradients.mul_(squashed.square_().neg_().add_(1))
    return losses, gradients.mul_(valid.unsqueeze(1))


def distillation_loss(logits: Tensor, targets: Tensor, teacher: Teacher) -> Tensor:
    """Return the summed loss with a teacher and its terms for logits (N, V) and targets (N,), as `summed_cross_entropy` does."""
    logprobs = at_least_float32(logits).log_softmax(dim=-1)
    probabilities = teacher.probabilities(slice(None)).to(logprobs.dtype)
    cross_entropy = -logprobs.gather(1, targets.long().clamp_min(0).unsqueeze(1)).squeeze(1)
    divergence = (torch.xlogy(probabilities, probabilities) - probabilities * logprobs).sum(dim=-1)
    terms = (torch.stack((cross_entropy, divergence)) * (targets >= 0)).sum(dim=1)
    loss = (1 - teacher.weight) * terms[0] + teacher.weight * terms[1]
    return torch.cat((loss[None], terms.detach()))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b. If torch supports it, a product of 16-bit matrices is added to a float32 `total` without rounding."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif adds_product_in_float32(a.dtype, a.device.type):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b


@functools.cache
def adds_product_in_float32(dtype: torch.dtype, device_type: str) -> bool:
    """Whether torch can add a product of 16-bit matrices to a float32 matrix in one call, as it can on CUDA since version 2.8."""
    if device_type != "cuda":
        return False
    ones = torch.ones(16, 16, dtype=dtype, device=device_type)
    total = torch.ones(16, 16, device=device_type)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):  # not implemented for this device or dtype; no such argument
        return False
    return bool((total == 17).all())


def losses_and_logit_gradients(logits: Tensor, targets: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
    """Like `_losses_and_logit_gradients`, but written so that torch.compile fuses it into one kernel.

    `logits` may have any dtype and are not modified. The losses are at least float32; the gradients have the dtype of the logits.
    """
    valid = (targets >= 0).unsqueeze(1)  # (N, 1)
    index = targets.clamp_min(0).unsqueeze(1)  # (N, 1)
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    slope = None
    if cap is not None:
        squashed = torch.tanh(x / cap)
        x, slope = squashed * cap, 1 - squashed * squashed
    normalizer = torch.logsumexp(x, dim=-1, keepdim=True)  # (N, 1)
    losses = ((normalizer - x.gather(1, index)) * valid).squeeze(1)
    gradients = (x - normalizer).exp() - (torch.arange(x.shape[1], device=x.device) == index).to(x.dtype)
    if slope is not None:
        gradients = gradients * slope
    return losses, (gradients * valid).to(logits.dtype)


class FusedLoss:
    """`losses_and_logit_gradients`, compiled on CUDA if Triton is installed and the logits are large.

    If compilation fails, it warns once and uses the uncompiled loss from then on.
    """

    enabled = True

    def function(self, logits: int, device: torch.device) -> LossFunction | None:
        """Return the compiled loss for `logits` logits in total, or None if the uncompiled loss should be used."""
        if device.type != "cuda" or 4 * logits < FUSED_LOSS_FROM or not self.enabled or not has_triton():
            return None
        return self

    def __call__(self, logits: Tensor, targets: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
        if self.enabled:
            try:
                with torch.autocast(logits.device.type, enabled=False):
                    return _compiled_loss()(logits, targets, cap)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # the compiler's errors have no common base class, and some come from the tools it runs
                self.enabled = False
                warnings.warn(f"the loss cannot be compiled ({first_line(error)}); using the uncompiled loss", stacklevel=2)
        losses, gradients = _losses_and_logit_gradients(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, cap)
        return losses, gradients.to(logits.dtype)


fused_loss = FusedLoss()


@functools.cache
def _compiled_loss() -> LossFunction:
    return torch.compile(losses_and_logit_gradients, dynamic=False)


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed, which torch.compile needs on CUDA."""
    return importlib.util.find_spec("triton") is not None


def _losses_and_logit_gradients(logits: Tensor, targets: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
    """Return losses (N,) and their gradients (N, V) w.r.t. the logits before soft-capping. Both are 0 for negative targets.

    Logits must be float32 or float64. On a CPU, the gradients overwrite the logits, because copying them would take longer than
    an arithmetic pass.
    """
    valid = targets >= 0
    index = targets.clamp_min(0).unsqueeze(1)  # (N, 1)
    squashed = None
    if cap is not None:
        squashed = logits.div_(cap).tanh_()
        logits = squashed * cap
    if prefers_composite_ops(logits):
        gradients = torch.log_softmax(logits, dim=-1)
        losses = gradients.gather(1, index).squeeze(1).neg_().mul_(valid)
        gradients.exp_().mul_(valid.unsqueeze(1))
    else:
        logits.sub_(logits.amax(dim=-1, keepdim=True))
        target_logits = logits.gather(1, index)
        total = logits.exp_().sum(dim=-1, keepdim=True)
        losses = (total.log() - target_logits).squeeze(1).mul_(valid)
        gradients = logits.mul_(valid.unsqueeze(1) / total)
    gradients.scatter_add_(1, index, -valid.to(gradients.dtype).unsqueeze(1))
    if squashed is not None:
        gradients.mul_(squashed.square_().neg_().add_(1))
    return losses, gradients


def _losses_and_logit_gradients_in_blocks(logits: Tensor, targets: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
    """Like `_losses_and_logit_gradients`, but for logits of any dtype, and for the rows of one block at a time (see `LOSS_BLOCK`).

    The gradients overwrite the logits.
    """
    dtype, rows = torch.promote_types(logits.dtype, torch.float32), loss_block_rows(logits.shape[1])
    losses = []
    for block, ids in zip(torch.split(logits, rows), torch.split(targets, rows), strict=True):
        block_losses, gradients = _losses_and_logit_gradients(block.to(dtype), ids, cap)
        losses.append(block_losses)
        if gradients.data_ptr() != block.data_ptr():
            block.copy_(gradients)
        del gradients  # free it before the next block is converted
    return torch.cat(losses), logits


def select_targets(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (B, T, C) and targets (B, T) -> the rows whose target is not negative: states (N, C) and ids (N,).

    In bfloat16 on a CPU, N is rounded up with rows whose id is -1, because oneDNN compiles a kernel for each new shape.
    """
    flat = targets.flatten()
    chosen = (flat >= 0).nonzero().squeeze(1)
    ids = flat[chosen].long()
    if hidden.device.type == "cpu" and torch.is_autocast_enabled("cpu") and (missing := -len(ids) % _ROWS_MULTIPLE):
        chosen, ids = F.pad(chosen, (0, missing)), F.pad(ids, (0, missing), value=-1)
    return hidden.flatten(0, 1)[chosen], ids


def summed_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cap: float | None,
    chunk: int,
    *,
    compiled: bool = True,
    teacher: Teacher | None = None,
) -> Tensor:
    """Return the sum of -log softmax(softcap(hidden @ weight.T))[target] over non-negative targets, in nats and at least float32.

    `hidden` (N, C), `weight` (V, C), `targets` (N,). `cap`: softcap(x) = cap * tanh(x / cap), or no cap if None. At most
    `chunk` rows of logits exist at a time, and none are saved for the backward pass. The backward pass can run only once.
    `compiled`: use the compiled loss if `FusedLoss` provides one.

    With a `teacher`, returns a vector (3,): the loss to minimize, the cross-entropy and the Kullback-Leibler divergence from the
    teacher's distribution to the model's, all summed over non-negative targets. With w = `teacher.weight`, the loss is (1 - w)
    times the cross-entropy plus w times the divergence (Hinton et al. 2015). Only the loss has a gradient.
    """
    dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else hidden.dtype
    if teacher is not None:
        loss, terms = _SummedDistillation.apply(hidden, weight, targets, cap, chunk, teacher, dtype)  # type: ignore[no-untyped-call]
        return torch.cat((loss[None], terms))
    total: Tensor = _SummedCrossEntropy.apply(hidden, weight, targets, cap, chunk, compiled, dtype)  # type: ignore[no-untyped-call]
    return total

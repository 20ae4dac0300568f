"""Muon: momentum whose update is made orthogonal (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

Equal matrices are stacked and orthogonalised together, in the floating type that is fast on the device. In float32 the
mathematics is that of `torch.optim.Muon` with `adjust_lr_fn="original"`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = {
    # Jordan et al. 2024: the same polynomial a x + b x^3 + c x^5 in every iteration; five of them are usual.
    "classic": ((3.4445, -4.7750, 2.0315),),
    # Amsel et al. 2025: each polynomial is the best for what the one before leaves, of singular values in [0.01, 1]. Three
    # bring them to 1 +- 0.27, four to 1 +- 0.013.
    "polar_express": (
        (8.0934, -23.6205, 17.4462),
        (3.6366, -2.7219, 0.5365),
        (2.6613, -1.9772, 0.4526),
        (1.9562, -1.3375, 0.3839),
        (1.875, -1.25, 0.375),
    ),
}
_MOMENTUM_AT_FIRST = 0.85


def orthogonalise(matrices: Tensor, steps: int, coefficients: str = "classic") -> Tensor:
    """Newton-Schulz iteration: (N, rows, columns) with their singular values pulled towards one."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    polynomials = COEFFICIENTS[coefficients]
    for step in range(steps):
        a, b, c = polynomials[min(step, len(polynomials) - 1)]
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def orthogonalised(matrices: Sequence[Tensor], steps: int, coefficients: str, dtype: torch.dtype) -> list[Tensor]:
    """Each matrix orthogonalised, those of one shape in one go; computed and returned in `dtype`."""
    members: dict[torch.Size, list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        members[matrix.shape].append(index)
    results = list(matrices)
    for shape, indices in members.items():
        stack = torch.empty((len(indices), *shape), dtype=dtype, device=matrices[0].device)
        for place, index in zip(stack, indices, strict=True):
            place.copy_(matrices[index])
        for index, result in zip(indices, orthogonalise(stack, steps, coefficients), strict=True):
            results[index] = result
    return results


class Muon(torch.optim.Optimizer):
    """For matrices. `rows[parameter]`, when given, says into which row blocks it falls, each a matrix of its own.

    The rate is per unit of spectral norm, times sqrt(rows / columns) for tall matrices. `momentum_warmup` steps lead the
    momentum from 0.85 to `momentum`. Weight decay is decoupled; with `cautious` (Chen et al. 2025) only where the update
    itself moves a weight towards zero.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        rows: Mapping[Tensor, tuple[int, ...]] | None = None,
        *,
        lr: float = 0.02,
        momentum: float = 0.95,
        momentum_warmup: int = 0,
        steps: int = 5,
        coefficients: str = "classic",
        weight_decay: float = 0.0,
        cautious: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "momentum_warmup": momentum_warmup,
            "steps": steps,
            "coefficients": coefficients,
            "weight_decay": weight_decay,
            "cautious": cautious,
        }
        super().__init__(params, defaults)
        self._rows = dict(rows or {})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            self._step_group(group)

    def _step_group(self, group: dict[str, Any]) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return
        updates = self._nesterov(parameters, group)
        pieces = [piece for pair in zip(parameters, updates, strict=True) for piece in self._matrices(*pair)]
        directions = orthogonalised([update for _, update in pieces], group["steps"], group["coefficients"], self._dtype)
        matrices = [matrix for matrix, _ in pieces]
        decay = group["lr"] * group["weight_decay"]
        if decay and group["cautious"]:
            for matrix, direction in zip(matrices, directions, strict=True):
                matrix.addcmul_(matrix, (matrix * direction > 0).to(matrix.dtype), value=-decay)
        elif decay:
            torch._foreach_mul_(parameters, 1 - decay)
        by_scale: dict[float, list[int]] = defaultdict(list)
        for index, matrix in enumerate(matrices):
            by_scale[math.sqrt(max(1.0, matrix.shape[0] / matrix.shape[1]))].append(index)
        for scale, indices in by_scale.items():
            chosen = [matrices[index] for index in indices]
            moves = [directions[index].to(matrices[0].dtype) for index in indices]
            torch._foreach_add_(chosen, moves, alpha=-group["lr"] * scale)

    def _nesterov(self, parameters: list[Tensor], group: dict[str, Any]) -> tuple[Tensor, ...]:
        """Momentum's update, a step ahead."""
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
                self.state[parameter]["step"] = torch.zeros(())
        buffers = [self.state[parameter]["momentum"] for parameter in parameters]
        counts = [self.state[parameter]["step"] for parameter in parameters]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        warmth = min(1.0, float(counts[0]) / group["momentum_warmup"]) if group["momentum_warmup"] else 1.0
        momentum = _MOMENTUM_AT_FIRST + warmth * (group["momentum"] - _MOMENTUM_AT_FIRST)
        torch._foreach_add_(counts, 1)
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        return torch._foreach_lerp(gradients, buffers, momentum)

    def _matrices(self, parameter: Tensor, update: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        sizes = list(self._rows.get(parameter, (parameter.shape[0],)))
        yield from zip(torch.split(parameter, sizes), torch.split(update, sizes), strict=True)

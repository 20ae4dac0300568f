"""Muon: momentum whose update is made orthogonal (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

Equal matrices are stacked and orthogonalised together, in float32 where bfloat16 is slow. The mathematics is that of
`torch.optim.Muon` with `adjust_lr_fn="original"`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int) -> Tensor:
    """Newton-Schulz iteration: (..., rows, columns) with its singular values pulled towards one."""
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x.mT if tall else x
    return result


def _is_fast_in_bfloat16(device: torch.device) -> bool:
    """Older GPUs only emulate it."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


class Muon(torch.optim.Optimizer):
    """For matrices. `rows[i]`, when given, says into which row blocks parameter i falls, each a matrix of its own."""

    def __init__(
        self,
        params: Sequence[Tensor],
        rows: Sequence[tuple[int, ...] | None] | None = None,
        *,
        lr: float = 0.02,
        momentum: float = 0.95,
        steps: int = 5,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "steps": steps, "weight_decay": weight_decay})
        self._rows = list(rows) if rows is not None else [None] * len(params)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            self._step_group(group)

    def _step_group(self, group: dict[str, Any]) -> None:
        stacks: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for parameter, rows in zip(group["params"], self._rows, strict=True):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            buffer = state["momentum"]
            buffer.lerp_(parameter.grad, 1 - group["momentum"])
            update = parameter.grad.lerp(buffer, group["momentum"])  # Nesterov
            sizes = rows or (parameter.shape[0],)
            for matrix, part in zip(parameter.split(sizes), update.split(sizes), strict=True):
                stacks[(matrix.shape[0], matrix.shape[1])].append((matrix, part))
        for (height, width), members in stacks.items():
            stacked = torch.stack([update for _, update in members])
            if _is_fast_in_bfloat16(stacked.device):
                stacked = stacked.bfloat16()
            updates = orthogonalise(stacked, group["steps"])
            rate = group["lr"] * math.sqrt(max(1.0, height / width))
            matrices = [matrix for matrix, _ in members]
            if group["weight_decay"]:
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(matrices, list(updates.to(matrices[0].dtype).unbind()), alpha=-rate)

"""Muon: momentum whose update is made orthogonal (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

Equal matrices are stacked and orthogonalised together, in the floating type that is fast on the device. In float32 the
mathematics is that of `torch.optim.Muon` with `adjust_lr_fn="original"`. Where several processes train together, each matrix is
orthogonalised by one of them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:  # a second of import that only several processes need
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Placement

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
    itself moves a weight towards zero. `mesh`: the processes that train together, all stepping with equal parameters and
    gradients, or each with its rows of them (`fully_shard`).

    As with torch's fused optimisers, a step changes nothing but its count where `found_inf`, a number on the device, is 1.
    """

    found_inf: Tensor | None = None

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
        mesh: DeviceMesh | None = None,
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
        self._mesh = mesh

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            self._step_group(group)

    def _step_group(self, group: dict[str, Any]) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return
        updates = self._nesterov(parameters, group)
        directions = self._directions(parameters, updates, group)
        weights = [_own(parameter) for parameter in parameters]
        decay = group["lr"] * group["weight_decay"]
        kept: float | Tensor = 1 - decay
        if self.found_inf is not None:
            usable = 1 - self.found_inf.double()
            kept = 1 - decay * usable
            torch._foreach_mul_(directions, usable)
        if decay and group["cautious"]:
            for weight, direction in zip(weights, directions, strict=True):
                weight.addcmul_(weight, (weight * direction > 0).to(weight.dtype), value=-decay)
        elif decay:
            torch._foreach_mul_(weights, kept)
        torch._foreach_add_(weights, directions, alpha=-group["lr"])

    def _nesterov(self, parameters: list[Tensor], group: dict[str, Any]) -> tuple[Tensor, ...]:
        """Momentum's update, a step ahead; of what is spread, this process's rows."""
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
                self.state[parameter]["step"] = torch.zeros(())
        buffers = [_own(self.state[parameter]["momentum"]) for parameter in parameters]
        counts = [self.state[parameter]["step"] for parameter in parameters]
        gradients = [_own(parameter.grad) for parameter in parameters if parameter.grad is not None]
        if self.found_inf is not None:  # momentum towards itself stays what it is
            pairs = zip(buffers, gradients, strict=True)
            gradients = [torch.where(self.found_inf > 0, buffer, gradient) for buffer, gradient in pairs]
        warmth = min(1.0, float(counts[0]) / group["momentum_warmup"]) if group["momentum_warmup"] else 1.0
        momentum = _MOMENTUM_AT_FIRST + warmth * (group["momentum"] - _MOMENTUM_AT_FIRST)
        torch._foreach_add_(counts, 1)
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        return torch._foreach_lerp(gradients, buffers, momentum)

    def _directions(self, parameters: list[Tensor], updates: Sequence[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """The update of each parameter made orthogonal and scaled, in the parameter's type."""
        if self._mesh is None:
            whole = self._orthogonal([(update, self._blocks(p)) for p, update in zip(parameters, updates, strict=True)], group)
            return [direction.to(update.dtype) for direction, update in zip(whole, updates, strict=True)]
        return self._directions_together(parameters, updates, group, self._mesh)

    def _directions_together(
        self, parameters: list[Tensor], updates: Sequence[Tensor], group: dict[str, Any], mesh: DeviceMesh
    ) -> list[Tensor]:
        """The same by all processes: those of one shape are stacked, dealt out whole, and brought back where they were."""
        from torch.distributed.tensor import Replicate, Shard

        alike: dict[tuple[torch.Size, tuple[int, ...]], list[int]] = defaultdict(list)
        for index, parameter in enumerate(parameters):
            alike[parameter.shape, self._blocks(parameter)].append(index)
        here: Placement = Shard(1) if hasattr(parameters[0], "to_local") else Replicate()
        shares = []
        for (shape, _), indices in alike.items():
            stack = torch.stack([updates[index].to(self._dtype) for index in indices])
            shares.append(_moved(stack, torch.Size((len(indices), *shape)), mesh, here, Shard(0)))
        matrices = [(matrix, blocks) for share, (_, blocks) in zip(shares, alike, strict=True) for matrix in share]
        done = iter(self._orthogonal(matrices, group))
        directions = list(updates)
        for share, ((shape, _), indices) in zip(shares, alike.items(), strict=True):
            stack = torch.stack([next(done) for _ in share]) if len(share) else share
            brought = _moved(stack, torch.Size((len(indices), *shape)), mesh, Shard(0), here)
            for index, direction in zip(indices, brought, strict=True):
                directions[index] = direction.to(updates[index].dtype)
        return directions

    def _orthogonal(self, updates: Sequence[tuple[Tensor, tuple[int, ...]]], group: dict[str, Any]) -> list[Tensor]:
        """Each whole update with every row block of it orthogonalised, and scaled if it is tall."""
        pieces = [piece for update, blocks in updates for piece in torch.split(update, list(blocks))]
        done = iter(orthogonalised(pieces, group["steps"], group["coefficients"], self._dtype))
        return [
            torch.cat([_scaled(next(done)) for _ in blocks]) if len(blocks) > 1 else _scaled(next(done)) for _, blocks in updates
        ]

    def _blocks(self, parameter: Tensor) -> tuple[int, ...]:
        return self._rows.get(parameter, (parameter.shape[0],))


def _scaled(direction: Tensor) -> Tensor:
    scale = math.sqrt(max(1.0, direction.shape[0] / direction.shape[1]))
    return direction if scale == 1.0 else direction * scale


def _own(tensor: Tensor) -> Tensor:
    """This process's rows of a tensor that is spread, else the tensor."""
    own: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return own


def _moved(own: Tensor, shape: torch.Size, mesh: DeviceMesh, before: Placement, after: Placement) -> Tensor:
    """A stack of matrices of which this process holds `own`, spread over the processes in another way."""
    from torch.distributed.tensor import DTensor

    stride = (shape[1] * shape[2], shape[2], 1)
    spread = DTensor.from_local(own, mesh, [before], run_check=False, shape=shape, stride=stride)
    return spread.redistribute(placements=[after]).to_local()

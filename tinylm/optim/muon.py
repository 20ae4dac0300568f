"""Muon: momentum with orthogonalized updates (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

Updates are orthogonalized by Newton-Schulz iterations, for which matrices of the same shape are stacked, or by a rational function
(`optim.rational`). In float32, updates with Newton-Schulz iterations match `torch.optim.Muon` with
`adjust_lr_fn="original"`. In distributed training, each matrix is orthogonalized by only one process.

Legend: `N` matrices of the same shape, `R` rows, `C` columns.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tinylm.optim import rational
from tinylm.optim.without_dynamo import WithoutDynamo

if TYPE_CHECKING:  # these imports take a second and are only needed in distributed training
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Placement

COEFFICIENTS = {
    # Jordan et al. 2024: the same polynomial a x + b x^3 + c x^5 in every iteration, usually for five iterations.
    "classic": ((3.4445, -4.7750, 2.0315),),
    # Amsel et al. 2025: each polynomial is optimal for the output of the previous one, given singular values in [0.01, 1].
    # Three iterations map them to 1 +- 0.27, four to 1 +- 0.013.
    "polar_express": (
        (8.0934, -23.6205, 17.4462),
        (3.6366, -2.7219, 0.5365),
        (2.6613, -1.9772, 0.4526),
        (1.9562, -1.3375, 0.3839),
        (1.875, -1.25, 0.375),
    ),
}
"""(a, b, c) for each Newton-Schulz iteration. Further iterations repeat the last polynomial."""
_INITIAL_MOMENTUM = 0.85
"""Momentum at the start of its warmup."""


def orthogonalize(matrices: Tensor, steps: int, coefficients: str = "classic") -> Tensor:
    """Push the singular values of each matrix toward 1 with Newton-Schulz iterations. `matrices` and the result are (N, R, C)."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices  # wide or square, so that x @ x.mT is the smaller Gram matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    polynomials = COEFFICIENTS[coefficients]
    for step in range(steps):
        a, b, c = polynomials[min(step, len(polynomials) - 1)]
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def orthogonalize_all(
    matrices: Sequence[Tensor], steps: int, coefficients: str, dtype: torch.dtype, *, scale: bool = False
) -> list[Tensor]:
    """Orthogonalize (R, C) matrices in one batch per shape. Both the computation and the results use `dtype`.

    If `scale` is set, the results of tall matrices are multiplied by sqrt(R / C).
    """
    indices_by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        indices_by_shape[matrix.shape].append(index)
    results = list(matrices)
    for shape, indices in indices_by_shape.items():
        stack = torch.empty((len(indices), *shape), dtype=dtype, device=matrices[0].device)  # (N, R, C)
        torch._foreach_copy_(list(stack), [matrices[index] for index in indices])
        directions = orthogonalize(stack, steps, coefficients)
        factor = _scale(matrices[indices[0]]) if scale else 1.0
        if factor != 1.0:
            directions = directions * factor
        if directions.is_cuda:
            # The result for a tall matrix is a transposed view. torch's _foreach functions launch one kernel per tensor if their
            # arguments have different strides. On a CPU, strides make no difference.
            directions = directions.contiguous()
        for index, result in zip(indices, directions, strict=True):
            results[index] = result
    return results


class Muon(WithoutDynamo, torch.optim.Optimizer):
    """Muon for parameters that are matrices.

    If a parameter stacks several matrices, `rows` contains the number of rows in each matrix. The spectral norm of an update is
    approximately `lr`, multiplied by sqrt(R / C) for tall matrices. The momentum rises linearly from 0.85 to `momentum` over
    `momentum_warmup` steps. Weight decay is decoupled. `cautious` weight decay (Chen et al. 2025) applies only to weights that the
    update moves toward zero. `orthogonalization` selects Newton-Schulz iterations, configured by `steps` and `coefficients`, or a
    rational function. Both compute in `dtype`; the rational function requires float32 or float64.

    `mesh` contains the processes that train together. Parameters and gradients are either replicated or sharded
    (`fully_shard`).

    Like torch's fused optimizers, this optimizer skips the update if `found_inf`, a scalar on the device, is 1. Unlike them, it
    counts skipped steps in the momentum warmup.
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
        orthogonalization: Literal["newton_schulz", "rational"] = "newton_schulz",
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
            "orthogonalization": orthogonalization,
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
        decay = group["lr"] * group["weight_decay"]
        directions = self._directions(parameters, updates, group)
        weights = [_local(parameter) for parameter in parameters]
        shrink: float | Tensor = 1 - decay
        if self.found_inf is not None:
            usable = 1 - self.found_inf.double()
            # Both factors have the dtype of the tensors they scale. If not, _foreach_mul_ launches one kernel per tensor on CUDA.
            shrink = (1 - decay * usable).to(weights[0].dtype)
            torch._foreach_mul_(directions, usable.to(directions[0].dtype))
        if decay and group["cautious"]:  # if the update is skipped, all directions are zero, so no weight decays
            for weight, direction in zip(weights, directions, strict=True):
                weight.addcmul_(weight, (weight * direction > 0).to(weight.dtype), value=-decay)
        elif decay:
            torch._foreach_mul_(weights, shrink)
        torch._foreach_add_(weights, directions, alpha=-group["lr"])

    def _nesterov(self, parameters: list[Tensor], group: dict[str, Any]) -> tuple[Tensor, ...]:
        """Update the momentum buffers and return the Nesterov update for each parameter or for this process's shard of it."""
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
                self.state[parameter]["step"] = torch.zeros(())
        buffers = [_local(self.state[parameter]["momentum"]) for parameter in parameters]
        counts = [self.state[parameter]["step"] for parameter in parameters]
        gradients = [_local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        if self.found_inf is not None:  # interpolating a buffer with itself leaves it unchanged
            pairs, skipped = zip(buffers, gradients, strict=True), self.found_inf > 0
            gradients = [torch.where(skipped, buffer, gradient) for buffer, gradient in pairs]
        warmed_up = min(1.0, float(counts[0]) / group["momentum_warmup"]) if group["momentum_warmup"] else 1.0
        momentum = _INITIAL_MOMENTUM + warmed_up * (group["momentum"] - _INITIAL_MOMENTUM)
        torch._foreach_add_(counts, 1)
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        return torch._foreach_lerp(gradients, buffers, momentum)

    def _directions(self, parameters: list[Tensor], updates: Sequence[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Return the orthogonalized and scaled update for each parameter, in the dtype of `updates`."""
        if self._mesh is None:
            pairs = [(update, self._row_blocks(p)) for p, update in zip(parameters, updates, strict=True)]
            orthogonal = self._orthogonalize_blocks(pairs, group)
            return _cast_all(orthogonal, updates)
        return self._distributed_directions(parameters, updates, group, self._mesh)

    def _distributed_directions(
        self, parameters: list[Tensor], updates: Sequence[Tensor], group: dict[str, Any], mesh: DeviceMesh
    ) -> list[Tensor]:
        """Compute `_directions` in distributed training.

        Updates of the same shape are stacked, (N, R, C), and redistributed so that each process orthogonalizes whole matrices. The
        results are then redistributed like the parameters: replicated, or sharded by rows.
        """
        from torch.distributed.tensor import Replicate, Shard

        indices_by_shape: dict[tuple[torch.Size, tuple[int, ...]], list[int]] = defaultdict(list)
        for index, parameter in enumerate(parameters):
            indices_by_shape[parameter.shape, self._row_blocks(parameter)].append(index)
        placement: Placement = Shard(1) if hasattr(parameters[0], "to_local") else Replicate()
        own_stacks = []
        for (shape, _), indices in indices_by_shape.items():
            stack = torch.stack([updates[index].to(self._dtype) for index in indices])
            own_stacks.append(_redistribute(stack, torch.Size((len(indices), *shape)), mesh, placement, Shard(0)))
        matrices = [(matrix, blocks) for stack, (_, blocks) in zip(own_stacks, indices_by_shape, strict=True) for matrix in stack]
        orthogonal = iter(self._orthogonalize_blocks(matrices, group))
        directions = list(updates)
        for own_stack, ((shape, _), indices) in zip(own_stacks, indices_by_shape.items(), strict=True):
            stack = torch.stack([next(orthogonal) for _ in own_stack]) if len(own_stack) else own_stack
            stack = _redistribute(stack, torch.Size((len(indices), *shape)), mesh, Shard(0), placement)
            for index, direction in zip(indices, stack, strict=True):
                directions[index] = direction.to(updates[index].dtype)
        return directions

    def _orthogonalize_blocks(self, updates: Sequence[tuple[Tensor, tuple[int, ...]]], group: dict[str, Any]) -> list[Tensor]:
        """Orthogonalize and scale every row block in each update. `updates` contains pairs (update, rows per block)."""
        matrices = [matrix for update, blocks in updates for matrix in torch.split(update, list(blocks))]
        if group["orthogonalization"] == "rational":
            orthogonal = rational.orthogonalize([matrix.to(self._dtype) for matrix in matrices])
            results = iter([result.mul_(_scale(result)) for result in orthogonal])
        else:
            results = iter(orthogonalize_all(matrices, group["steps"], group["coefficients"], self._dtype, scale=True))
        return [torch.cat([next(results) for _ in blocks]) if len(blocks) > 1 else next(results) for _, blocks in updates]

    def _row_blocks(self, parameter: Tensor) -> tuple[int, ...]:
        """Return the number of rows in each matrix that a parameter stacks."""
        return self._rows.get(parameter, (parameter.shape[0],))


def _scale(matrix: Tensor) -> float:
    """Return the factor of the update of a matrix, (R, C): sqrt(R / C) if it is tall, else 1."""
    rows, columns = matrix.shape
    return math.sqrt(max(1.0, rows / columns))


def _cast_all(directions: list[Tensor], updates: Sequence[Tensor]) -> list[Tensor]:
    """Cast the directions to the dtypes of the updates. On CUDA, this takes only a few kernel launches."""
    if not directions[0].is_cuda or directions[0].dtype == updates[0].dtype:
        return [direction.to(update.dtype) for direction, update in zip(directions, updates, strict=True)]
    cast = [torch.empty_like(update) for update in updates]
    torch._foreach_copy_(cast, directions)
    return cast


def _local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a sharded tensor. Other tensors are returned unchanged."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def _redistribute(local: Tensor, shape: torch.Size, mesh: DeviceMesh, before: Placement, after: Placement) -> Tensor:
    """Change the placement of a stack of global `shape` (N, R, C). `local` and the result are this process's shards."""
    from torch.distributed.tensor import DTensor

    stride = (shape[1] * shape[2], shape[2], 1)
    distributed = DTensor.from_local(local, mesh, [before], run_check=False, shape=shape, stride=stride)
    return distributed.redistribute(placements=[after]).to_local()

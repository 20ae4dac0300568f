"""Run the forward and backward pass of a micro-batch as one CUDA graph (`training.compile: graph`).

Small models are limited by the host, which launches hundreds of kernels per micro-batch. A graph launches all of them in one call.
It repeats the same kernels on the same memory, so inputs are copied to fixed buffers, and gradients accumulate in fixed buffers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tinylm.data.batch import Batch
from tinylm.errors import first_line
from tinylm.model.graphs import GraphBackend, Work
from tinylm.recipe import Recipe
from tinylm.training.feed import LocalBatch
from tinylm.training.precision import Precision
from tinylm.training.step import GradientSettings, accumulate

_MAX_GRAPHS = 4
"""Maximum number of shapes of micro-batches to capture. Micro-batches of other shapes run without a graph."""


def unsupported_reason(recipe: Recipe, precision: Precision, world_size: int) -> str | None:
    """Return why micro-batches of a recipe cannot run as graphs, or None if they can."""
    if precision.device.type != "cuda":
        return "it requires a CUDA GPU"
    if precision.name == "fp16":
        return "it does not support fp16"
    if recipe.model.uses_dropout:
        return "it does not support dropout"
    return "it does not support several processes" if world_size > 1 else None


class GraphedMicroBatches:
    """Computes the gradient of a batch like `step.accumulate`, but with one graph per shape of micro-batches.

    Graphs are captured when they are first needed. If that fails, it warns once and continues without graphs.
    """

    def __init__(self, network: nn.Module, settings: GradientSettings, backend: GraphBackend) -> None:
        self._network, self._settings = network, settings
        self._backend: GraphBackend | None = backend
        self._graphs: dict[Any, tuple[Batch, Work]] = {}
        self._buffers: dict[nn.Parameter, Tensor] = {}
        self._count = torch.ones((), device=settings.precision.device)
        """The number of targets in the global batch."""
        self._losses: Tensor | None = None
        """The sum of the mean losses so far, like the result of `accumulate`."""

    def accumulate(self, batch: LocalBatch) -> Tensor:
        """Store the gradient in `.grad`, and return the mean losses. See `step.accumulate`."""
        if self._losses is None:
            self._allocate(batch)
        losses = self._losses
        assert losses is not None
        losses.zero_()
        self._count.fill_(float(max(batch.global_target_count, 1)))
        for parameter, buffer in self._buffers.items():
            parameter.grad = buffer
        torch._foreach_zero_(list(self._buffers.values()))
        for micro_batch in batch.share.split(self._settings.micro_batch_size):
            self._run(micro_batch)
        return losses.clone()

    def _allocate(self, batch: LocalBatch) -> None:
        """Allocate the fixed buffers. One micro-batch without a graph shows which parameters have gradients."""
        example = LocalBatch.whole(next(batch.share.split(self._settings.micro_batch_size)))
        self._losses = accumulate(self._network, example, self._settings)
        self._buffers = {parameter: parameter.grad for parameter in self._network.parameters() if parameter.grad is not None}

    def _run(self, micro_batch: Batch) -> None:
        device = self._settings.precision.device
        on_cuda = device.type == "cuda"
        tensors = {name: tensor for name, tensor in vars(micro_batch).items() if tensor is not None}
        shape = tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())
        if shape not in self._graphs and self._backend is not None and len(self._graphs) < _MAX_GRAPHS:
            inputs = Batch(**{name: tensor.to(device, copy=True) for name, tensor in tensors.items()})
            self._capture(shape, inputs, self._backend)
        if shape not in self._graphs:
            self._work(micro_batch.to(device, non_blocking=on_cuda))()
            return
        inputs, replay = self._graphs[shape]
        for name, tensor in tensors.items():
            getattr(inputs, name).copy_(tensor, non_blocking=on_cuda)
        replay()

    def _capture(self, shape: Any, inputs: Batch, backend: GraphBackend) -> None:
        """Capture a graph. The capture changes the sums in the fixed buffers, so they are restored afterwards."""
        assert self._losses is not None
        sums = [self._losses, *self._buffers.values()]
        before = [tensor.clone() for tensor in sums]
        try:
            self._graphs[shape] = inputs, backend.capture(self._work(inputs))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # some operations cannot be captured
            self._backend = None
            problem = f"training without CUDA graphs, because a micro-batch cannot be captured ({first_line(error)})"
            warnings.warn(problem, stacklevel=2)
        torch._foreach_copy_(sums, before)

    def _work(self, micro_batch: Batch) -> Callable[[], None]:
        settings, network, sums = self._settings, self._network, self._losses

        def work() -> None:
            with settings.precision.autocast():
                losses = settings.objective.loss_sum(network, micro_batch) / self._count
            loss, reported = (losses[0], losses[1:]) if losses.ndim else (losses, losses)
            loss.backward()  # type: ignore[no-untyped-call]
            assert sums is not None
            sums.add_(reported.detach())

        return work

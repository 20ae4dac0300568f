"""The results of optimizer steps. On a GPU, the host queues the next step before it waits for the results of the previous one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tinylm.host_copy import HostCopy


@dataclass(frozen=True)
class StepResult:
    """The outcome of an optimizer step. It is the same in every process."""

    step: int
    cursor: int
    """Position in the data order after this step, in sequences."""
    fingerprint: int
    """Hash of the sequences in the global batch."""
    loss: float
    """Mean over all targets in the global batch, in nats."""
    grad_norm: float
    loss_scale: float
    """The factor that scales the loss in fp16. It is 1 in other precisions."""
    distillation_loss: float | None = None
    """Mean divergence from the teachers in nats, or None without teachers."""


@dataclass(frozen=True)
class PendingStep:
    """A step whose results may not have been copied from the device to the host yet."""

    step: int
    cursor: int
    fingerprint: int
    values: HostCopy
    """Loss, gradient norm, loss scale and, with teachers, the distillation loss: (3,) or (4,)."""

    @classmethod
    def start(cls, step: int, cursor: int, fingerprint: int, values: Tensor) -> PendingStep:
        """Start copying the results to the host, without waiting for the GPU."""
        return cls(step, cursor, fingerprint, HostCopy(values))

    def read(self) -> StepResult:
        """Wait for the results and return them."""
        return StepResult(self.step, self.cursor, self.fingerprint, *self.values.tolist())


def defers_results(device: torch.device) -> bool:
    """Whether the results of a step are read only after the next step has been queued.

    This requires a device that runs asynchronously, and optimizers that skip an update if a flag on the device is set.
    """
    return device.type == "cuda"

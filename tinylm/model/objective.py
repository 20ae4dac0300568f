"""Training objectives: they turn token sequences into inputs and targets, and compute losses.

Losses are sums or per token, never means, so that gradient accumulation can divide by the number of targets in the global batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Example:
    """Inputs and targets of the model, each (batch, time). Targets equal to `IGNORE_INDEX` are ignored."""

    inputs: Tensor
    targets: Tensor


class Objective(Protocol):
    """A stateless objective, used for training and evaluation."""

    def example(self, tokens: Tensor) -> Example:
        """Inputs and targets of sequences (batch, time + 1). Negative ids are padding."""
        ...

    def summed_loss(self, network: nn.Module, example: Example) -> Tensor:
        """Sum of the losses of all targets in nats, a scalar with a gradient."""
        ...

    def losses(self, network: nn.Module, example: Example) -> Tensor:
        """Loss of each target in nats, (batch, time), zero where the target is ignored."""
        ...


class CausalObjective:
    """Next-token prediction."""

    def example(self, tokens: Tensor) -> Example:
        # The copy of a pinned tensor to a GPU is only fast if the tensor is contiguous.
        return Example(tokens[:, :-1].clamp_min(0), tokens[:, 1:].contiguous())

    def summed_loss(self, network: nn.Module, example: Example) -> Tensor:
        total: Tensor = network(example.inputs, targets=example.targets)
        return total

    def losses(self, network: nn.Module, example: Example) -> Tensor:
        """Computed in float32, or in the dtype of the logits if that is wider."""
        logits = network(example.inputs)
        logits = logits.float() if logits.itemsize < 4 else logits
        targets = example.targets.flatten().long()
        losses = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORE_INDEX, reduction="none")
        return losses.view_as(example.targets)

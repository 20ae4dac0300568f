"""What a model is trained to do: tokens in, a token-weighted loss out.

An objective turns a batch of token sequences into inputs and targets and gives the loss of each target, never a mean, so
that whoever accumulates can divide their sum by the number of targets in the whole global batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100


@dataclass(frozen=True)
class Example:
    """What the model reads and what it should say, each (B, T); targets that are `IGNORED` do not count."""

    inputs: Tensor
    targets: Tensor


class Objective(Protocol):
    """Stateless; the same object serves training and evaluation."""

    def example(self, tokens: Tensor) -> Example:
        """Inputs and targets of sequences (B, T + 1); negative ids are padding."""
        ...

    def summed_loss(self, network: nn.Module, example: Example) -> Tensor:
        """Sum over all targets in nats, a number with a gradient."""
        ...

    def losses(self, network: nn.Module, example: Example) -> Tensor:
        """Loss of each position in nats, (B, T), zero where ignored."""
        ...


class CausalObjective:
    """Predict each next token from those before it."""

    def example(self, tokens: Tensor) -> Example:
        return Example(tokens[:, :-1].clamp_min(0), tokens[:, 1:].contiguous())  # only what is contiguous stays pinned on its way

    def summed_loss(self, network: nn.Module, example: Example) -> Tensor:
        total: Tensor = network(example.inputs, targets=example.targets)
        return total

    def losses(self, network: nn.Module, example: Example) -> Tensor:
        """In float32 at least."""
        logits = network(example.inputs)
        precise = logits.float() if logits.itemsize < 4 else logits
        losses = F.cross_entropy(precise.flatten(0, 1), example.targets.flatten().long(), ignore_index=IGNORED, reduction="none")
        return losses.view_as(example.targets)

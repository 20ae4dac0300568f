"""What a model is trained to do: tokens in, a token-weighted loss out.

An objective turns a batch of token sequences into inputs and targets and gives the loss of each target, never a mean, so
that whoever accumulates can divide their sum by the number of targets in the whole global batch.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100


class Objective(Protocol):
    """Stateless; the same object serves training and evaluation."""

    def targets(self, tokens: Tensor) -> Tensor:
        """What the model should say for `tokens` (B, T + 1); positions with `IGNORED` do not count."""
        ...

    def losses(self, network: nn.Module, tokens: Tensor) -> Tensor:
        """Loss of each position in nats, (B, T), zero where ignored."""
        ...


class CausalObjective:
    """Predict each next token from those before it."""

    def targets(self, tokens: Tensor) -> Tensor:
        return tokens[:, 1:]

    def losses(self, network: nn.Module, tokens: Tensor) -> Tensor:
        """`tokens` (B, T + 1), negative ids being padding: -> (B, T) nats, in float32 at least."""
        targets = self.targets(tokens)
        logits = network(tokens[:, :-1].clamp_min(0))
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten().long(), ignore_index=IGNORED, reduction="none")
        return losses.view_as(targets)

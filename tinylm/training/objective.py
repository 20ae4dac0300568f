"""`Objective` is the interface for training objectives. An objective makes batches from dataset examples and computes the losses.

Losses are returned as sums or per target, never as means, so that gradient accumulation can divide by the number of
targets in the global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from tinylm.data.batch import Batch
from tinylm.data.datasets import Examples
from tinylm.data.prepared import PreparedData
from tinylm.evaluation.metrics import Metric, Metrics
from tinylm.model.base import Model
from tinylm.processes import SINGLE_PROCESS, Processes
from tinylm.recipe.schema import EvaluationSection


@dataclass(frozen=True)
class Heldout:
    """The held-out data of a run, and how to evaluate a model on it during training."""

    prepared: PreparedData
    section: EvaluationSection
    processes: Processes = SINGLE_PROCESS
    """All processes take part in the evaluation and return the same result."""
    on_progress: Callable[[int], None] = lambda count: None
    """Called after every batch with the number of tokens scored so far, the same number of times in each process. It may raise an
    exception to interrupt the evaluation."""


class Objective(Protocol):
    """What a model learns to predict. Objectives are stateless."""

    @property
    def name(self) -> str:
        """The name in a recipe."""
        ...

    @property
    def metrics(self) -> Sequence[Metric]:
        """The metrics of an evaluation on held-out data, primary metric first. The primary metric selects the best checkpoint."""
        ...

    def batch(self, examples: Examples, seed: int, start: int) -> Batch:
        """Make a batch of consecutive examples. `start` is the first example's position in the data order.

        Random choices depend only on the recipe's `seed` and an example's position, so that a resumed run repeats them.
        """
        ...

    def loss_sum(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return the sum of the losses over all targets in nats, a scalar with a gradient.

        An objective whose loss has several terms returns a vector instead: the loss to minimize, followed by the terms to report.
        The first term is the cross-entropy, which is logged as the loss, so that it is comparable to other objectives.
        """
        ...

    def losses(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of each target in nats, (batch, time). It is zero where the target is ignored."""
        ...

    def evaluate(self, network: Model, heldout: Heldout) -> Metrics:
        """Evaluate a network on held-out data. Return the values of `metrics`."""
        ...

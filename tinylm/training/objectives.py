"""Training objectives, which make batches from the examples of a dataset and compute the losses.

Losses are returned as sums or per target, never as means, so that gradient accumulation can divide by the number of
targets in the global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tinylm.data.batch import Batch
from tinylm.data.datasets import Examples
from tinylm.data.prepare import PreparedData
from tinylm.evaluation import perplexity
from tinylm.evaluation.metrics import LANGUAGE_MODEL, Metric, Metrics
from tinylm.evaluation.perplexity import EvaluationOptions
from tinylm.evaluation.scoring import token_losses
from tinylm.model.base import Model
from tinylm.processes import SINGLE_PROCESS, Processes
from tinylm.recipe.schema import (
    CausalLMObjective,
    EvaluationSection,
    ObjectiveVariant,
    register_objective_section,
    unregister_section,
)


@dataclass(frozen=True)
class Heldout:
    """The held-out data of a run, and how to evaluate a model on it during training."""

    prepared: PreparedData
    section: EvaluationSection
    processes: Processes = SINGLE_PROCESS
    """All processes evaluate together and return the same result."""
    on_progress: Callable[[int], None] = lambda count: None
    """Called after every batch, equally often in each process, with the number of tokens scored so far. May raise to interrupt."""


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
        """Make a batch of consecutive examples. `start` is the position of the first one in the data order.

        Random choices depend only on the recipe's `seed` and an example's position, so that a resumed run repeats them.
        """
        ...

    def loss_sum(self, network: nn.Module, batch: Batch) -> Tensor:
        """Sum of the losses of all targets in nats, a scalar with a gradient."""
        ...

    def losses(self, network: nn.Module, batch: Batch) -> Tensor:
        """Loss of each target in nats, (batch, time), zero where the target is ignored."""
        ...

    def evaluate(self, network: Model, heldout: Heldout) -> Metrics:
        """Evaluate a network on held-out data. Returns the values of `metrics`."""
        ...


class CausalLM:
    """Next-token prediction."""

    name = "causal_lm"
    metrics: Sequence[Metric] = LANGUAGE_MODEL

    def batch(self, examples: Examples, seed: int, start: int) -> Batch:
        """Inputs are all tokens but the last, targets are all but the first. Nothing is random."""
        tokens = torch.from_numpy(examples["tokens"])
        segments = torch.from_numpy(examples["segments"])[:, :-1].contiguous() if "segments" in examples else None
        # Copying a pinned tensor to a GPU is only fast if the tensor is contiguous.
        return Batch(tokens[:, :-1].clamp_min(0), tokens[:, 1:].contiguous(), segments)

    def loss_sum(self, network: nn.Module, batch: Batch) -> Tensor:
        total: Tensor = network(batch.inputs, targets=batch.targets, segments=batch.segments)
        return total

    def losses(self, network: nn.Module, batch: Batch) -> Tensor:
        """Computed in float32, or in the dtype of the logits if that is wider."""
        return token_losses(network(batch.inputs, segments=batch.segments), batch.targets)

    def evaluate(self, network: Model, heldout: Heldout) -> Metrics:
        """Score every held-out token once (see `evaluation.perplexity`)."""
        section, prepared = heldout.section, heldout.prepared
        scores = perplexity.evaluate(
            network,
            prepared.heldout,
            prepared.tokenizer.token_byte_lengths,
            EvaluationOptions(stride=section.stride, max_tokens=section.max_tokens, confidence_interval=False),
            processes=heldout.processes,
            on_progress=heldout.on_progress,
        )
        return scores.metrics


_OBJECTIVES: dict[type[ObjectiveVariant], Callable[[Any], Objective]] = {CausalLMObjective: lambda section: CausalLM()}


def register(section: type[ObjectiveVariant], objective: Callable[[Any], Objective]) -> None:
    """Add an objective. `section` becomes a variant of `objective:` in recipes, and `build` returns `objective(section)`.

    Raises `ValueError` if an objective with this name already exists.
    """
    register_objective_section(section)
    _OBJECTIVES[section] = objective


def unregister(section: type[ObjectiveVariant]) -> None:
    """Remove an objective that `register` added."""
    unregister_section(section)
    del _OBJECTIVES[section]


def build(section: ObjectiveVariant) -> Objective:
    """Build the objective that a recipe section configures."""
    return _OBJECTIVES[type(section)](section)

"""Classification: predict the label of a text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylm.data.batch import IGNORE_INDEX, Batch
from tinylm.data.datasets import Examples
from tinylm.data.framing import PADDING
from tinylm.data.labels import PreparedLabels
from tinylm.evaluation import classification
from tinylm.evaluation.metrics import CLASSIFIER, Metric, Metrics
from tinylm.model.base import Model
from tinylm.recipe.labels import ClassificationObjective
from tinylm.training.objective import Heldout


class Classification:
    """Cross-entropy over the labels, with label smoothing and class weights.

    A batch has one target per text. The sum of the weighted losses is divided by the number of texts, not by the sum of the
    weights.
    """

    name = "classification"
    metrics: Sequence[Metric] = CLASSIFIER

    def __init__(self, section: ClassificationObjective) -> None:
        self._section = section
        self._weights = class_weights(section)

    def batch(self, examples: Examples, seed: int, start: int) -> Batch:
        """Sort the texts by length, so that micro-batches have little padding. The batch does not depend on `seed`."""
        tokens = examples["tokens"]
        order = np.argsort((tokens >= 0).sum(axis=1), kind="stable")
        ids = torch.from_numpy(tokens[order])
        segments = torch.where(ids < 0, PADDING, 0)
        return Batch(ids.clamp_min(0), torch.from_numpy(examples["labels"][order]), segments)

    def loss_sum(self, network: nn.Module, batch: Batch) -> Tensor:
        return self.losses(network, batch).sum()

    def losses(self, network: nn.Module, batch: Batch) -> Tensor:
        batch = without_padding(batch)
        logits: Tensor = network(batch.inputs, segments=batch.segments)
        weight = None if self._weights is None else self._weights.to(logits.device)
        targets = batch.targets[:, 0].masked_fill(batch.targets[:, 0] < 0, IGNORE_INDEX)
        losses = F.cross_entropy(
            logits.float(),
            targets,
            weight,
            ignore_index=IGNORE_INDEX,
            reduction="none",
            label_smoothing=self._section.label_smoothing,
        )
        return losses[:, None]

    def evaluate(self, network: Model, heldout: Heldout) -> Metrics:
        """Classify every held-out text (see `evaluation.classification`)."""
        prepared = heldout.prepared
        assert isinstance(prepared, PreparedLabels)
        return classification.evaluate_during_training(
            network, prepared, max_tokens=heldout.section.max_tokens, processes=heldout.processes, on_progress=heldout.on_progress
        )


def class_weights(section: ClassificationObjective) -> Tensor | None:
    """Return the loss weight of each label, (labels,), or None if all are 1. Balanced weights average 1 over the training texts."""
    if section.class_weights == "balanced":
        counts = torch.tensor(section.label_counts, dtype=torch.float64)
        return (counts.sum() / (len(counts) * counts)).float()
    if isinstance(section.class_weights, dict):
        return torch.tensor([section.class_weights.get(label, 1.0) for label in section.labels])
    return None


def without_padding(batch: Batch) -> Batch:
    """Remove the columns that contain only padding. On a GPU, nothing is removed, because that would require a synchronization."""
    if batch.segments is None or batch.segments.device.type != "cpu":
        return batch
    width = int((batch.segments >= 0).sum(dim=1).max())
    return Batch(batch.inputs[:, :width], batch.targets, batch.segments[:, :width])

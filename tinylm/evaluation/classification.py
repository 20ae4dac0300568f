"""Evaluate a classifier: predictions for texts, accuracy, F1 scores and the confusion matrix.

If k labels tie for the highest probability and one of them is correct, the text counts as 1 / k correct.

Legend: `N` texts, `L` labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tinylm.cost.memory import EVALUATION_BATCH_TOKENS
from tinylm.cost.micro_batch import CPU_MICRO_BATCH_TOKENS
from tinylm.data.framing import Framing, batches_by_length
from tinylm.data.labels import PreparedLabels
from tinylm.errors import InputError
from tinylm.evaluation.intervals import wilson
from tinylm.evaluation.metrics import ACCURACY, LABEL_LOSS, MACRO_F1, Metrics
from tinylm.model.base import Model, evaluation_mode
from tinylm.model.classifier import SequenceClassifier
from tinylm.processes import SINGLE_PROCESS, Processes


@torch.no_grad()
def predict(
    network: Model,
    texts: Sequence[np.ndarray],
    framing: Framing,
    *,
    processes: Processes = SINGLE_PROCESS,
    on_progress: Callable[[int], None] = lambda tokens: None,
) -> np.ndarray:
    """Return the logits for texts given as token ids, float64 (N, L).

    The network runs in evaluation mode, and its training mode is restored afterwards. With several `processes`, each rank runs
    some of the batches, and all ranks return the same result. `on_progress` receives the number of tokens read so far. It is
    called the same number of times on every rank.
    """
    assert isinstance(network, SequenceClassifier)
    framed = [framing.frame(ids) for ids in texts]
    max_tokens = CPU_MICRO_BATCH_TOKENS if network.device.type == "cpu" else EVALUATION_BATCH_TOKENS
    batches = batches_by_length([len(ids) for ids in framed], max_tokens)
    logits = np.zeros((len(framed), network.output.out_features))
    read = 0
    with evaluation_mode(network):
        for first in range(0, len(batches), processes.world_size):
            # A sharded model needs all ranks in every forward pass, so ranks without their own batch repeat the last one.
            own = min(first + processes.rank, len(batches) - 1)
            tokens, segments = framing.rows([framed[index] for index in batches[own]])
            is_padded = bool((segments < 0).any())
            masks = torch.from_numpy(segments).to(network.device) if is_padded else None
            outputs = network(torch.from_numpy(tokens).to(network.device), segments=masks)
            if own == first + processes.rank:
                logits[batches[own]] = outputs.float().cpu().double().numpy()
            read += sum(len(framed[index]) for peer in batches[first : first + processes.world_size] for index in peer)
            on_progress(read)
    summed: np.ndarray = processes.sum(logits)
    return summed


def evaluate_during_training(
    network: Model,
    prepared: PreparedLabels,
    *,
    max_tokens: int | None,
    processes: Processes,
    on_progress: Callable[[int], None],
) -> Metrics:
    """Classify the held-out texts, or only those within the first `max_tokens` held-out tokens."""
    assert isinstance(network, SequenceClassifier)
    texts, targets = prepared.heldout.documents(), prepared.heldout.ids(network.objective.labels)
    if max_tokens is not None:
        count = max(1, int(np.searchsorted(np.cumsum([len(ids) for ids in texts]), max_tokens)))
        texts, targets = texts[:count], targets[:count]
    framing = Framing.of(prepared.tokenizer, network.model, prepared.truncate)
    return score(predict(network, texts, framing, processes=processes, on_progress=on_progress), targets).metrics


@dataclass(frozen=True)
class LabelScore:
    """How well one label is recognized. `count` is the number of texts with this label."""

    precision: float
    recall: float
    f1: float
    count: int


@dataclass(frozen=True)
class ClassifierScores:
    """The result of evaluating N texts."""

    examples: int
    accuracy: float
    accuracy_ci95: tuple[float, float]
    macro_f1: float
    """The mean F1 over all labels that occur in the texts or the predictions."""
    loss: float
    """Cross-entropy in nats per text, averaged over the texts whose label the model knows."""
    per_label: list[LabelScore]
    confusion: np.ndarray
    """(L, L): the number of texts for each true label (row) and predicted label (column)."""

    @property
    def metrics(self) -> Metrics:
        """The metrics that are logged during training."""
        values = {ACCURACY.name: self.accuracy, LABEL_LOSS.name: self.loss, MACRO_F1.name: self.macro_f1}
        return Metrics(ACCURACY.name, values)


def score(logits: np.ndarray, targets: np.ndarray) -> ClassifierScores:
    """Compare logits (N, L) with the ids of the true labels (N,). A negative id marks a label that the model does not have.

    Raises `InputError` if there are no texts.
    """
    count, labels = logits.shape
    if not count:
        raise InputError("there are no texts to evaluate")
    known = targets >= 0
    predicted = logits.argmax(axis=1)
    credit = credits(logits, targets)
    confusion = np.zeros((labels, labels), dtype=np.int64)
    np.add.at(confusion, (targets[known], predicted[known]), 1)
    unknown = np.bincount(predicted[~known], minlength=labels)
    per_label = _per_label(confusion, unknown)
    relevant = [row.f1 for row, guesses in zip(per_label, confusion.sum(axis=0) + unknown, strict=True) if row.count or guesses]
    losses = -log_softmax(logits)[np.arange(count), np.maximum(targets, 0)]
    accuracy = float(credit.mean())
    return ClassifierScores(
        examples=count,
        accuracy=accuracy,
        accuracy_ci95=wilson(float(credit.sum()), count),
        macro_f1=float(np.mean(relevant)),
        loss=float(losses[known].mean()) if known.any() else float("nan"),
        per_label=per_label,
        confusion=confusion,
    )


def credits(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the credit (N,) for each prediction: 1 if correct, 0 if wrong, and 1 / k if the true label ties with k - 1 others."""
    best = logits == logits.max(axis=1, keepdims=True)
    right = best[np.arange(len(targets)), np.maximum(targets, 0)] & (targets >= 0)
    shares: np.ndarray = right / best.sum(axis=1)
    return shares


def _per_label(confusion: np.ndarray, unknown: np.ndarray) -> list[LabelScore]:
    """Return the scores of each label.

    `unknown` (L,) counts the predictions for texts whose label the model does not have. All of these predictions are wrong.
    """
    scores = []
    for label in range(len(confusion)):
        hits, count = int(confusion[label, label]), int(confusion[label].sum())
        guesses = int(confusion[:, label].sum() + unknown[label])
        precision, recall = hits / guesses if guesses else 0.0, hits / count if count else 0.0
        f1 = 2 * hits / (guesses + count) if guesses + count else 0.0
        scores.append(LabelScore(precision, recall, f1, count))
    return scores


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Convert logits (N, L) to log-probabilities (N, L)."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    normalized: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return normalized


def fit_temperature(logits: np.ndarray, targets: np.ndarray) -> float:
    """Find the temperature that minimizes the loss of logits / temperature (Guo et al. 2017) by golden-section search.

    Texts whose label the model does not know are ignored. Raises `InputError` if no text has a known label.
    """
    known = targets >= 0
    if not known.any():
        raise InputError("no held-out text has a label that the model knows, so the temperature cannot be fitted")
    logits, targets = logits[known], targets[known]

    def loss(log_temperature: float) -> float:
        scaled = log_softmax(logits / np.exp(log_temperature))
        return -float(scaled[np.arange(len(targets)), targets].mean())

    low, high, golden = -4.0, 4.0, (5**0.5 - 1) / 2
    for _ in range(60):
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    return float(np.exp((low + high) / 2))

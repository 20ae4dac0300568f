"""Classify texts with a trained model, optionally with calibrated probabilities."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from tinylm.data.framing import Framing
from tinylm.data.labels import LabeledShard, open_labeled
from tinylm.errors import InputError
from tinylm.evaluation import classification
from tinylm.model.classifier import SequenceClassifier
from tinylm.recipe.labels import ClassificationObjective, LabelsSection
from tinylm.run import Checkpoint, Run
from tinylm.tokenizer import Tokenizer

_CHUNK = 4096
"""Number of texts per chunk. Texts are sorted by length within a chunk."""


@dataclass(frozen=True)
class Prediction:
    """The most likely label of a text, and the probability of each label."""

    text: str
    label: str
    probabilities: dict[str, float]


def truncation(run: Run) -> str:
    """Return the value of `data.truncate` in a run's recipe, or the default if its data is not labeled texts."""
    return run.recipe.data.truncate if isinstance(run.recipe.data, LabelsSection) else "head"


def require_classifier(run: Run) -> ClassificationObjective:
    """Return a run's classification objective. Raises `InputError` if the run was not trained for classification."""
    objective = run.recipe.objective
    if not isinstance(objective, ClassificationObjective):
        raise InputError(
            f"was trained with the {objective.name} objective, not classification",
            where=str(run.path),
            hint="choose a classifier with --run",
        )
    return objective


def heldout_texts(run: Run, split: str = "heldout") -> LabeledShard:
    """Open a run's held-out or test texts. Raises `InputError` if the texts are missing or damaged."""
    if split == "test" and not run.has_test_split:
        raise InputError("this run has no test texts", where=str(run.path), hint="set `data.test` in the recipe to hold out some")
    if not (run.path / "heldout").exists():
        raise InputError("this run has no held-out texts", where=str(run.path), hint="specify labeled texts to evaluate it on")
    return open_labeled(run.path / "heldout", split, run.tokenizer.vocab_size)


class TextClassifier:
    """Classifies texts with a run's network."""

    def __init__(self, run: Run, checkpoint: Checkpoint, device: torch.device) -> None:
        """Raises `InputError` if the run was not trained for classification."""
        self.labels = require_classifier(run).labels
        self._run = run
        self._tokenizer: Tokenizer = run.tokenizer
        network = run.network(checkpoint, device)
        assert isinstance(network, SequenceClassifier)
        self.network = network
        self.framing = Framing.of(run.tokenizer, network.model, truncation(run))
        self.temperature = 1.0

    def calibrate(self) -> float:
        """Fit the temperature on the held-out texts so that probabilities match the fraction of correct predictions.

        Returns the temperature. Raises `InputError` if the run has no held-out texts.
        """
        texts = heldout_texts(self._run)
        logits = classification.predict(self.network, texts.documents(), self.framing)
        self.temperature = classification.fit_temperature(logits, texts.ids(self.labels))
        return self.temperature

    def classify(self, texts: Iterable[str]) -> Iterator[Prediction]:
        """Yield a prediction for each text, in order."""
        remaining = iter(texts)
        while chunk := list(islice(remaining, _CHUNK)):
            logits = self.logits(chunk) / self.temperature
            probabilities = np.exp(classification.log_softmax(logits))
            for text, row in zip(chunk, probabilities, strict=True):
                yield Prediction(text, self.labels[int(row.argmax())], dict(zip(self.labels, map(float, row), strict=True)))

    def logits(self, texts: list[str]) -> np.ndarray:
        """Return the logits (texts, labels) before calibration."""
        return classification.predict(
            self.network, [np.array(self._tokenizer.encode(text), dtype=np.int64) for text in texts], self.framing
        )

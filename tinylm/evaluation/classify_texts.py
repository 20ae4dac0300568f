"""Classify texts with a trained run, optionally with calibrated probabilities."""

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
"""Number of texts that are sorted by length together."""


@dataclass(frozen=True)
class Prediction:
    """The most likely label of a text, and the probability of each label."""

    text: str
    label: str
    probabilities: dict[str, float]


def truncation(run: Run) -> str:
    """The value of `data.truncate` that a run was trained with."""
    return run.recipe.data.truncate if isinstance(run.recipe.data, LabelsSection) else "head"


def require_classifier(run: Run) -> ClassificationObjective:
    """Return the objective of a classifier. Raises `InputError` for another run."""
    objective = run.recipe.objective
    if not isinstance(objective, ClassificationObjective):
        raise InputError(
            f"was trained with objective {objective.name}, not classification",
            where=str(run.path),
            hint="choose a classifier with --run",
        )
    return objective


def heldout_texts(run: Run, split: str = "heldout") -> LabeledShard:
    """Open the held-out or test texts of a run. Raises `InputError` if there are none, or if they are damaged."""
    if split == "test" and not run.has_test_split:
        raise InputError("this run has no test texts", where=str(run.path), hint="`data.test` in a recipe sets them aside")
    if not (run.path / "heldout").exists():
        raise InputError("this run has no held-out texts", where=str(run.path), hint="name labeled texts to evaluate it on")
    return open_labeled(run.path / "heldout", split, run.tokenizer.vocab_size)


class TextClassifier:
    """Classifies texts with the network of a run."""

    def __init__(self, run: Run, checkpoint: Checkpoint, device: torch.device) -> None:
        """Raises `InputError` if the run is not a classifier."""
        self.labels = require_classifier(run).labels
        self._run = run
        self._tokenizer: Tokenizer = run.tokenizer
        network = run.network(checkpoint, device)
        assert isinstance(network, SequenceClassifier)
        self.network = network
        self.framing = Framing.of(run.tokenizer, network.model, truncation(run))
        self.temperature = 1.0

    def calibrate(self) -> float:
        """Fit the temperature on the held-out texts, so that the probabilities match the share of right labels. Returns it."""
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
        """The logits (texts, labels) before calibration."""
        return classification.predict(
            self.network, [np.array(self._tokenizer.encode(text), dtype=np.int64) for text in texts], self.framing
        )

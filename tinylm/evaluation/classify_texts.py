"""Classify texts with a trained model, optionally with calibrated probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from tinylm.data.framing import Framing, TextCounts
from tinylm.data.labels import LabeledShard, open_labeled
from tinylm.ensemble import Ensemble
from tinylm.errors import InputError
from tinylm.evaluation import classification
from tinylm.evaluation.scoring import ensemble_losses
from tinylm.model.base import Model
from tinylm.recipe.labels import ClassificationObjective, LabelsSection
from tinylm.run import Run
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
    """Classifies texts with a network, or with the mean of the probabilities of several networks."""

    def __init__(self, ensemble: Ensemble, device: torch.device) -> None:
        """Raises `InputError` if a run was not trained for classification."""
        self._run = ensemble.members[0].run
        self.labels = require_classifier(self._run).labels
        self._tokenizer: Tokenizer = self._run.tokenizer
        self._members: list[tuple[Model, Framing]] = []
        for member in ensemble.members:
            network = member.run.network(member.checkpoint, device)
            self._members.append((network, Framing.of(self._tokenizer, network.model, truncation(member.run))))
        self.temperature = 1.0
        self.counts = TextCounts()
        """The texts that `classify` has skipped or truncated so far."""

    def calibrate(self) -> float:
        """Fit the temperature on the held-out texts so that probabilities match the fraction of correct predictions.

        Returns the temperature. Raises `InputError` if the run has no held-out texts.
        """
        texts = heldout_texts(self._run)
        logits = self.predict(texts.documents())
        self.temperature = classification.fit_temperature(logits, texts.ids(self.labels))
        return self.temperature

    def classify(self, texts: Iterable[str]) -> Iterator[Prediction]:
        """Yield a prediction for each text that is not empty, in order. `counts` is updated."""
        remaining = self.counts.without_empty(texts)
        while chunk := list(islice(remaining, _CHUNK)):
            documents = self._encode(chunk)
            self.counts.add(map(len, documents), self.room)
            logits = self.predict(documents) / self.temperature
            probabilities = np.exp(classification.log_softmax(logits))
            for text, row in zip(chunk, probabilities, strict=True):
                yield Prediction(text, self.labels[int(row.argmax())], dict(zip(self.labels, map(float, row), strict=True)))

    def logits(self, texts: list[str]) -> np.ndarray:
        """Return the logits (texts, labels) before calibration."""
        return self.predict(self._encode(texts))

    @property
    def room(self) -> int:
        """The number of tokens of a text that every network reads."""
        return min(framing.room for _, framing in self._members)

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(self._tokenizer.encode(text), dtype=np.int64) for text in texts]

    def predict(self, documents: Sequence[np.ndarray], on_progress: Callable[[int], None] = lambda tokens: None) -> np.ndarray:
        """Return the logits (texts, labels) for texts given as token ids. For several networks, these are log-probabilities."""
        logits = self.predict_each(documents, on_progress)
        return logits[0] if len(logits) == 1 else mean_log_probabilities(logits)

    def predict_each(
        self, documents: Sequence[np.ndarray], on_progress: Callable[[int], None] = lambda tokens: None
    ) -> list[np.ndarray]:
        """Return the logits (texts, labels) of each network."""
        return [classification.predict(network, documents, framing, on_progress=on_progress) for network, framing in self._members]


def mean_log_probabilities(logits: Sequence[np.ndarray]) -> np.ndarray:
    """Return the logarithm of the mean of the probabilities, for several arrays of logits (texts, labels)."""
    return -ensemble_losses([-classification.log_softmax(each) for each in logits])

"""Classify texts with a trained model, optionally with calibrated probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TypeAlias

import numpy as np
import torch

from tinylm.data.framing import Framing, TextCounts
from tinylm.data.labels import LabeledParts, LabeledShard, open_labeled, read_parts
from tinylm.ensemble import Ensemble
from tinylm.errors import InputError
from tinylm.evaluation import classification
from tinylm.evaluation.scoring import ensemble_losses
from tinylm.model.base import Model
from tinylm.recipe.labels import ClassificationObjective, LabelsSection
from tinylm.reporting import SILENT
from tinylm.run import Run
from tinylm.tokenizer import Tokenizer

EncodedTexts: TypeAlias = dict[str, list[np.ndarray]]
"""The token ids of the same texts for one or more tokenizers. The keys are the fingerprints of the tokenizers."""

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


@dataclass(frozen=True)
class _Network:
    """A member of an ensemble."""

    model: Model
    framing: Framing
    tokenizer: str
    """The fingerprint of its tokenizer."""


class TextClassifier:
    """Classifies texts with a network, or with the mean of the probabilities of several networks."""

    def __init__(self, ensemble: Ensemble, device: torch.device) -> None:
        """Raises `InputError` if a run was not trained for classification."""
        self._ensemble = ensemble
        self.labels = require_classifier(ensemble.members[0].run).labels
        self._tokenizers: dict[str, Tokenizer] = {}
        self._networks: list[_Network] = []
        for member in ensemble.members:
            tokenizer, model = member.run.tokenizer, member.run.network(member.checkpoint, device)
            self._tokenizers.setdefault(tokenizer.fingerprint, tokenizer)
            framing = Framing.of(tokenizer, model.model, truncation(member.run))
            self._networks.append(_Network(model, framing, tokenizer.fingerprint))
        self.temperature = 1.0
        self._truncated = [0] * len(self._networks)
        self.counts = TextCounts()
        """The texts that `classify` has skipped or truncated so far."""

    def calibrate(self) -> float:
        """Fit the temperature on the held-out texts so that probabilities match the fraction of correct predictions.

        Returns the temperature. Raises `InputError` if the run has no held-out texts.
        """
        heldout = heldout_texts(self._ensemble.members[0].run)
        logits = self.predict(self.own_texts("heldout"))
        self.temperature = classification.fit_temperature(logits, heldout.ids(self.labels))
        return self.temperature

    def own_texts(self, split: str) -> EncodedTexts:
        """Encode the held-out or test texts of the first run.

        They are saved as tokens. If other networks have other tokenizers, the original texts are also required. Raises
        `InputError` if the texts are missing or have changed.
        """
        first = self._ensemble.members[0]
        encoded = {first.run.tokenizer.fingerprint: heldout_texts(first.run, split).documents()}
        others = [fingerprint for fingerprint in self._tokenizers if fingerprint not in encoded]
        if others:
            texts = [item.text for item in self.original_parts.texts[split]]
            encoded |= {fingerprint: _encoded(self._tokenizers[fingerprint], texts) for fingerprint in others}
        return encoded

    @cached_property
    def original_parts(self) -> LabeledParts:
        """The labeled texts that the first run was trained and evaluated on.

        Raises `InputError` if they are missing or have changed since the run was trained.
        """
        first = self._ensemble.members[0]
        data = first.run.recipe.data
        if not isinstance(data, LabelsSection):
            raise InputError("the training texts of an imported model are not available", where=first.path)
        parts = read_parts(data, SILENT)
        if parts.encoded_fingerprint(first.run.tokenizer) != first.checkpoint.state["fingerprints"]["data"]:
            where = str(first.run.path / "recipe.yaml")
            raise InputError("the training texts have changed since the run was trained", where=where)
        return parts

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        """Encode texts with the tokenizer of each network."""
        return {fingerprint: _encoded(tokenizer, texts) for fingerprint, tokenizer in self._tokenizers.items()}

    def count(self, texts: EncodedTexts, counts: TextCounts) -> None:
        """Count truncated texts. `counts` receives the total so far for the network that truncates the most texts."""
        for index, network in enumerate(self._networks):
            room = network.framing.room
            self._truncated[index] += sum(len(ids) > room for ids in texts[network.tokenizer])
        counts.truncated, counts.room = max(
            ((truncated, network.framing.room) for truncated, network in zip(self._truncated, self._networks, strict=True)),
            key=lambda pair: (pair[0], -pair[1]),
        )

    def classify(self, texts: Iterable[str]) -> Iterator[Prediction]:
        """Yield a prediction for each text that is not empty, in order. `counts` is updated."""
        remaining = self.counts.without_empty(texts)
        while chunk := list(islice(remaining, _CHUNK)):
            encoded = self.encode(chunk)
            self.count(encoded, self.counts)
            logits = self.predict(encoded) / self.temperature
            probabilities = np.exp(classification.log_softmax(logits))
            for text, row in zip(chunk, probabilities, strict=True):
                yield Prediction(text, self.labels[int(row.argmax())], dict(zip(self.labels, map(float, row), strict=True)))

    def predict(self, texts: EncodedTexts, on_progress: Callable[[int], None] = lambda tokens: None) -> np.ndarray:
        """Return the logits (texts, labels). For several networks, these are log-probabilities."""
        logits = self.predict_each(texts, on_progress)
        return logits[0] if len(logits) == 1 else mean_log_probabilities(logits)

    def predict_each(self, texts: EncodedTexts, on_progress: Callable[[int], None] = lambda tokens: None) -> list[np.ndarray]:
        """Return the logits (texts, labels) of each network."""
        return [
            classification.predict(network.model, texts[network.tokenizer], network.framing, on_progress=on_progress)
            for network in self._networks
        ]


def _encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    return [np.array(tokenizer.encode(text), dtype=np.int64) for text in texts]


def mean_log_probabilities(logits: Sequence[np.ndarray]) -> np.ndarray:
    """Return the logarithm of the mean of the probabilities, for several arrays of logits (texts, labels)."""
    return -ensemble_losses([-classification.log_softmax(each) for each in logits])

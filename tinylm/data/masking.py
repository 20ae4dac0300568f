"""The dataset for masked language models: text windows with masked tokens (Devlin et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tinylm.data import mixture
from tinylm.data.batch import IGNORE_INDEX
from tinylm.data.datasets import Dataset, Examples
from tinylm.data.mixture import Mixture
from tinylm.data.order import uniform
from tinylm.data.prepare import PreparedText
from tinylm.recipe import Recipe
from tinylm.recipe.encoder import MaskedLMObjective, Replacement
from tinylm.tokenizer import Tokenizer
from tinylm.tokenizer.control_tokens import ControlTokens, is_ordinary

_CHOICE, _KIND, _TOKEN = range(3)
"""Random number streams that decide whether a token is predicted, how it is replaced, and which random token replaces it."""


@dataclass(frozen=True)
class Masking:
    """Which tokens can be masked, and what replaces them."""

    mask: int
    ordinary: np.ndarray
    """Whether each id is an ordinary token, (vocabulary,). Only ordinary tokens can be masked or replace another token."""
    replace: Replacement

    @classmethod
    def of(cls, tokenizer: Tokenizer, replace: Replacement = Replacement()) -> Masking:
        """Return the masking for a tokenizer. Raises `InputError` if it has no [MASK] token."""
        return cls(ControlTokens.of(tokenizer).mask, np.array(is_ordinary(tokenizer)), replace)

    def apply(self, tokens: np.ndarray, rate: np.ndarray, seed: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mask token ids (rows, time). Returns inputs and targets, where the target is `IGNORE_INDEX` if a token is not predicted.

        `rate` (rows,) is the probability of predicting an ordinary token. `positions` (rows,) determine the random choices.
        """
        width = tokens.shape[1]
        chosen = (uniform(seed, positions, width, _CHOICE) < rate[:, None]) & self.ordinary[tokens]
        kind = uniform(seed, positions, width, _KIND)
        candidates = np.flatnonzero(self.ordinary)
        random = candidates[(uniform(seed, positions, width, _TOKEN) * len(candidates)).astype(np.int64)]
        replaced = np.where(
            kind < self.replace.mask, self.mask, np.where(kind < self.replace.mask + self.replace.random, random, tokens)
        )
        return np.where(chosen, replaced, tokens), np.where(chosen, tokens, IGNORE_INDEX)


class MaskedWindows:
    """Masked text windows framed as `[CLS] tokens [SEP]`. The documents in a window are separated by [SEP].

    Examples have `tokens` (the inputs) and `targets`, both (count, context_length). With `data.document_mask`, they also have
    `segments`.
    """

    def __init__(self, stream: Dataset, tokenizer: Tokenizer, objective: MaskedLMObjective, seed: int) -> None:
        """Raises `InputError` if the tokenizer lacks the control tokens of an encoder."""
        self.stream, self._seed = stream, seed
        self._control = ControlTokens.of(tokenizer)
        self._end_of_text = tokenizer.end_of_text
        self._masking = Masking.of(tokenizer, objective.replace)
        self._rates = objective.rate[0], objective.rate[-1]
        self.total: int | None = None
        """Number of examples over which the masking rate changes, or None if the length of the run is unknown."""

    @property
    def examples_per_epoch(self) -> int:
        return self.stream.examples_per_epoch

    @property
    def tokens_per_example(self) -> float:
        return self.stream.tokens_per_example + 2

    def examples(self, start: int, count: int) -> Examples:
        """Return the examples at positions [start, start + count)."""
        positions = np.arange(start, start + count, dtype=np.int64)
        windows = self.stream.examples(start, count)
        text = windows["tokens"][:, :-1]  # The last token is also the first token of the next window.
        text = np.where(text == self._end_of_text, self._control.sep, text)
        framed = np.pad(text, ((0, 0), (1, 1)))
        framed[:, 0], framed[:, -1] = self._control.cls, self._control.sep
        inputs, targets = self._masking.apply(framed, self.rates(positions), self._seed, positions)
        examples = {"tokens": inputs, "targets": targets}
        if "segments" in windows:
            examples["segments"] = np.pad(windows["segments"][:, :-1], ((0, 0), (1, 1)), mode="edge")
        return examples

    def rates(self, positions: np.ndarray) -> np.ndarray:
        """Return the masking rate at each position."""
        first, last = self._rates
        done = np.zeros(len(positions)) if self.total is None else np.minimum(positions / self.total, 1.0)
        return first + (last - first) * done


def build(recipe: Recipe, objective: MaskedLMObjective, prepared: PreparedText) -> MaskedWindows:
    """Build the dataset for a recipe. Raises `InputError` if the text is shorter than one window."""
    window = recipe.model.model_copy(update={"context_length": recipe.model.context_length - 2})
    stream = mixture.build(recipe, prepared, window)
    dataset = MaskedWindows(stream, prepared.tokenizer, objective, recipe.seed)
    dataset.total = mixture.planned_examples(recipe, dataset)
    if isinstance(stream, Mixture):
        stream.set_total(dataset.total)
    return dataset

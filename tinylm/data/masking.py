"""The dataset of masked language models: windows of text in which some tokens are masked (Devlin et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tinylm.cost.plan import training_steps
from tinylm.data import datasets
from tinylm.data.batch import IGNORE_INDEX
from tinylm.data.datasets import Examples, TokenStream
from tinylm.data.order import uniform
from tinylm.data.prepare import PreparedText
from tinylm.recipe import Recipe
from tinylm.recipe.encoder import MaskedLMObjective, Replacement
from tinylm.recipe.schema import require_text
from tinylm.tokenizer import Tokenizer
from tinylm.tokenizer.control_tokens import ControlTokens, is_ordinary

_CHOICE, _KIND, _TOKEN = range(3)
"""The streams of random numbers: whether a token is masked, what replaces it, and which random token."""


@dataclass(frozen=True)
class Masking:
    """Which tokens can be masked and what replaces them."""

    mask: int
    ordinary: np.ndarray
    """(vocabulary,): whether each id is an ordinary token, which can be masked and can replace a token."""
    replace: Replacement

    @classmethod
    def of(cls, tokenizer: Tokenizer, replace: Replacement = Replacement()) -> Masking:
        """Raises `InputError` if the tokenizer has no [MASK] token."""
        return cls(ControlTokens.of(tokenizer).mask, np.array(is_ordinary(tokenizer)), replace)

    def apply(self, tokens: np.ndarray, rate: np.ndarray, seed: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids (rows, time) -> inputs with masks, and targets: the id where a token is to be predicted, else `IGNORE_INDEX`.

        `rate` (rows,): the probability that an ordinary token is to be predicted. `positions` (rows,) determine the random choices.
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
    """Windows of a text as `[CLS] tokens [SEP]`, in which documents are separated by [SEP], with masked tokens.

    Examples have `tokens` (the inputs) and `targets`, both (count, context_length), and `segments` with `data.document_mask`.
    """

    def __init__(self, stream: TokenStream, tokenizer: Tokenizer, objective: MaskedLMObjective, seed: int) -> None:
        """Raises `InputError` if the tokenizer does not have the control tokens of an encoder."""
        self._stream, self._seed = stream, seed
        self._control = ControlTokens.of(tokenizer)
        self._end_of_text = tokenizer.end_of_text
        self._masking = Masking.of(tokenizer, objective.replace)
        self._rates = objective.rate[0], objective.rate[-1]
        self.total: int | None = None
        """Number of examples in the training run, over which the rate changes."""

    @property
    def examples_per_epoch(self) -> int:
        return self._stream.examples_per_epoch

    @property
    def tokens_per_example(self) -> float:
        return self._stream.context_length + 2

    def examples(self, start: int, count: int) -> Examples:
        """The examples at positions [start, start + count)."""
        positions = np.arange(start, start + count, dtype=np.int64)
        windows = self._stream.examples(start, count)
        text = windows["tokens"][:, :-1]  # the last token of a window is the first of the next one
        text = np.where(text == self._end_of_text, self._control.sep, text)
        framed = np.pad(text, ((0, 0), (1, 1)))
        framed[:, 0], framed[:, -1] = self._control.cls, self._control.sep
        inputs, targets = self._masking.apply(framed, self.rates(positions), self._seed, positions)
        examples = {"tokens": inputs, "targets": targets}
        if "segments" in windows:
            examples["segments"] = np.pad(windows["segments"][:, :-1], ((0, 0), (1, 1)), mode="edge")
        return examples

    def rates(self, positions: np.ndarray) -> np.ndarray:
        """The masking rate of each position."""
        first, last = self._rates
        done = np.zeros(len(positions)) if self.total is None else np.minimum(positions / self.total, 1.0)
        return first + (last - first) * done


def build(recipe: Recipe, objective: MaskedLMObjective, prepared: PreparedText) -> MaskedWindows:
    """Build the dataset of a recipe. Raises `InputError` if the text is shorter than one window."""
    window = recipe.model.model_copy(update={"context_length": recipe.model.context_length - 2})
    stream = datasets.build(require_text(recipe.data), prepared.train, window, recipe.seed)
    assert isinstance(stream, TokenStream)
    dataset = MaskedWindows(stream, prepared.tokenizer, objective, recipe.seed)
    steps = training_steps(recipe.training, dataset.tokens_per_example, dataset.examples_per_epoch)
    dataset.total = None if steps is None else steps * recipe.training.global_batch_size
    return dataset

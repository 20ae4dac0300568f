"""Datasets map positions in the data order to examples. An example depends only on the seed and the position.

A position is the number of examples that all processes have read since the start of training. Resuming requires no other state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from tinylm.cost.examples import ExampleSize
from tinylm.data.batch import IGNORE_INDEX
from tinylm.data.order import epoch_key, permute
from tinylm.data.shards import Shard
from tinylm.errors import InputError
from tinylm.recipe.schema import DataSection, ModelVariant

Examples = dict[str, np.ndarray]
"""Named int64 arrays with one example per row. Every dataset has `tokens` (count, length), in which negative ids are padding.

`segments` (count, length) and `targets` (count, length - 1) are optional (see `Batch`). Without `targets`, the target at each
position is the next token. Other arrays are specific to a dataset and its objective.
"""


class Dataset(Protocol):
    """Training examples in the order in which they are read."""

    @property
    def examples_per_epoch(self) -> int: ...

    @property
    def tokens_per_example(self) -> float:
        """Mean number of tokens that the model reads per example, excluding padding."""
        ...

    def examples(self, start: int, count: int) -> Examples:
        """Return the examples at positions [start, start + count)."""
        ...


@runtime_checkable
class PaddedDataset(Dataset, Protocol):
    """A dataset whose examples differ in length."""

    @property
    def example_size(self) -> ExampleSize: ...


def example_size(dataset: Dataset) -> ExampleSize | None:
    """Return the size of the examples, or None if they all have the same length."""
    return dataset.example_size if isinstance(dataset, PaddedDataset) else None


def build(data: DataSection, shard: Shard, model: ModelVariant, seed: int) -> Dataset:
    """Build the dataset that `data` configures for a model. Raises `InputError` if the text is shorter than one example."""
    if not model.needs_full_window:
        return ConsecutiveParts(shard, model.context_length)
    separator = shard.end_of_text if data.document_mask or model.reads_across_documents is False else None
    if data.shuffle == "documents":
        return ShuffledDocuments(shard, model.context_length, seed, separator=separator, burn_in=model.warmup_tokens)
    return TokenStream(shard.tokens, model.context_length, seed, separator=separator, burn_in=model.warmup_tokens)


class TokenStream:
    """Windows of `context_length + 1` tokens from a text in which all documents are concatenated.

    Each epoch divides the text into windows at a different offset (0 in the first epoch) and visits them in a pseudo-random order.
    Adjacent windows share one token, so each target occurs once in the first epoch. In later epochs, the last window is moved
    back if it would extend past the end of the text.

    With a `separator` (the end-of-text token), examples include `segments`, which number the documents in a window. The end-of-text
    token before a document belongs to the document's segment. The first token in a document is therefore predicted only from the
    end-of-text token, as in evaluation and generation. The end-of-text token after a document is predicted from that document.

    With `burn_in`, each window is preceded by that many additional tokens, which are not targets. At the beginning of the text,
    end-of-text tokens are used instead.
    """

    def __init__(
        self, tokens: np.ndarray, context_length: int, seed: int, *, separator: int | None = None, burn_in: int = 0
    ) -> None:
        """Raises `InputError` if the text is shorter than one window."""
        self._tokens = tokens
        self.context_length = context_length
        self.tokens_per_example = context_length + burn_in
        self._burn_in = burn_in
        self._seed = seed
        self._separator = separator
        self.examples_per_epoch = (len(tokens) - 1) // context_length
        if self.examples_per_epoch < 1:
            raise InputError(
                f"the training text has {len(tokens):,} tokens, fewer than context_length {context_length:,} + 1",
                where="model.context_length",
                hint="use a shorter context or more text",
            )

    def window_starts(self, positions: np.ndarray) -> np.ndarray:
        """Return the index in the text at which the window for each position starts."""
        epochs, within_epoch = np.divmod(positions, self.examples_per_epoch)
        starts = np.empty_like(positions)
        last_start = len(self._tokens) - 1 - self.context_length
        for epoch in np.unique(epochs):
            selected = epochs == epoch
            key = epoch_key(self._seed, int(epoch))
            offset = key % self.context_length if epoch else 0
            windows = permute(within_epoch[selected], self.examples_per_epoch, key)
            starts[selected] = np.minimum(windows * self.context_length + offset, last_start)
        return starts

    def examples(self, start: int, count: int) -> Examples:
        """Return the windows at positions [start, start + count) as `tokens`.

        With a separator, the result also contains `segments`. With a burn-in, it contains `targets`.
        """
        positions = np.arange(start, start + count, dtype=np.int64)
        starts = self.window_starts(positions)
        windows = [self._window(int(p) // self.examples_per_epoch, int(s)) for p, s in zip(positions, starts, strict=True)]
        examples = {"tokens": np.stack(windows).astype(np.int64)}
        if self._separator is not None:
            examples["segments"] = np.cumsum(examples["tokens"] == self._separator, axis=1)
        if self._burn_in:
            targets = examples["tokens"][:, 1:].copy()
            targets[:, : self._burn_in] = IGNORE_INDEX
            examples["targets"] = targets
        return examples

    def _window(self, epoch: int, start: int) -> np.ndarray:
        """Return the window at index `start` in an epoch's text, including its burn-in."""
        first = max(0, start - self._burn_in)
        window = self._read(epoch, first, start + self.context_length + 1)
        missing = self._burn_in - (start - first)
        return window if not missing else np.concatenate((np.repeat(self._tokens[:1], missing), window))

    def _read(self, epoch: int, start: int, end: int) -> np.ndarray:
        """Return the tokens [start, end) from an epoch's text."""
        return self._tokens[start:end]


@dataclass(frozen=True)
class _DocumentOrder:
    """The order of the documents in one epoch, and the index in the epoch's text at which each document ends."""

    epoch: int
    documents: np.ndarray
    ends: np.ndarray


class ShuffledDocuments(TokenStream):
    """Like `TokenStream`, but each epoch concatenates the documents in a different order.

    A document therefore has different neighbors in each epoch. The dataset keeps three integers per document in memory.
    """

    def __init__(self, shard: Shard, context_length: int, seed: int, *, separator: int | None = None, burn_in: int = 0) -> None:
        """Raises `InputError` if the text is shorter than one window."""
        super().__init__(shard.tokens, context_length, seed, separator=separator, burn_in=burn_in)
        boundaries = np.flatnonzero(np.asarray(shard.tokens) == shard.end_of_text)
        self._starts = boundaries[:-1]  # Each document starts with the end-of-text token before it.
        self._lengths = np.diff(boundaries)
        self._last_order: _DocumentOrder | None = None

    def _read(self, epoch: int, start: int, end: int) -> np.ndarray:
        order = self._order(epoch)
        index = int(np.searchsorted(order.ends, start, side="right"))
        pieces = []
        while start < end and index < len(order.ends):
            document, document_end = order.documents[index], int(order.ends[index])
            first = self._starts[document] + self._lengths[document] - (document_end - start)
            length = min(document_end, end) - start
            pieces.append(self._tokens[first : first + length])
            start, index = start + length, index + 1
        if start < end:  # the end-of-text token after the last document
            pieces.append(self._tokens[-1:])
        return np.concatenate(pieces)

    def _order(self, epoch: int) -> _DocumentOrder:
        """Return the document order in an epoch. This is thread-safe because the cached order is replaced atomically."""
        order = self._last_order
        if order is None or order.epoch != epoch:
            count = len(self._starts)
            documents = permute(np.arange(count), count, epoch_key(self._seed, epoch) + 1)
            order = self._last_order = _DocumentOrder(epoch, documents, np.cumsum(self._lengths[documents]))
        return order


class ConsecutiveParts:
    """Consecutive parts of a text with `length` tokens each, for models that are trained by counting.

    The last part can be shorter. There is only one epoch, and positions after its end contain no tokens.
    """

    def __init__(self, shard: Shard, length: int) -> None:
        self.shard, self.length = shard, length
        self.examples_per_epoch = -(-len(shard) // length)
        self.tokens_per_example = len(shard) / self.examples_per_epoch

    def span(self, start: int, count: int) -> tuple[int, int]:
        """Return the token indexes at which the parts [start, start + count) begin and end."""
        return min(start * self.length, len(self.shard)), min((start + count) * self.length, len(self.shard))

    def examples(self, start: int, count: int) -> Examples:
        """Return the parts at positions [start, start + count), with negative ids as padding."""
        first, last = self.span(start, count)
        tokens = np.full(count * self.length, IGNORE_INDEX, dtype=np.int64)
        tokens[: last - first] = self.shard.tokens[first:last]
        return {"tokens": tokens.reshape(count, self.length)}

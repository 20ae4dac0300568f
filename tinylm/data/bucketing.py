"""Orders of examples of different lengths, in which the examples in each batch have similar lengths, to reduce padding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import numpy as np

from tinylm.data.order import epoch_key, permute

_BATCHES_PER_BUCKET = 32
"""Number of batches in a bucket. Each bucket is sorted by length. Larger buckets reduce padding but mix examples less."""


class Order(Protocol):
    """A pseudo-random order of examples that depends only on the seed and the position."""

    examples_per_epoch: int
    """Number of positions in an epoch."""
    filled: float
    """The fraction of the positions that contain an example."""

    def indexes(self, start: int, count: int) -> np.ndarray:
        """Return the indexes of the examples at positions [start, start + count), and -1 at empty positions."""

    def padded_lengths(self) -> np.ndarray:
        """Return the mean number of tokens per position and side in the first epoch, including padding, (sides,)."""

    def longest(self) -> np.ndarray:
        """Return the largest number of tokens per position and side in a batch, including padding, (sides,)."""


def make_order(lengths: np.ndarray, batch_size: int, batch_tokens: int | None, seed: int) -> Order:
    """Return the order of examples with the given `lengths`, (examples, sides), in batches of `batch_size` positions.

    `batch_tokens` limits the number of tokens in a batch, including padding.
    """
    return BucketedOrder(lengths, batch_size, seed) if batch_tokens is None else TokenOrder(lengths, batch_size, batch_tokens, seed)


class _EpochOrder(ABC):
    """Looks up examples in the order of their epoch, and caches the order of the last epoch."""

    examples_per_epoch: int
    _last: tuple[int, np.ndarray] | None = None

    def indexes(self, start: int, count: int) -> np.ndarray:
        positions = np.arange(start, start + count, dtype=np.int64)
        epochs, within_epoch = np.divmod(positions, self.examples_per_epoch)
        indexes = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            indexes[chosen] = self._of_epoch(int(epoch))[within_epoch[chosen]]
        return indexes

    def _of_epoch(self, epoch: int) -> np.ndarray:
        """Return the order of the examples in an epoch. This is thread-safe because the cached order is replaced atomically."""
        last = self._last
        if last is None or last[0] != epoch:
            last = self._last = (epoch, self._compute(epoch))
        return last[1]

    @abstractmethod
    def _compute(self, epoch: int) -> np.ndarray:
        """Return the order of the examples in an epoch."""


class BucketedOrder(_EpochOrder):
    """A pseudo-random order of examples, in which the examples in each batch have similar lengths.

    Each epoch permutes all examples, divides them into buckets of 32 batches, sorts each bucket by length, divides it into batches,
    and permutes the batches. The order depends only on the seed and the position. The incomplete batch at the end of each epoch is
    dropped; it contains different examples each time. If there are fewer examples than `batch_size`, none are dropped.
    """

    filled = 1.0

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int) -> None:
        """`lengths`: (examples, sides). Examples are sorted by the first side, then by the next."""
        self._lengths, self._seed = lengths, seed
        self._batch_size = batch_size if len(lengths) >= batch_size else 1
        self.examples_per_epoch = len(lengths) // self._batch_size * self._batch_size

    def padded_lengths(self) -> np.ndarray:
        batches = self._lengths[self._of_epoch(0)].reshape(-1, self._batch_size, self._lengths.shape[1])
        mean: np.ndarray = batches.max(axis=1).mean(axis=0)
        return mean

    def longest(self) -> np.ndarray:
        longest: np.ndarray = self._lengths.max(axis=0)
        return longest

    def _compute(self, epoch: int) -> np.ndarray:
        total, size = len(self._lengths), self._batch_size
        key = epoch_key(self._seed, epoch)
        order = permute(np.arange(total), total, key)[: self.examples_per_epoch]
        for first in range(0, len(order), size * _BATCHES_PER_BUCKET):
            bucket = order[first : first + size * _BATCHES_PER_BUCKET]
            order[first : first + len(bucket)] = bucket[np.lexsort(self._lengths[bucket].T[::-1])]
        batches = permute(np.arange(len(order) // size), len(order) // size, key + 1)
        mixed: np.ndarray = order.reshape(-1, size)[batches].reshape(-1)
        return mixed


class TokenOrder(_EpochOrder):
    """A pseudo-random order of examples in batches of similar numbers of tokens.

    The examples are sorted by length, and consecutive examples form batches. A batch has at most `batch_tokens` tokens, including
    padding, and at most `batch_size` examples. An example with more tokens is a batch of its own. Each epoch permutes the batches,
    and the examples of equal length among each other.

    Every batch takes `batch_size` positions. Its examples are spread evenly over them, and the others are empty. Therefore, equal
    shares of a batch (micro-batches, processes) contain about the same number of examples.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, batch_tokens: int, seed: int) -> None:
        """`lengths`: (examples, sides). Examples are sorted by the first side, then by the last."""
        self._lengths, self._batch_size, self._seed = lengths, batch_size, seed
        first, last = lengths[:, 0], lengths[:, -1]
        # Alternating directions keep the last sides similar where the first side gets longer by 1.
        self._sort_keys = np.where(first % 2 == 0, last, -last), first
        ordered = lengths[np.lexsort(self._sort_keys)]
        self._starts = np.array(_batch_starts(ordered, batch_size, batch_tokens))
        self._sizes = np.diff(np.append(self._starts, len(lengths)))
        self._padded = np.maximum.reduceat(ordered, self._starts, axis=0) * self._sizes[:, None]  # (batches, sides)
        self.examples_per_epoch = len(self._starts) * batch_size
        self.filled = len(lengths) / self.examples_per_epoch

    def padded_lengths(self) -> np.ndarray:
        mean: np.ndarray = self._padded.mean(axis=0) / self._batch_size
        return mean

    def longest(self) -> np.ndarray:
        longest: np.ndarray = -(-self._padded.max(axis=0) // self._batch_size)
        return longest

    def _compute(self, epoch: int) -> np.ndarray:
        total, batches, key = len(self._lengths), len(self._starts), epoch_key(self._seed, epoch)
        random = permute(np.arange(total), total, key)
        order = np.lexsort((random, *self._sort_keys))
        rank = np.arange(total) - np.repeat(self._starts, self._sizes)  # of each example in its batch
        positions = np.empty(batches, dtype=np.int64)
        positions[permute(np.arange(batches), batches, key + 1)] = np.arange(batches) * self._batch_size
        indexes = np.full(self.examples_per_epoch, -1)
        indexes[np.repeat(positions, self._sizes) + rank * self._batch_size // np.repeat(self._sizes, self._sizes)] = order
        return indexes


def _batch_starts(lengths: np.ndarray, batch_size: int, batch_tokens: int) -> list[int]:
    """Return the index of the first example of each batch, given the lengths of the examples in order."""
    starts, longest = [0], [0] * lengths.shape[1]
    for index, example in enumerate(lengths.tolist()):
        longer = [max(pair) for pair in zip(longest, example, strict=True)]
        size = index - starts[-1] + 1
        if size > 1 and (size > batch_size or size * sum(longer) > batch_tokens):
            starts.append(index)
            longer = example
        longest = longer
    return starts

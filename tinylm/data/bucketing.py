"""An order of examples of different lengths, in which the examples in each batch have similar lengths, to reduce padding."""

from __future__ import annotations

import numpy as np

from tinylm.data.order import epoch_key, permute

_BATCHES_PER_BUCKET = 32
"""Number of batches in a bucket. Each bucket is sorted by length. Larger buckets reduce padding but mix examples less."""


class BucketedOrder:
    """A pseudo-random order of examples, in which the examples in each batch have similar lengths.

    Each epoch permutes all examples, divides them into buckets of 32 batches, sorts each bucket by length, divides it into batches,
    and permutes the batches. The order depends only on the seed and the position. The incomplete batch at the end of each epoch is
    dropped; it contains different examples each time. If there are fewer examples than `batch_size`, none are dropped.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int) -> None:
        """`lengths`: (examples, sides). Examples are sorted by the first side, then by the next."""
        self._lengths, self._seed = lengths, seed
        self._batch_size = batch_size if len(lengths) >= batch_size else 1
        self.examples_per_epoch = len(lengths) // self._batch_size * self._batch_size
        self._last: tuple[int, np.ndarray] | None = None

    def indexes(self, start: int, count: int) -> np.ndarray:
        """Return the indexes of the examples at positions [start, start + count)."""
        positions = np.arange(start, start + count, dtype=np.int64)
        epochs, within_epoch = np.divmod(positions, self.examples_per_epoch)
        indexes = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            indexes[chosen] = self._of_epoch(int(epoch))[within_epoch[chosen]]
        return indexes

    def padded_lengths(self) -> np.ndarray:
        """Return the mean number of positions of each side in the first epoch, including padding, (sides,)."""
        batches = self._lengths[self._of_epoch(0)].reshape(-1, self._batch_size, self._lengths.shape[1])
        mean: np.ndarray = batches.max(axis=1).mean(axis=0)
        return mean

    def _of_epoch(self, epoch: int) -> np.ndarray:
        """Return the order of the examples in an epoch. This is thread-safe because the cached order is replaced atomically."""
        last = self._last
        if last is None or last[0] != epoch:
            last = self._last = (epoch, self._compute(epoch))
        return last[1]

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

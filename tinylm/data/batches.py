"""The data order: which sequences of tokens a step reads, as a pure function of seed and position in O(1) memory.

Each epoch cuts the text into windows of `context_length` targets, at an offset that depends on the epoch, and visits them in a
pseudo-random order that is computed on the fly. A position is the number of sequences read since the start of training, over all
processes. It is all that is needed to resume.
"""

from __future__ import annotations

import numpy as np

from tinylm.errors import InputError

_FEISTEL_ROUNDS = 6
_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
"""SplitMix64's increment: 2^64 divided by the golden ratio."""


def _mix64(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer, uint64 -> uint64: every output bit depends on every input bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed


def permute(positions: np.ndarray, size: int, key: int) -> np.ndarray:
    """Map `positions` in [0, size) with the pseudo-random permutation of [0, size) that `key` selects.

    Uses a Feistel network over a power of two. Images outside the range are mapped again until they are inside (cycle walking).
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    keys = _mix64(np.uint64(key % 2**64) + _GOLDEN_GAMMA * np.arange(1, _FEISTEL_ROUNDS + 1, dtype=np.uint64))

    def encrypt(values: np.ndarray) -> np.ndarray:
        left, right = values >> shift, values & mask
        for round_key in keys:
            left, right = right, left ^ (_mix64(right ^ round_key) & mask)
        return (left << shift) | right

    with np.errstate(over="ignore"):
        values = encrypt(positions.astype(np.uint64))
        while (outside := values >= np.uint64(size)).any():
            values[outside] = encrypt(values[outside])
    return values.astype(np.int64)


def fingerprint(sequences: np.ndarray) -> int:
    """An order-independent 64-bit hash of a set of sequences (N, length)."""
    with np.errstate(over="ignore"):
        offsets = _GOLDEN_GAMMA * np.arange(1, sequences.shape[1] + 1, dtype=np.uint64)
        rows = _mix64(sequences.astype(np.uint64) + offsets).sum(axis=1, dtype=np.uint64)
        return int(_mix64(rows).sum(dtype=np.uint64))


def _epoch_key(seed: int, epoch: int) -> int:
    mixed = _mix64(np.array([seed], dtype=np.uint64) * _GOLDEN_GAMMA + np.uint64(epoch))
    return int(_mix64(mixed)[0])


class Batches:
    """Maps positions in the data order to sequences of `context_length + 1` tokens.

    Adjacent windows share one token, so each target occurs once in the first epoch. Each later epoch starts at an offset of its
    own, and its last window is moved back if it would extend past the end of the text.
    """

    def __init__(self, tokens: np.ndarray, context_length: int, seed: int) -> None:
        """Raises `InputError` if the text is shorter than one sequence."""
        self._tokens = tokens
        self.context_length = context_length
        self._seed = seed
        self.windows_per_epoch = (len(tokens) - 1) // context_length
        if self.windows_per_epoch < 1:
            raise InputError(
                f"the training text has {len(tokens):,} tokens, fewer than context_length {context_length:,} + 1",
                where="model.context_length",
                hint="use a shorter context or more text",
            )

    def window_starts(self, positions: np.ndarray) -> np.ndarray:
        """The index in the text of the first token of each position's sequence."""
        epochs, within_epoch = np.divmod(positions, self.windows_per_epoch)
        starts = np.empty_like(positions)
        last_start = len(self._tokens) - 1 - self.context_length
        for epoch in np.unique(epochs):
            selected = epochs == epoch
            key = _epoch_key(self._seed, int(epoch))
            offset = key % self.context_length if epoch else 0
            windows = permute(within_epoch[selected], self.windows_per_epoch, key)
            starts[selected] = np.minimum(windows * self.context_length + offset, last_start)
        return starts

    def sequences(self, start: int, count: int) -> np.ndarray:
        """The sequences at positions [start, start + count), as int64 (count, context_length + 1)."""
        starts = self.window_starts(np.arange(start, start + count, dtype=np.int64))
        return np.stack([self._tokens[s : s + self.context_length + 1] for s in starts]).astype(np.int64)

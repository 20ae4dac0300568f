"""Which tokens a step sees: a pure function of (seed, position), in O(1) memory.

The text is cut into windows of context_length targets, once per epoch and at an offset that changes with the epoch; the
windows are visited in an order that is a permutation computed on the fly. A position is a count of sequences since the
start of the training, over all processes: it alone is what resuming needs.
"""

from __future__ import annotations

import numpy as np

from tinylm.errors import InputError

_ROUNDS = 6
_MIX = np.uint64(0x9E3779B97F4A7C15)


def _mixed(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: uint64 -> uint64, every bit depending on every bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed


def permuted(positions: np.ndarray, size: int, key: int) -> np.ndarray:
    """The images of `positions` (in [0, size)) under the pseudo-random permutation of [0, size) that `key` chooses.

    A Feistel network over the next even power of two; images outside are sent through again (cycle walking).
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    keys = _mixed(np.uint64(key % 2**64) + _MIX * np.arange(1, _ROUNDS + 1, dtype=np.uint64))

    def encrypt(values: np.ndarray) -> np.ndarray:
        left, right = values >> shift, values & mask
        for round_key in keys:
            left, right = right, left ^ (_mixed(right ^ round_key) & mask)
        return (left << shift) | right

    with np.errstate(over="ignore"):
        values = encrypt(positions.astype(np.uint64))
        while (outside := values >= np.uint64(size)).any():
            values[outside] = encrypt(values[outside])
    return values.astype(np.int64)


def fingerprint(sequences: np.ndarray) -> int:
    """A number in [0, 2**64) that tells sets of sequences (N, length) apart, whatever their order."""
    with np.errstate(over="ignore"):
        places = _MIX * np.arange(1, sequences.shape[1] + 1, dtype=np.uint64)
        rows = _mixed(sequences.astype(np.uint64) + places).sum(axis=1, dtype=np.uint64)
        return int(_mixed(rows).sum(dtype=np.uint64))


def _key(seed: int, epoch: int) -> int:
    mixed = _mixed(np.array([seed], dtype=np.uint64) * _MIX + np.uint64(epoch))
    return int(_mixed(mixed)[0])


class Batches:
    """Sequences of `context_length + 1` tokens by position.

    Neighbouring windows share one token, so that in the first epoch each target occurs once. Later epochs begin at an
    offset of their own; the last window then ends with the text.
    """

    def __init__(self, tokens: np.ndarray, context_length: int, seed: int) -> None:
        """Raises `InputError` when the text is shorter than one sequence."""
        self._tokens = tokens
        self.context_length = context_length
        self._seed = seed
        self.windows = (len(tokens) - 1) // context_length
        if self.windows < 1:
            raise InputError(
                f"the training text has {len(tokens):,} tokens, fewer than context_length {context_length:,} + 1",
                where="model.context_length",
                hint="use a shorter context or more text",
            )

    def starts(self, positions: np.ndarray) -> np.ndarray:
        """Where in the text each position's sequence begins."""
        epochs, within = np.divmod(positions, self.windows)
        starts = np.empty_like(positions)
        last = len(self._tokens) - 1 - self.context_length
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            key = _key(self._seed, int(epoch))
            offset = key % self.context_length if epoch else 0
            windows = permuted(within[chosen], self.windows, key)
            starts[chosen] = np.minimum(windows * self.context_length + offset, last)
        return starts

    def sequences(self, start: int, count: int) -> np.ndarray:
        """Sequences for positions [start, start + count): (count, context_length + 1), int64."""
        starts = self.starts(np.arange(start, start + count, dtype=np.int64))
        return np.stack([self._tokens[s : s + self.context_length + 1] for s in starts]).astype(np.int64)

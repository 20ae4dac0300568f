"""Pseudo-random permutations for the data order, computed in O(1) memory, and hashes of examples."""

from __future__ import annotations

import numpy as np

_FEISTEL_ROUNDS = 6
_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
"""SplitMix64's increment: 2^64 divided by the golden ratio."""


def _mix64(values: np.ndarray) -> np.ndarray:
    """Apply SplitMix64's finalizer (uint64 -> uint64). Each output bit depends on every input bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed


def permute(positions: np.ndarray, size: int, key: int) -> np.ndarray:
    """Map `positions` in [0, size) with the pseudo-random permutation of [0, size) that `key` selects.

    The permutation is a Feistel network over a power of two. Results outside the range are mapped again until they are inside
    (cycle walking).
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


def uniform(seed: int, positions: np.ndarray, width: int, stream: int) -> np.ndarray:
    """Return pseudo-random numbers in [0, 1), (len(positions), width).

    They depend only on the seed, position, column and `stream`. Different streams are independent.
    """
    with np.errstate(over="ignore"):
        key = _mix64(np.array([seed], dtype=np.uint64) + _GOLDEN_GAMMA * np.uint64(2 * stream + 1))
        rows = _mix64(key + _GOLDEN_GAMMA * (positions.astype(np.uint64) + np.uint64(1)))
        columns = _GOLDEN_GAMMA * np.arange(1, width + 1, dtype=np.uint64)
        bits = _mix64(rows[:, None] + columns[None, :])
    numbers: np.ndarray = (bits >> np.uint64(11)).astype(np.float64) / (1 << 53)
    return numbers


def fingerprint(sequences: np.ndarray) -> int:
    """Return a 64-bit hash of sequences (N, length) that does not depend on their order."""
    with np.errstate(over="ignore"):
        offsets = _GOLDEN_GAMMA * np.arange(1, sequences.shape[1] + 1, dtype=np.uint64)
        rows = _mix64(sequences.astype(np.uint64) + offsets).sum(axis=1, dtype=np.uint64)
        return int(_mix64(rows).sum(dtype=np.uint64))


def epoch_key(seed: int, epoch: int) -> int:
    """Return a 64-bit key that selects the permutation for an epoch."""
    mixed = _mix64(np.array([seed], dtype=np.uint64) * _GOLDEN_GAMMA + np.uint64(epoch))
    return int(_mix64(mixed)[0])

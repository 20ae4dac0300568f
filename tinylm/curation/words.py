"""Hash words and sequences of words to 64-bit numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

_MAX_CACHED_WORDS = 1 << 19
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class _WordHashes(dict[bytes, int]):
    """The hashes of the words seen so far. A missing word is hashed and added."""

    def __missing__(self, word: bytes) -> int:
        if len(self) >= _MAX_CACHED_WORDS:
            self.clear()
        value = int.from_bytes(hashlib.blake2b(word, digest_size=8).digest(), "little")
        self[word] = value
        return value


_hashes = _WordHashes()


def hash_words(words: Sequence[bytes]) -> np.ndarray:
    """Return the hash of each word, uint64 (words,). It is the same in every process."""
    return np.fromiter(map(_hashes.__getitem__, words), dtype=np.uint64, count=len(words))


def hash_ngrams(hashes: np.ndarray, length: int) -> np.ndarray:
    """Return the hash of each sequence of `length` words, uint64 (max(words - length + 1, 0),)."""
    count = max(len(hashes) - length + 1, 0)
    result = np.zeros(count, dtype=np.uint64)
    for offset in range(length):
        result *= _MULTIPLIER
        result += hashes[offset : offset + count]
    return result

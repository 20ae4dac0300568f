"""Assign numbers to the distinct chunks of a text. A chunk is the text between two neighboring split points.

Most chunks in a text repeat earlier ones. Therefore, only new chunks have to be encoded, and training counts chunk numbers instead
of words. Array operations look up all chunks of a text at once: each short chunk is packed into three 64-bit integers and compared
in full, so a hash collision cannot return a wrong number.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinylm.tokenizer import kernel_loading
from tinylm.tokenizer.constants import HASH_MULTIPLIERS, PACKED_WORDS
from tinylm.tokenizer.split_points import SplitPoints

MAX_CHUNKS = 400_000
MAX_BYTES = 32 << 20
_SLOTS = 1 << 20
_MAX_PACKED_BYTES = 8 * PACKED_WORDS
_MASKS = np.array([(1 << 8 * size) - 1 for size in range(8)] + [(1 << 64) - 1] * (_MAX_PACKED_BYTES - 7), dtype=np.uint64)
"""`_MASKS[size]` keeps the first `size` bytes of a 64-bit integer, or all 8 bytes if `size` is larger."""


class ChunkIndex:
    """Numbers chunks in the order in which they first occur. `chunks[n]` contains the bytes of chunk number n."""

    def __init__(self, split_points: SplitPoints) -> None:
        self._split_points = split_points
        self.clear()

    def clear(self) -> None:
        """Remove all chunks."""
        self.chunks: list[bytes] = []
        self.n_bytes = 0
        self._numbers: dict[bytes, int] = {}
        """The numbers of chunks that are looked up one by one: long chunks if the kernels are used, otherwise all chunks."""
        self._slots = np.zeros(_SLOTS, dtype=np.int32)
        """The hash table, from slot to chunk number. If the kernels are used, -1 marks an empty slot."""
        self._has_kernel_slots = False
        self._packed = np.zeros((PACKED_WORDS, 1024), dtype="<u8")
        self._lengths = np.full(1024, -1, dtype=np.int32)
        """The length in bytes of each chunk in `_packed`, or -1 for a chunk that is too long to be packed."""

    @property
    def is_full(self) -> bool:
        """Whether the index has reached its size limit. The caller should then call `clear`."""
        return len(self.chunks) > MAX_CHUNKS or self.n_bytes > MAX_BYTES

    def find(self, text: bytes) -> np.ndarray:
        """Return the chunk numbers of a text in order, as int32 (chunks,). New chunks get the next numbers."""
        if not text:
            return np.zeros(0, dtype=np.int32)
        starts = np.concatenate(([0], self._split_points.find(text)))
        lengths = np.diff(starts, append=len(text)).astype(np.int32)
        if (kernels := kernel_loading.kernels_if_worthwhile(len(text))) is not None:
            return self._find_with_kernels(kernels, text, starts, lengths)
        numbers, missing = self._look_up(text, starts, lengths)
        if len(missing):
            starts, lengths = starts[missing], lengths[missing]
            numbers[missing] = self._number_one_by_one(text, starts, starts + lengths)
            self._store(numbers[missing], lengths, *_pack(text, starts, lengths))
        return numbers

    def _find_with_kernels(self, kernels: Any, text: bytes, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """`find` with compiled loops. Linear probing resolves hash collisions, so the table contains every short chunk."""
        if not self._has_kernel_slots:
            self._slots = np.full(_SLOTS, -1, dtype=np.int32)
            kernels.index_chunks(self._slots, self._packed, self._lengths, len(self.chunks))
            self._has_kernel_slots = True
        self._reserve(len(self.chunks) + len(starts))
        codes, numbers = np.frombuffer(text, dtype=np.uint8), np.empty(len(starts), np.int32)
        new, long = np.empty(len(starts), np.int64), np.empty(len(starts), np.int64)
        n_new, n_long = kernels.number_chunks(
            codes, starts, self._slots, self._packed, self._lengths, len(self.chunks), numbers, new, long
        )
        for start, length in zip(starts[new[:n_new]].tolist(), lengths[new[:n_new]].tolist(), strict=True):
            self.chunks.append(text[start : start + length])
            self.n_bytes += length
        if n_long:
            long = long[:n_long]
            numbers[long] = self._number_one_by_one(text, starts[long], starts[long] + lengths[long])
        return numbers

    def _look_up(self, text: bytes, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the number of each chunk, and the indices of the chunks that were not found."""
        packed, slots = _pack(text, starts, lengths)
        numbers: np.ndarray = self._slots[slots]
        known = self._lengths[numbers] == lengths
        for word, stored in zip(packed, self._packed, strict=True):
            known &= stored[numbers] == word
        return numbers, np.flatnonzero(~known)

    def _number_one_by_one(self, text: bytes, starts: np.ndarray, ends: np.ndarray) -> list[int]:
        """Return the chunk number of `text[start:end]` for each start and end. New chunks get the next numbers."""
        known_numbers, chunks = self._numbers, self.chunks
        numbers = []
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            chunk = text[start:end]
            number = known_numbers.get(chunk)
            if number is None:
                number = known_numbers[chunk] = len(chunks)
                chunks.append(chunk)
                self.n_bytes += len(chunk)
            numbers.append(number)
        return numbers

    def _store(self, numbers: np.ndarray, lengths: np.ndarray, packed: list[np.ndarray], slots: np.ndarray) -> None:
        """Add short chunks to the table that `_look_up` reads. If two chunks have the same slot, the later one is kept."""
        self._reserve(len(self.chunks))
        short = lengths <= _MAX_PACKED_BYTES
        numbers = numbers[short]
        self._lengths[numbers] = lengths[short]
        for stored, word in zip(self._packed, packed, strict=True):
            stored[numbers] = word[short]
        self._slots[slots[short]] = numbers

    def _reserve(self, n_chunks: int) -> None:
        """Grow the arrays if they are too small for `n_chunks` chunks."""
        if n_chunks > len(self._lengths):
            extra = 2 * n_chunks - len(self._lengths)
            self._lengths = np.concatenate((self._lengths, np.full(extra, -1, dtype=np.int32)))
            self._packed = np.pad(self._packed, ((0, 0), (0, extra)))


def _pack(text: bytes, starts: np.ndarray, lengths: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the first bytes of each chunk as `PACKED_WORDS` zero-padded integers, and the hash table slot of each chunk."""
    padded = text + bytes(_MAX_PACKED_BYTES)
    # word_at[i] is the integer formed by the 8 bytes at position i. The view is strided, so nothing is copied.
    word_at = np.ndarray(shape=(len(text) + 8 * (PACKED_WORDS - 1) + 1,), dtype="<u8", buffer=padded, strides=(1,))
    words = []
    hashed = lengths.astype(np.uint64) * HASH_MULTIPLIERS[1]
    for index in range(PACKED_WORDS):
        sizes = np.clip(lengths - 8 * index, 0, _MAX_PACKED_BYTES)
        word = word_at[starts + 8 * index] & _MASKS[sizes]
        hashed = (hashed ^ word) * HASH_MULTIPLIERS[index]
        hashed ^= hashed >> np.uint64(29)
        words.append(word)
    return words, (hashed & np.uint64(_SLOTS - 1)).astype(np.int64)

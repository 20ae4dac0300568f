"""Distinct chunks of text, found fast: most of any text is words that stood in it before.

A `ChunkIndex` numbers the chunks between the borders of a text. The bytes of a short chunk are packed into three integers and
looked up for the whole text at once with array operations, which compare all of the chunk: a number is never a guess. Encoding
then asks the model only for chunks not met before, and training counts numbers instead of reading words.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinylm.tokenizer.compiled import kernels
from tinylm.tokenizer.splits import SplitPoints

MOST_CHUNKS = 400_000
MOST_BYTES = 32 << 20
_WORDS = 3
"""Integers of 8 bytes for a chunk; a longer chunk is looked up by itself."""
_SLOTS = 1 << 20
MULTIPLIERS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(0x165667B19E3779F9))
_MASKS = np.array([(1 << 8 * size) - 1 for size in range(8)] + [(1 << 64) - 1] * (8 * _WORDS - 7), dtype=np.uint64)


class ChunkIndex:
    """Numbers chunks as they are met. `chunks[n]` is the text of number n, as bytes."""

    def __init__(self, borders: SplitPoints) -> None:
        self._borders = borders
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.chunks: list[bytes] = []
        self.bytes = 0
        self._numbers: dict[bytes, int] = {}
        self._slots = np.zeros(_SLOTS, dtype=np.int32)
        self._compiled = False
        self._packed = np.zeros((_WORDS, 1024), dtype="<u8")
        self._lengths = np.full(1024, -1, dtype=np.int32)

    @property
    def is_full(self) -> bool:
        """Whether it holds as much as it should; then it is for its owner to `clear` it."""
        return len(self.chunks) > MOST_CHUNKS or self.bytes > MOST_BYTES

    def find(self, text: bytes) -> np.ndarray:
        """The numbers of a text's chunks in order, as int32; chunks not met before get the next numbers."""
        if not text:
            return np.zeros(0, dtype=np.int32)
        starts = np.concatenate(([0], self._borders.find(text)))
        lengths = np.diff(starts, append=len(text)).astype(np.int32)
        if (loops := kernels(len(text))) is not None:
            return self._numbered(loops, text, starts, lengths)
        found, unknown = self._look_up(text, starts, lengths)
        if len(unknown):
            starts, lengths = starts[unknown], lengths[unknown]
            found[unknown] = self._resolve(text, starts, starts + lengths)
            self._remember(found[unknown], lengths, *_pack(text, starts, lengths))
        return found

    def _numbered(self, loops: Any, text: bytes, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The number of each chunk by machine code, which looks on where two want the same slot."""
        if not self._compiled:
            self._slots = np.full(_SLOTS, -1, dtype=np.int32)
            loops.index_chunks(self._slots, self._packed, self._lengths, len(self.chunks))
            self._compiled = True
        self._make_room(len(self.chunks) + len(starts))
        codes, found = np.frombuffer(text, dtype=np.uint8), np.empty(len(starts), np.int32)
        new, long = np.empty(len(starts), np.int64), np.empty(len(starts), np.int64)
        fresh, others = loops.number_chunks(
            codes, starts, self._slots, self._packed, self._lengths, len(self.chunks), found, new, long
        )
        for start, length in zip(starts[new[:fresh]].tolist(), lengths[new[:fresh]].tolist(), strict=True):
            self.chunks.append(text[start : start + length])
            self.bytes += length
        if others:
            long = long[:others]
            found[long] = self._resolve(text, starts[long], starts[long] + lengths[long])
        return found

    def _look_up(self, text: bytes, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The number of each chunk, and which of them are not known."""
        packed, slots = _pack(text, starts, lengths)
        found: np.ndarray = self._slots[slots]
        known = self._lengths[found] == lengths
        for word, kept in zip(packed, self._packed, strict=True):
            known &= kept[found] == word
        return found, np.flatnonzero(~known)

    def _resolve(self, text: bytes, starts: np.ndarray, ends: np.ndarray) -> list[int]:
        numbers, chunks = self._numbers, self.chunks
        found = []
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            chunk = text[start:end]
            number = numbers.get(chunk)
            if number is None:
                number = numbers[chunk] = len(chunks)
                chunks.append(chunk)
                self.bytes += len(chunk)
            found.append(number)
        return found

    def _remember(self, numbers: np.ndarray, lengths: np.ndarray, packed: list[np.ndarray], slots: np.ndarray) -> None:
        """Put short chunks where the next look-up finds them; of two that want the same slot the later has it."""
        self._make_room(len(self.chunks))
        short = lengths <= 8 * _WORDS
        numbers = numbers[short]
        self._lengths[numbers] = lengths[short]
        for kept, word in zip(self._packed, packed, strict=True):
            kept[numbers] = word[short]
        self._slots[slots[short]] = numbers

    def _make_room(self, numbers: int) -> None:
        more = 2 * numbers - len(self._lengths)
        if numbers > len(self._lengths):
            self._lengths = np.concatenate((self._lengths, np.full(more, -1, dtype=np.int32)))
            self._packed = np.pad(self._packed, ((0, 0), (0, more)))


def _pack(text: bytes, starts: np.ndarray, lengths: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Each chunk's first bytes as integers, what lies behind its end as zeros; and the slot that they hash to."""
    padded = text + bytes(8 * _WORDS)
    everywhere = np.ndarray(shape=(len(text) + 8 * (_WORDS - 1) + 1,), dtype="<u8", buffer=padded, strides=(1,))
    words = []
    hashed = lengths.astype(np.uint64) * MULTIPLIERS[1]
    for index in range(_WORDS):
        inside = np.clip(lengths - 8 * index, 0, 8 * _WORDS)
        word = everywhere[starts + 8 * index] & _MASKS[inside]
        hashed = (hashed ^ word) * MULTIPLIERS[index]
        hashed ^= hashed >> np.uint64(29)
        words.append(word)
    return words, (hashed & np.uint64(_SLOTS - 1)).astype(np.int64)

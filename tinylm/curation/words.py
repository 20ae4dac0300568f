"""Divide texts into words, and hash words and sequences of words to 64-bit numbers.

The inner loops are in `kernels`, which is imported late because importing numba takes half a second.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

OTHER, LETTER, SPACE = range(3)
"""The classes of characters."""
_classes = np.full(0x110000, OTHER, dtype=np.uint8)
"""The class of each character in `_known`."""
_known: set[str] = set()


@dataclass(frozen=True)
class Words:
    """The words in a text. They are separated by whitespace."""

    hashes: np.ndarray
    """uint64 (words,): a hash of each word, which is the same in every process."""
    lengths: np.ndarray
    """int64 (words,): the number of characters in each word."""
    with_letter: int
    """The number of words that contain a letter."""

    def __len__(self) -> int:
        return len(self.hashes)

    def ngram_hashes(self, length: int) -> np.ndarray:
        """Return the hash of each sequence of `length` words, uint64 (max(words - length + 1, 0),)."""
        from tinylm.curation import kernels

        hashes: np.ndarray = kernels.hash_ngrams(self.hashes, length)
        return hashes

    def top_ngram(self, length: int) -> tuple[int, int]:
        """Return (count, characters) of the most frequent n-gram, including the spaces in it, or (0, 0) if there is none.

        The first one wins a tie.
        """
        from tinylm.curation import kernels

        count, characters = kernels.top_ngram(self.hashes, self.lengths, length)
        return count, characters

    def repeated_characters(self, length: int) -> int:
        """Return the number of characters, without spaces, in n-grams that occurred before. Overlaps are counted once."""
        from tinylm.curation import kernels

        characters: int = kernels.repeated_characters(self.hashes, self.lengths, length)
        return characters


def find_words(text: str) -> Words:
    """Find the words in a text."""
    from tinylm.curation import kernels

    if text.isascii():
        codes = np.frombuffer(text.encode("ascii"), dtype=np.uint8)
    else:
        _classify(set(text) - _known)
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    return Words(*kernels.scan_words(codes, _classes, LETTER, SPACE))


def _classify(characters: set[str]) -> None:
    """Store the classes of characters."""
    for character in characters:
        if character.isspace():
            _classes[ord(character)] = SPACE
        elif character.isalpha():
            _classes[ord(character)] = LETTER
    _known.update(characters)


_classify(set(map(chr, range(128))))

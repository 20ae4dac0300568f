"""MinHash signatures of documents, divided into bands (Broder 1997; Leskovec et al., chapter 3).

Two documents with the Jaccard similarity s of their sets of word 5-grams agree in a whole band of r rows with probability s^r,
and in at least one of b bands with probability 1 - (1 - s^r)^b. FineWeb's 14 bands of 8 rows find 92% of the pairs with s = 0.8
and 37% of the pairs with s = 0.65.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tinylm.curation.words import find_words

SHINGLE_WORDS = 5
_SEED = 1
_ASCII = bytes(
    ord("0") if chr(code).isdigit() else ord(chr(code).lower()) if chr(code).isalnum() else ord(" ") for code in range(128)
) + bytes(128)
"""Maps each ASCII character to a lowercase letter, the digit 0 or a space."""
_NO_WORD = re.compile(r"[\W_]+")
_DIGIT = re.compile(r"\d")
_IDEOGRAPH = re.compile(r"([\u3040-\u30ff\u3400-\u9fff])")
"""A Chinese or Japanese character, which is treated as a word."""
_MIX = np.uint64(0xBF58476D1CE4E5B9)


def shingles(text: str) -> np.ndarray:
    """Return the hashes of the word 5-grams in a text, uint64. A text with fewer than five words has a single shingle, or none
    if it has no words.

    Case, punctuation, accents and the values of digits are ignored, similar to datatrove.
    """
    words = find_words(_normalized(text))
    return words.ngram_hashes(min(SHINGLE_WORDS, len(words))) if len(words) else words.hashes


def _normalized(text: str) -> str:
    if text.isascii():  # several times faster
        return text.encode("ascii").translate(_ASCII).decode("ascii")
    text = unicodedata.normalize("NFD", text.lower())
    marks = [character for character in set(text) if unicodedata.combining(character)]
    if marks:
        text = text.translate(dict.fromkeys(map(ord, marks)))
    return _IDEOGRAPH.sub(r" \1 ", _DIGIT.sub("0", _NO_WORD.sub(" ", text)))


@dataclass(frozen=True)
class MinHash:
    """A family of `bands` * `rows` hash functions."""

    bands: int = 14
    rows: int = 8

    @cached_property
    def _functions(self) -> tuple[np.ndarray, np.ndarray]:
        """The odd factor and the offset of each function, which maps x to the higher half of factor * x + offset modulo 2**64."""
        factors, offsets = np.random.default_rng(_SEED).integers(0, 1 << 64, (2, self.bands * self.rows), dtype=np.uint64)
        return factors | np.uint64(1), offsets

    def probability(self, similarity: float) -> float:
        """Return the probability that two documents with this Jaccard similarity agree in at least one band."""
        return 1 - (1 - similarity**self.rows) ** self.bands

    def band_keys(self, documents: list[np.ndarray]) -> np.ndarray:
        """Return a key for each band and document, uint64 (bands, documents). `documents` are nonempty arrays of shingles.

        Documents have the same key if they agree in all rows of the band.
        """
        from tinylm.curation import kernels

        minima = np.empty((len(documents), self.bands * self.rows), dtype=np.uint32)
        for number, document in enumerate(documents):
            minima[number] = kernels.minima(document, *self._functions)
        keys = np.zeros((len(documents), self.bands), dtype=np.uint64)
        for row in range(self.rows):
            keys ^= minima[:, row :: self.rows]
            keys *= _MIX
            keys ^= keys >> np.uint64(29)
        return np.ascontiguousarray(keys.T)

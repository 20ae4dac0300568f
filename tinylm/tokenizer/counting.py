"""How often each word stands in a text: all that training needs to know of it.

Words are what the tokenizer's own normaliser and pre-tokenizer make of the text. Between borders most text repeats, so chunks are
numbered and counted first and only distinct ones are divided into words. Counts are Python integers, which do not overflow;
memory is bounded by the distinct words kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import tokenizers

from tinylm.text.sources import Piece
from tinylm.tokenizer import splits
from tinylm.tokenizer.chunks import ChunkIndex
from tinylm.tokenizer.encoding import units
from tinylm.tokenizer.splits import SplitPoints

Warn = Callable[[str], None]

LONGEST_RUN = 256
"""Characters of a word that are learned from together: a longer one is cut, for nothing repeats at that length."""
RUNS_BUDGET = 1 << 20
"""Characters of such words that are learned from at all."""
MOST_WORDS = 500_000
"""Distinct words kept; with more, those met least are forgotten. It bounds the memory of counting and of learning."""
_WINDOW = 1 << 20
_MARGIN = 1 << 10
_TOGETHER = 1 << 12


@dataclass(frozen=True)
class Words:
    """Words with their counts, most frequent first and otherwise in code point order: the same for the same text."""

    texts: list[str]
    counts: np.ndarray
    """int64 (words,)"""


def count_words(backend: tokenizers.Tokenizer, borders: SplitPoints | None, pieces: Iterable[Piece], warn: Warn) -> Words:
    """The words that `backend` makes of a text."""
    counter = _Counter(backend, warn)
    if borders is None:
        for text, _ in units(pieces, None):
            counter.add_all(text.decode("utf-8"))
        return counter.words()
    index, counts = ChunkIndex(borders), np.zeros(0, dtype=np.int64)
    for text, _ in units(pieces, borders):
        found = np.bincount(index.find(text), minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
        if index.is_full:
            counter.add(borders, index.chunks, counts.tolist())
            index.clear()
            counts = np.zeros(0, dtype=np.int64)
    counter.add(borders, index.chunks, counts.tolist())
    return counter.words()


def count_characters(backend: tokenizers.Tokenizer, pieces: Iterable[Piece]) -> Words:
    """The characters of a text after normalisation, as words of one."""
    totals = np.zeros(0x110000, dtype=np.int64)
    before_spaces = splits.KNOWN["whitespace"]
    for text, _ in units(pieces, before_spaces if backend.normalizer is None else before_spaces.without_high()):
        characters = text.decode("utf-8")
        if backend.normalizer is not None:
            characters = backend.normalizer.normalize_str(characters)
        codes, counts = np.unique(np.frombuffer(characters.encode("utf-32-le"), dtype="<u4"), return_counts=True)
        totals[codes] += counts
    return _ordered({chr(code): int(totals[code]) for code in np.flatnonzero(totals)})


def _ordered(counts: Mapping[str, int]) -> Words:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return Words([word for word, _ in ordered], np.array([count for _, count in ordered], dtype=np.int64))


class _Counter:
    def __init__(self, backend: tokenizers.Tokenizer, warn: Warn) -> None:
        self._normalize = backend.normalizer.normalize_str if backend.normalizer is not None else str
        self._divide = (
            backend.pre_tokenizer.pre_tokenize_str if backend.pre_tokenizer is not None else lambda text: [(text, (0, len(text)))]
        )
        self._warn = warn
        self._counts: dict[str, int] = {}
        self._kept = 0
        self._rarest = 0
        self._cut = False

    def add(self, borders: SplitPoints, chunks: Sequence[bytes], counts: Sequence[int]) -> None:
        """Distinct chunks between `borders`, each with how often it stands in the text."""
        for start in range(0, len(chunks), _TOGETHER):
            texts = [self._normalize(chunk.decode("utf-8")) for chunk in chunks[start : start + _TOGETHER]]
            self._add_together(borders, texts, np.array(counts[start : start + _TOGETHER], dtype=np.int64))
        self._forget_rare()

    def _add_together(self, borders: SplitPoints, texts: list[str], counts: np.ndarray) -> None:
        """Divide chunks as one text, which is several times faster, wherever that text has a border between two of them."""
        sizes = np.fromiter((len(text.encode("utf-8")) for text in texts), dtype=np.int64, count=len(texts))
        joined = np.isin(np.cumsum(sizes) - sizes, borders.find("".join(texts).encode("utf-8")))
        lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
        begins = np.cumsum(lengths) - lengths
        runs = np.unique(np.concatenate(([0], np.flatnonzero(~joined), [len(texts)]))).tolist()
        words: list[str] = []
        starts: list[int] = []
        for first, last in pairwise(runs):
            offset = int(begins[first])
            for word, (start, _) in self._divide("".join(texts[first:last])):
                words.append(word)
                starts.append(offset + start)
        owners = np.searchsorted(begins, starts, side="right") - 1
        met = self._counts
        for word, count in zip(words, counts[owners].tolist(), strict=True):
            if len(word) <= LONGEST_RUN:
                met[word] = met.get(word, 0) + count
            else:
                self._one(word, count)

    def add_all(self, text: str) -> None:
        """A text without known borders: divided in windows that go on where a word ended well inside the last."""
        text = self._normalize(text)
        start, size = 0, _WINDOW
        while start < len(text):
            window = text[start : start + size]
            last = start + size >= len(text)
            end = 0
            for word, (_, stop) in self._divide(window):
                if not last and stop > size - _MARGIN:
                    break
                self._one(word, 1)
                end = stop
            if last:
                return
            start, size = (start + end, _WINDOW) if end else (start, 2 * size)
            self._forget_rare()

    def _one(self, word: str, count: int) -> None:
        if len(word) <= LONGEST_RUN:
            self._counts[word] = self._counts.get(word, 0) + count
            return
        for part in self._parts(word):
            self._counts[part] = self._counts.get(part, 0) + count

    def _parts(self, word: str) -> Iterator[str]:
        if not self._cut:
            self._cut = True
            self._warn(
                f"the text has runs of more than {LONGEST_RUN} characters without a border; at most {RUNS_BUDGET:,} characters of "
                "such runs are learned from"
            )
        kept = word[: max(0, RUNS_BUDGET - self._kept)]
        self._kept += len(kept)
        return (kept[start : start + LONGEST_RUN] for start in range(0, len(kept), LONGEST_RUN))

    def _forget_rare(self) -> None:
        while len(self._counts) > MOST_WORDS:
            self._rarest += 1
            self._counts = {word: count for word, count in self._counts.items() if count > self._rarest}
            self._warn(f"more than {MOST_WORDS:,} different words: those met at most {self._rarest} times so far are forgotten")

    def words(self) -> Words:
        return _ordered(self._counts)


def character_counts(words: Words) -> dict[str, int]:
    """How often each character stands in the text, most frequent first."""
    codes = np.frombuffer("".join(words.texts).encode("utf-32-le"), dtype="<u4")
    weights = np.repeat(words.counts, [len(word) for word in words.texts])
    distinct, owners = np.unique(codes, return_inverse=True)
    totals = np.zeros(len(distinct), dtype=np.int64)
    np.add.at(totals, owners, weights)
    ordered = sorted(zip(distinct.tolist(), totals.tolist(), strict=True), key=lambda item: (-item[1], item[0]))
    return {chr(code): count for code, count in ordered}


def warn_of_binary(pieces: Iterable[Piece], warn: Warn) -> Iterator[Piece]:
    """The same pieces; says so early when the first of them look like no text at all."""
    seen = strange = 0
    for piece in pieces:
        if seen < _WINDOW:
            seen += len(piece.text)
            strange += len(_STRANGE.findall(piece.text))
            if seen >= _WINDOW or strange > 1000:
                _warn_if_strange(strange, seen, warn)
                seen = max(seen, _WINDOW)
        yield piece
    if seen < _WINDOW:
        _warn_if_strange(strange, seen, warn)


_STRANGE = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f\ufffd]")


def _warn_if_strange(strange: int, seen: int, warn: Warn) -> None:
    if strange > seen / 100:
        warn(f"{strange:,} of the first {seen:,} characters are control characters or U+FFFD: is this a binary file?")

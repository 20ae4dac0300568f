"""Count the words in a text. Vocabularies are learned from these counts.

Words are the units into which a tokenizer's normalizer and pretokenizer divide the text. If the split points are known, chunks are
counted first, and each distinct chunk is divided into words only once. Memory use is limited, because at most `MAX_WORDS` distinct
words are kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import tokenizers

from tinylm.text.sources import Piece
from tinylm.tokenizer.byte_level import bytes_to_unicode
from tinylm.tokenizer.chunks import ChunkIndex
from tinylm.tokenizer.encoding import segments
from tinylm.tokenizer.pretokenizer import ascii_pattern, maps_bytes
from tinylm.tokenizer.split_points import SPLIT_POINTS, SplitPoints

Warn = Callable[[str], None]

MAX_WORD_LENGTH = 256
"""Longer words are cut into parts of this many characters, because they rarely repeat."""
MAX_LONG_WORD_CHARACTERS = 1 << 20
"""Maximum total number of characters of long words that are counted."""
MAX_WORDS = 500_000
"""Maximum number of distinct words. If there are more, the rarest are dropped, which limits memory use in counting and learning."""
BINARY_CHECK_CHARACTERS = 1 << 20
"""Number of characters at the beginning of a text that are checked for control characters."""
WINDOW_CHARACTERS = 1 << 20
"""A text without known split points is divided into words in windows of this size."""
_WINDOW_MARGIN = 1 << 10
"""A word may be incomplete if it ends within this many characters of the end of a window."""
_CHUNKS_AT_ONCE = 1 << 12


@dataclass(frozen=True)
class WordCounts:
    """Distinct words with their counts, most frequent first and then in code point order."""

    words: list[str]
    counts: np.ndarray
    """int64 (words,)"""


def count_words(backend: tokenizers.Tokenizer, split_points: SplitPoints | None, pieces: Iterable[Piece], warn: Warn) -> WordCounts:
    """Count the words into which the normalizer and pretokenizer of `backend` divide a text."""
    counter = _WordCounter(backend, warn)
    if split_points is None:
        for text, _ in segments(pieces, None):
            counter.add_text(text.decode("utf-8"))
        return counter.result()
    index, counts = ChunkIndex(split_points), np.zeros(0, dtype=np.int64)
    for text, _ in segments(pieces, split_points, cut_anywhere=True):  # a word that is cut hardly changes the counts
        chunk_counts = np.bincount(index.find(text), minlength=len(counts))
        chunk_counts[: len(counts)] += counts
        counts = chunk_counts
        if index.is_full:
            counter.add_chunks(split_points, index.chunks, counts.tolist())
            index.clear()
            counts = np.zeros(0, dtype=np.int64)
    counter.add_chunks(split_points, index.chunks, counts.tolist())
    return counter.result()


def count_characters(backend: tokenizers.Tokenizer, pieces: Iterable[Piece]) -> WordCounts:
    """Count the characters in a text after normalization. Each character is a word in the result."""
    totals = np.zeros(0x110000, dtype=np.int64)
    at_spaces = SPLIT_POINTS["whitespace"]
    for text, _ in segments(pieces, at_spaces if backend.normalizer is None else at_spaces.ascii_only(), cut_anywhere=True):
        characters = text.decode("utf-8")
        if backend.normalizer is not None:
            characters = backend.normalizer.normalize_str(characters)
        codes, counts = np.unique(np.frombuffer(characters.encode("utf-32-le"), dtype="<u4"), return_counts=True)
        totals[codes] += counts
    return _sorted_counts({chr(code): int(totals[code]) for code in np.flatnonzero(totals)})


def _sorted_counts(counts: Mapping[str, int]) -> WordCounts:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return WordCounts([word for word, _ in ordered], np.array([count for _, count in ordered], dtype=np.int64))


class _WordCounter:
    def __init__(self, backend: tokenizers.Tokenizer, warn: Warn) -> None:
        self._normalize = backend.normalizer.normalize_str if backend.normalizer is not None else str
        self._pretokenize = (
            backend.pre_tokenizer.pre_tokenize_str if backend.pre_tokenizer is not None else lambda text: [(text, (0, len(text)))]
        )
        tokenizer_json = json.loads(backend.to_str())
        self._ascii_pattern = ascii_pattern(tokenizer_json) if backend.normalizer is None else None
        self._ascii_characters = bytes_to_unicode() if maps_bytes(tokenizer_json) else {}
        self._warn = warn
        self._counts: dict[str, int] = {}
        self._long_word_characters = 0
        self._dropped_count = 0
        """Words with at most this count have been dropped."""
        self._warned_about_long_words = False

    def add_chunks(self, split_points: SplitPoints, chunks: Sequence[bytes], counts: Sequence[int]) -> None:
        """Count the words in distinct chunks. `counts` contains the number of occurrences of each chunk."""
        if self._ascii_pattern is not None:
            self._add_ascii_chunks(self._ascii_pattern, chunks, counts)
            others = [(chunk, count) for chunk, count in zip(chunks, counts, strict=True) if not chunk.isascii()]
            chunks, counts = [chunk for chunk, _ in others], [count for _, count in others]
        for start in range(0, len(chunks), _CHUNKS_AT_ONCE):
            texts = [self._normalize(chunk.decode("utf-8")) for chunk in chunks[start : start + _CHUNKS_AT_ONCE]]
            self._add_texts(split_points, texts, np.array(counts[start : start + _CHUNKS_AT_ONCE], dtype=np.int64))
        self._drop_rare_words()

    def _add_ascii_chunks(self, pattern: re.Pattern[str], chunks: Sequence[bytes], counts: Sequence[int]) -> None:
        """Count the words in those chunks that are ASCII, with Python's `re`, which is faster than the pretokenizer."""
        totals: dict[str, int] = {}
        for chunk, count in zip(chunks, counts, strict=True):
            if chunk.isascii():
                for word in pattern.findall(chunk.decode("ascii")):
                    totals[word] = totals.get(word, 0) + count
        for word, count in totals.items():
            self._add_word(word.translate(self._ascii_characters), count)

    def _add_texts(self, split_points: SplitPoints, texts: list[str], counts: np.ndarray) -> None:
        """Join the texts of chunks and pretokenize them together, which is several times faster than one at a time.

        Two neighboring texts are joined only if there is a split point between them in the joined text.
        """
        n_bytes = np.fromiter((len(text.encode("utf-8")) for text in texts), dtype=np.int64, count=len(texts))
        joined = np.isin(np.cumsum(n_bytes) - n_bytes, split_points.find("".join(texts).encode("utf-8")))
        lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
        text_offsets = np.cumsum(lengths) - lengths
        runs = np.unique(np.concatenate(([0], np.flatnonzero(~joined), [len(texts)]))).tolist()
        words: list[str] = []
        starts: list[int] = []
        for first, last in pairwise(runs):
            offset = int(text_offsets[first])
            for word, (start, _) in self._pretokenize("".join(texts[first:last])):
                words.append(word)
                starts.append(offset + start)
        chunk_of_word = np.searchsorted(text_offsets, starts, side="right") - 1
        totals = self._counts
        for word, count in zip(words, counts[chunk_of_word].tolist(), strict=True):
            if len(word) <= MAX_WORD_LENGTH:
                totals[word] = totals.get(word, 0) + count
            else:
                self._add_word(word, count)

    def add_text(self, text: str) -> None:
        """Count the words in a text without known split points.

        The text is pretokenized in windows. The next window begins after the last word that ends well inside the current window.
        """
        text = self._normalize(text)
        start, size = 0, WINDOW_CHARACTERS
        while start < len(text):
            window = text[start : start + size]
            is_last = start + size >= len(text)
            end = 0
            for word, (_, stop) in self._pretokenize(window):
                if not is_last and stop > size - _WINDOW_MARGIN:
                    break
                self._add_word(word, 1)
                end = stop
            if is_last:
                return
            start, size = (start + end, WINDOW_CHARACTERS) if end else (start, 2 * size)
            self._drop_rare_words()

    def _add_word(self, word: str, count: int) -> None:
        if len(word) <= MAX_WORD_LENGTH:
            self._counts[word] = self._counts.get(word, 0) + count
            return
        for part in self._parts(word):
            self._counts[part] = self._counts.get(part, 0) + count

    def _parts(self, word: str) -> Iterator[str]:
        """Cut a long word into parts of `MAX_WORD_LENGTH` characters.

        Keep at most `MAX_LONG_WORD_CHARACTERS` characters across all long words.
        """
        if not self._warned_about_long_words:
            self._warned_about_long_words = True
            self._warn(
                f"the text has words of more than {MAX_WORD_LENGTH} characters (text without spaces?); at most "
                f"{MAX_LONG_WORD_CHARACTERS:,} characters of such words are used"
            )
        kept = word[: max(0, MAX_LONG_WORD_CHARACTERS - self._long_word_characters)]
        self._long_word_characters += len(kept)
        return (kept[start : start + MAX_WORD_LENGTH] for start in range(0, len(kept), MAX_WORD_LENGTH))

    def _drop_rare_words(self) -> None:
        while len(self._counts) > MAX_WORDS:
            self._dropped_count += 1
            self._counts = {word: count for word, count in self._counts.items() if count > self._dropped_count}
            self._warn(
                f"the text has more than {MAX_WORDS:,} distinct words; words seen at most {self._dropped_count} times so far "
                "were dropped"
            )

    def result(self) -> WordCounts:
        return _sorted_counts(self._counts)


def character_counts(word_counts: WordCounts) -> dict[str, int]:
    """Return the count of each character in the text, most frequent first."""
    codes = np.frombuffer("".join(word_counts.words).encode("utf-32-le"), dtype="<u4")
    weights = np.repeat(word_counts.counts, [len(word) for word in word_counts.words])
    distinct, inverse = np.unique(codes, return_inverse=True)
    totals = np.zeros(len(distinct), dtype=np.int64)
    np.add.at(totals, inverse, weights)
    ordered = sorted(zip(distinct.tolist(), totals.tolist(), strict=True), key=lambda item: (-item[1], item[0]))
    return {chr(code): count for code, count in ordered}


def warn_if_binary(pieces: Iterable[Piece], warn: Warn) -> Iterator[Piece]:
    """Yield the pieces unchanged, and warn once if the beginning of the text looks like a binary file."""
    seen = control = 0
    for piece in pieces:
        if seen < BINARY_CHECK_CHARACTERS:
            seen += len(piece.text)
            control += len(_CONTROL.findall(piece.text))
            if seen >= BINARY_CHECK_CHARACTERS or control > 1000:
                _check_for_binary(control, seen, warn)
                seen = max(seen, BINARY_CHECK_CHARACTERS)
        yield piece
    if seen < BINARY_CHECK_CHARACTERS:
        _check_for_binary(control, seen, warn)


_CONTROL = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f\ufffd]")


def _check_for_binary(control: int, seen: int, warn: Warn) -> None:
    if control > seen / 100:
        warn(f"{control:,} of the first {seen:,} characters are control characters or U+FFFD: is this a binary file?")

"""Build a vocabulary of words or tokens for a text, and encode the text as a file of ids.

The text is read twice: once to count the words or tokens, and once to write their ids. Memory use does not grow with the length of
the text. The file contains int32 ids in text order, without rare words, and -1 between documents. The cache key is a hash of the
text and the vocabulary options.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from tinylm.embedding.byte_mapping import to_byte_mapped
from tinylm.errors import InputError
from tinylm.paths import cache_folder, cached_file
from tinylm.recipe.embeddings import EmbeddingDataSection, TokenVocabulary, WordVocabulary
from tinylm.reporting import Reporter
from tinylm.text.sources import Corpus, Piece, describe
from tinylm.text.split import scan, unchanged
from tinylm.tokenizer import Tokenizer

END_OF_DOCUMENT = -1
MAX_COUNTED_WORDS = 1 << 20
"""Maximum number of distinct words while counting. If it is exceeded, the rarest words are dropped, as in word2vec."""
_FORMAT = 1
"""Version of the cached files. Increase it when their format changes."""


@dataclass(frozen=True)
class Vocabulary:
    """The words or tokens that have a vector, in descending order of frequency."""

    names: list[str]
    counts: np.ndarray
    """The number of occurrences of each name in the text, int64 (names,)."""
    byte_mapped: bool
    """Whether the names are byte-mapped token bytes (see `byte_mapping`)."""


@dataclass(frozen=True)
class EncodedText:
    """A text stored as a file of ids, which are indices into the vocabulary."""

    vocabulary: Vocabulary
    path: Path
    length: int
    """Number of ids in the file, including the separators between documents."""
    fingerprint: str
    """Hash of the text, the vocabulary options and the tokenizer."""

    def read(self, start: int, count: int) -> np.ndarray:
        """Read up to `count` ids (int32) from index `start`.

        The file is not memory-mapped, because mapped pages would count toward the memory of the process.
        """
        return np.fromfile(self.path, dtype="<i4", count=count, offset=4 * start)


def encode_corpus(data: EmbeddingDataSection, section: WordVocabulary | TokenVocabulary, reporter: Reporter) -> EncodedText:
    """Build the vocabulary for a recipe's text and encode the text.

    Raises `InputError` if the text cannot be read, or if no word or token reaches the minimum count.
    """
    with Corpus(data.train, field=data.field, template=data.template, errors=data.errors) as corpus:
        counter = _WordCounter(section) if isinstance(section, WordVocabulary) else _TokenCounter(section)
        with reporter.progress("counting", None, "B") as advance:
            scanned = scan(counter.count(corpus.pieces()), advance)
        if not scanned.characters:
            raise InputError("the text is empty", where=describe(data.train))
        vocabulary = counter.vocabulary()
        if not vocabulary.names:
            raise InputError(
                f"no {counter.noun} in this text occur {section.min_count} times or more",
                where=describe(data.train),
                hint="lower vocabulary.min_count (--min-count)",
            )
        key = json.dumps([scanned.fingerprint, section.model_dump(), counter.fingerprint, _FORMAT])
        fingerprint = hashlib.sha256(key.encode()).hexdigest()[:32]
        path = cache_folder("embeddings") / f"{fingerprint}.ids"
        kept = int(vocabulary.counts.sum())
        reporter.note(
            f"text: {scanned.characters:,} characters, {counter.total:,} {counter.noun}; vocabulary: {len(vocabulary.names):,} "
            f"{counter.noun} that occur {section.min_count} times or more ({kept:,} occurrences)"
        )
        pieces = unchanged(corpus.pieces(), scanned, describe(data.train))
        cached_file(
            path,
            lambda temporary: _write(temporary, counter.encode(pieces, vocabulary), kept, reporter),
            lambda path: reporter.warn(f"{path} is damaged; encoding the text again"),
        )
    return EncodedText(vocabulary, path, path.stat().st_size // 4, fingerprint)


def _write(path: Path, encoded: Iterator[np.ndarray], total: int, reporter: Reporter) -> None:
    with open(path, "wb") as file, reporter.progress("encoding", total, "") as advance:
        done = 0
        for ids in encoded:
            file.write(ids.astype("<i4").tobytes())
            done += len(ids)
            advance(done)


_SEPARATOR = np.array([END_OF_DOCUMENT], dtype=np.int32)


class _WordCounter:
    """Counts words in a first pass and encodes them in a second."""

    noun = "words"
    fingerprint = ""

    def __init__(self, section: WordVocabulary) -> None:
        self._section = section
        self._counts: Counter[str] = Counter()
        self._min_kept_count = 1
        self.total = 0

    def count(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        """Count the words of each piece and yield the piece."""
        for piece in pieces:
            words = split_words(piece.text, self._section.lowercase)
            self._counts.update(words)
            self.total += len(words)
            while len(self._counts) > MAX_COUNTED_WORDS:
                self._min_kept_count += 1
                self._counts = Counter({word: n for word, n in self._counts.items() if n >= self._min_kept_count})
            yield piece

    def vocabulary(self) -> Vocabulary:
        """Return the most frequent words, with ties in alphabetical order, and discard the counts."""
        ordered = sorted(self._counts.items(), key=lambda item: (-item[1], item[0]))
        kept = [(word, count) for word, count in ordered if count >= self._section.min_count][: self._section.max_size]
        self._counts.clear()
        return Vocabulary([word for word, _ in kept], np.array([count for _, count in kept], dtype=np.int64), byte_mapped=False)

    def encode(self, pieces: Iterator[Piece], vocabulary: Vocabulary) -> Iterator[np.ndarray]:
        """Yield the ids of each piece, with a separator between documents."""
        ids = {word: id for id, word in enumerate(vocabulary.names)}
        for index, piece in enumerate(pieces):
            if piece.starts_document and index:
                yield _SEPARATOR
            piece_ids = np.fromiter(
                (ids.get(word, -1) for word in split_words(piece.text, self._section.lowercase)), dtype=np.int32
            )
            yield piece_ids[piece_ids >= 0]


class _TokenCounter:
    """Counts tokens in a first pass and encodes them in a second. Token names are byte-mapped."""

    noun = "tokens"

    def __init__(self, section: TokenVocabulary) -> None:
        path = Path(section.tokenizer)
        self._section = section
        self._tokenizer = Tokenizer.load(path / "tokenizer.json" if path.is_dir() else path)
        self.fingerprint = self._tokenizer.fingerprint
        self._counts = np.zeros(self._tokenizer.vocab_size, dtype=np.int64)
        self.total = 0

    def count(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        """Count the tokens of each piece and yield the piece."""
        for piece in pieces:
            for ids, _ in self._tokenizer.encode_pieces([piece]):
                self._counts += np.bincount(ids, minlength=len(self._counts))
                self.total += len(ids)
            yield piece

    def _kept_tokens(self) -> np.ndarray:
        """Return the ids of tokens that reach the minimum count, in descending order of frequency."""
        order = np.argsort(-self._counts, kind="stable")
        return order[self._counts[order] >= self._section.min_count]

    def vocabulary(self) -> Vocabulary:
        """Return the tokens that reach the minimum count, in descending order of frequency."""
        kept = self._kept_tokens()
        names = token_names(self._tokenizer)
        return Vocabulary([names[id] for id in kept], self._counts[kept], byte_mapped=True)

    def encode(self, pieces: Iterator[Piece], vocabulary: Vocabulary) -> Iterator[np.ndarray]:
        """Yield the ids of each piece, with a separator between documents."""
        id_of_token = np.full(len(self._counts), -1, dtype=np.int32)
        kept = self._kept_tokens()
        id_of_token[kept] = np.arange(len(kept), dtype=np.int32)
        for index, (tokens, starts_document) in enumerate(self._tokenizer.encode_pieces(pieces)):
            if starts_document and index:
                yield _SEPARATOR
            ids = id_of_token[tokens]
            yield ids[ids >= 0]


def token_names(tokenizer: Tokenizer) -> list[str]:
    """Return a unique name for each token id. It is the token's byte-mapped bytes, or the token itself if it is special."""
    special = {id for id in (tokenizer.end_of_text, tokenizer.unknown) if id is not None}
    names = []
    for id, raw in enumerate(tokenizer.token_bytes):
        if raw and id not in special:
            names.append(to_byte_mapped(raw))
        else:
            names.append(str(tokenizer.backend.id_to_token(id) or f"<|unused-{id}|>"))
    return names


def split_words(text: str, lowercase: bool) -> list[str]:
    """Return the words in a text: runs of letters, digits, combining marks and underscores, with apostrophes inside a word."""
    words: list[str] = _word_pattern().findall(text.lower() if lowercase else text)
    return words


def word_spans(text: str) -> list[tuple[int, int]]:
    """Return the (start, end) offsets of each word, in characters."""
    return [match.span() for match in _word_pattern().finditer(text)]


@cache
def _word_pattern() -> re.Pattern[str]:
    """Return the pattern for a word. Python's \\w does not match combining marks, which occur inside words in many scripts."""
    marks = [code for code in range(0x300, sys.maxunicode + 1) if unicodedata.category(chr(code)) in ("Mn", "Mc")]
    starts = [code for code, before in zip(marks, [0, *marks], strict=False) if code != before + 1]
    ends = [code for code, after in zip(marks, [*marks[1:], 0], strict=True) if after != code + 1]
    ranges = "".join(f"{chr(start)}-{chr(end)}" for start, end in zip(starts, ends, strict=True))
    letter = rf"[\w{ranges}]"
    return re.compile(rf"{letter}+(?:['’]{letter}+)*")

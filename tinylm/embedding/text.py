"""From a text to ids on disk: which words or tokens get a vector, how often each occurs, and where each stands.

Two passes over the text, in memory that does not grow with it: one counts, one writes. The file holds int32 ids in the order
of the text, rare ones left out, and -1 between documents; it is cached under the text's content and the choice of units.
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

from tinylm.embedding.spelling import byte_mapped
from tinylm.errors import InputError
from tinylm.paths import cache_folder, whole_file
from tinylm.recipe.embeddings import EmbeddingDataSection, TokenVocabulary, WordVocabulary
from tinylm.reporting import Reporter
from tinylm.text.sources import Corpus, Piece, describe
from tinylm.text.split import scan
from tinylm.tokenizer import Tokenizer

END_OF_DOCUMENT = -1
MOST_WORDS = 1 << 20
"""Different words remembered while counting; when there are more, the rarest are forgotten (as word2vec does)."""
_FORMAT = 1


@dataclass(frozen=True)
class Units:
    """What gets a vector, most frequent first."""

    names: list[str]
    counts: np.ndarray
    byte_mapped: bool


@dataclass(frozen=True)
class Text:
    """A text as ids in a file."""

    units: Units
    path: Path
    length: int
    """Ids in the file, ends of documents included."""
    fingerprint: str
    """Of the text and of what was made of it."""

    def read(self, start: int, count: int) -> np.ndarray:
        """Up to `count` ids from `start` on. A copy: pages of a mapped file would count as this process's memory."""
        return np.fromfile(self.path, dtype="<i4", count=count, offset=4 * start)


def prepare(data: EmbeddingDataSection, section: WordVocabulary | TokenVocabulary, reporter: Reporter) -> Text:
    """Read a text into ids. Raises `InputError` for a text that cannot be read or has no unit that is frequent enough."""
    with Corpus(data.train, field=data.field, errors=data.errors) as corpus:
        counter = _Words(section) if isinstance(section, WordVocabulary) else _Tokens(section)
        with reporter.progress("counting", None, "B") as advance:
            found = scan(counter.counting(corpus.pieces()), advance)
        units = counter.units()
        if not units.names:
            raise InputError(
                f"nothing in this text occurs {section.min_count} times", where=describe(data.train), hint="lower min_count"
            )
        parts = json.dumps([found.fingerprint, section.model_dump(), counter.fingerprint, _FORMAT])
        fingerprint = hashlib.sha256(parts.encode()).hexdigest()[:32]
        path = cache_folder("embeddings") / f"{fingerprint}.ids"
        kept = int(units.counts.sum())
        reporter.note(
            f"text: {found.characters:,} characters, {counter.total:,} {counter.noun}, {kept:,} of them among the "
            f"{len(units.names):,} that occur {section.min_count} times or more"
        )
        if not path.exists():
            _write(path, counter.encoded(corpus.pieces(), units), kept, reporter)
    return Text(units, path, path.stat().st_size // 4, fingerprint)


def _write(path: Path, encoded: Iterator[np.ndarray], total: int, reporter: Reporter) -> None:
    with whole_file(path) as temporary, open(temporary, "wb") as file, reporter.progress("encoding", total, "") as advance:
        done = 0
        for ids in encoded:
            file.write(ids.astype("<i4").tobytes())
            done += len(ids)
            advance(done)


_SEPARATOR = np.array([END_OF_DOCUMENT], dtype=np.int32)


class _Words:
    """Counts and numbers words."""

    noun = "words"
    fingerprint = ""

    def __init__(self, section: WordVocabulary) -> None:
        self._section = section
        self._counts: Counter[str] = Counter()
        self._forgotten_below = 1
        self.total = 0

    def counting(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            words = words_of(piece.text, self._section.lowercase)
            self._counts.update(words)
            self.total += len(words)
            while len(self._counts) > MOST_WORDS:
                self._forgotten_below += 1
                self._counts = Counter({w: n for w, n in self._counts.items() if n >= self._forgotten_below})
            yield piece

    def units(self) -> Units:
        ordered = sorted(self._counts.items(), key=lambda item: (-item[1], item[0]))
        kept = [(word, count) for word, count in ordered if count >= self._section.min_count][: self._section.max_size]
        self._counts.clear()
        return Units([word for word, _ in kept], np.array([count for _, count in kept], dtype=np.int64), byte_mapped=False)

    def encoded(self, pieces: Iterator[Piece], units: Units) -> Iterator[np.ndarray]:
        ids = {word: id for id, word in enumerate(units.names)}
        for position, piece in enumerate(pieces):
            if piece.starts_document and position:
                yield _SEPARATOR
            known = (ids.get(word, -1) for word in words_of(piece.text, self._section.lowercase))
            found = np.fromiter(known, dtype=np.int32)
            yield found[found >= 0]


class _Tokens:
    """Counts and numbers the tokens of a tokenizer, under their byte-mapped names."""

    noun = "tokens"

    def __init__(self, section: TokenVocabulary) -> None:
        path = Path(section.tokenizer)
        self._section = section
        self._tokenizer = Tokenizer.load(path / "tokenizer.json" if path.is_dir() else path)
        self.fingerprint = self._tokenizer.fingerprint
        self._counts = np.zeros(self._tokenizer.vocab_size, dtype=np.int64)
        self.total = 0

    def counting(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            for ids, _ in self._tokenizer.encode_pieces([piece]):
                self._counts += np.bincount(ids, minlength=len(self._counts))
                self.total += len(ids)
            yield piece

    def _order(self) -> np.ndarray:
        order = np.argsort(-self._counts, kind="stable")
        return order[self._counts[order] >= self._section.min_count]

    def units(self) -> Units:
        order = self._order()
        names = token_names(self._tokenizer)
        return Units([names[id] for id in order], self._counts[order], byte_mapped=True)

    def encoded(self, pieces: Iterator[Piece], units: Units) -> Iterator[np.ndarray]:
        numbers = np.full(len(self._counts), -1, dtype=np.int32)
        order = self._order()
        numbers[order] = np.arange(len(order), dtype=np.int32)
        for position, (ids, starts) in enumerate(self._tokenizer.encode_pieces(pieces)):
            if starts and position:
                yield _SEPARATOR
            found = numbers[ids]
            yield found[found >= 0]


def token_names(tokenizer: Tokenizer) -> list[str]:
    """The byte-mapped name of each id; special tokens keep their own, and no two are equal."""
    special = {id for id in (tokenizer.end_of_text, tokenizer.unknown) if id is not None}
    names = []
    for id, raw in enumerate(tokenizer.token_bytes):
        plain = raw and id not in special
        names.append(byte_mapped(raw) if plain else str(tokenizer.backend.id_to_token(id) or f"<|unused-{id}|>"))
    return names


def words_of(text: str, lowercase: bool) -> list[str]:
    """The words of a text: runs of letters, digits, marks and underscores, with apostrophes inside."""
    found: list[str] = _word_pattern().findall(text.lower() if lowercase else text)
    return found


def word_spans(text: str) -> list[tuple[int, int]]:
    """(start, end) of each word of a text."""
    return [match.span() for match in _word_pattern().finditer(text)]


@cache
def _word_pattern() -> re.Pattern[str]:
    """Python's \\w leaves out the combining marks without which the words of many scripts fall apart."""
    marks = [code for code in range(0x300, sys.maxunicode + 1) if unicodedata.category(chr(code)) in ("Mn", "Mc")]
    starts = [code for code, before in zip(marks, [0, *marks], strict=False) if code != before + 1]
    ends = [code for code, after in zip(marks, [*marks[1:], 0], strict=True) if after != code + 1]
    ranges = "".join(f"{chr(start)}-{chr(end)}" for start, end in zip(starts, ends, strict=True))
    letter = rf"[\w{ranges}]"
    return re.compile(rf"{letter}+(?:['’]{letter}+)*")

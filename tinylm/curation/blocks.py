"""Divide the documents of several sources into blocks, the unit of work and of resuming.

The blocks depend only on the text, so the result of a preparation does not depend on the number of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

from tinylm.curation.settings import Settings
from tinylm.errors import InputError
from tinylm.text.sources import Corpus, Piece, describe, require_used_format

BLOCK_CHARACTERS = 1 << 22
"""A block ends after the document with which it reaches this size."""
MAX_DOCUMENT_CHARACTERS = 1 << 22
"""A longer document is divided into several documents, to limit memory."""


@dataclass
class Block:
    """Consecutive documents of one part of the text: `train` or `heldout`."""

    number: int
    part: str
    texts: list[str] = field(default_factory=list)
    sources: list[tuple[str, int]] = field(default_factory=list)
    """Each file with the number of its documents in this block."""
    divided: int = 0
    """Number of documents that continue the preceding document, because it is longer than `MAX_DOCUMENT_CHARACTERS`."""
    characters: int = 0

    def add(self, source: str, text: str, continues: bool) -> None:
        self.texts.append(text)
        if self.sources and self.sources[-1][0] == source:
            self.sources[-1] = (source, self.sources[-1][1] + 1)
        else:
            self.sources.append((source, 1))
        self.divided += continues
        self.characters += len(text)

    def digest(self) -> str:
        """Return a hash of the documents."""
        digest = hashlib.blake2b(self.part.encode(), digest_size=16)
        for text in self.texts:
            encoded = text.encode("utf-8")
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
        return digest.hexdigest()


class Documents:
    """The sources of a preparation, which can be read repeatedly."""

    def __init__(self, settings: Settings) -> None:
        """Open the sources. Raises `InputError` if a source does not exist or cannot be opened."""
        self._stack = ExitStack()
        self._parts: dict[str, Corpus] = {}
        try:
            for part, sources in (("train", settings.sources), ("heldout", settings.heldout)):
                if sources:
                    corpus = Corpus(
                        sources, field=settings.field, template=settings.template, errors=settings.errors, allow_unused_format=True
                    )
                    self._parts[part] = self._stack.enter_context(corpus)
            require_used_format(list(self._parts.values()))
        except BaseException:
            self._stack.close()
            raise
        self.skipped = [path for corpus in self._parts.values() for path in corpus.skipped]

    def __enter__(self) -> Documents:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def blocks(self) -> Iterator[Block]:
        """Yield all blocks in order, first those of the training text. Raises `InputError` if a part contains no documents."""
        number = 0
        for part, corpus in self._parts.items():
            first, block = number, Block(number, part)
            for name, pieces in corpus.files():
                for text, continues in _documents(pieces):
                    block.add(name, text, continues)
                    if block.characters >= BLOCK_CHARACTERS:
                        yield block
                        number += 1
                        block = Block(number, part)
            if block.texts:
                yield block
                number += 1
            if number == first:
                raise InputError("the text is empty", where=describe(corpus.sources))


def _documents(pieces: Iterator[Piece]) -> Iterator[tuple[str, bool]]:
    """Yield (text, whether it continues the document before it) for each document."""
    parts: list[str] = []
    size, continues = 0, False
    for piece in pieces:
        is_full = size + len(piece.text) > MAX_DOCUMENT_CHARACTERS
        if parts and (piece.starts_document or is_full):
            yield "".join(parts), continues
            parts, size, continues = [], 0, not piece.starts_document
        parts.append(piece.text)
        size += len(piece.text)
    if parts:
        yield "".join(parts), continues

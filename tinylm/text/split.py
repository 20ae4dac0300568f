"""Split a text into a training part and a held-out part.

`scan` reads the text once and returns sizes, hashes and a fingerprint. From these, `by_document` or `by_tail` computes a `Split`,
whose `select` streams one of the parts. Each document is in one part, unless it is so long that `by_tail` has to cut it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tinylm.errors import InputError
from tinylm.text.sources import Piece


@dataclass(frozen=True)
class Scan:
    """The result of one pass over a text."""

    bytes: int
    """Size of the text in bytes, as UTF-8."""
    hashes: np.ndarray
    """uint64 (documents,): the first 8 bytes of the BLAKE2b hash of each document."""
    lengths: np.ndarray
    """int64 (documents,): characters of each document."""
    fingerprint: str
    """Hash of the text and its division into documents."""

    @property
    def documents(self) -> int:
        return len(self.hashes)

    @cached_property
    def characters(self) -> int:
        return int(self.lengths.sum())


def scan(pieces: Iterable[Piece], progress: Callable[[int], None] | None = None) -> Scan:
    """Read a text once. `progress` is called with the number of bytes read so far."""
    hashes, lengths = array("Q"), array("q")
    text_hash = hashlib.sha256()
    document_hash = hashlib.blake2b(digest_size=16)
    size = 0

    def finish_document() -> None:
        digest = document_hash.digest()
        text_hash.update(digest)
        hashes.append(int.from_bytes(digest[:8], "big"))

    for piece in pieces:
        if piece.starts_document:
            if lengths:
                finish_document()
            document_hash = hashlib.blake2b(digest_size=16)
            lengths.append(0)
        encoded = piece.text.encode("utf-8")
        document_hash.update(encoded)
        lengths[-1] += len(piece.text)
        size += len(encoded)
        if progress is not None:
            progress(size)
    if lengths:
        finish_document()
    return Scan(size, np.array(hashes, dtype=np.uint64), np.array(lengths, dtype=np.int64), text_hash.hexdigest())


@dataclass(frozen=True)
class Split:
    """Defines which text is held out: the characters of each document from its boundary on."""

    boundaries: np.ndarray
    """int64 (documents,): 0 if the document is held out, its length if it is used for training."""
    lengths: np.ndarray
    """int64 (documents,): characters of each document."""

    @property
    def cuts_a_document(self) -> bool:
        """Whether part of a document is held out and the rest is used for training."""
        return bool(np.any((self.boundaries > 0) & (self.boundaries < self.lengths)))

    def select(self, pieces: Iterable[Piece], part: str) -> Iterator[Piece]:
        """Yield the pieces of one part, `train` or `heldout`."""
        document, position, starts_document = -1, 0, True
        boundary = 0
        for piece in pieces:
            if piece.starts_document:
                document, position, starts_document = document + 1, 0, True
                boundary = int(self.boundaries[document])
            cut = min(max(boundary - position, 0), len(piece.text))
            text = piece.text[:cut] if part == "train" else piece.text[cut:]
            position += len(piece.text)
            if text:
                yield Piece(text, starts_document)
                starts_document = False


def by_document(scanned: Scan, share: float) -> Split:
    """Hold out the documents whose hash is in the lowest `share` of all possible hashes, so that equal documents stay together.

    Raises `InputError` if one part would be empty.
    """
    held_out = scanned.hashes < np.uint64(int(share * 2**64))
    if not held_out.any() or held_out.all():
        part = "training" if held_out.any() else "held-out"
        raise InputError(
            f"the {part} part of the {scanned.documents:,} documents would be empty",
            where="data.heldout",
            hint="use `by: tail`, another share, or a text with more documents",
        )
    return Split(np.where(held_out, 0, scanned.lengths), scanned.lengths)


def by_tail(scanned: Scan, share: float) -> Split:
    """Hold out about the last `share` of the characters, starting at the nearest document start.

    If that would hold out less than 50% or more than 150% of the requested characters, the document at the requested position is
    cut there.
    """
    ends = np.cumsum(scanned.lengths)
    cut = int(scanned.characters * (1 - share))
    document_starts = ends[:-1]
    if len(document_starts):
        nearest = int(document_starts[np.argmin(np.abs(document_starts - cut))])
        held_out = scanned.characters - nearest
        if abs(held_out - scanned.characters * share) <= 0.5 * scanned.characters * share:
            cut = nearest
    starts = ends - scanned.lengths
    return Split(np.clip(cut - starts, 0, scanned.lengths), scanned.lengths)


def repeated_documents(train: np.ndarray, heldout: np.ndarray) -> int:
    """Return the number of held-out documents that are also training documents, compared by hash."""
    return int(np.isin(heldout, train).sum())

"""The held-out split: which characters are learned and which are only measured.

A first pass over the text gives a `Scan` (sizes, a fingerprint, one short hash per document); from it and the recipe's
`heldout` a `Split` decides, and `select` streams either half. A document is never in both halves, except that a text
which is one single document (or nearly) is cut in two at a character.
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
    """What one pass over a text found. `hashes` and `lengths` have an entry per document."""

    bytes: int
    hashes: np.ndarray
    """First 8 bytes of each document's BLAKE2b, as uint64."""
    lengths: np.ndarray
    """Characters of each document, as int64."""
    fingerprint: str
    """Of the whole text: equal texts, cut into documents equally, have equal fingerprints."""

    @property
    def documents(self) -> int:
        return len(self.hashes)

    @cached_property
    def characters(self) -> int:
        return int(self.lengths.sum())


def scan(pieces: Iterable[Piece], progress: Callable[[int], None] | None = None) -> Scan:
    """Read a text once. `progress` is told the bytes read so far."""
    hashes, lengths = array("Q"), array("q")
    whole = hashlib.sha256()
    document = hashlib.blake2b(digest_size=16)
    size = 0

    def finish() -> None:
        digest = document.digest()
        whole.update(digest)
        hashes.append(int.from_bytes(digest[:8], "big"))

    for piece in pieces:
        if piece.starts_document:
            if lengths:
                finish()
            document = hashlib.blake2b(digest_size=16)
            lengths.append(0)
        encoded = piece.text.encode("utf-8")
        document.update(encoded)
        lengths[-1] += len(piece.text)
        size += len(encoded)
        if progress is not None:
            progress(size)
    if lengths:
        finish()
    return Scan(size, np.array(hashes, dtype=np.uint64), np.array(lengths, dtype=np.int64), whole.hexdigest())


@dataclass(frozen=True)
class Split:
    """For each document, where its held-out part begins: 0 = all held out, its length = all training."""

    boundaries: np.ndarray
    lengths: np.ndarray

    @property
    def cuts_a_document(self) -> bool:
        return bool(np.any((self.boundaries > 0) & (self.boundaries < self.lengths)))

    def select(self, pieces: Iterable[Piece], half: str) -> Iterator[Piece]:
        """The pieces of one half, `train` or `heldout`."""
        document, position, starts = -1, 0, True
        boundary = 0
        for piece in pieces:
            if piece.starts_document:
                document, position, starts = document + 1, 0, True
                boundary = int(self.boundaries[document])
            cut = min(max(boundary - position, 0), len(piece.text))
            text = piece.text[:cut] if half == "train" else piece.text[cut:]
            position += len(piece.text)
            if text:
                yield Piece(text, starts)
                starts = False


def by_document(found: Scan, share: float) -> Split:
    """Hold out the documents whose hash falls into the lowest `share` of all hashes: equal documents go the same way.

    Raises `InputError` when either half would be empty.
    """
    held = found.hashes < np.uint64(int(share * 2**64))
    if not held.any() or held.all():
        raise InputError(
            f"none of the {found.documents:,} documents would be {'left to train on' if held.any() else 'held out'}",
            where="data.heldout",
            hint="use `by: tail`, another share, or a text with more documents",
        )
    return Split(np.where(held, 0, found.lengths), found.lengths)


def by_tail(found: Scan, share: float) -> Split:
    """Hold out the last `share` of the characters, from the document border nearest to it.

    When that border would hold out less than half or more than one and a half of what was asked for, the document in
    which the cut falls is cut itself.
    """
    ends = np.cumsum(found.lengths)
    cut = int(found.characters * (1 - share))
    borders = ends[:-1]
    if len(borders):
        nearest = int(borders[np.argmin(np.abs(borders - cut))])
        held = found.characters - nearest
        if abs(held - found.characters * share) <= 0.5 * found.characters * share:
            cut = nearest
    starts = ends - found.lengths
    return Split(np.clip(cut - starts, 0, found.lengths), found.lengths)


def repeated_documents(train: np.ndarray, heldout: np.ndarray) -> int:
    """How many held-out documents, by hash, also occur in training."""
    return int(np.isin(heldout, train).sum())

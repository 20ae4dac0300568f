"""Split a text into training text, held-out text and optionally test text.

`scan` reads the text once and returns sizes, hashes and a fingerprint. From these, `by_document` or `by_tail` computes a `Split`.
Its method `select` streams one of the parts. Each document is in one part, unless it is so long that `by_tail` has to cut it.
`move_cuts_to_lines` moves such cuts to the ends of paragraphs or lines.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from tinylm.errors import InputError
from tinylm.text.sources import Piece


@dataclass(frozen=True)
class Scan:
    """The result of one pass over a text."""

    bytes: int
    """Size of the text in UTF-8 bytes."""
    hashes: np.ndarray
    """uint64 (documents,): the first 8 bytes of each document's BLAKE2b hash."""
    lengths: np.ndarray
    """int64 (documents,): the number of characters in each document."""
    fingerprint: str
    """Hash of the text and its division into documents."""

    @property
    def documents(self) -> int:
        return len(self.hashes)

    @cached_property
    def characters(self) -> int:
        return int(self.lengths.sum())


class _Scanner:
    """Computes a `Scan` from pieces that are added one by one."""

    def __init__(self) -> None:
        self._hashes, self._lengths = array("Q"), array("q")
        self._text_hash = hashlib.sha256()
        self._document_hash = hashlib.blake2b(digest_size=16)
        self.bytes = 0

    def add(self, piece: Piece) -> None:
        if piece.starts_document:
            self._finish_document()
            self._document_hash = hashlib.blake2b(digest_size=16)
            self._lengths.append(0)
        encoded = piece.text.encode("utf-8")
        self._document_hash.update(encoded)
        self._lengths[-1] += len(piece.text)
        self.bytes += len(encoded)

    def _finish_document(self) -> None:
        if self._lengths:
            digest = self._document_hash.digest()
            self._text_hash.update(digest)
            self._hashes.append(int.from_bytes(digest[:8], "big"))

    def finish(self) -> Scan:
        self._finish_document()
        hashes, lengths = np.array(self._hashes, dtype=np.uint64), np.array(self._lengths, dtype=np.int64)
        return Scan(self.bytes, hashes, lengths, self._text_hash.hexdigest())


def scan(pieces: Iterable[Piece], progress: Callable[[int], None] | None = None) -> Scan:
    """Read a text once. After each piece, `progress` is called with the number of bytes read so far."""
    scanner = _Scanner()
    for piece in pieces:
        scanner.add(piece)
        if progress is not None:
            progress(scanner.bytes)
    return scanner.finish()


def unchanged(pieces: Iterable[Piece], expected: Scan, where: str) -> Iterator[Piece]:
    """Yield the pieces of a text that was scanned before. After the last piece, raise `InputError` if the text has changed.

    Data that is computed from a text is cached under the fingerprint of the scan, so the text must not change in between.
    """
    scanner, count = _Scanner(), 0
    for piece in pieces:
        count += piece.starts_document
        scanner.add(piece)
        if count > expected.documents or scanner.bytes > expected.bytes:
            break
        yield piece
    if scanner.finish().fingerprint != expected.fingerprint:
        raise InputError("the text changed while it was read", where=where, hint="try again, or use a copy of the text")


PARTS = ("train", "heldout", "test")
_MAX_MOVE_CHARACTERS = 8192
_MAX_MOVE_SHARE = 0.1
"""A cut moves by at most this fraction of the smallest part, and by at most `_MAX_MOVE_CHARACTERS`."""
_CUTS = (re.compile(r"\n[ \t\r]*\n+"), re.compile(r"\r\n|\n|\r"), re.compile(r"\s+"))
"""Patterns that a cut may follow, best first: a blank line, the end of a line, whitespace."""


@dataclass(frozen=True)
class Split:
    """Assigns each character to a part. Each document consists of training text, then held-out text, then test text.

    Two of the three are empty unless the document is cut.
    """

    boundaries: np.ndarray
    """int64 (documents,): the character position where the held-out text of each document starts."""
    lengths: np.ndarray
    """int64 (documents,): the number of characters in each document."""
    test_boundaries: np.ndarray | None = None
    """int64 (documents,): the character position where the test text of each document starts. None if there is no test text."""

    def spans(self, part: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the start and end of a part in each document, in characters."""
        test = self.lengths if self.test_boundaries is None else self.test_boundaries
        edges = (np.zeros_like(self.lengths), self.boundaries, test, self.lengths)
        index = PARTS.index(part)
        return edges[index], edges[index + 1]

    def contains(self, part: str) -> np.ndarray:
        """Return bool (documents,): whether a part contains any text of each document."""
        starts, ends = self.spans(part)
        return np.asarray(ends > starts)

    def characters(self, part: str) -> int:
        starts, ends = self.spans(part)
        return int((ends - starts).sum())

    @property
    def cuts_a_document(self) -> bool:
        """Whether a document is cut into parts."""
        return bool((np.sum([self.contains(part) for part in PARTS], axis=0) > 1).any())

    def select(self, pieces: Iterable[Piece], part: str) -> Iterator[Piece]:
        """Yield the pieces of one part: `train`, `heldout` or `test`."""
        starts, ends = self.spans(part)
        document, position, starts_document = -1, 0, True
        start = end = 0
        for piece in pieces:
            if piece.starts_document:
                document, position, starts_document = document + 1, 0, True
                start, end = int(starts[document]), int(ends[document])
            text = piece.text[max(start - position, 0) : max(end - position, 0)]
            position += len(piece.text)
            if text:
                yield Piece(text, starts_document)
                starts_document = False


def by_document(scanned: Scan, share: float, test_share: float = 0.0) -> Split:
    """Hold out the documents whose hash is in the lowest `share` of all possible hashes. Identical documents stay together.

    Documents with a hash in the next `test_share` form the test part. Raises `InputError` if a part would be empty.
    """
    limit, test_limit = (np.uint64(min(int(value * 2**64), 2**64 - 1)) for value in (share, share + test_share))
    held_out, not_training = scanned.hashes < limit, scanned.hashes < test_limit
    split = Split(
        np.where(not_training, 0, scanned.lengths),
        scanned.lengths,
        np.where(not_training & ~held_out, 0, scanned.lengths) if test_share else None,
    )
    wanted = {"training": ("train", True), "held-out": ("heldout", share > 0), "test": ("test", test_share > 0)}
    for name, (part, is_wanted) in wanted.items():
        if is_wanted and not split.contains(part).any():
            raise InputError(
                f"the {name} part of the {scanned.documents:,} documents would be empty",
                where="data.test" if part == "test" else "data.heldout",
                hint="use `by: tail`, another share, or a text with more documents",
            )
    return split


def by_tail(scanned: Scan, share: float, test_share: float = 0.0) -> Split:
    """Hold out about the last `share` of the characters, starting at the nearest document start.

    If that would hold out less than 50% or more than 150% of the requested characters, the document at the requested position is
    cut there. With `test_share`, the end of the text is the test part, and the held-out part precedes it.
    """
    cut = _tail_start(scanned, share + test_share)
    boundaries = _boundaries_at(scanned, cut)
    if not test_share:
        return Split(boundaries, scanned.lengths)
    test_cut = _tail_start(scanned, test_share)
    if test_cut <= cut and share:  # both moved to the same document start
        exact = (int(scanned.characters * (1 - part)) for part in (share + test_share, test_share))
        boundaries, test_boundaries = (_boundaries_at(scanned, position) for position in exact)
    else:
        test_boundaries = _boundaries_at(scanned, test_cut)
    return Split(boundaries, scanned.lengths, test_boundaries)


def _tail_start(scanned: Scan, share: float) -> int:
    """Return the position where a tail of about `share` starts, in characters from the start of the text."""
    cut = int(scanned.characters * (1 - share))
    document_starts = np.cumsum(scanned.lengths)[:-1]
    if len(document_starts):
        nearest = int(document_starts[np.argmin(np.abs(document_starts - cut))])
        held_out = scanned.characters - nearest
        if abs(held_out - scanned.characters * share) <= 0.5 * scanned.characters * share:
            return nearest
    return cut


def _boundaries_at(scanned: Scan, cut: int) -> np.ndarray:
    """Return the boundary in each document for a cut at `cut` characters from the start of the text."""
    starts = np.cumsum(scanned.lengths) - scanned.lengths
    return np.asarray(np.clip(cut - starts, 0, scanned.lengths))


def move_cuts_to_lines(split: Split, pieces: Iterable[Piece]) -> Split:
    """Move every cut within a document to the nearest paragraph end, or else line end, or else word end.

    The text is read up to the last cut. A cut without any of these nearby stays where it is.
    """
    sizes = [size for part in PARTS if (size := split.characters(part))]
    reach = min(int(_MAX_MOVE_SHARE * min(sizes, default=0)), _MAX_MOVE_CHARACTERS)
    boundaries = [split.boundaries.copy()] + ([] if split.test_boundaries is None else [split.test_boundaries.copy()])
    cuts = sorted(
        {
            (int(document), int(positions[document]))
            for positions in boundaries
            for document in np.flatnonzero((positions > 0) & (positions < split.lengths))
        }
    )
    for (document, position), moved in zip(cuts, _moved(cuts, reach, pieces), strict=True):
        for positions in boundaries:
            if positions[document] == position:
                positions[document] = moved
    return replace(split, boundaries=boundaries[0], test_boundaries=boundaries[1] if len(boundaries) > 1 else None)


def _moved(cuts: list[tuple[int, int]], reach: int, pieces: Iterable[Piece]) -> list[int]:
    """Return the new position of each cut in its document. `cuts` contains sorted (document, position) pairs."""
    nearby = ["" for _ in cuts]
    document, offset = -1, 0
    for piece in pieces if cuts else ():
        if piece.starts_document:
            document, offset = document + 1, 0
        for number, (cut_document, position) in enumerate(cuts):
            if cut_document == document:
                start = max(position - reach, 0)
                nearby[number] += piece.text[max(start - offset, 0) : max(position + reach - offset, 0)]
        offset += len(piece.text)
        if (document, offset) >= (cuts[-1][0], cuts[-1][1] + reach):
            break
    starts = (max(position - reach, 0) for _, position in cuts)
    return [start + _nearest_cut(text, position - start) for start, (_, position), text in zip(starts, cuts, nearby, strict=True)]


def _nearest_cut(text: str, position: int) -> int:
    """Return the cut position in `text` nearest to `position`, using the first pattern in `_CUTS` that matches.

    Returns `position` if no pattern matches.
    """
    for pattern in _CUTS:
        ends = [match.end() for match in pattern.finditer(text) if 0 < match.end() < len(text)]
        if ends:
            return min(ends, key=lambda end: abs(end - position))
    return position


def repeated_documents(train: np.ndarray, heldout: np.ndarray) -> int:
    """Return the number of held-out documents that are also training documents. `train` and `heldout` are document hashes."""
    return int(np.isin(heldout, train).sum())

"""Decide which documents are kept: find exact and near-duplicates in the analyzed blocks, and choose the held-out documents.

Documents with equal text, or with the same key in at least one MinHash band, are connected. Of each connected group, the first
document is kept. Keys are read band by band and, if there are many documents, in several ranges, so that memory is limited to
about 200 MB plus 2 to 10 bytes per document (4 bytes for the group of a duplicate, and 4 for the document that it repeats).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinylm.curation.analysis import FILTERS, Analysis, open_analysis, open_keys
from tinylm.curation.settings import Settings

TRAIN = 0
EXACT_DUPLICATE, NEAR_DUPLICATE, EXACT_CONTAMINATION, NEAR_CONTAMINATION = range(len(FILTERS) + 1, len(FILTERS) + 5)
HELDOUT = len(FILTERS) + 5
REMOVALS = (*FILTERS, "exact_duplicates", "near_duplicates", "exact_contamination", "near_contamination")
"""Everything that removes documents, in the order of application. The code of a removal is its index plus 1."""
RANGE_KEYS = 1 << 22
"""Approximate number of keys that are sorted at once."""


@dataclass(frozen=True)
class Decisions:
    """What happens to each document, in the order of the text."""

    codes: np.ndarray
    """uint8 (documents,): `TRAIN`, `HELDOUT`, or 1 plus the index in `REMOVALS`."""
    originals: np.ndarray
    """uint32 or uint64 (documents,): 1 plus the number of the document that a duplicate repeats, or 0 for other documents."""


class Groups:
    """Connected groups of documents (union-find). The representative of a group is its first document.

    `_back[i]` is the distance from document i to an earlier document in its group, or 0. Documents without duplicates therefore
    use only untouched zero pages.
    """

    def __init__(self, documents: int) -> None:
        self._back = np.zeros(documents, dtype=np.uint32 if documents < 1 << 32 else np.uint64)

    def find(self, documents: np.ndarray) -> np.ndarray:
        """Return the representative of each document, int64."""
        found = documents
        while True:
            earlier = found - self._back[found].astype(np.int64)
            if (earlier == found).all():
                return found
            found = earlier
            self._back[documents] = documents - found  # shortens the paths, here and in later searches

    def connect(self, first: np.ndarray, second: np.ndarray) -> None:
        """Join the groups of `first[i]` and `second[i]` for all i."""
        while len(first):
            first, second = self.find(first), self.find(second)
            low, high = np.minimum(first, second), np.maximum(first, second)
            different = low < high
            low, high = low[different], high[different]
            order = np.lexsort((low, high))
            low, high = low[order], high[order]
            is_first = np.append(True, high[1:] != high[:-1])[: len(high)]
            # A representative joins only one group at a time. The other pairs follow in the next round.
            self._back[high[is_first]] = high[is_first] - low[is_first]
            first, second = low[~is_first], high[~is_first]


class _AnalyzedBlocks:
    """The analyses of all blocks. Documents are numbered in the order in which they take precedence: the first is kept."""

    def __init__(self, folder: Path, count: int, first_part: str) -> None:
        self._folder = folder
        self.parts: list[str] = []
        self.sizes: list[int] = []
        codes = []
        for number in range(count):
            analysis = open_analysis(folder, number)
            self.parts.append(analysis.part)
            self.sizes.append(analysis.documents)
            codes.append(analysis.codes)
        self.codes = np.concatenate(codes)
        self.starts = np.cumsum([0, *self.sizes])
        order = sorted(range(count), key=lambda number: (self.parts[number] != first_part, number))
        self.ranks = np.zeros(count, dtype=np.int64)
        """The number, in order of precedence, of the first document of each block."""
        position = 0
        for number in order:
            self.ranks[number] = position
            position += self.sizes[number]
        self.order = order

    @property
    def documents(self) -> int:
        return len(self.codes)

    def positions(self, ranks: np.ndarray) -> np.ndarray:
        """Convert document numbers in order of precedence to numbers in the order of the text."""
        order = np.array(self.order)
        blocks = order[np.searchsorted(self.ranks[order], ranks, side="right") - 1]
        return np.asarray(self.starts[blocks] + ranks - self.ranks[blocks])

    def groups(self, row: int) -> Iterator[np.ndarray]:
        """Yield int64 (2, pairs): pairs of documents that have the same key in a row. Both are numbered by precedence."""
        passed = int(np.count_nonzero(self.codes == 0))
        ranges = max(1, -(-passed // RANGE_KEYS))
        for index in range(ranges):
            keys, documents = [], []
            for number in self.order:
                block = np.array(open_keys(self._folder, number)[row])  # a copy, which does not keep the file open
                passed_here = np.flatnonzero(self.codes[self.starts[number] : self.starts[number + 1]] == 0)
                # The highest 32 bits, scaled to a range number. Hashes are uniform, so the ranges have similar sizes.
                inside = slice(None) if ranges == 1 else (block >> np.uint64(32)) * np.uint64(ranges) >> np.uint64(32) == index
                keys.append(block[inside])
                documents.append(passed_here[inside] + self.ranks[number])
            all_keys, all_documents = np.concatenate(keys), np.concatenate(documents)
            order = np.argsort(all_keys, kind="stable")
            all_keys, all_documents = all_keys[order], all_documents[order]
            is_repeated = np.append(False, all_keys[1:] == all_keys[:-1])[: len(all_keys)]
            first = np.maximum.accumulate(np.where(is_repeated, 0, np.arange(len(all_keys))))
            yield np.stack((all_documents[first[is_repeated]], all_documents[is_repeated]))


def decide(folder: Path, blocks: int, settings: Settings) -> Decisions:
    """Decide what happens to each document in `blocks` analyzed blocks in `folder`."""
    analyzed = _AnalyzedBlocks(folder, blocks, "heldout" if settings.contaminated == "train" else "train")
    groups = Groups(analyzed.documents)
    exact = np.zeros(analyzed.documents, dtype=bool)
    if settings.uses("exact_duplicates"):
        for first, second in analyzed.groups(0):
            groups.connect(first, second)
            exact[second] = True
    if settings.uses("near_duplicates"):
        for row in range(1, settings.bands + 1):
            for first, second in analyzed.groups(row):
                groups.connect(first, second)
    codes = analyzed.codes
    originals = np.zeros(len(codes), dtype=np.uint32 if len(codes) < (1 << 32) - 1 else np.uint64)
    first_heldout = _first_of_second_part(analyzed)
    for number, (start, size) in enumerate(zip(analyzed.starts[:-1].tolist(), analyzed.sizes, strict=True)):
        ranks = np.arange(analyzed.ranks[number], analyzed.ranks[number] + size)
        representatives = groups.find(ranks)
        block = codes[start : start + size]
        duplicate = (representatives != ranks) & (block == 0)
        crosses = duplicate & (ranks >= first_heldout) & (representatives < first_heldout)
        if not settings.uses("contamination"):
            duplicate &= ~crosses
            crosses[:] = False
        is_exact = exact[ranks]
        block[duplicate & ~crosses] = NEAR_DUPLICATE
        block[duplicate & ~crosses & is_exact] = EXACT_DUPLICATE
        block[crosses] = NEAR_CONTAMINATION
        block[crosses & is_exact] = EXACT_CONTAMINATION
        originals[start : start + size][duplicate] = 1 + analyzed.positions(representatives[duplicate])
        is_heldout = block == TRAIN
        if analyzed.parts[number] == "train":
            is_heldout &= _held_out_by_hash(open_analysis(folder, number), settings)
        block[is_heldout] = HELDOUT
    return Decisions(codes, originals)


def _first_of_second_part(analyzed: _AnalyzedBlocks) -> int:
    """Return the number, in order of precedence, of the first document of the part that comes second."""
    first_part = analyzed.parts[analyzed.order[0]]
    return sum(size for part, size in zip(analyzed.parts, analyzed.sizes, strict=True) if part == first_part)


def _held_out_by_hash(analysis: Analysis, settings: Settings) -> np.ndarray:
    """Return which documents of the training text are held out, as with `heldout: {by: document}` in a recipe."""
    if settings.heldout:
        return np.zeros(analysis.documents, dtype=bool)
    return np.asarray(analysis.hashes < np.uint64(min(int(settings.heldout_share * 2**64), 2**64 - 1)))

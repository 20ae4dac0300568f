"""The report of a preparation: what each step and rule removed, with an example. It is the same for any number of processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from tinylm.curation.analysis import EMPTY, Analysis, open_analysis
from tinylm.curation.cleaning import LINE_RULES
from tinylm.curation.duplicates import (
    EXACT_DUPLICATE,
    HELDOUT,
    REMOVALS,
    TRAIN,
    Decisions,
)
from tinylm.curation.rules import RULES
from tinylm.curation.settings import Settings

_VALUE_DIGITS = 4


@dataclass(frozen=True)
class Step:
    """What one step or rule changed or removed."""

    step: str
    meaning: str
    documents: int
    """Number of documents before the step."""
    removed: int
    """Number of documents that the step removed."""
    changed: int
    """Number of documents of which the step removed parts."""
    bytes: int
    """Number of bytes that the step removed."""
    example: dict[str, Any] | None
    """The first document that the step removed or changed."""

    @property
    def share(self) -> float:
        """The fraction of the documents that the step removed."""
        return self.removed / self.documents if self.documents else 0.0


@dataclass(frozen=True)
class Part:
    """The size of the training text or the held-out text that is left."""

    documents: int
    bytes: int


@dataclass(frozen=True)
class Report:
    """The sizes of the text before and after all steps, and what each step removed."""

    documents: int
    bytes: int
    divided: int
    """Number of documents that were created by dividing very long documents."""
    steps: list[Step]
    train: Part
    heldout: Part
    digest: str
    """A hash of all blocks and decisions."""


@dataclass(frozen=True)
class DecidedBlock:
    """The analysis of a block and what happens to its documents."""

    number: int
    first: int
    """The number of its first document."""
    analysis: Analysis
    codes: np.ndarray
    originals: np.ndarray

    def removed_entry(self, index: int) -> dict[str, Any]:
        """Return a description of a removed document. `index` is its position in the block."""
        code = int(self.codes[index])
        entry: dict[str, Any] = {
            "document": self.first + index,
            "source": _source_of(self.analysis, index),
            "rule": REMOVALS[code - 1],
        }
        if code < EXACT_DUPLICATE and REMOVALS[code - 1] != EMPTY:
            entry["value"] = round(float(self.analysis.values[index]), _VALUE_DIGITS)
        if self.originals[index]:
            entry["original"] = int(self.originals[index]) - 1
        return {**entry, "text": self.analysis.excerpts[index]}


def decided_blocks(folder: Path, blocks: int, decisions: Decisions) -> Iterator[DecidedBlock]:
    first = 0
    for number in range(blocks):
        analysis = open_analysis(folder, number)
        span = slice(first, first + analysis.documents)
        yield DecidedBlock(number, first, analysis, decisions.codes[span], decisions.originals[span])
        first += analysis.documents


def _source_of(analysis: Analysis, index: int) -> str:
    for name, count in analysis.sources:
        if index < count:
            return name
        index -= count
    raise IndexError


def build_report(folder: Path, blocks: int, decisions: Decisions, settings: Settings, digest: str) -> Report:
    """Count what each step removes."""
    documents = raw_bytes = divided = 0
    counts, sizes = np.zeros(HELDOUT + 1, dtype=np.int64), np.zeros(HELDOUT + 1, dtype=np.int64)
    changes: dict[str, dict[str, Any]] = {}
    examples: dict[int, dict[str, Any]] = {}
    for block in decided_blocks(folder, blocks, decisions):
        analysis = block.analysis
        documents, raw_bytes, divided = documents + analysis.documents, raw_bytes + analysis.raw_bytes, divided + analysis.divided
        np.add.at(counts, block.codes, 1)
        np.add.at(sizes, block.codes, analysis.sizes)
        for name, change in analysis.changes.items():
            total = changes.setdefault(name, {"documents": 0, "lines": 0, "bytes": 0, "example": change["example"]})
            for key in ("documents", "lines", "bytes"):
                total[key] += change[key]
        codes, first = np.unique(block.codes, return_index=True)
        for code, index in zip(codes.tolist(), first.tolist(), strict=True):
            if TRAIN < code < HELDOUT and code not in examples:
                examples[code] = block.removed_entry(index)
    _add_originals(folder, blocks, decisions, examples)
    steps = _steps(settings, documents, counts, sizes, changes, examples)
    train, heldout = (Part(int(counts[code]), int(sizes[code])) for code in (TRAIN, HELDOUT))
    return Report(documents, raw_bytes, divided, steps, train, heldout, digest)


def _add_originals(folder: Path, blocks: int, decisions: Decisions, examples: dict[int, dict[str, Any]]) -> None:
    """Add the beginning of the original to each example of a duplicate."""
    wanted = {entry["original"]: entry for entry in examples.values() if "original" in entry}
    for block in decided_blocks(folder, blocks, decisions) if wanted else ():
        for number in [number for number in wanted if block.first <= number < block.first + block.analysis.documents]:
            wanted.pop(number)
            for entry in examples.values():
                if entry.get("original") == number:
                    entry["original_text"] = block.analysis.excerpts[number - block.first]
        if not wanted:
            return


def _steps(
    settings: Settings,
    documents: int,
    counts: np.ndarray,
    sizes: np.ndarray,
    changes: dict[str, dict[str, Any]],
    examples: dict[int, dict[str, Any]],
) -> list[Step]:
    steps = []
    left = documents

    def change(name: str, meaning: str) -> None:
        entry = changes.get(name)
        if entry is None:
            steps.append(Step(name, meaning, left, 0, 0, 0, None))
        else:
            steps.append(Step(name, meaning, left, 0, entry["documents"], entry["bytes"], {"text": entry["example"]}))

    def removal(name: str, meaning: str) -> None:
        nonlocal left
        code = REMOVALS.index(name) + 1
        removed = int(counts[code])
        steps.append(Step(name, meaning, left, removed, 0, int(sizes[code]), examples.get(code)))
        left -= removed

    if settings.uses("clean"):
        change("clean", "line endings, Unicode normalization, control characters, trailing spaces, blank lines")
    for rule in RULES:
        if rule.name == "c4_lorem_ipsum":  # the first rule after the line rules
            for line_rule in LINE_RULES:
                if settings.uses(line_rule.name):
                    change(line_rule.name, line_rule.meaning)
        if settings.uses(rule.name):
            removal(rule.name, rule.meaning)
    removal(EMPTY, "no text is left")
    if settings.uses("exact_duplicates"):
        removal("exact_duplicates", "the same text as an earlier document")
    if settings.uses("near_duplicates"):
        removal("near_duplicates", f"similar to an earlier document (MinHash, {settings.bands} bands of {settings.rows} rows)")
    if settings.heldout and settings.uses("contamination"):
        part, other = ("held-out", "training") if settings.contaminated == "heldout" else ("training", "held-out")
        removal("exact_contamination", f"{part} documents that are also in the {other} text")
        removal("near_contamination", f"{part} documents that are similar to one in the {other} text")
    return steps


def write_removed(file: TextIO, folder: Path, blocks: int, decisions: Decisions) -> None:
    """Write one JSON line for each removed document."""
    for block in decided_blocks(folder, blocks, decisions):
        for index in np.flatnonzero((block.codes != TRAIN) & (block.codes != HELDOUT)).tolist():
            file.write(json.dumps(block.removed_entry(index), ensure_ascii=False) + "\n")

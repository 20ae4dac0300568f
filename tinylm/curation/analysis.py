"""Analyze a block of documents: apply the quality rules, and hash the documents that pass them.

The result of a block is stored in two files, so that an interrupted preparation can continue with the first missing block.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinylm.curation.blocks import Block
from tinylm.curation.cleaning import RemovedLines, apply_line_rules, clean
from tinylm.curation.minhash import shingles
from tinylm.curation.rules import RULES, Page, first_violated
from tinylm.curation.settings import Settings
from tinylm.paths import atomic_file

EXCERPT_CHARACTERS = 80
EMPTY = "empty"
FILTERS = (EMPTY, *(rule.name for rule in RULES))
"""What can remove a document before duplicates are removed. See `Analysis.codes`."""


@dataclass(frozen=True)
class Analysis:
    """The analysis of a block. Arrays have one entry per document, unless stated otherwise."""

    part: str
    digest: str
    codes: np.ndarray
    """uint8: 0 if the document passed all rules, or 1 plus the index in `FILTERS` of the rule that removes it."""
    values: np.ndarray
    """float64: the value that this rule measured, or 0."""
    sizes: np.ndarray
    """int64: the size of the text after cleaning, in UTF-8 bytes."""
    hashes: np.ndarray
    """uint64: the first 8 bytes of the BLAKE2b hash of the cleaned text, as in `tinylm.text.split.Scan`."""
    excerpts: list[str]
    """The beginning of each cleaned document."""
    sources: list[tuple[str, int]]
    """Each file with the number of its documents in the block."""
    raw_bytes: int
    divided: int
    changes: dict[str, dict[str, Any]]
    """For cleaning and each line rule: the number of changed documents, removed lines and removed bytes, and an example."""

    @property
    def documents(self) -> int:
        return len(self.codes)


def final_text(text: str, settings: Settings, part: str) -> str:
    """Return the text of a document as it is encoded. The line rules do not apply to held-out sources."""
    cleaned = clean(text) if settings.uses("clean") else text
    return apply_line_rules(cleaned, settings.line_rules)[0] if part == "train" else cleaned


def analyze(block: Block, settings: Settings, folder: Path) -> None:
    """Analyze a block and write the result to `folder`. Does nothing if the result exists and the block has not changed."""
    digest = block.digest()
    if _digest(folder, block.number) == digest:
        return
    with_rules = block.part == "train"  # the user chose the documents of a separate held-out text
    count = len(block.texts)
    filters = _Filters(settings)
    cleans, finds_similar = settings.uses("clean"), settings.uses("near_duplicates")
    codes, values = np.zeros(count, dtype=np.uint8), np.zeros(count)
    sizes, hashes = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.uint64)
    excerpts, changes = [], _Changes()
    signed, signed_shingles = [], []
    raw_bytes = 0
    for number, text in enumerate(block.texts):
        raw_size = len(text.encode("utf-8"))
        raw_bytes += raw_size
        cleaned = clean(text) if cleans else text
        changes.cleaned(text, cleaned, raw_size)
        violated, final = None, cleaned
        if with_rules and cleaned:
            violated, final, removed_lines = filters.apply(cleaned)
            changes.lines(removed_lines)
        encoded = final.encode("utf-8")
        sizes[number] = len(encoded)
        hashes[number] = int.from_bytes(hashlib.blake2b(encoded, digest_size=16).digest()[:8], "big")
        excerpts.append(cleaned[:EXCERPT_CHARACTERS])
        if violated is not None:
            codes[number], values[number] = FILTERS.index(violated[0]) + 1, violated[1]
        elif not final.strip():
            codes[number] = FILTERS.index(EMPTY) + 1
        else:
            document = shingles(final) if finds_similar else hashes[:0]
            signed.append(number)
            signed_shingles.append(document if len(document) else hashes[number : number + 1])
    keys = np.concatenate((hashes[signed][None], settings.minhash.band_keys(signed_shingles)))
    info = {
        "part": block.part,
        "digest": digest,
        "excerpts": excerpts,
        "sources": block.sources,
        "raw_bytes": raw_bytes,
        "divided": block.divided,
        "changes": changes.entries,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(_keys_file(folder, block.number)) as temporary, open(temporary, "wb") as file:
        np.save(file, keys)
    with atomic_file(_info_file(folder, block.number)) as temporary, open(temporary, "wb") as file:
        text_array = np.frombuffer(json.dumps(info).encode(), dtype=np.uint8)
        np.savez(file, codes=codes, values=values, sizes=sizes, hashes=hashes, info=text_array)


class _Filters:
    """The rules that are switched on."""

    def __init__(self, settings: Settings) -> None:
        self._before_lines = [rule for rule in settings.rules if rule.group == "gopher"]
        self._after_lines = [rule for rule in settings.rules if rule.group != "gopher"]
        self._line_rules = settings.line_rules

    def apply(self, text: str) -> tuple[tuple[str, float] | None, str, dict[str, RemovedLines]]:
        """Return (the violated rule and its value, or None), the text without the removed lines, and the removed lines.

        As in FineWeb, the rules of Gopher apply to the text before lines are removed, and the other rules to the text after that.
        """
        page = Page(text)
        violated = first_violated(page, self._before_lines)
        if violated is not None:
            return (violated[0].name, violated[1]), text, {}
        final, removed = apply_line_rules(text, self._line_rules)
        if not final.strip():
            return None, final, removed
        violated = first_violated(page if final is text else Page(final), self._after_lines)
        return (None if violated is None else (violated[0].name, violated[1])), final, removed


class _Changes:
    """Counts how cleaning and the line rules change documents."""

    def __init__(self) -> None:
        self.entries: dict[str, dict[str, Any]] = {}

    def cleaned(self, before: str, after: str, size: int) -> None:
        if before != after:
            self._add("clean", 0, size - len(after.encode("utf-8")), before)

    def lines(self, removed: dict[str, RemovedLines]) -> None:
        for rule, lines in removed.items():
            self._add(rule, lines.count, lines.bytes, lines.example)

    def _add(self, name: str, lines: int, size: int, example: str) -> None:
        empty = {"documents": 0, "lines": 0, "bytes": 0, "example": example[:EXCERPT_CHARACTERS]}
        entry = self.entries.setdefault(name, empty)
        entry["documents"] += 1
        entry["lines"] += lines
        entry["bytes"] += size


def _info_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.npz"


def _keys_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.npy"


def _digest(folder: Path, number: int) -> str | None:
    """Return the digest of a block that has been analyzed, or None."""
    file = _info_file(folder, number)
    return open_analysis(folder, number).digest if file.exists() else None


def open_analysis(folder: Path, number: int) -> Analysis:
    """Read the analysis of a block."""
    with np.load(_info_file(folder, number), allow_pickle=False) as arrays:
        info = json.loads(arrays["info"].tobytes())
        info["sources"] = [(name, count) for name, count in info["sources"]]
        return Analysis(**info, **{name: arrays[name] for name in ("codes", "values", "sizes", "hashes")})


def open_keys(folder: Path, number: int) -> np.ndarray:
    """Memory-map the keys of a block, uint64 (1 + bands, documents that passed the rules).

    The first row contains the hashes of the texts, and the other rows contain the keys of the MinHash bands.
    """
    keys: np.ndarray = np.load(_keys_file(folder, number), mmap_mode="r", allow_pickle=False)
    return keys

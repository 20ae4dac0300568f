"""GloVe: co-occurrences counted on disk, then factorized, in parallel and the same to the bit on any number of threads.

Counting holds the pairs of the most frequent words in a dense table and spills the others as sorted runs, which are merged
range by range. The cells are dealt into 8 x 8 blocks by (row mod 8, column mod 8). A step works through 8 blocks that share
neither rows nor columns (Gemulla et al. 2011), so that threads never touch the same vector, and order never matters.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinylm.embedding.text import Text
from tinylm.embedding.word2vec import StepResult, kernels
from tinylm.paths import cache_folder, write_whole
from tinylm.recipe.embeddings import GloveMethod
from tinylm.reporting import Reporter

STRIPES = 8
_MOST_DENSE = 2048
"""Names whose pairs are counted in a table in memory: 32 MiB."""
_PAIR_BYTES = 64
"""Of memory for each pair of a run: key, weight, and what sorting them takes."""
_FORMAT = 1
RUN = np.dtype([("key", "<i8"), ("weight", "<f8")])
CELL = np.dtype([("row", "<i4"), ("column", "<i4"), ("count", "<f4")])


@dataclass(frozen=True)
class Cooccurrences:
    """The cells of a table, in a file, block after block, shuffled within each."""

    path: Path
    ends: list[int]
    """Where each of the blocks ends."""

    def __len__(self) -> int:
        return self.ends[-1]

    def block(self, row: int, column: int) -> np.ndarray:
        """The cells (of dtype CELL) of one block."""
        place = row * STRIPES + column
        start = self.ends[place - 1] if place else 0
        return np.fromfile(self.path, dtype=CELL, count=self.ends[place] - start, offset=CELL.itemsize * start)


def count(text: Text, method: GloveMethod, seed: int, reporter: Reporter) -> Cooccurrences:
    """Count a text's co-occurrences within the window, symmetric, each 1 / distance; cached by what decides them."""
    key = json.dumps([text.fingerprint, method.window, seed, _FORMAT])
    folder = cache_folder("cooccurrences", hashlib.sha256(key.encode()).hexdigest()[:32])
    note = folder / "ends.json"
    if not note.exists():
        with tempfile.TemporaryDirectory(prefix="counting-", dir=folder) as working:
            runs = _runs(text, method, Path(working), reporter)
            _deal(runs, len(text.units.names), method, Path(working))
            ends = _shuffle(Path(working), folder / "cells", seed)
        write_whole(note, json.dumps(ends) + "\n")
    found = Cooccurrences(folder / "cells", json.loads(note.read_text(encoding="utf-8")))
    reporter.note(f"co-occurrences: {len(found):,} pairs that occur")
    return found


def _runs(text: Text, method: GloveMethod, working: Path, reporter: Reporter) -> list[Path]:
    """Count, and write runs of pairs sorted by key, the dense table as one of them."""
    compiled = kernels()
    names, window = len(text.units.names), method.window
    dense = np.zeros((min(names, _MOST_DENSE),) * 2)
    room = max(method.buffer_megabytes * (1 << 20) // _PAIR_BYTES, 4 * window)
    keys, weights = np.empty(room, np.int64), np.empty(room, np.float32)
    runs: list[Path] = []
    found = 0
    stretch = max(room // (4 * window), 1)

    def spill(run: np.ndarray) -> None:
        runs.append(working / f"run-{len(runs)}")
        run.tofile(runs[-1])

    with reporter.progress("counting pairs", text.length, "") as advance:
        for start in range(0, text.length, stretch):
            before = min(window, start)
            ids = text.read(start - before, before + stretch)
            if found + window * stretch > room:
                spill(_summed(keys[:found], weights[:found].astype(np.float64)))
                found = 0
            found += compiled.count_pairs(ids, before, window, names, dense, keys[found:], weights[found:])
            advance(start + stretch)
    spill(_summed(keys[:found], weights[:found].astype(np.float64)))
    rows, columns = np.nonzero(dense)
    run = np.empty(len(rows), RUN)
    run["key"], run["weight"] = rows * names + columns, dense[rows, columns]
    spill(run)
    return runs


def _summed(keys: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Equal keys as one, sorted; weights are added in the order in which they came."""
    order = np.argsort(keys, kind="stable")
    keys, weights = keys[order], weights[order]
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    run = np.empty(len(starts), RUN)
    run["key"], run["weight"] = keys[starts], np.add.reduceat(weights, starts) if len(starts) else 0.0
    return run


def _deal(runs: list[Path], names: int, method: GloveMethod, working: Path) -> None:
    """Merge the runs range by range and deal their cells, in both directions, into a file per block."""
    mapped = [np.memmap(path, RUN, "r") for path in runs if path.stat().st_size]
    room = max(method.buffer_megabytes * (1 << 20) // _PAIR_BYTES, 1)
    parts = -(-sum(map(len, mapped)) // room)
    sample = np.sort(np.concatenate([run["key"][:: max(1, len(run) // (16 * parts))] for run in mapped])) if mapped else np.zeros(0)
    borders = [int(sample[len(sample) * part // parts]) for part in range(1, parts)] + [names * names]
    places = [0] * len(mapped)
    for border in sorted(set(borders)):
        ends = [int(np.searchsorted(run["key"], border)) for run in mapped]
        pieces = [np.array(run[start:end]) for run, start, end in zip(mapped, places, ends, strict=True)]
        places = ends
        cells = _summed(np.concatenate([p["key"] for p in pieces]), np.concatenate([p["weight"] for p in pieces]))
        low, high = np.divmod(cells["key"], names)
        twice = np.where(low == high, 2.0, 1.0) * cells["weight"]
        other = low != high
        rows, columns = np.concatenate([low, high[other]]), np.concatenate([high, low[other]])
        counts = np.concatenate([twice, twice[other]])
        block = rows % STRIPES * STRIPES + columns % STRIPES
        for place in np.unique(block):
            chosen = block == place
            dealt = np.empty(int(chosen.sum()), CELL)
            dealt["row"], dealt["column"], dealt["count"] = rows[chosen], columns[chosen], counts[chosen]
            with open(working / f"block-{place}", "ab") as file:
                dealt.tofile(file)


def _shuffle(working: Path, target: Path, seed: int) -> list[int]:
    """All blocks in one file, each in a random order. Where each ends."""
    ends = []
    total = 0
    joined = working / "cells"
    with open(joined, "wb") as file:
        for place in range(STRIPES * STRIPES):
            path = working / f"block-{place}"
            if path.exists():
                cells = np.fromfile(path, CELL)
                np.random.Generator(np.random.PCG64([seed, place])).shuffle(cells)
                cells.tofile(file)
                total += len(cells)
                path.unlink()
            ends.append(total)
    shutil.move(joined, target)
    return ends


class Glove:
    """The tables and one step after another. The last column of each table is its bias."""

    unit = "pairs"

    def __init__(self, text: Text, method: GloveMethod, seed: int, threads: int, reporter: Reporter) -> None:
        self._kernels = kernels()
        self._method = method
        self.cells = count(text, method, seed, reporter)
        self._pool = ThreadPoolExecutor(min(threads, STRIPES))
        shape = (len(text.units.names), method.dimensions + 1)
        generator = np.random.Generator(np.random.PCG64(seed))
        self.words, self.contexts = (
            ((generator.random(shape, dtype=np.float32) - 0.5) / method.dimensions).astype(np.float32) for _ in range(2)
        )
        self.word_squares, self.context_squares = np.ones(shape, np.float32), np.ones(shape, np.float32)
        self.steps_per_epoch = STRIPES
        self.steps = STRIPES * method.epochs

    def step(self, number: int) -> StepResult:
        """Do step `number` of `steps`, counted from 0: the blocks (r, r + number)."""
        method = self._method

        def work(row: int) -> tuple[float, int]:
            cells = self.cells.block(row, (row + number) % STRIPES)
            loss: float = self._kernels.glove(
                np.ascontiguousarray(cells["row"]),
                np.ascontiguousarray(cells["column"]),
                np.ascontiguousarray(cells["count"]),
                self.words,
                self.contexts,
                self.word_squares,
                self.context_squares,
                np.float32(method.lr),
                np.float32(method.x_max),
                np.float32(method.alpha),
            )
            return loss, len(cells)

        done = list(self._pool.map(work, range(STRIPES)))
        cells = sum(count for _, count in done)
        return StepResult(sum(loss for loss, _ in done), cells, cells, method.lr)

    def tables(self) -> dict[str, np.ndarray]:
        """All that was learned so far; change them in place to go on from elsewhere."""
        squares = {"word_squares": self.word_squares, "context_squares": self.context_squares}
        return {"words": self.words, "contexts": self.contexts, **squares}

    def vectors(self) -> np.ndarray:
        """The vectors that people use: word and context summed (section 4.2)."""
        summed: np.ndarray = (self.words + self.contexts)[:, :-1]
        return summed

    def close(self) -> None:
        self._pool.shutdown()

"""GloVe (Pennington et al. 2014): count co-occurrences on disk and factorize the matrix.

Pairs of frequent words are counted in a dense matrix. All other pairs are written to disk as sorted runs, which are then merged one
key range at a time. The cells of the co-occurrence matrix are grouped into 8 x 8 blocks by (row mod 8, column mod 8). A step
processes 8 blocks that share neither rows nor columns (Gemulla et al. 2011), so no two threads update the same vector. The result
is bit-identical for any number of threads.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinylm.embedding.encoded_text import EncodedText
from tinylm.embedding.word2vec import StepResult, import_kernels
from tinylm.paths import cache_folder, cached_file, name_write_errors, temporary_folder
from tinylm.recipe.embeddings import GloveMethod
from tinylm.reporting import Reporter

BLOCKS_PER_SIDE = 8
MAX_DENSE_NAMES = 2048
"""Number of the most frequent names whose pairs are counted in a dense float64 matrix (32 MiB)."""
BYTES_PER_PAIR = 64
"""Bytes of memory per buffered pair: the key, the weight and the temporary arrays used for sorting."""
_FORMAT = 2
"""Version of the cache format. Increase it when the contents of the cached files change."""
RUN_DTYPE = np.dtype([("key", "<i8"), ("weight", "<f8")])
CELL_DTYPE = np.dtype([("row", "<i4"), ("column", "<i4"), ("count", "<f4")])


@dataclass(frozen=True)
class Cooccurrences:
    """A file that contains the nonzero cells of a co-occurrence matrix, block by block, followed by `ends`.

    The cells are shuffled within each block.
    """

    path: Path
    ends: list[int]
    """The index after the last cell of each block."""

    def __len__(self) -> int:
        return self.ends[-1]

    def block(self, row: int, column: int) -> np.ndarray:
        """Read the cells of one block as an array of `CELL_DTYPE`."""
        index = row * BLOCKS_PER_SIDE + column
        start = self.ends[index - 1] if index else 0
        return np.fromfile(self.path, dtype=CELL_DTYPE, count=self.ends[index] - start, offset=CELL_DTYPE.itemsize * start)


def count_cooccurrences(text: EncodedText, method: GloveMethod, seed: int, reporter: Reporter) -> Cooccurrences:
    """Count pairs of words within a symmetric window. A pair at distance d has weight 1 / d. The result is cached on disk."""
    key = json.dumps([text.fingerprint, method.window, seed, _FORMAT])
    path = cache_folder("cooccurrences") / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.cells"

    def count(temporary: Path) -> None:
        with temporary_folder(path.parent, "counting") as working, name_write_errors(path):
            runs = _write_runs(text, method, working, reporter)
            _merge_into_blocks(runs, len(text.vocabulary.names), method, working)
            _shuffle_and_join_blocks(working, temporary, seed)

    cached_file(path, count, lambda path: reporter.warn(f"{path} is damaged; counting the co-occurrences again"))
    blocks = BLOCKS_PER_SIDE * BLOCKS_PER_SIDE
    ends = np.fromfile(path, dtype="<i8", count=blocks, offset=path.stat().st_size - 8 * blocks)
    cells = Cooccurrences(path, ends.tolist())
    reporter.note(f"co-occurrences: {len(cells):,} nonzero cells")
    return cells


def _write_runs(text: EncodedText, method: GloveMethod, working: Path, reporter: Reporter) -> list[Path]:
    """Count the pairs and write them as runs sorted by key. The last run contains the dense matrix."""
    compiled = import_kernels()
    names, window = len(text.vocabulary.names), method.window
    dense = np.zeros((min(names, MAX_DENSE_NAMES),) * 2)
    capacity = max(method.buffer_megabytes * (1 << 20) // BYTES_PER_PAIR, 4 * window)
    keys, weights = np.empty(capacity, np.int64), np.empty(capacity, np.float32)
    runs: list[Path] = []
    buffered = 0
    chunk = max(capacity // (4 * window), 1)

    def write_run(run: np.ndarray) -> None:
        runs.append(working / f"run-{len(runs)}")
        run.tofile(runs[-1])

    with reporter.progress("counting pairs", text.length, "") as advance:
        for start in range(0, text.length, chunk):
            before = min(window, start)
            ids = text.read(start - before, before + chunk)
            if buffered + window * chunk > capacity:
                write_run(_sum_by_key(keys[:buffered], weights[:buffered].astype(np.float64)))
                buffered = 0
            buffered += compiled.count_pairs(ids, before, window, names, dense, keys[buffered:], weights[buffered:])
            advance(start + chunk)
    write_run(_sum_by_key(keys[:buffered], weights[:buffered].astype(np.float64)))
    rows, columns = np.nonzero(dense)
    run = np.empty(len(rows), RUN_DTYPE)
    run["key"], run["weight"] = rows * names + columns, dense[rows, columns]
    write_run(run)
    return runs


def _sum_by_key(keys: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return a run sorted by key. The weights of equal keys are added in input order."""
    order = np.argsort(keys, kind="stable")
    keys, weights = keys[order], weights[order]
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    run = np.empty(len(starts), RUN_DTYPE)
    run["key"], run["weight"] = keys[starts], np.add.reduceat(weights, starts) if len(starts) else 0.0
    return run


def _merge_into_blocks(runs: list[Path], names: int, method: GloveMethod, working: Path) -> None:
    """Merge the runs into block files, one key range at a time. Each pair becomes two cells, (row, column) and (column, row)."""
    mapped = [np.memmap(path, RUN_DTYPE, "r") for path in runs if path.stat().st_size]
    bounds = _range_bounds(mapped, names, max(method.buffer_megabytes * (1 << 20) // BYTES_PER_PAIR, 1))
    starts = [0] * len(mapped)
    for bound in bounds:
        ends = [int(np.searchsorted(run["key"], bound)) for run in mapped]
        parts = [np.array(run[start:end]) for run, start, end in zip(mapped, starts, ends, strict=True)]
        starts = ends
        pairs = _sum_by_key(np.concatenate([part["key"] for part in parts]), np.concatenate([part["weight"] for part in parts]))
        low, high = np.divmod(pairs["key"], names)
        weights = np.where(low == high, 2.0, 1.0) * pairs["weight"]  # a word paired with itself is counted in both directions
        mirrored = low != high
        rows, columns = np.concatenate([low, high[mirrored]]), np.concatenate([high, low[mirrored]])
        counts = np.concatenate([weights, weights[mirrored]])
        blocks = rows % BLOCKS_PER_SIDE * BLOCKS_PER_SIDE + columns % BLOCKS_PER_SIDE
        for block in np.unique(blocks):
            chosen = blocks == block
            cells = np.empty(int(chosen.sum()), CELL_DTYPE)
            cells["row"], cells["column"], cells["count"] = rows[chosen], columns[chosen], counts[chosen]
            with open(working / f"block-{block}", "ab") as file:
                cells.tofile(file)


def _range_bounds(runs: list[np.memmap], names: int, capacity: int) -> list[int]:
    """Return the upper bounds of the key ranges in ascending order.

    The bounds are estimated from a sample of the keys so that each range contains about `capacity` pairs.
    """
    ranges = -(-sum(map(len, runs)) // capacity)
    samples = [run["key"][:: max(1, len(run) // (16 * ranges))] for run in runs]
    sample = np.sort(np.concatenate(samples)) if samples else np.zeros(0)
    return sorted({*(int(sample[len(sample) * part // ranges]) for part in range(1, ranges)), names * names})


def _shuffle_and_join_blocks(working: Path, target: Path, seed: int) -> None:
    """Shuffle the cells within each block and write all blocks to one file, followed by the end index of each block as int64."""
    ends = []
    total = 0
    with open(target, "wb") as file:
        for block in range(BLOCKS_PER_SIDE * BLOCKS_PER_SIDE):
            path = working / f"block-{block}"
            if path.exists():
                cells = np.fromfile(path, CELL_DTYPE)
                np.random.Generator(np.random.PCG64([seed, block])).shuffle(cells)
                cells.tofile(file)
                total += len(cells)
                path.unlink()
            ends.append(total)
        np.array(ends, dtype="<i8").tofile(file)


class Glove:
    """Trains the GloVe tables step by step. Each table is float32 (names, dimensions + 1); the last column contains the biases."""

    unit = "pairs"

    def __init__(self, text: EncodedText, method: GloveMethod, seed: int, threads: int, reporter: Reporter) -> None:
        self._kernels = import_kernels()
        self._method = method
        self.cells = count_cooccurrences(text, method, seed, reporter)
        self._pool = ThreadPoolExecutor(min(threads, BLOCKS_PER_SIDE))
        shape = (len(text.vocabulary.names), method.dimensions + 1)
        generator = np.random.Generator(np.random.PCG64(seed))
        self.words, self.contexts = (
            ((generator.random(shape, dtype=np.float32) - 0.5) / method.dimensions).astype(np.float32) for _ in range(2)
        )
        self.word_squares, self.context_squares = np.ones(shape, np.float32), np.ones(shape, np.float32)
        self.steps_per_epoch = BLOCKS_PER_SIDE
        self.steps = BLOCKS_PER_SIDE * method.epochs

    def step(self, number: int) -> StepResult:
        """Run step `number` (0 to `steps` - 1), which processes block (row, (row + number) mod 8) for each row of blocks."""
        method = self._method

        def train_block(row: int) -> tuple[float, int]:
            cells = self.cells.block(row, (row + number) % BLOCKS_PER_SIDE)
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

        results = list(self._pool.map(train_block, range(BLOCKS_PER_SIDE)))
        cells = sum(count for _, count in results)
        return StepResult(sum(loss for loss, _ in results), cells, cells, method.lr)

    def tables(self) -> dict[str, np.ndarray]:
        """Return the complete training state by name. To restore the state, write into these arrays."""
        squares = {"word_squares": self.word_squares, "context_squares": self.context_squares}
        return {"words": self.words, "contexts": self.contexts, **squares}

    def vectors(self) -> np.ndarray:
        """Return the word vectors, float32 (names, dimensions): the sum of both tables (Pennington et al. 2014, section 4.2)."""
        summed: np.ndarray = (self.words + self.contexts)[:, :-1]
        return summed

    def close(self) -> None:
        self._pool.shutdown()

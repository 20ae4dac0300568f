"""Skip-gram and CBOW with negative sampling (Mikolov et al. 2013). The result is bit-identical for any number of threads.

A step reads 8 consecutive segments of the text. Training on a segment uses plain SGD, its own random numbers and its own copies of
the table rows that it changes. All segments start from the same tables, and their changes are then added in text order. The result
therefore does not depend on which thread processes which segment. A step depends only on the seed, the step number and the tables,
so no other state is needed to resume training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinylm.embedding.encoded_text import EncodedText
from tinylm.recipe.embeddings import CbowMethod, SkipGramMethod

SEGMENTS = 8
"""Segments per step, and the maximum number of threads."""
SEGMENT_LENGTHS = {"skipgram": 128, "cbow": 256}
"""Ids per segment, by method. With longer segments, training is faster, but learns worse vectors from a short text."""


@dataclass(frozen=True)
class StepResult:
    """The result of a step. `loss` is summed over `terms` (pairs, positions or cells). `tokens` counts ids, or cells for GloVe."""

    loss: float
    terms: int
    tokens: int
    lr: float


def import_kernels() -> Any:
    """Import the module with the compiled loops. This imports numba, which takes half a second."""
    from tinylm.embedding import kernels as compiled

    return compiled


class Word2Vec:
    """Train skip-gram or CBOW tables step by step. `inputs` and `outputs` are float32 (names, dimensions)."""

    unit = "tokens"

    def __init__(self, text: EncodedText, method: SkipGramMethod | CbowMethod, seed: int, threads: int) -> None:
        self._kernels = import_kernels()
        self._text, self._method, self._seed = text, method, seed
        self._threads = min(threads, SEGMENTS)
        self._pool = ThreadPoolExecutor(max(1, self._threads - 1))  # the calling thread also works
        names, width = len(text.vocabulary.names), method.dimensions
        generator = np.random.Generator(np.random.PCG64(seed))
        self.inputs = ((generator.random((names, width), dtype=np.float32) - 0.5) / width).astype(np.float32)
        self.outputs = np.zeros((names, width), dtype=np.float32)
        self._constants = self._training_constants(text.vocabulary.counts)
        self._segment_length = SEGMENT_LENGTHS[method.name]
        self._workspaces = Workspaces(names, width, method.negatives, self._segment_length)
        self._work = self._kernels.Workspace(*self._workspaces.arrays())
        self._is_skip_gram = isinstance(method, SkipGramMethod)
        self._train(np.empty(0, np.int32), 0, np.float32(0))  # compile now, so that compilation does not count as training time
        self.steps_per_epoch = -(-text.length // (SEGMENTS * self._segment_length))
        self.steps = self.steps_per_epoch * method.epochs

    def _training_constants(self, counts: np.ndarray) -> Any:
        method, frequencies = self._method, counts / counts.sum()
        keep = np.ones(len(counts))
        if method.subsample:
            keep = np.minimum(1, np.sqrt(method.subsample / frequencies) + method.subsample / frequencies)
        accept, alias = alias_table(counts.astype(np.float64) ** method.exponent)
        bound, steps = self._kernels.SIGMOID_RANGE, self._kernels.SIGMOID_STEPS
        log_sigmoid = -np.logaddexp(0, -np.arange(-bound * steps, bound * steps + 1) / steps)
        return self._kernels.TrainingConstants(
            keep.astype(np.float32),
            accept,
            alias,
            np.exp(log_sigmoid).astype(np.float32),
            log_sigmoid.astype(np.float32),
            method.window,
            method.negatives,
        )

    def step(self, number: int) -> StepResult:
        """Run step `number`, from 0 to `steps` - 1."""
        epoch, within = divmod(number, self.steps_per_epoch)
        step_length = SEGMENTS * self._segment_length
        ids = self._text.read(within * step_length, step_length)
        done = epoch * self._text.length + within * step_length
        method = self._method
        lr = method.lr - (method.lr - method.lr_end) * done / (self._text.length * method.epochs)
        loss, terms = self._train(ids, number, np.float32(lr))
        return StepResult(loss, terms, len(ids), lr)

    def _train(self, ids: np.ndarray, number: int, lr: np.float32) -> tuple[float, int]:
        """Train on the ids of one step. Return the summed loss and the number of terms in the sum."""
        workspaces, threads = self._workspaces, self._threads
        seeds = np.random.SeedSequence([self._seed, number]).generate_state(SEGMENTS, np.uint64)
        losses, counts = np.empty(SEGMENTS), np.empty((3, SEGMENTS), np.int64)

        def train_part(part: int) -> None:
            arrays = ids, seeds, self.inputs, self.outputs, self._constants, self._work, lr, losses, counts
            self._kernels.train_segments(*arrays, self._is_skip_gram, part, threads)

        self._run_in_threads(train_part)
        tables = (
            (self.inputs, workspaces.input_rows, workspaces.inputs, workspaces.input_uses, counts[1]),
            (self.outputs, workspaces.output_rows, workspaces.outputs, workspaces.output_uses, counts[2]),
        )

        def merge_part(part: int) -> None:
            for table, scratch in zip(tables, workspaces.row_totals, strict=True):
                self._kernels.merge_changes(*table, lr, *scratch, part, threads)

        self._run_in_threads(merge_part)
        return float(losses.sum()), int(counts[0].sum())

    def _run_in_threads(self, work: Callable[[int], None]) -> None:
        """Call `work(part)` once per thread, with `part` from 0 to `threads` - 1.

        Starting a call takes as long as training on about 50 ids, so a step makes only a few calls.
        """
        others = [self._pool.submit(work, part) for part in range(1, self._threads)]
        work(0)
        for other in others:
            other.result()

    def tables(self) -> dict[str, np.ndarray]:
        """Return the complete training state by name. To restore the state, write into these arrays."""
        return {"inputs": self.inputs, "outputs": self.outputs}

    def vectors(self) -> np.ndarray:
        """Return the word vectors, float32 (names, dimensions): the input table, as in the original word2vec."""
        return self.inputs

    def close(self) -> None:
        self._pool.shutdown()


class Workspaces:
    """Scratch memory for all segments, allocated once. The arrays for `kernels.Workspace` have one row per segment."""

    def __init__(self, names: int, width: int, negatives: int, length: int) -> None:
        inputs, outputs = min(names, length), min(names, length * (negatives + 1))
        self.kept = np.empty((SEGMENTS, length), np.int32)
        self.negatives = np.empty((SEGMENTS, length, negatives), np.int32)
        self.input_slots = np.full((SEGMENTS, names), -1, np.int32)
        self.output_slots = np.full((SEGMENTS, names), -1, np.int32)
        self.inputs = np.empty((SEGMENTS, inputs, width), np.float32)
        self.outputs = np.empty((SEGMENTS, outputs, width), np.float32)
        self.input_rows, self.input_uses = np.empty((2, SEGMENTS, inputs), np.int32)
        self.output_rows, self.output_uses = np.empty((2, SEGMENTS, outputs), np.int32)
        self.row_totals = np.zeros((2, 2, names), np.int32)
        """(table, total, name): `segments_per_row` and `uses_per_row` of `kernels.merge_changes` for the inputs and the outputs."""

    def arrays(self) -> Sequence[np.ndarray]:
        """Return the arrays in the field order of `kernels.Workspace`."""
        return (
            self.kept,
            self.negatives,
            self.input_slots,
            self.output_slots,
            self.inputs,
            self.outputs,
            self.input_rows,
            self.output_rows,
            self.input_uses,
            self.output_uses,
        )


def alias_table(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Build tables for sampling rows in proportion to `weights` in constant time (Walker 1977; Vose 1991).

    To sample, draw a row r uniformly. Keep it with probability `accept[r]`; otherwise, use `alias[r]`.
    """
    scaled = (weights / weights.sum() * len(weights)).tolist()
    accept, alias = np.ones(len(weights), dtype=np.float32), np.arange(len(weights), dtype=np.int32)
    small = [row for row, weight in enumerate(scaled) if weight < 1]
    large = [row for row, weight in enumerate(scaled) if weight >= 1]
    while small and large:
        row, other = small.pop(), large.pop()
        accept[row], alias[row] = scaled[row], other
        scaled[other] -= 1 - scaled[row]
        (small if scaled[other] < 1 else large).append(other)
    return accept, alias

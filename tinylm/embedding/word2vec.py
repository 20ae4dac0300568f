"""Skip-gram and CBOW with negative sampling, fast on several threads and the same to the bit on any number of them.

A step takes 8 consecutive stretches of the text. Each is worked through by plain stochastic gradient descent on a copy of the
rows it needs, from the same starting point and with random numbers of its own; then the changes are added in the order of
the text. Threads only decide who computes what. What a step does depends on (seed, step) alone, so resuming needs the
tables and the number of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinylm.embedding.text import Text
from tinylm.errors import need_extra
from tinylm.recipe.embeddings import CbowMethod, SkipGramMethod

LANES = 8
"""Stretches of a step: the most threads that can help."""
STRETCH = 1024
"""Ids in a stretch."""


@dataclass(frozen=True)
class StepResult:
    """`loss` is a sum over `terms` in the method's own unit; `tokens` of the text (or cells of a table) were gone through."""

    loss: float
    terms: int
    tokens: int
    lr: float


def kernels() -> Any:
    """The compiled loops. Raises `InputError` where numba is not installed."""
    try:
        from tinylm.embedding import kernels as compiled
    except ImportError:
        raise need_extra("embed", "training vectors") from None
    return compiled


class Word2Vec:
    """The tables and one step after another."""

    unit = "tokens"

    def __init__(self, text: Text, method: SkipGramMethod | CbowMethod, seed: int, threads: int) -> None:
        self._kernels = kernels()
        self._text, self._method, self._seed = text, method, seed
        self._threads = min(threads, LANES)
        self._pool = ThreadPoolExecutor(self._threads)
        names, width = len(text.units.names), method.dimensions
        generator = np.random.Generator(np.random.PCG64(seed))
        self.inputs = ((generator.random((names, width), dtype=np.float32) - 0.5) / width).astype(np.float32)
        self.outputs = np.zeros((names, width), dtype=np.float32)
        self._law = self._make_law(text.units.counts)
        self._memory = _Memory(names, width, method.negatives)
        self._lanes = [self._kernels.Lane(*self._memory.lane(lane)) for lane in range(LANES)]
        self._learn = self._kernels.skip_gram if isinstance(method, SkipGramMethod) else self._kernels.cbow
        self._go(np.empty(0, np.int32), 0, np.float32(0))  # compiles, before anything is timed
        self.steps_per_epoch = -(-text.length // (LANES * STRETCH))
        self.steps = self.steps_per_epoch * method.epochs

    def _make_law(self, counts: np.ndarray) -> Any:
        method, shares = self._method, counts / counts.sum()
        keep = np.ones(len(counts))
        if method.subsample:
            keep = np.minimum(1, np.sqrt(method.subsample / shares) + method.subsample / shares)
        accept, alias = alias_table(counts.astype(np.float64) ** method.exponent)
        bound, steps = self._kernels.BOUND, self._kernels.STEPS
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
        """Do step `number` of `steps`, counted from 0."""
        epoch, within = divmod(number, self.steps_per_epoch)
        ids = self._text.read(within * LANES * STRETCH, LANES * STRETCH)
        done = epoch * self._text.length + within * LANES * STRETCH
        method = self._method
        lr = method.lr - (method.lr - method.lr_end) * done / (self._text.length * method.epochs)
        loss, terms = self._go(ids, number, np.float32(lr))
        return StepResult(loss, terms, len(ids), lr)

    def _go(self, ids: np.ndarray, number: int, rate: np.float32) -> tuple[float, int]:
        """Learn from the ids of a step; the sum of the losses and over how many terms."""
        memory, threads = self._memory, self._threads

        def work(lane: int) -> tuple[float, int, int, int]:
            stretch = ids[lane * STRETCH : (lane + 1) * STRETCH]
            seed = np.uint64(np.random.SeedSequence([self._seed, number, lane]).generate_state(1, np.uint64)[0])
            found: tuple[float, int, int, int] = self._learn(
                stretch, seed, self.inputs, self.outputs, self._law, self._lanes[lane], rate
            )
            return found

        lanes = list(self._pool.map(work, range(LANES)))
        tables = (
            (self.inputs, memory.input_rows, memory.inputs, memory.input_uses, np.array([lane[2] for lane in lanes])),
            (self.outputs, memory.output_rows, memory.outputs, memory.output_uses, np.array([lane[3] for lane in lanes])),
        )

        def join(job: tuple[int, int]) -> None:
            side, part = job
            self._kernels.join(*tables[side], rate, memory.lanes_of[side], memory.uses_of[side], part, threads)

        list(self._pool.map(join, [(side, part) for side in range(2) for part in range(threads)]))
        return sum(lane[0] for lane in lanes), sum(lane[1] for lane in lanes)

    def tables(self) -> dict[str, np.ndarray]:
        """All that was learned so far; change them in place to go on from elsewhere."""
        return {"inputs": self.inputs, "outputs": self.outputs}

    def vectors(self) -> np.ndarray:
        """The vectors that people use: the inputs."""
        return self.inputs

    def close(self) -> None:
        self._pool.shutdown()


class _Memory:
    """What the lanes write into, allocated once."""

    def __init__(self, names: int, width: int, negatives: int) -> None:
        inputs, outputs = min(names, STRETCH), min(names, STRETCH * (negatives + 1))
        self.kept = np.empty((LANES, STRETCH), np.int32)
        self.drawn = np.empty((LANES, STRETCH, negatives), np.int32)
        self.input_slots = np.full((LANES, names), -1, np.int32)
        self.output_slots = np.full((LANES, names), -1, np.int32)
        self.inputs = np.empty((LANES, inputs, width), np.float32)
        self.outputs = np.empty((LANES, outputs, width), np.float32)
        self.input_rows, self.input_uses = np.empty((2, LANES, inputs), np.int32)
        self.output_rows, self.output_uses = np.empty((2, LANES, outputs), np.int32)
        self.lanes_of = np.zeros((2, names), np.int32)
        self.uses_of = np.zeros((2, names), np.int32)

    def lane(self, lane: int) -> Sequence[np.ndarray]:
        """In the order of `kernels.Lane`."""
        return [
            part[lane]
            for part in (
                self.kept,
                self.drawn,
                self.input_slots,
                self.output_slots,
                self.inputs,
                self.outputs,
                self.input_rows,
                self.output_rows,
                self.input_uses,
                self.output_uses,
            )
        ]


def alias_table(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Walker's method (Vose 1991): draw row r evenly, keep it with chance accept[r], else take alias[r]."""
    chances = (weights / weights.sum() * len(weights)).tolist()
    accept, alias = np.ones(len(weights), dtype=np.float32), np.arange(len(weights), dtype=np.int32)
    small = [row for row, chance in enumerate(chances) if chance < 1]
    large = [row for row, chance in enumerate(chances) if chance >= 1]
    while small and large:
        row, other = small.pop(), large.pop()
        accept[row], alias[row] = chances[row], other
        chances[other] -= 1 - chances[row]
        (small if chances[other] < 1 else large).append(other)
    return accept, alias

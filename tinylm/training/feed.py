"""Prefetch batches: a background thread assembles the next batch and pins its memory while the device computes.

With several processes, each gets an equal share of the examples of every global batch, determined by its rank.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from tinylm.data.batch import Batch
from tinylm.data.datasets import Dataset
from tinylm.data.order import fingerprint
from tinylm.training.objectives import Objective


@dataclass(frozen=True)
class LocalBatch:
    """This process's share of a global batch, in host memory. With a single process, it is the whole global batch."""

    share: Batch
    global_target_count: int
    """Number of targets in the global batch that count in the loss."""
    global_token_count: int
    """Number of tokens in the global batch that the model reads, without padding."""
    fingerprint: int = 0
    """Hash of the examples in this share. The hashes of all shares add up to the hash of the global batch, modulo 2**64."""

    @classmethod
    def whole(cls, batch: Batch) -> LocalBatch:
        """Wrap a global batch that a single process computes."""
        return cls(batch, batch.target_count, batch.token_count)


class Feed:
    """A context manager that returns batches by position and prefetches the next one."""

    def __init__(
        self,
        dataset: Dataset,
        objective: Objective,
        *,
        seed: int,
        pin_memory: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """`seed` is the recipe's seed, for the random choices of the objective."""
        self._dataset = dataset
        self._objective = objective
        self._seed = seed
        self._pin_memory = pin_memory
        self._rank, self._world_size = rank, world_size
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tinylm-feed")
        self._next: tuple[int, int, Future[LocalBatch]] | None = None

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._worker.shutdown(cancel_futures=True)

    def batch(self, start: int, count: int) -> LocalBatch:
        """Return this process's share of the examples [start, start + count). Also starts preparing the next `count` examples.

        An error from reading the examples is raised here, even if it occurred in the background thread.
        """
        if self._next is not None and self._next[:2] == (start, count):
            batch = self._next[2].result()
        else:
            batch = self._prepare(start, count)
        self._next = (start + count, count, self._worker.submit(self._prepare, start + count, count))
        return batch

    def _prepare(self, start: int, count: int) -> LocalBatch:
        examples = self._dataset.examples(start, count)
        batch = self._objective.batch(examples, self._seed, start)
        rows = slice(self._rank * count // self._world_size, (self._rank + 1) * count // self._world_size)
        share = batch.rows(rows)
        if self._pin_memory:
            share = share.pin_memory()
        hashed = fingerprint(np.concatenate([array[rows] for array in examples.values()], axis=1))
        return LocalBatch(share, batch.target_count, batch.token_count, hashed)

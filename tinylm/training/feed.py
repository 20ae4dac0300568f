"""Prefetch batches: a background thread assembles the next batch and pins its memory while the device computes.

With several processes, each process reads an equal share of every global batch, which depends on its rank.
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
    """Number of targets in the global batch, without ignored ones."""
    global_token_count: int
    """Number of input tokens in the global batch, without padding."""
    fingerprint: int = 0
    """Hash of the examples in this share. The hash of the global batch is the sum over all shares, modulo 2**64."""

    @classmethod
    def whole(cls, batch: Batch) -> LocalBatch:
        """Wrap a global batch for a single process."""
        return cls(batch, batch.target_count, batch.token_count)


class Feed:
    """Returns batches by position and prefetches the next one. Use it as a context manager."""

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
        """`seed` is the recipe's seed. The objective uses it for random choices."""
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
        """Return this process's share of the examples [start, start + count), and start to prepare the next `count` examples.

        Errors in reading the examples are raised here, even if they occurred in the background thread.
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

"""Prefetch batches: a background thread assembles the next batch and pins its memory while the device computes.

With several processes, each gets an equal share of the sequences of every global batch, determined by its rank.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch

from tinylm.data.batches import Batches, fingerprint
from tinylm.model.objective import Example, Objective


@dataclass(frozen=True)
class LocalBatch:
    """This process's share of a global batch, in host memory. With a single process, the global batch."""

    example: Example
    """Inputs and targets, (batch, time)."""
    global_target_count: int
    """Number of targets in the global batch that count in the loss."""
    fingerprint: int = 0
    """Hash of the sequences in this share. The hashes of all shares add up to that of the global batch, modulo 2**64."""


class Feed:
    """A context manager that returns batches by position and prefetches the next one."""

    def __init__(self, batches: Batches, objective: Objective, *, pin_memory: bool, rank: int = 0, world_size: int = 1) -> None:
        self._batches = batches
        self._objective = objective
        self._pin_memory = pin_memory
        self._rank, self._world_size = rank, world_size
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tinylm-feed")
        self._next: tuple[int, int, Future[LocalBatch]] | None = None

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._worker.shutdown(cancel_futures=True)

    def batch(self, start: int, count: int) -> LocalBatch:
        """This process's share of the sequences [start, start + count). Also starts to prepare the `count` sequences after them.

        An error from reading the sequences is raised here, even if it occurred in the background thread.
        """
        if self._next is not None and self._next[:2] == (start, count):
            batch = self._next[2].result()
        else:
            batch = self._prepare(start, count)
        self._next = (start + count, count, self._worker.submit(self._prepare, start + count, count))
        return batch

    def _prepare(self, start: int, count: int) -> LocalBatch:
        sequences = self._batches.sequences(start, count)
        example = self._objective.example(torch.from_numpy(sequences))
        target_count = int((example.targets >= 0).sum())
        share = slice(self._rank * count // self._world_size, (self._rank + 1) * count // self._world_size)
        inputs, targets = example.inputs[share], example.targets[share]
        if self._pin_memory:
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
        return LocalBatch(Example(inputs, targets), target_count, fingerprint(np.ascontiguousarray(sequences[share])))

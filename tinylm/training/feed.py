"""Batches that are ready before the step asks: cut, turned into examples and pinned by a thread while the device computes.

Of several processes each computes an equal share of a global batch's sequences: which they are follows from its rank alone.
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
class GlobalBatch:
    """This process's share of a batch, in the host's memory, and how many targets count in the whole of it."""

    example: Example
    targets: int
    fingerprint: int = 0
    """Of the share's sequences; those of all shares add up, modulo 2**64, to that of the whole."""


class Feed:
    """Hands out global batches by position, each prepared while the one before is used. A context manager."""

    def __init__(self, batches: Batches, objective: Objective, *, pin: bool, rank: int = 0, count: int = 1) -> None:
        self._batches = batches
        self._objective = objective
        self._pin = pin
        self._rank, self._count = rank, count
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tinylm-feed")
        self._next: tuple[int, int, Future[GlobalBatch]] | None = None

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._worker.shutdown(cancel_futures=True)

    def take(self, start: int, count: int) -> GlobalBatch:
        """Sequences [start, start + count); those after them are prepared meanwhile."""
        if self._next is not None and self._next[:2] == (start, count):
            batch = self._next[2].result()
        else:
            batch = self._prepare(start, count)
        self._next = (start + count, count, self._worker.submit(self._prepare, start + count, count))
        return batch

    def _prepare(self, start: int, count: int) -> GlobalBatch:
        sequences = self._batches.sequences(start, count)
        example = self._objective.example(torch.from_numpy(sequences))
        targets = int((example.targets >= 0).sum())
        share = slice(self._rank * count // self._count, (self._rank + 1) * count // self._count)
        inputs, wanted = example.inputs[share], example.targets[share]
        if self._pin:
            inputs, wanted = inputs.pin_memory(), wanted.pin_memory()
        return GlobalBatch(Example(inputs, wanted), targets, fingerprint(np.ascontiguousarray(sequences[share])))

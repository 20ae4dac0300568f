"""Batches that are ready before the step asks: cut, turned into examples and pinned by a thread while the device computes."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import torch

from tinylm.data.batches import Batches
from tinylm.model.objective import Example, Objective


@dataclass(frozen=True)
class GlobalBatch:
    """An example in the host's memory, and how many of its targets count."""

    example: Example
    targets: int


class Feed:
    """Hands out global batches by position, each prepared while the one before is used. A context manager."""

    def __init__(self, batches: Batches, objective: Objective, *, pin: bool) -> None:
        self._batches = batches
        self._objective = objective
        self._pin = pin
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
        example = self._objective.example(torch.from_numpy(self._batches.sequences(start, count)))
        targets = int((example.targets >= 0).sum())
        if self._pin:
            example = Example(example.inputs.pin_memory(), example.targets.pin_memory())
        return GlobalBatch(example, targets)

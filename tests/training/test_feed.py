"""Prefetched batches are the requested ones, and errors in the background thread are raised to the caller."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import Tensor

from tinylm.data.batches import Batches
from tinylm.model.objective import IGNORE_INDEX, CausalObjective, Example
from tinylm.training.feed import Feed, LocalBatch

TOKENS = np.random.default_rng(0).integers(0, 61, 500).astype(np.uint16)


class _RecordingBatches(Batches):
    """Records which sequences were read, and whether by the main thread."""

    def __init__(self, broken_from: int = 10**9) -> None:
        super().__init__(TOKENS, 8, seed=3)
        self.reads: list[tuple[int, int, bool]] = []
        self.broken_from = broken_from

    def sequences(self, start: int, count: int) -> np.ndarray:
        self.reads.append((start, count, threading.current_thread() is threading.main_thread()))
        if start >= self.broken_from:
            raise OSError(f"sequence {start} cannot be read")
        return super().sequences(start, count)


def _has_sequences(batch: LocalBatch, start: int, count: int) -> bool:
    sequences = torch.from_numpy(Batches(TOKENS, 8, seed=3).sequences(start, count))
    return torch.equal(batch.example.inputs, sequences[:, :-1]) and torch.equal(batch.example.targets, sequences[:, 1:])


def _workers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("tinylm-feed")]


ORDERS = [
    [(0, 4), (4, 4), (8, 4)],
    [(8, 4), (8, 4), (0, 4), (60, 4)],
    [(0, 4), (4, 2), (6, 1), (7, 9)],
    [(12, 4), (4, 4)],
]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_a_batch_depends_only_on_its_position_and_not_on_the_order_of_calls(order: list[tuple[int, int]]) -> None:
    with Feed(_RecordingBatches(), CausalObjective(), pin_memory=False) as feed:
        for start, count in order:
            batch = feed.batch(start, count)
            assert _has_sequences(batch, start, count)
            assert batch.global_target_count == count * 8


def test_the_next_batch_is_read_once_and_by_another_thread() -> None:
    batches = _RecordingBatches()
    with Feed(batches, CausalObjective(), pin_memory=False) as feed:
        for start in (0, 4, 8):
            feed.batch(start, 4)
    assert batches.reads[:3] == [(0, 4, True), (4, 4, False), (8, 4, False)]
    assert batches.reads[3:] in ([], [(12, 4, False)])


def test_ignored_targets_are_not_counted() -> None:
    class PartlyIgnored(CausalObjective):
        def example(self, tokens: Tensor) -> Example:
            example = super().example(tokens)
            example.targets[1, 2:] = IGNORE_INDEX
            return example

    with Feed(_RecordingBatches(), PartlyIgnored(), pin_memory=False) as feed:
        assert [feed.batch(start, 4).global_target_count for start in (0, 4, 8)] == [3 * 8 + 2] * 3


def test_an_error_in_the_thread_is_raised_when_the_batch_is_requested() -> None:
    with Feed(_RecordingBatches(broken_from=8), CausalObjective(), pin_memory=False) as feed:
        feed.batch(0, 4)
        feed.batch(4, 4)
        with pytest.raises(OSError, match="sequence 8 cannot be read"):
            feed.batch(8, 4)
        assert _has_sequences(feed.batch(0, 4), 0, 4)


def test_an_error_in_a_batch_that_is_not_requested_is_ignored() -> None:
    with Feed(_RecordingBatches(broken_from=4), CausalObjective(), pin_memory=False) as feed:
        feed.batch(0, 4)
    assert not _workers()


@pytest.mark.parametrize("failing", [False, True])
def test_the_thread_ends_with_the_context(failing: bool) -> None:
    try:
        with Feed(_RecordingBatches(), CausalObjective(), pin_memory=False) as feed:
            feed.batch(0, 4)
            assert _workers()
            if failing:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert failing
    assert not _workers()

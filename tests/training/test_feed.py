"""Prefetching returns the requested batches, and errors in the background thread are raised in the caller."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from tinylm.data.batch import IGNORE_INDEX, Batch
from tinylm.data.datasets import Examples, TokenStream
from tinylm.training.feed import Feed, LocalBatch
from tinylm.training.objectives import CausalLM

TOKENS = np.random.default_rng(0).integers(0, 61, 500).astype(np.uint16)


class _RecordingDataset(TokenStream):
    """A dataset that records which examples are read, and whether the main thread reads them."""

    def __init__(self, broken_from: int = 10**9) -> None:
        super().__init__(TOKENS, 8, seed=3)
        self.reads: list[tuple[int, int, bool]] = []
        self.broken_from = broken_from

    def examples(self, start: int, count: int) -> Examples:
        self.reads.append((start, count, threading.current_thread() is threading.main_thread()))
        if start >= self.broken_from:
            raise OSError(f"sequence {start} cannot be read")
        return super().examples(start, count)


def _has_sequences(batch: LocalBatch, start: int, count: int) -> bool:
    sequences = torch.from_numpy(TokenStream(TOKENS, 8, seed=3).examples(start, count)["tokens"])
    return torch.equal(batch.share.inputs, sequences[:, :-1]) and torch.equal(batch.share.targets, sequences[:, 1:])


def _workers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("tinylm-feed")]


ORDERS = [
    [(0, 4), (4, 4), (8, 4)],
    [(8, 4), (8, 4), (0, 4), (60, 4)],
    [(0, 4), (4, 2), (6, 1), (7, 9)],
    [(12, 4), (4, 4)],
]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_a_batch_depends_only_on_its_position(order: list[tuple[int, int]]) -> None:
    with Feed(_RecordingDataset(), CausalLM(), seed=0) as feed:
        for start, count in order:
            batch = feed.batch(start, count)
            assert _has_sequences(batch, start, count)
            assert batch.global_target_count == count * 8


def test_the_next_batch_is_read_once_in_another_thread() -> None:
    dataset = _RecordingDataset()
    with Feed(dataset, CausalLM(), seed=0) as feed:
        for start in (0, 4, 8):
            feed.batch(start, 4)
    assert dataset.reads[:3] == [(0, 4, True), (4, 4, False), (8, 4, False)]
    assert dataset.reads[3:] in ([], [(12, 4, False)])


def test_ignored_targets_are_not_counted() -> None:
    class PartlyIgnored(CausalLM):
        def batch(self, examples: Examples, seed: int, start: int) -> Batch:
            batch = super().batch(examples, seed, start)
            batch.targets[1, 2:] = IGNORE_INDEX
            return batch

    with Feed(_RecordingDataset(), PartlyIgnored(), seed=0) as feed:
        assert [feed.batch(start, 4).global_target_count for start in (0, 4, 8)] == [3 * 8 + 2] * 3


def test_padding_is_not_counted_as_tokens() -> None:
    class Padded(CausalLM):
        def batch(self, examples: Examples, seed: int, start: int) -> Batch:
            batch = super().batch(examples, seed, start)
            segments = torch.zeros_like(batch.inputs)
            segments[1, 5:] = -1
            return replace(batch, segments=segments)

    for rank in (0, 1):
        with Feed(_RecordingDataset(), Padded(), seed=0, rank=rank, world_size=2) as feed:
            batch = feed.batch(0, 4)
            assert (len(batch.share), batch.global_token_count) == (2, 4 * 8 - 3)


def test_the_objective_receives_the_seed_and_position() -> None:
    received: list[tuple[int, int]] = []

    class Recording(CausalLM):
        def batch(self, examples: Examples, seed: int, start: int) -> Batch:
            received.append((seed, start))
            return super().batch(examples, seed, start)

    with Feed(_RecordingDataset(), Recording(), seed=7) as feed:
        feed.batch(12, 4)
    assert received[0] == (7, 12)


def test_an_error_in_the_background_thread_is_raised_when_its_batch_is_requested() -> None:
    with Feed(_RecordingDataset(broken_from=8), CausalLM(), seed=0) as feed:
        feed.batch(0, 4)
        feed.batch(4, 4)
        with pytest.raises(OSError, match="sequence 8 cannot be read"):
            feed.batch(8, 4)
        assert _has_sequences(feed.batch(0, 4), 0, 4)


def test_an_error_in_a_batch_that_is_not_requested_is_ignored() -> None:
    with Feed(_RecordingDataset(broken_from=4), CausalLM(), seed=0) as feed:
        feed.batch(0, 4)
    assert not _workers()


@pytest.mark.parametrize("failing", [False, True])
def test_the_background_thread_stops_when_the_context_exits(failing: bool) -> None:
    try:
        with Feed(_RecordingDataset(), CausalLM(), seed=0) as feed:
            feed.batch(0, 4)
            assert _workers()
            if failing:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert failing
    assert not _workers()

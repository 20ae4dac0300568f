"""Prepared batches are those that were asked for, and a thread's troubles reach whoever asks."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import Tensor

from tinylm.data.batches import Batches
from tinylm.model.objective import IGNORED, CausalObjective, Example
from tinylm.training.feed import Feed, GlobalBatch

TOKENS = np.random.default_rng(0).integers(0, 61, 500).astype(np.uint16)


class _Noted(Batches):
    """Notes which sequences were cut, and whether by the thread that asks."""

    def __init__(self, broken_from: int = 10**9) -> None:
        super().__init__(TOKENS, 8, seed=3)
        self.cut: list[tuple[int, int, bool]] = []
        self.broken_from = broken_from

    def sequences(self, start: int, count: int) -> np.ndarray:
        self.cut.append((start, count, threading.current_thread() is threading.main_thread()))
        if start >= self.broken_from:
            raise OSError(f"sequence {start} cannot be read")
        return super().sequences(start, count)


def _is_cut_there(batch: GlobalBatch, start: int, count: int) -> bool:
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
def test_batches_are_those_of_their_position_in_whatever_order_they_are_asked_for(order: list[tuple[int, int]]) -> None:
    with Feed(_Noted(), CausalObjective(), pin=False) as feed:
        for start, count in order:
            batch = feed.take(start, count)
            assert _is_cut_there(batch, start, count)
            assert batch.targets == count * 8


def test_the_batch_after_the_last_one_is_cut_by_another_thread_and_once() -> None:
    batches = _Noted()
    with Feed(batches, CausalObjective(), pin=False) as feed:
        for start in (0, 4, 8):
            feed.take(start, 4)
    assert batches.cut[:3] == [(0, 4, True), (4, 4, False), (8, 4, False)]
    assert batches.cut[3:] in ([], [(12, 4, False)])


def test_only_targets_that_count_are_counted() -> None:
    class Some(CausalObjective):
        def example(self, tokens: Tensor) -> Example:
            example = super().example(tokens)
            example.targets[1, 2:] = IGNORED
            return example

    with Feed(_Noted(), Some(), pin=False) as feed:
        assert [feed.take(start, 4).targets for start in (0, 4, 8)] == [3 * 8 + 2] * 3


def test_what_goes_wrong_in_the_thread_is_raised_where_the_batch_is_asked_for() -> None:
    with Feed(_Noted(broken_from=8), CausalObjective(), pin=False) as feed:
        feed.take(0, 4)
        feed.take(4, 4)
        with pytest.raises(OSError, match="sequence 8 cannot be read"):
            feed.take(8, 4)
        assert _is_cut_there(feed.take(0, 4), 0, 4)


def test_a_batch_that_nobody_asks_for_may_fail_unheard() -> None:
    with Feed(_Noted(broken_from=4), CausalObjective(), pin=False) as feed:
        feed.take(0, 4)
    assert not _workers()


@pytest.mark.parametrize("failing", [False, True])
def test_the_thread_ends_with_the_training(failing: bool) -> None:
    try:
        with Feed(_Noted(), CausalObjective(), pin=False) as feed:
            feed.take(0, 4)
            assert _workers()
            if failing:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert failing
    assert not _workers()

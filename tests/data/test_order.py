"""Test that permutations map a range onto itself in O(1) memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from tinylm.data.order import permute

KEYS = [0, 1, 2**63, 2**64 - 1, 12345678901234567890]


@pytest.mark.parametrize("key", KEYS)
def test_permute_maps_a_range_onto_itself(key: int) -> None:
    for size in [*range(1, 130), 255, 256, 257, 1000, 4095, 4096, 4097, 65_536, 100_003]:
        images = permute(np.arange(size), size, key)
        assert np.array_equal(np.sort(images), np.arange(size)), size


def test_a_permutation_of_a_huge_range_stays_in_range_and_needs_almost_no_memory() -> None:
    positions = np.array([0, 1, 2, 10**12, 2**40 - 1])
    tracemalloc.start()
    images = permute(positions, 2**40, 5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(images.tolist())) == 5
    assert images.min() >= 0
    assert images.max() < 2**40
    assert peak < 100_000  # bytes
    assert np.array_equal(images[[3, 1]], permute(positions[[3, 1]], 2**40, 5))


def test_permuted_positions_are_uncorrelated_and_uniform() -> None:
    size = 20_000
    images = permute(np.arange(size), size, 9).astype(float)
    assert abs(np.corrcoef(np.arange(size), images)[0, 1]) < 0.05
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.05
    assert (np.diff(images) == 1).sum() < 10
    histogram = np.histogram(images[:2000], bins=10, range=(0, size))[0]
    assert histogram.min() > 120, "the first tenth must be drawn from the whole range"


def test_different_keys_produce_different_permutations() -> None:
    orders = {tuple(permute(np.arange(50), 50, key).tolist()) for key in range(200)}
    assert len(orders) == 200

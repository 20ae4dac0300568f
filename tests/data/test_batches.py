"""The data order: it depends only on the seed and the position, and every epoch covers the whole text."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from tinylm.data.batches import Batches, permute
from tinylm.errors import InputError

KEYS = [0, 1, 2**63, 2**64 - 1, 12345678901234567890]


def text_of(length: int) -> np.ndarray:
    """Tokens that equal their index."""
    return np.arange(length, dtype=np.uint32)


@pytest.mark.parametrize("key", KEYS)
def test_permute_maps_a_range_onto_itself(key: int) -> None:
    for size in [*range(1, 130), 255, 256, 257, 1000, 4095, 4096, 4097, 65_536, 100_003]:
        images = permute(np.arange(size), size, key)
        assert np.array_equal(np.sort(images), np.arange(size)), size


def test_permuting_a_huge_range_stays_in_range_and_allocates_almost_nothing() -> None:
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


def test_different_keys_give_different_permutations() -> None:
    orders = {tuple(permute(np.arange(50), 50, key).tolist()) for key in range(200)}
    assert len(orders) == 200


@pytest.mark.parametrize(
    ("length", "context"), [(2, 1), (33, 32), (1000, 32), (1025, 32), (1056, 32), (1057, 32), (100, 99), (50, 7)]
)
def test_the_first_epoch_contains_each_target_once(length: int, context: int) -> None:
    batches = Batches(text_of(length), context, seed=3)
    assert batches.windows_per_epoch == (length - 1) // context
    sequences = batches.sequences(0, batches.windows_per_epoch)
    assert sequences.shape == (batches.windows_per_epoch, context + 1)
    assert np.array_equal(np.diff(sequences, axis=1), np.ones((batches.windows_per_epoch, context))), "consecutive tokens"
    targets = np.sort(sequences[:, 1:].ravel())
    assert np.array_equal(targets, np.arange(1, batches.windows_per_epoch * context + 1))
    assert length - 1 - len(targets) < context, "only the incomplete last window may be dropped"


def test_every_epoch_has_its_own_offset_and_stays_inside_the_text() -> None:
    batches = Batches(text_of(1000), 32, seed=3)
    offsets = set()
    for epoch in range(20):
        starts = np.sort(
            batches.window_starts(np.arange(epoch * batches.windows_per_epoch, (epoch + 1) * batches.windows_per_epoch))
        )
        assert starts.min() >= 0
        assert starts.max() <= 1000 - 33
        assert np.all(np.diff(starts)[:-1] == 32), "only the last window may overlap another"
        offsets.add(int(starts[0]))
    assert len(offsets) > 10


def test_sequences_do_not_depend_on_the_batch_size() -> None:
    batches = Batches(text_of(500), 16, seed=8)
    expected = batches.sequences(0, 200)  # more than six epochs
    assert expected.dtype == np.int64
    for sizes in ([200], [1] * 200, [64, 64, 64, 8], [7] * 28 + [4]):
        starts = np.cumsum([0, *sizes[:-1]])
        sequences = [batches.sequences(int(start), size) for start, size in zip(starts, sizes, strict=True)]
        assert np.array_equal(np.concatenate(sequences), expected)
    resumed = Batches(text_of(500), 16, seed=8)
    assert np.array_equal(resumed.sequences(137, 20), expected[137:157])


def test_each_seed_and_each_epoch_has_its_own_order() -> None:
    orders = [tuple(Batches(text_of(2000), 16, seed).window_starts(np.arange(100)).tolist()) for seed in (0, 1, 2, 3, 2**63 - 1)]
    assert len(set(orders)) == 5
    batches = Batches(text_of(2000), 16, seed=1)
    epochs = [batches.window_starts(np.arange(124) + 124 * epoch) // 16 for epoch in range(5)]
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 5


def test_a_text_of_one_sequence_works_and_a_shorter_one_raises() -> None:
    batches = Batches(text_of(33), 32, seed=1)
    for position in (0, 1, 1000):
        assert batches.sequences(position, 1).tolist() == [list(range(33))]
    with pytest.raises(
        InputError, match=r"has 32 tokens, fewer than context_length 32 \+ 1 \(use a shorter context or more text\)"
    ):
        Batches(text_of(32), 32, seed=1)


def test_memory_mapped_tokens_give_the_same_sequences(tmp_path: object) -> None:
    path = f"{tmp_path}/tokens.npy"
    np.save(path, text_of(300).astype(np.uint16))
    mapped = Batches(np.load(path, mmap_mode="r"), 16, seed=2)
    assert np.array_equal(mapped.sequences(3, 40), Batches(text_of(300), 16, seed=2).sequences(3, 40))

"""Which tokens a step sees is a function of the seed and the position alone, and an epoch misses nothing."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from tinylm.data.batches import Batches, permuted
from tinylm.errors import InputError

KEYS = [0, 1, 2**63, 2**64 - 1, 12345678901234567890]


def text_of(length: int) -> np.ndarray:
    """Tokens that tell where they stand."""
    return np.arange(length, dtype=np.uint32)


@pytest.mark.parametrize("key", KEYS)
def test_the_permutation_meets_each_number_once(key: int) -> None:
    for size in [*range(1, 130), 255, 256, 257, 1000, 4095, 4096, 4097, 65_536, 100_003]:
        images = permuted(np.arange(size), size, key)
        assert np.array_equal(np.sort(images), np.arange(size)), size


def test_the_permutation_of_a_huge_range_stays_inside_it_and_needs_no_memory() -> None:
    positions = np.array([0, 1, 2, 10**12, 2**40 - 1])
    tracemalloc.start()
    images = permuted(positions, 2**40, 5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(images.tolist())) == 5
    assert images.min() >= 0
    assert images.max() < 2**40
    assert peak < 100_000, "bytes"
    assert np.array_equal(images[[3, 1]], permuted(positions[[3, 1]], 2**40, 5))


def test_the_permutation_looks_shuffled() -> None:
    size = 20_000
    images = permuted(np.arange(size), size, 9).astype(float)
    assert abs(np.corrcoef(np.arange(size), images)[0, 1]) < 0.05
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.05
    assert (np.diff(images) == 1).sum() < 10
    moved = images[:2000]
    histogram = np.histogram(moved, bins=10, range=(0, size))[0]
    assert histogram.min() > 120, "the first tenth comes from everywhere"


def test_keys_permute_differently() -> None:
    orders = {tuple(permuted(np.arange(50), 50, key).tolist()) for key in range(200)}
    assert len(orders) == 200


@pytest.mark.parametrize(
    ("length", "context"), [(2, 1), (33, 32), (1000, 32), (1025, 32), (1056, 32), (1057, 32), (100, 99), (50, 7)]
)
def test_the_first_epoch_covers_each_target_once(length: int, context: int) -> None:
    batches = Batches(text_of(length), context, seed=3)
    assert batches.windows == (length - 1) // context
    sequences = batches.sequences(0, batches.windows)
    assert sequences.shape == (batches.windows, context + 1)
    assert np.array_equal(np.diff(sequences, axis=1), np.ones((batches.windows, context))), "consecutive tokens"
    targets = np.sort(sequences[:, 1:].ravel())
    assert np.array_equal(targets, np.arange(1, batches.windows * context + 1))
    assert length - 1 - len(targets) < context, "only what fills no window is left out"


def test_every_epoch_visits_windows_inside_the_text_at_an_offset_of_its_own() -> None:
    batches = Batches(text_of(1000), 32, seed=3)
    offsets = set()
    for epoch in range(20):
        starts = np.sort(batches.starts(np.arange(epoch * batches.windows, (epoch + 1) * batches.windows)))
        assert starts.min() >= 0
        assert starts.max() <= 1000 - 33
        assert np.all(np.diff(starts)[:-1] == 32), "the windows of an epoch do not overlap, but for the last"
        offsets.add(int(starts[0]))
    assert len(offsets) > 10


def test_any_way_of_asking_gives_the_same_sequences() -> None:
    batches = Batches(text_of(500), 16, seed=8)
    whole = batches.sequences(0, 200)  # more than six epochs
    assert whole.dtype == np.int64
    for sizes in ([200], [1] * 200, [64, 64, 64, 8], [7] * 28 + [4]):
        cuts = np.cumsum([0, *sizes[:-1]])
        assert np.array_equal(whole, np.concatenate([batches.sequences(int(a), n) for a, n in zip(cuts, sizes, strict=True)]))
    again = Batches(text_of(500), 16, seed=8)
    assert np.array_equal(again.sequences(137, 20), whole[137:157])


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    orders = [tuple(Batches(text_of(2000), 16, seed).starts(np.arange(100)).tolist()) for seed in (0, 1, 2, 3, 2**63 - 1)]
    assert len(set(orders)) == 5
    batches = Batches(text_of(2000), 16, seed=1)
    epochs = [batches.starts(np.arange(124) + 124 * epoch) // 16 for epoch in range(5)]
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 5


def test_a_text_of_one_sequence_works_and_a_shorter_one_is_refused() -> None:
    batches = Batches(text_of(33), 32, seed=1)
    for position in (0, 1, 1000):
        assert batches.sequences(position, 1).tolist() == [list(range(33))]
    with pytest.raises(
        InputError, match=r"has 32 tokens, fewer than context_length 32 \+ 1 \(use a shorter context or more text\)"
    ):
        Batches(text_of(32), 32, seed=1)


def test_tokens_are_read_from_a_file_as_from_memory(tmp_path: object) -> None:
    path = f"{tmp_path}/tokens.npy"
    np.save(path, text_of(300).astype(np.uint16))
    mapped = Batches(np.load(path, mmap_mode="r"), 16, seed=2)
    assert np.array_equal(mapped.sequences(3, 40), Batches(text_of(300), 16, seed=2).sequences(3, 40))

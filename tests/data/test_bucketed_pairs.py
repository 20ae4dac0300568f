"""Test that sentence pairs are batched by length, and that batches depend only on the seed and the position."""

from __future__ import annotations

import numpy as np
import pytest

from tinylm.data.bucketed_pairs import BucketedPairs
from tinylm.errors import InputError

SIZE = 8


def _dataset(
    count: int = 1000, seed: int = 1, context_length: int = 40, size: int = SIZE, batch_tokens: int | None = None
) -> BucketedPairs:
    generator = np.random.default_rng(0)
    sources = [np.full(generator.integers(2, 40), index) for index in range(count)]
    targets = [np.full(max(2, len(source) + generator.integers(-2, 3)), index) for index, source in enumerate(sources)]
    return BucketedPairs(sources, targets, context_length, size, seed, batch_tokens)


def test_every_pair_occurs_at_most_once_in_an_epoch() -> None:
    dataset = _dataset(1003)
    assert dataset.examples_per_epoch == 992 or dataset.examples_per_epoch % SIZE == 0
    first = dataset.pair_indexes(0, dataset.examples_per_epoch)
    second = dataset.pair_indexes(dataset.examples_per_epoch, dataset.examples_per_epoch)
    assert len(set(first.tolist())) == len(first) == dataset.examples_per_epoch
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("batch_tokens", [None, 300])
def test_examples_depend_only_on_seed_and_position(batch_tokens: int | None) -> None:
    dataset, again = _dataset(batch_tokens=batch_tokens), _dataset(batch_tokens=batch_tokens)
    end = dataset.examples_per_epoch
    for start in (end - SIZE, 3 * SIZE, 2 * end, 0):
        for name, array in dataset.examples(start, SIZE).items():
            assert np.array_equal(array, again.examples(start, SIZE)[name])
    assert not np.array_equal(dataset.pair_indexes(0, 64), _dataset(seed=2).pair_indexes(0, 64))


def test_the_source_and_the_target_of_each_row_form_a_pair() -> None:
    examples = _dataset().examples(5 * SIZE, SIZE)
    assert (examples["source"][:, 0] == examples["tokens"][:, 0]).all()


def test_padding_is_a_small_fraction_of_the_tokens() -> None:
    dataset = _dataset()
    batches = [dataset.examples(start, SIZE) for start in range(0, 800, SIZE)]
    padding = sum(int((batch[name] < 0).sum()) for batch in batches for name in ("source", "tokens"))
    total = sum(batch[name].size for batch in batches for name in ("source", "tokens"))
    assert padding / total < 0.12


def test_pairs_longer_than_the_context_are_skipped() -> None:
    dataset = _dataset(context_length=10)
    assert dataset.examples(0, 400)["source"].shape[1] <= 10
    with pytest.raises(InputError, match="all pairs are longer than 1 tokens"):
        _dataset(context_length=1)


def test_batches_by_tokens_contain_every_pair_once_and_similar_numbers_of_tokens() -> None:
    dataset = _dataset(size=64, batch_tokens=400)
    epoch = dataset.pair_indexes(0, dataset.examples_per_epoch)
    used_pairs = epoch[epoch >= 0].tolist()
    assert sorted(used_pairs) == list(range(len(used_pairs)))
    assert len(used_pairs) > 990, "only pairs that are longer than the context are missing"
    assert not np.array_equal(epoch, dataset.pair_indexes(dataset.examples_per_epoch, dataset.examples_per_epoch))
    tokens, pairs = [], []
    for start in range(0, dataset.examples_per_epoch, 64):
        batch = dataset.examples(start, 64)
        used = batch["tokens"][:, 0] >= 0
        assert (batch["source"][:, 0] == batch["tokens"][:, 0]).all()
        assert abs(int(used[:16].sum()) - int(used[48:].sum())) <= 1, "micro-batches and processes have equal shares"
        tokens.append(int(used.sum()) * (batch["tokens"].shape[1] + batch["source"].shape[1]))
        pairs.append(int(used.sum()))
    assert max(tokens) <= 400
    assert float(np.mean(tokens)) > 300
    assert max(pairs) > 4 * min(pairs)
    real = sum(int((dataset.examples(0, dataset.examples_per_epoch)[name] >= 0).sum()) for name in ("source", "tokens"))
    assert dataset.tokens_per_example * dataset.examples_per_epoch == pytest.approx(real)
    assert real / sum(tokens) > 0.9

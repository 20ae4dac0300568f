"""Test that examples depend only on the seed and the position, and that every epoch covers the whole text."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from tinylm.data.datasets import Dataset, ShuffledDocuments, TokenStream, build
from tinylm.data.shards import Counts, Shard
from tinylm.errors import InputError
from tinylm.recipe.recurrent import GruSection
from tinylm.recipe.schema import DataSection


def text_of(length: int) -> np.ndarray:
    """Return `length` tokens, each equal to its index."""
    return np.arange(length, dtype=np.uint32)


@pytest.mark.parametrize(
    ("length", "context"), [(2, 1), (33, 32), (1000, 32), (1025, 32), (1056, 32), (1057, 32), (100, 99), (50, 7)]
)
def test_the_first_epoch_contains_each_target_once(length: int, context: int) -> None:
    dataset = TokenStream(text_of(length), context, seed=3)
    assert dataset.examples_per_epoch == (length - 1) // context
    sequences = dataset.examples(0, dataset.examples_per_epoch)["tokens"]
    assert sequences.shape == (dataset.examples_per_epoch, context + 1)
    assert np.array_equal(np.diff(sequences, axis=1), np.ones((dataset.examples_per_epoch, context))), "consecutive tokens"
    targets = np.sort(sequences[:, 1:].ravel())
    assert np.array_equal(targets, np.arange(1, dataset.examples_per_epoch * context + 1))
    assert length - 1 - len(targets) < context, "only the incomplete last window may be dropped"


def test_every_epoch_has_its_own_offset_and_stays_inside_the_text() -> None:
    dataset = TokenStream(text_of(1000), 32, seed=3)
    offsets = set()
    for epoch in range(20):
        starts = np.sort(
            dataset.window_starts(np.arange(epoch * dataset.examples_per_epoch, (epoch + 1) * dataset.examples_per_epoch))
        )
        assert starts.min() >= 0
        assert starts.max() <= 1000 - 33
        assert np.all(np.diff(starts)[:-1] == 32), "only the last window may overlap another"
        offsets.add(int(starts[0]))
    assert len(offsets) > 10


def test_sequences_do_not_depend_on_the_batch_size() -> None:
    dataset = TokenStream(text_of(500), 16, seed=8)
    expected = dataset.examples(0, 200)["tokens"]  # more than six epochs
    assert expected.dtype == np.int64
    for sizes in ([200], [1] * 200, [64, 64, 64, 8], [7] * 28 + [4]):
        starts = np.cumsum([0, *sizes[:-1]])
        sequences = [dataset.examples(int(start), size)["tokens"] for start, size in zip(starts, sizes, strict=True)]
        assert np.array_equal(np.concatenate(sequences), expected)
    resumed = TokenStream(text_of(500), 16, seed=8)
    assert np.array_equal(resumed.examples(137, 20)["tokens"], expected[137:157])


def test_each_seed_and_each_epoch_has_its_own_order() -> None:
    orders = [
        tuple(TokenStream(text_of(2000), 16, seed).window_starts(np.arange(100)).tolist()) for seed in (0, 1, 2, 3, 2**63 - 1)
    ]
    assert len(set(orders)) == 5
    dataset = TokenStream(text_of(2000), 16, seed=1)
    epochs = [dataset.window_starts(np.arange(124) + 124 * epoch) // 16 for epoch in range(5)]
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 5


def test_a_text_with_exactly_one_sequence_is_accepted_and_a_shorter_text_is_rejected() -> None:
    dataset = TokenStream(text_of(33), 32, seed=1)
    for position in (0, 1, 1000):
        assert dataset.examples(position, 1)["tokens"].tolist() == [list(range(33))]
    with pytest.raises(
        InputError, match=r"has 32 tokens, fewer than context_length 32 \+ 1 \(use a shorter context or more text\)"
    ):
        TokenStream(text_of(32), 32, seed=1)


def test_memory_mapped_tokens_return_the_same_sequences(tmp_path: object) -> None:
    path = f"{tmp_path}/tokens.npy"
    np.save(path, text_of(300).astype(np.uint16))
    mapped = TokenStream(np.load(path, mmap_mode="r"), 16, seed=2)
    assert np.array_equal(mapped.examples(3, 40)["tokens"], TokenStream(text_of(300), 16, seed=2).examples(3, 40)["tokens"])


END_OF_TEXT = 0


def shard_of(lengths: list[int]) -> Shard:
    """Return a shard of documents with these lengths. All tokens are different."""
    numbers = iter(range(1, 10_000))
    tokens = [END_OF_TEXT]
    for length in lengths:
        tokens += [next(numbers) for _ in range(length)] + [END_OF_TEXT]
    counts = Counts(len(lengths), sum(lengths), sum(lengths), sum(lengths), 0)
    return Shard(np.array(tokens, dtype=np.uint16), counts, END_OF_TEXT)


LENGTHS = [5, 1, 0, 40, 7, 7, 0, 0, 16, 3, 100, 2, 9, 12, 31]


def _epoch_text(dataset: ShuffledDocuments, epoch: int) -> np.ndarray:
    """Return the tokens that an epoch covers, in text order."""
    positions = np.arange(epoch * dataset.examples_per_epoch, (epoch + 1) * dataset.examples_per_epoch)
    order = np.argsort(dataset.window_starts(positions))
    windows = dataset.examples(int(positions[0]), len(positions))["tokens"][order]
    assert np.array_equal(windows[:-2, -1], windows[1:-1, 0]), "adjacent windows share a token"
    return np.concatenate([windows[0, :1], windows[:, 1:].ravel()])


@pytest.mark.parametrize("context", [1, 4, 9, 30])
def test_shuffled_documents_are_complete_and_occur_once(context: int) -> None:
    shard = shard_of(LENGTHS)
    text = _epoch_text(ShuffledDocuments(shard, context, seed=3), 0).tolist()
    assert len(shard) - len(text) < context, "only the incomplete last window is dropped"
    assert text[0] == END_OF_TEXT
    ends = [index for index, token in enumerate(text) if token == END_OF_TEXT]
    read = [tuple(text[start + 1 : end]) for start, end in pairwise(ends)]
    documents = [tuple(shard.tokens[start:end].tolist()) for start, end in shard.documents()]
    missing = Counter(documents) - Counter(read)
    assert not Counter(read) - Counter(documents), "every document is complete and occurs once"
    assert sum(len(document) + 1 for document in missing.elements()) < context + 1 + max(LENGTHS), "only the last one is truncated"
    assert read != documents[: len(read)]


def test_every_epoch_and_every_seed_has_its_own_document_order() -> None:
    shard = shard_of(LENGTHS)
    dataset = ShuffledDocuments(shard, 4, seed=3)
    firsts = [tuple(_epoch_text(dataset, 0).tolist()), tuple(_epoch_text(ShuffledDocuments(shard, 4, seed=4), 0).tolist())]
    followed_by: set[int] = set()
    for epoch in range(12):
        tokens = dataset.examples(epoch * dataset.examples_per_epoch, dataset.examples_per_epoch)["tokens"]
        followed_by |= {int(row[i + 2]) for row in tokens for i in range(3) if row[i] == 5 and row[i + 1] == END_OF_TEXT}
    assert len(set(firsts)) == 2
    assert len(followed_by) > 3, "different documents must follow the first one"


def test_shuffled_documents_depend_only_on_the_seed_and_the_position() -> None:
    shard = shard_of(LENGTHS)
    expected = ShuffledDocuments(shard, 8, seed=8).examples(0, 120)["tokens"]  # more than three epochs
    dataset = ShuffledDocuments(shard, 8, seed=8)
    for start, count in [(100, 20), (0, 7), (60, 40), (7, 1), (20, 60)]:
        assert np.array_equal(dataset.examples(start, count)["tokens"], expected[start : start + count])


@pytest.mark.parametrize("kind", [TokenStream, ShuffledDocuments])
def test_segments_number_the_documents_in_a_window(kind: type[TokenStream]) -> None:
    shard = shard_of(LENGTHS)
    text = shard.tokens if kind is TokenStream else shard
    plain, dataset = kind(text, 16, seed=2), kind(text, 16, seed=2, separator=END_OF_TEXT)  # type: ignore[arg-type]
    examples = dataset.examples(3, 9)
    assert np.array_equal(examples["tokens"], plain.examples(3, 9)["tokens"])
    for tokens, segments in zip(examples["tokens"].tolist(), examples["segments"].tolist(), strict=True):
        number = 0
        for token, segment in zip(tokens, segments, strict=True):
            number += token == END_OF_TEXT
            assert segment == number
    assert "segments" not in plain.examples(0, 1)


def test_the_recipe_selects_the_dataset() -> None:
    shard = shard_of(LENGTHS)

    def built(**keys: object) -> Dataset:
        return build(DataSection.model_validate({"train": "my.txt", **keys}), shard, GruSection(context_length=8, burn_in=0), 5)

    assert list(built().examples(0, 2)) == ["tokens"]
    assert list(built(document_mask=True).examples(0, 2)) == ["tokens", "segments"]
    assert np.array_equal(built().examples(0, 30)["tokens"], TokenStream(shard.tokens, 8, 5).examples(0, 30)["tokens"])
    shuffled = built(shuffle="documents").examples(0, 30)["tokens"]
    assert np.array_equal(shuffled, ShuffledDocuments(shard, 8, 5).examples(0, 30)["tokens"])
    assert not np.array_equal(shuffled, built().examples(0, 30)["tokens"])
    assert built().tokens_per_example == 8
    assert built().examples_per_epoch == built(shuffle="documents").examples_per_epoch == (len(shard) - 1) // 8

"""Tokens on disk are the tokens that were written, in the smallest type that holds them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tinylm.data import shards
from tinylm.data.shards import Counts, Shard
from tinylm.errors import InputError

DOCUMENTS = [[5, 6, 7], [8], [9, 5, 5, 5, 6], [7, 7]]


def written(
    folder: Path, documents: list[list[int]], *, vocab_size: int = 300, end_of_text: int = 299, unknown: int | None = None
) -> Shard:
    """Each document in two pieces, as long documents come."""
    pieces = [
        (np.array(part, dtype=np.uint32), index == 0)
        for document in documents
        for index, part in enumerate((document[:2], document[2:]))
        if part
    ]
    counts = shards.write(
        folder, "train", pieces, vocab_size=vocab_size, end_of_text=end_of_text, unknown=unknown, sizes=lambda: (44, 33)
    )
    shard = shards.open_shard(folder, "train")
    assert shard.counts == counts
    return shard


def test_a_half_is_its_documents_with_the_end_of_text_around_each(tmp_path: Path) -> None:
    shard = written(tmp_path, DOCUMENTS)
    assert shard.tokens.tolist() == [299, 5, 6, 7, 299, 8, 299, 9, 5, 5, 5, 6, 299, 7, 7, 299]
    assert len(shard) == 16
    assert shard.counts == Counts(documents=4, bytes=44, characters=33, tokens=11, unknown_tokens=0)


def test_the_documents_are_found_again(tmp_path: Path) -> None:
    shard = written(tmp_path, DOCUMENTS)
    assert [shard.tokens[start:end].tolist() for start, end in shard.documents()] == DOCUMENTS


def test_unknown_tokens_are_counted(tmp_path: Path) -> None:
    assert written(tmp_path, DOCUMENTS, unknown=5).counts.unknown_tokens == 4


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(300, np.uint16), (65_536, np.uint16), (65_537, np.uint32), (200_000, np.uint32)]
)
def test_tokens_take_two_bytes_where_the_vocabulary_fits(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    documents = [[vocab_size - 2, 0, 1]]
    shard = written(tmp_path, documents, vocab_size=vocab_size, end_of_text=vocab_size - 1)
    assert shard.tokens.dtype == dtype
    assert shard.tokens.tolist() == [vocab_size - 1, vocab_size - 2, 0, 1, vocab_size - 1]
    assert isinstance(shard.tokens, np.memmap)


def test_numpy_reads_the_file_by_itself_also_when_it_is_long(tmp_path: Path) -> None:
    documents = [[number % 299 for number in range(length)] for length in (200_000, 1, 50_000)]
    shard = written(tmp_path, documents)
    plain = np.load(tmp_path / "train.npy")
    assert plain.shape == (250_001 + 4,)
    assert np.array_equal(plain, shard.tokens)
    assert [plain[start:end].tolist() for start, end in shard.documents()] == documents


@pytest.mark.parametrize("keep", [0, 5, 100, -1, -2])
def test_a_file_cut_short_is_told_and_named(tmp_path: Path, keep: int) -> None:
    written(tmp_path, DOCUMENTS)
    path = tmp_path / "train.npy"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError) as caught:
        shards.open_shard(tmp_path, "train")
    assert str(caught.value).startswith(f"{path}: no readable tokens: ")


@pytest.mark.parametrize("note", ["", "{", "[]", "{}", '{"end_of_text": 1}', '{"end_of_text": "x"}'])
def test_a_damaged_note_is_told(tmp_path: Path, note: str) -> None:
    written(tmp_path, DOCUMENTS)
    (tmp_path / "train.json").write_text(note, encoding="utf-8")
    with pytest.raises(InputError, match="no readable tokens"):
        shards.open_shard(tmp_path, "train")


def test_a_missing_half_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no readable tokens"):
        shards.open_shard(tmp_path, "heldout")


def test_what_was_interrupted_leaves_no_file(tmp_path: Path) -> None:
    def broken():  # type: ignore[no-untyped-def]
        yield np.array([1, 2, 3]), True
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shards.write(tmp_path, "train", broken(), vocab_size=300, end_of_text=299, unknown=None, sizes=lambda: (0, 0))
    assert list(tmp_path.iterdir()) == []

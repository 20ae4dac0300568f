"""Test that shards contain the tokens that were written, in the smallest dtype that fits the vocabulary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tinylm.data import shards
from tinylm.data.shards import Counts, Shard
from tinylm.errors import InputError

DOCUMENTS = [[5, 6, 7], [8], [9, 5, 5, 5, 6], [7, 7]]


def write_and_open(
    folder: Path, documents: list[list[int]], *, vocab_size: int = 300, end_of_text: int = 299, unknown: int | None = None
) -> Shard:
    """Write each document in two pieces, as is done for long documents, and open the shard."""
    pieces = [
        (np.array(part, dtype=np.uint32), index == 0)
        for document in documents
        for index, part in enumerate((document[:2], document[2:]))
        if part
    ]
    counts = shards.write_shard(
        folder, "train", pieces, vocab_size=vocab_size, end_of_text=end_of_text, unknown=unknown, sizes=lambda: (44, 33)
    )
    shard = shards.open_shard(folder, "train")
    assert shard.counts == counts
    return shard


def test_every_document_is_surrounded_by_end_of_text_tokens(tmp_path: Path) -> None:
    shard = write_and_open(tmp_path, DOCUMENTS)
    assert shard.tokens.tolist() == [299, 5, 6, 7, 299, 8, 299, 9, 5, 5, 5, 6, 299, 7, 7, 299]
    assert len(shard) == 16
    assert shard.counts == Counts(documents=4, bytes=44, characters=33, tokens=11, unknown_tokens=0)


def test_documents_returns_the_start_and_end_of_every_document(tmp_path: Path) -> None:
    shard = write_and_open(tmp_path, DOCUMENTS)
    assert [shard.tokens[start:end].tolist() for start, end in shard.documents()] == DOCUMENTS


def test_unknown_tokens_are_counted(tmp_path: Path) -> None:
    assert write_and_open(tmp_path, DOCUMENTS, unknown=5).counts.unknown_tokens == 4


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(300, np.uint16), (65_536, np.uint16), (65_537, np.uint32), (200_000, np.uint32)]
)
def test_tokens_are_uint16_if_the_vocabulary_fits(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    documents = [[vocab_size - 2, 0, 1]]
    shard = write_and_open(tmp_path, documents, vocab_size=vocab_size, end_of_text=vocab_size - 1)
    assert shard.tokens.dtype == dtype
    assert shard.tokens.tolist() == [vocab_size - 1, vocab_size - 2, 0, 1, vocab_size - 1]
    assert isinstance(shard.tokens, np.memmap)


def test_numpy_can_load_the_file(tmp_path: Path) -> None:
    documents = [[number % 299 for number in range(length)] for length in (200_000, 1, 50_000)]
    shard = write_and_open(tmp_path, documents)
    plain = np.load(tmp_path / "train.npy")
    assert plain.shape == (250_001 + 4,)
    assert np.array_equal(plain, shard.tokens)
    assert [plain[start:end].tolist() for start, end in shard.documents()] == documents


@pytest.mark.parametrize("keep", [0, 5, 100, -1, -2])
def test_the_error_for_a_truncated_file_contains_its_path(tmp_path: Path, keep: int) -> None:
    write_and_open(tmp_path, DOCUMENTS)
    path = tmp_path / "train.npy"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError) as caught:
        shards.open_shard(tmp_path, "train")
    assert str(caught.value).startswith(f"{path}: the tokens are missing or damaged: ")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"end_of_text": 1}', '{"end_of_text": "x"}'])
def test_a_damaged_counts_file_is_rejected(tmp_path: Path, content: str) -> None:
    write_and_open(tmp_path, DOCUMENTS)
    (tmp_path / "train.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match="the tokens are missing or damaged"):
        shards.open_shard(tmp_path, "train")


def test_a_missing_shard_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the tokens are missing or damaged"):
        shards.open_shard(tmp_path, "heldout")


def test_an_interrupted_write_leaves_no_file(tmp_path: Path) -> None:
    def broken():  # type: ignore[no-untyped-def]
        yield np.array([1, 2, 3]), True
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shards.write_shard(tmp_path, "train", broken(), vocab_size=300, end_of_text=299, unknown=None, sizes=lambda: (0, 0))
    assert list(tmp_path.iterdir()) == []

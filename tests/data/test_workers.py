"""Test that parallel encoding writes byte-identical tokens with any number of worker processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tinylm.data import workers as parallel
from tinylm.data.prepare import encode_to_shard
from tinylm.errors import WorkError
from tinylm.recipe.schema import BpeTokenizer
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer, training


@pytest.fixture
def pieces(english: str) -> list[Piece]:
    """Documents of different sizes, split into pieces. One document contains the end-of-text token as ordinary text."""
    texts = [english[start : start + size] for start, size in ((0, 9000), (9000, 1), (9001, 40_000), (50_000, 700))]
    texts.append("<|endoftext|> is text here")
    return [Piece(text[start : start + 5000], start == 0) for text in texts for start in range(0, len(text), 5000)]


@pytest.fixture
def tokenizer(pieces: list[Piece]) -> Tokenizer:
    return training.train(BpeTokenizer(kind="bpe", vocab_size=500), pieces, print)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "BATCH_BYTES", 3000)


def encode_with(workers: int, folder: Path, pieces: Iterator[Piece], tokenizer: Tokenizer) -> None:
    encode_pieces = partial(parallel.encode_in_parallel, tokenizer, workers=workers)
    encode_to_shard(folder, "text", pieces, tokenizer, lambda done: None, encode_pieces)


@pytest.mark.usefixtures("small_batches")
def test_any_number_of_workers_writes_the_same_bytes(pieces: list[Piece], tokenizer: Tokenizer, tmp_path: Path) -> None:
    for workers in (1, 3):
        encode_with(workers, tmp_path / str(workers), iter(pieces), tokenizer)
    for name in ("text.npy", "text.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()


def _exit_worker(tokenizer_json: str) -> None:
    os._exit(9)


def test_a_killed_worker_causes_an_error_and_leaves_no_file(
    pieces: list[Piece], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "initialize_worker", _exit_worker)
    with pytest.raises(WorkError, match=r"was killed.*--workers"):
        encode_with(2, tmp_path, iter(pieces), tokenizer)
    assert not list(tmp_path.iterdir())


def test_an_error_while_reading_the_text_is_propagated(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def broken() -> Iterator[Piece]:
        yield Piece("some text", True)
        raise OSError("the disk was removed")

    with pytest.raises(OSError, match="the disk was removed"):
        encode_with(2, tmp_path, broken(), tokenizer)

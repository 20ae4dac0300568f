"""However many processes encode a text, its tokens are the same bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tinylm.data import workers as room
from tinylm.data.prepare import encode
from tinylm.errors import WorkError
from tinylm.recipe.schema import BpeTokenizer
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer, training


@pytest.fixture
def pieces(english: str) -> list[Piece]:
    """Documents of many sizes, in pieces, and text that would be a control token."""
    texts = [english[at : at + size] for at, size in ((0, 9000), (9000, 1), (9001, 40_000), (50_000, 700))]
    texts.append("<|endoftext|> is text here")
    return [Piece(text[at : at + 5000], at == 0) for text in texts for at in range(0, len(text), 5000)]


@pytest.fixture
def tokenizer(pieces: list[Piece]) -> Tokenizer:
    return training.train(BpeTokenizer(kind="bpe", vocab_size=500), pieces, print)


def encode_with(workers: int, folder: Path, pieces: Iterator[Piece], tokenizer: Tokenizer) -> None:
    encode(folder, "text", pieces, tokenizer, lambda done: None, partial(room.encoded, tokenizer, workers=workers))


def test_any_number_of_workers_writes_the_same_bytes(
    pieces: list[Piece], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_BATCH_BYTES", 3000)
    for workers in (1, 3):
        encode_with(workers, tmp_path / str(workers), iter(pieces), tokenizer)
    for name in ("text.npy", "text.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()


def test_a_worker_that_is_killed_is_told_and_leaves_no_file(
    pieces: list[Piece], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_begin", _killed)
    with pytest.raises(WorkError, match=r"was killed.*--workers"):
        encode_with(2, tmp_path, iter(pieces), tokenizer)
    assert not list(tmp_path.iterdir())


def _killed(tokenizer: str) -> None:
    os._exit(9)


def test_an_error_in_the_text_comes_through(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def broken() -> Iterator[Piece]:
        yield Piece("a beginning", True)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        encode_with(2, tmp_path, broken(), tokenizer)

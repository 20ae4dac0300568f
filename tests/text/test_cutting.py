"""Long documents are cut into pieces of bounded size that together have the same tokens as the whole document."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tinylm.recipe.schema import BpeTokenizer
from tinylm.text.cutting import MAX_PIECE_CHARACTERS, MIN_PIECE_CHARACTERS
from tinylm.text.sources import Corpus, Piece
from tinylm.tokenizer import training


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def pieces_of(path: Path) -> list[str]:
    with Corpus([str(path)]) as corpus:
        pieces = list(corpus.pieces())
    assert [piece.starts_document for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    return [piece.text for piece in pieces]


def test_a_long_document_is_cut_into_pieces_of_bounded_size(tmp_path: Path, english: str) -> None:
    for name, text in {
        "english": english * 3,
        "nospace": "ab" * 1_300_000,
        "spaces": " " * 2_500_000,
        "lines": "word\n" * 500_000,
        "rare": ("x" * 700_000 + " ") * 4,
        "exact": "x" * MAX_PIECE_CHARACTERS,
        "wide": "語🙂 " * 600_000,
    }.items():
        pieces = pieces_of(write(tmp_path / name, text))
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= MAX_PIECE_CHARACTERS
        assert all(len(piece) >= MIN_PIECE_CHARACTERS for piece in pieces[:-1])
        assert len(pieces) > 1 or len(text) == MAX_PIECE_CHARACTERS


def test_the_cuts_do_not_depend_on_how_the_text_is_stored(tmp_path: Path, english: str) -> None:
    for number, text in enumerate([english * 2, "x" * 3_000_001, ("y" * 400_000 + " ") * 5 + "é" * 1_500_000]):
        plain = pieces_of(write(tmp_path / f"{number}.txt", text))
        assert plain == pieces_of(write(tmp_path / f"{number}.jsonl", json.dumps({"text": text})))
        assert plain == pieces_of(write(tmp_path / f"{number}.txt.gz", gzip.compress(text.encode(), 1)))


@pytest.mark.parametrize("split", ["gpt4", "gpt2"])
def test_the_pieces_encode_to_the_same_tokens_as_the_whole_text(tmp_path: Path, english: str, split: str) -> None:
    tokenizer = training.train(BpeTokenizer(kind="bpe", vocab_size=600, split=split), [Piece(english[:200_000], True)], print)
    odd = "  two  spaces \n\n  1234567 it's\t\tx\r\n\r\n \u00a0 end.  — “quoted” 語 🙂🙂 \x1c y\u2003 z  "
    for number, text in enumerate([english, (odd + "a") * 4000, odd * 4000]):
        pieces = pieces_of(write(tmp_path / f"{number}.txt", text))
        assert len(pieces) > 1
        assert [id for piece in pieces for id in tokenizer.encode(piece)] == tokenizer.encode(text)


@pytest.mark.parametrize("shift", range(5))
def test_a_cut_is_never_inside_white_space(tmp_path: Path, shift: int) -> None:
    pieces = pieces_of(write(tmp_path / "a.txt", "x" * shift + "ab \n  " * 100_000))
    assert len(pieces) == 3
    assert all(piece.endswith("b") for piece in pieces[:-1])
    assert all(piece.startswith(" \n  a") for piece in pieces[1:])


@pytest.mark.parametrize("split", ["gpt4", "gpt2"])
def test_a_space_after_any_character_starts_a_token(split: str, english: str) -> None:
    tokenizer = training.train(BpeTokenizer(kind="bpe", vocab_size=400, split=split), [Piece(english[:50_000], True)], print)
    characters = [
        c
        for code in [*range(0x3100), *range(0xA000, 0xABFF), *range(0xFE00, 0x10000), 0x1F642, 0xE0020]
        if not (c := chr(code)).isspace()
    ]
    space_and_x = tokenizer.encode(" x")
    together = tokenizer.backend.encode_batch([c + " x" for c in characters])
    alone = tokenizer.backend.encode_batch(characters)
    assert [e.ids for e in together] == [e.ids + space_and_x for e in alone]

"""BPE dropout changes the tokens of a text, but not the decoded text."""

from __future__ import annotations

import pytest
from tokenizer.samples import BYTE

from tinylm.errors import InputError
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer, training
from tinylm.tokenizer.dropout import DropoutEncoder


def test_dropout_produces_more_tokens_and_is_reproducible_with_a_seed(bpe: Tokenizer, english: str) -> None:
    text = english[:5000]

    def encode(dropout: float, seed: int = 0, piece_size: int = 5000) -> list[int]:
        pieces = [Piece(text[start : start + piece_size], start == 0) for start in range(0, 5000, piece_size)]
        return [id for ids, _ in DropoutEncoder(bpe, dropout, seed).encode_pieces(pieces) for id in ids.tolist()]

    assert encode(0.0) == bpe.encode(text)
    assert encode(0.1, 1) == encode(0.1, 1, piece_size=333) != encode(0.1, 2)
    for dropout in (0.1, 0.5):
        assert bpe.decode(encode(dropout)) == text
    assert len(bpe.encode(text)) < len(encode(0.1)) < len(encode(0.5)) < len(text.encode())
    with pytest.raises(InputError, match="needs a tokenizer of kind bpe, not byte"):
        DropoutEncoder(training.train(BYTE, [], pytest.fail), 0.1)

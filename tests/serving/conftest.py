"""Fixtures for the server tests: a tiny random model and its tokenizer."""

from __future__ import annotations

import pytest
from tiny import model

from tinylm.model.decoder import Decoder
from tinylm.recipe.schema import ByteTokenizer
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer, training


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return training.train(ByteTokenizer(kind="byte"), iter([Piece("text", True)]), print)


@pytest.fixture(scope="session")
def decoder(tokenizer: Tokenizer) -> Decoder:
    return Decoder(model("modern", vocab_size=tokenizer.vocab_size, context_length=64))

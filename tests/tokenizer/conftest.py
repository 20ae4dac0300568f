"""Tokenizers trained on the first 60,000 characters of the English text."""

from __future__ import annotations

import pytest
from tokenizer.samples import BPE, SECTIONS, train_on

from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer, training


@pytest.fixture(scope="session", params=SECTIONS, ids=lambda section: section.kind)
def tokenizer(request: pytest.FixtureRequest, english: str) -> Tokenizer:
    return train_on(english[:60_000], request.param)


@pytest.fixture(scope="session")
def bpe(english: str) -> Tokenizer:
    return training.train(BPE, [Piece(english[:60_000], True)], pytest.fail)

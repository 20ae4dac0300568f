"""Models with nothing at a special value, as run folders, and tokenizers on real text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from exchange import CONTEXT, Make, save
from tiny import model

from tinylm.recipe.schema import BpeTokenizer, ByteTokenizer, CharTokenizer
from tinylm.run import Run
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer, training


@pytest.fixture(scope="session")
def tokenizers(english: str) -> dict[str, Tokenizer]:
    """By what matters to other programs: the split and the kind."""
    sections = {
        "gpt2": BpeTokenizer(kind="bpe", vocab_size=400, split="gpt2"),
        "digits1": BpeTokenizer(kind="bpe", vocab_size=400, digits=1),
        "digits2": BpeTokenizer(kind="bpe", vocab_size=400),
        "digits3": BpeTokenizer(kind="bpe", vocab_size=400, digits=3),
        "byte": ByteTokenizer(kind="byte"),
        "char": CharTokenizer(kind="char"),
    }
    pieces = [Piece(english[:60_000], True)]
    return {name: training.train(section, pieces, lambda text: None) for name, section in sections.items()}


@pytest.fixture
def run_of(tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> Make:
    """`run_of("gpt2", tokenizer="byte", bias=False)`: a run folder with one checkpoint, weights roughened."""

    def make(preset: str, *, tokenizer: str = "gpt2", name: str = "run", **parts: Any) -> Run:
        chosen = tokenizers[tokenizer]
        return save(tmp_path / name, model(preset, vocabulary=chosen.vocab_size, context_length=CONTEXT, **parts), chosen)

    return make

"""Fixtures for export and import tests: run folders with small random models, and tokenizers trained on real text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import model
from untrained_runs import CONTEXT, MakeRun, save_run

from tinylm.recipe.schema import BpeTokenizer, ByteTokenizer, CharTokenizer
from tinylm.run import Run
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer, training


@pytest.fixture(scope="session")
def tokenizers(english: str) -> dict[str, Tokenizer]:
    """Return tokenizers that differ in what other programs support: the split pattern, the digits per token, and the kind."""
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
def make_run(tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> MakeRun:
    """`make_run("gpt2", tokenizer="byte", bias=False)` creates a run folder with one checkpoint that has random weights."""

    def make(preset: str, *, tokenizer: str = "gpt2", name: str = "run", **parts: Any) -> Run:
        chosen = tokenizers[tokenizer]
        return save_run(tmp_path / name, model(preset, vocab_size=chosen.vocab_size, context_length=CONTEXT, **parts), chosen)

    return make

"""How many tokens a recipe's text will be, without encoding all of it when it is large. Imports without torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from tinylm.data.prepare import open_text, prepare_text
from tinylm.recipe.schema import DataSection, TokenizerSection, VocabularyTokenizer
from tinylm.reporting import Reporter
from tinylm.text.sources import Piece
from tinylm.tokenizer import training

WHOLE_BYTES = 16 << 20
SAMPLE_CHARACTERS = 4 << 20


@dataclass(frozen=True)
class TextSize:
    vocab_size: int
    train_tokens: int
    heldout_tokens: int
    exact: bool
    """False: extrapolated from the first characters."""


def measure_text(data: DataSection, tokenizer: TokenizerSection, reporter: Reporter) -> TextSize:
    """Prepare a small text as training would (and so save training that work); sample a large one.

    Raises `InputError` as preparing does.
    """
    with ExitStack() as stack:
        text = open_text(data, reporter, stack)
        if text.train_scan.bytes > WHOLE_BYTES:
            sample = list(_first(text.pieces("train"), SAMPLE_CHARACTERS))
            trained = training.train(_lenient(tokenizer), sample, reporter.warn)
            tokens = sum(len(ids) for ids, _ in trained.encode_pieces(sample))
            characters = sum(len(piece.text) for piece in sample)
            train, heldout = (int(tokens / characters * text.sizes(half)[1]) for half in ("train", "heldout"))
            return TextSize(trained.vocab_size, train, heldout, exact=False)
        prepared = prepare_text(text, tokenizer, reporter)
    return TextSize(prepared.tokenizer.vocab_size, len(prepared.train), len(prepared.heldout), exact=True)


def _lenient(tokenizer: TokenizerSection) -> TokenizerSection:
    """A sample may have fewer tokens to give than the text."""
    if isinstance(tokenizer, VocabularyTokenizer):
        return tokenizer.model_copy(update={"allow_smaller": True})
    return tokenizer


def _first(pieces: Iterator[Piece], characters: int) -> Iterator[Piece]:
    for piece in pieces:
        if characters <= 0:
            return
        yield Piece(piece.text[:characters], piece.starts_document)
        characters -= len(piece.text)

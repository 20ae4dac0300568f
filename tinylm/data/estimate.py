"""Count the tokens in a recipe's text, or estimate them from a sample if the text is large. This module does not import torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain

from tinylm.data import prepared_folder
from tinylm.data.chat import read_parts
from tinylm.data.prepare import load_or_train_tokenizer, prepare, prepare_text
from tinylm.data.split_text import SplitText, open_text
from tinylm.recipe.chat import ChatSection
from tinylm.recipe.schema import DataVariant, TokenizerSection, VocabularyTokenizer, require_text
from tinylm.reporting import Reporter
from tinylm.text.sources import Piece
from tinylm.tokenizer import training
from tinylm.tokenizer.chat_template import ChatEncoder, ChatTemplate, add_control_tokens

EXACT_LIMIT_BYTES = 16 << 20
"""Maximum size in bytes of a training text that is tokenized completely."""
SAMPLE_CHARACTERS = 4 << 20


@dataclass(frozen=True)
class TextSize:
    """The size of a text in tokens."""

    vocab_size: int
    train_tokens: int
    heldout_tokens: int
    exact: bool
    """False if the token counts are estimates."""
    source_tokens: tuple[int, ...] = ()
    """The number of training tokens of each source of a mixture."""


def estimate_text_size(data: DataVariant, tokenizer: TokenizerSection, reporter: Reporter) -> TextSize:
    """Count the tokens in a text. A small text is tokenized and cached for training. For a large text, the counts are estimates.

    Raises `InputError` in the same cases as `prepare`, and if the data format is neither text nor chat.
    """
    if isinstance(data, ChatSection):
        return _estimate_chat(data, tokenizer, reporter)
    if prepared_folder.find(require_text(data)) is not None:
        opened = prepare(require_text(data), tokenizer, reporter)
        return TextSize(opened.tokenizer.vocab_size, len(opened.train), len(opened.heldout), exact=True)
    with ExitStack() as stack:
        text = open_text(require_text(data), reporter, stack)
        if text.train_bytes > EXACT_LIMIT_BYTES:
            return _estimate_from_sample(text, tokenizer, reporter)
        prepared = prepare_text(text, tokenizer, reporter)
    spans = prepared.spans.get("train", ())
    sizes = len(prepared.train), len(prepared.heldout)
    return TextSize(prepared.tokenizer.vocab_size, *sizes, exact=True, source_tokens=tuple(span.tokens for span in spans))


def _estimate_from_sample(text: SplitText, tokenizer: TokenizerSection, reporter: Reporter) -> TextSize:
    """Train a tokenizer on the beginning of the text or, for a mixture, of each source, and count the tokens in this sample."""
    sizes = [source.sizes("train")[1] for source in text.texts]
    samples = [
        list(_take_characters(source.pieces("train"), max(1, SAMPLE_CHARACTERS * size // sum(sizes))))
        for source, size in zip(text.texts, sizes, strict=True)
    ]
    trained = training.train(_allow_smaller(tokenizer), chain.from_iterable(samples), reporter.warn)
    counts = []
    for sample, size in zip(samples, sizes, strict=True):
        tokens = sum(len(ids) for ids, _ in trained.encode_pieces(sample))
        counts.append(int(tokens / sum(len(piece.text) for piece in sample) * size))
    heldout = int(sum(counts) / sum(sizes) * text.sizes("heldout")[1])
    by_source = tuple(counts) if len(counts) > 1 else ()
    return TextSize(trained.vocab_size, sum(counts), heldout, exact=False, source_tokens=by_source)


def _estimate_chat(data: ChatSection, section: TokenizerSection, reporter: Reporter) -> TextSize:
    """Encode all conversations. The result is not exact, because packing leaves some positions empty."""
    parts = read_parts(data, reporter)
    encoder = ChatEncoder(ChatTemplate(), add_control_tokens(load_or_train_tokenizer(parts, section, reporter)).tokenizer)

    def tokens(part: str) -> int:
        return sum(len(turn.ids) for item in parts.conversations[part] for turn in encoder.turns(item.messages))

    mixed = 0.0 if data.mix is None else data.mix.share
    return TextSize(encoder.tokenizer.vocab_size, round(tokens("train") / (1 - mixed)), tokens("heldout"), exact=False)


def _allow_smaller(tokenizer: TokenizerSection) -> TokenizerSection:
    """Allow a smaller vocabulary, because a sample might not contain enough distinct tokens for the requested size."""
    if isinstance(tokenizer, VocabularyTokenizer):
        return tokenizer.model_copy(update={"allow_smaller": True})
    return tokenizer


def _take_characters(pieces: Iterator[Piece], characters: int) -> Iterator[Piece]:
    for piece in pieces:
        if characters <= 0:
            return
        yield Piece(piece.text[:characters], piece.starts_document)
        characters -= len(piece.text)

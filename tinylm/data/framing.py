"""Frame texts for a model: truncate them to the context, add control tokens, and pad them to the same length.

An encoder reads `[CLS] text [SEP]`. Other models read a text between two end-of-text tokens, as during training.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tinylm.errors import InputError
from tinylm.recipe.encoder import CONTROL_TOKENS
from tinylm.recipe.schema import LearnedTokenizer, ModelVariant, TokenizerSection
from tinylm.reporting import Reporter
from tinylm.tokenizer import Tokenizer
from tinylm.tokenizer.control_tokens import ControlTokens

PADDING = -1
"""The segment number of padded positions."""


def with_control_tokens(section: TokenizerSection, model: ModelVariant) -> TokenizerSection:
    """For an encoder, add control tokens to the section of a tokenizer that will be trained. Other sections are unchanged."""
    if not model.bidirectional or not isinstance(section, LearnedTokenizer):
        return section
    added = [token for token in CONTROL_TOKENS if token not in section.special_tokens]
    return section.model_copy(update={"special_tokens": (*added, *section.special_tokens)})


@dataclass(frozen=True)
class Framing:
    """The control tokens and limits that turn a text into one row of model input."""

    first: int
    last: int
    pad: int
    context_length: int
    truncate: str = "head"
    """How to truncate: `head` keeps the beginning; `head_tail` takes a quarter of the tokens from the end."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, model: ModelVariant, truncate: str = "head") -> Framing:
        """Return the framing for a model. Raises `InputError` if the tokenizer lacks a control token that the model needs."""
        if model.bidirectional:
            control = ControlTokens.of(tokenizer)
            return cls(control.cls, control.sep, control.pad, model.context_length, truncate)
        end_of_text = tokenizer.end_of_text
        if end_of_text is None:
            raise InputError("the tokenizer has no end-of-text token", where="tokenizer", hint="add <|endoftext|> to it")
        return cls(end_of_text, end_of_text, end_of_text, model.context_length, truncate)

    @property
    def room(self) -> int:
        """The number of text tokens that fit into the context."""
        return self.context_length - 2

    def frame(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Truncate a text and add the control tokens. Return int64 (length,)."""
        ids = np.asarray(ids, dtype=np.int64)
        if len(ids) > self.room:
            tail = self.room // 4 if self.truncate == "head_tail" else 0
            ids = np.concatenate((ids[: self.room - tail], ids[len(ids) - tail :]))
        return np.concatenate(([self.first], ids, [self.last]))

    def rows(self, framed: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Pad framed texts to the same length. Return ids and segments (0 or `PADDING`), both int64 (texts, length)."""
        length = max(map(len, framed))
        tokens = np.full((len(framed), length), self.pad, dtype=np.int64)
        segments = np.full((len(framed), length), PADDING, dtype=np.int64)
        for row, ids in enumerate(framed):
            tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 0
        return tokens, segments


@dataclass
class TextCounts:
    """The number of texts that are skipped because they are empty, and of texts that are truncated to the context."""

    empty: int = 0
    truncated: int = 0
    room: int = 0
    """The number of tokens to which texts are truncated."""

    def without_empty(self, texts: Iterable[str]) -> Iterator[str]:
        """Yield the texts that are not blank, and count the others."""
        for text in texts:
            if text.strip():
                yield text
            else:
                self.empty += 1

    def add(self, lengths: Iterable[int], room: int) -> None:
        """Count the texts with more than `room` tokens. `lengths` contains the number of tokens in each text."""
        self.room = room
        self.truncated += sum(length > room for length in lengths)

    def report(self, reporter: Reporter) -> None:
        """Report the counts that are not 0 as a note."""
        parts = [f"{self.empty:,} empty text{'s' * (self.empty != 1)} skipped"] * (self.empty > 0)
        parts += [f"{self.truncated:,} text{'s' * (self.truncated != 1)} truncated to {self.room:,} tokens"] * (self.truncated > 0)
        if parts:
            reporter.note(", ".join(parts))


def batches_by_length(lengths: Sequence[int], max_tokens: int) -> list[np.ndarray]:
    """Group texts of similar length into batches of up to `max_tokens` tokens including padding, from longest to shortest.

    Return the indices of the texts in each batch. A text that is longer than `max_tokens` is in a batch of its own.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = max(1, max_tokens // max(1, int(lengths[order[start]])))
        batches.append(order[start : start + size])
        start += size
    return batches

"""Add control tokens to sentence pairs, and batch pairs of similar lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tinylm.cost.examples import ExampleSize
from tinylm.data.bucketing import Order, make_order
from tinylm.data.datasets import Examples
from tinylm.errors import InputError, did_you_mean
from tinylm.tokenizer import Tokenizer

PADDING = -1
_EMPTY = np.zeros(0, dtype=np.int64)


def language_token(language: str) -> str:
    """Return the control token that precedes a source sentence and selects the target language."""
    return f"<2{language}>"


@dataclass(frozen=True)
class PairFraming:
    """Adds an end-of-text token after each sentence, and a language token before each source sentence."""

    source_tokenizer: Tokenizer
    target_tokenizer: Tokenizer
    context_length: int

    @cached_property
    def _source_end(self) -> int:
        return _end_of_text(self.source_tokenizer)

    @cached_property
    def target_end(self) -> int:
        """The token at the end of a translation."""
        return _end_of_text(self.target_tokenizer)

    @property
    def source_limit(self) -> int:
        """The maximum number of text tokens in a source sentence: the context length minus the control tokens."""
        return self.context_length - 2

    def language_ids(self, language: str) -> list[int]:
        """Return a list with the target language's control token, or an empty list if `language` is empty.

        Raises `InputError` if the language has no control token.
        """
        if not language:
            return []
        id = self.source_tokenizer.backend.token_to_id(language_token(language))
        if id is None:
            known = self.languages
            hint = did_you_mean(language, known) or (f"known languages: {', '.join(known)}" if known else None)
            raise InputError(f"the model has no target language {language!r}", where="tokenizer", hint=hint)
        return [id]

    @cached_property
    def languages(self) -> list[str]:
        """The target languages that have a control token."""
        tokens = (token.content for token in self.source_tokenizer.backend.get_added_tokens_decoder().values() if token.special)
        return sorted(token[2:-1] for token in tokens if token.startswith("<2") and token.endswith(">"))

    def source(self, ids: Sequence[int] | np.ndarray, language: str = "") -> np.ndarray:
        """Return a source sentence of any length with its control tokens, as int64 (length,)."""
        return np.array([*self.language_ids(language), *ids, self._source_end], dtype=np.int64)

    def target(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return a target sentence of any length with its control tokens, as int64 (length,)."""
        return np.array([*ids, self.target_end], dtype=np.int64)


def _end_of_text(tokenizer: Tokenizer) -> int:
    if tokenizer.end_of_text is None:
        raise InputError("the tokenizer has no end-of-text token", where="tokenizer", hint="add <|endoftext|> to it")
    return tokenizer.end_of_text


class BucketedPairs:
    """Sentence pairs in a pseudo-random order in which the pairs in each batch have similar lengths."""

    def __init__(
        self,
        sources: Sequence[np.ndarray],
        targets: Sequence[np.ndarray],
        context_length: int,
        batch_size: int,
        seed: int,
        batch_tokens: int | None = None,
    ) -> None:
        """Skip pairs in which either sentence is longer than `context_length`. Raises `InputError` if no pairs remain.

        With `batch_tokens`, a batch contains at most this many tokens, including padding, and the rest of its rows are empty.
        """
        fitting = [
            index
            for index, (source, target) in enumerate(zip(sources, targets, strict=True))
            if len(source) <= context_length and len(target) <= context_length
        ]
        if not fitting:
            raise InputError(f"all pairs are longer than {context_length} tokens", where="model.context_length", hint="increase it")
        self._sources, self._targets = [sources[index] for index in fitting], [targets[index] for index in fitting]
        lengths = np.array([(len(self._targets[i]), len(self._sources[i])) for i in range(len(fitting))])
        self._order = make_order(lengths, batch_size, batch_tokens, seed)
        self.examples_per_epoch = self._order.examples_per_epoch
        self.example_size = pair_size(lengths, self._order)
        self.tokens_per_example = self.example_size.tokens

    def pair_indexes(self, start: int, count: int) -> np.ndarray:
        """Return the indexes of the pairs at positions [start, start + count), or -1 for empty rows. Only pairs that fit count."""
        return self._order.indexes(start, count)

    def examples(self, start: int, count: int) -> Examples:
        """Return the pairs at positions [start, start + count) as `source` and `tokens` (the target), padded with negative ids."""
        indexes = self.pair_indexes(start, count)
        return {
            "tokens": padded([_row(self._targets, index) for index in indexes]),
            "source": padded([_row(self._sources, index) for index in indexes]),
        }


def pair_size(lengths: np.ndarray, order: Order) -> ExampleSize:
    """Return the size of a row in a batch, given the lengths (pairs, 2) of all targets and sources."""
    target, source = order.padded_lengths()
    longest_target, longest_source = order.longest()
    tokens = float(lengths.sum() / len(lengths)) * order.filled
    return ExampleSize(tokens, float(target), int(longest_target), float(source), int(longest_source), order.filled)


def _row(sequences: Sequence[np.ndarray], index: int) -> np.ndarray:
    return sequences[index] if index >= 0 else _EMPTY


def padded(sequences: Sequence[np.ndarray]) -> np.ndarray:
    """Stack sequences of different lengths as int64 (sequences, longest), padded at the end with `PADDING`."""
    rows = np.full((len(sequences), max(1, *map(len, sequences))), PADDING, dtype=np.int64)
    for row, sequence in zip(rows, sequences, strict=True):
        row[: len(sequence)] = sequence
    return rows

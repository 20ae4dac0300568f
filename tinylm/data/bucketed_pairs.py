"""Add control tokens to sentence pairs, and batch pairs of similar length to reduce padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tinylm.data.datasets import Examples
from tinylm.data.order import epoch_key, permute
from tinylm.errors import InputError, did_you_mean
from tinylm.tokenizer import Tokenizer

PADDING = -1
_BATCHES_PER_BUCKET = 32
"""Number of batches in a bucket. Each bucket is sorted by length. Larger buckets reduce padding but mix pairs less."""


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
    """Sentence pairs in a pseudo-random order in which the pairs in each batch have similar lengths.

    Each epoch permutes all pairs, divides them into buckets of 32 batches, sorts each bucket by length, divides it into batches,
    and permutes the batches. The order depends only on the seed and the position. The incomplete batch at the end of each epoch is
    dropped; it contains different pairs each time.
    """

    def __init__(
        self, sources: Sequence[np.ndarray], targets: Sequence[np.ndarray], context_length: int, batch_size: int, seed: int
    ) -> None:
        """Skip pairs in which either sentence is longer than `context_length`. Raises `InputError` if no pairs remain."""
        fitting = [
            index
            for index, (source, target) in enumerate(zip(sources, targets, strict=True))
            if len(source) <= context_length and len(target) <= context_length
        ]
        if not fitting:
            raise InputError(f"all pairs are longer than {context_length} tokens", where="model.context_length", hint="increase it")
        self._sources, self._targets = [sources[index] for index in fitting], [targets[index] for index in fitting]
        self._lengths = np.array([(len(self._targets[i]), len(self._sources[i])) for i in range(len(fitting))])
        self._batch_size = batch_size if len(fitting) >= batch_size else 1
        self._seed = seed
        self.examples_per_epoch = len(fitting) // self._batch_size * self._batch_size
        self.tokens_per_example = float(self._lengths.sum() / len(fitting))
        self._last_order: tuple[int, np.ndarray] | None = None

    def pair_indexes(self, start: int, count: int) -> np.ndarray:
        """Return the indexes of the pairs at positions [start, start + count), counting only pairs that fit."""
        positions = np.arange(start, start + count, dtype=np.int64)
        epochs, within_epoch = np.divmod(positions, self.examples_per_epoch)
        indexes = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            indexes[chosen] = self._order(int(epoch))[within_epoch[chosen]]
        return indexes

    def examples(self, start: int, count: int) -> Examples:
        """Return the pairs at positions [start, start + count) as `source` and `tokens` (the target), padded with negative ids."""
        indexes = self.pair_indexes(start, count)
        return {
            "tokens": padded([self._targets[index] for index in indexes]),
            "source": padded([self._sources[index] for index in indexes]),
        }

    def _order(self, epoch: int) -> np.ndarray:
        """Return the order of the pairs in an epoch. This is thread-safe because the cached order is replaced atomically."""
        last = self._last_order
        if last is None or last[0] != epoch:
            last = self._last_order = (epoch, self._compute_order(epoch))
        return last[1]

    def _compute_order(self, epoch: int) -> np.ndarray:
        total, size = len(self._sources), self._batch_size
        key = epoch_key(self._seed, epoch)
        order = permute(np.arange(total), total, key)[: self.examples_per_epoch]
        for first in range(0, len(order), size * _BATCHES_PER_BUCKET):
            bucket = order[first : first + size * _BATCHES_PER_BUCKET]
            target_lengths, source_lengths = self._lengths[bucket].T
            order[first : first + len(bucket)] = bucket[np.lexsort((source_lengths, target_lengths))]
        batches = permute(np.arange(len(order) // size), len(order) // size, key + 1)
        mixed: np.ndarray = order.reshape(-1, size)[batches].reshape(-1)
        return mixed


def padded(sequences: Sequence[np.ndarray]) -> np.ndarray:
    """Stack sequences of different lengths as int64 (sequences, longest), padded at the end with `PADDING`."""
    rows = np.full((len(sequences), max(map(len, sequences))), PADDING, dtype=np.int64)
    for row, sequence in zip(rows, sequences, strict=True):
        row[: len(sequence)] = sequence
    return rows

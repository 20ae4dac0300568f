"""BPE dropout: encode the same text to different tokens each time, which makes a model robust to different segmentations.

Provilkov et al. 2020, "BPE-Dropout: Simple and Effective Subword Regularization": before each merge of a word, every merge that
could be applied is dropped with some probability; if all are dropped, the word is finished. For example, a word that is usually
encoded as `n` `e` `w` `est` becomes `n` `e` `w` `es` `t` if the merge of `es` and `t` is dropped.

Random numbers are drawn in text order, so the same seed produces the same ids no matter how the text is divided into pieces.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator

import numpy as np

from tinylm.errors import InputError
from tinylm.text.sources import Piece
from tinylm.tokenizer.encoding import segments
from tinylm.tokenizer.tokenizer import Tokenizer


class DropoutEncoder:
    """Encodes text with a BPE tokenizer and drops each merge with probability `dropout`."""

    def __init__(self, tokenizer: Tokenizer, dropout: float, seed: int = 0) -> None:
        """Raises `InputError` if the tokenizer is not of kind bpe."""
        if tokenizer.kind != "bpe":
            raise InputError(f"needs a tokenizer of kind bpe, not {tokenizer.kind}", where="dropout")
        self._tokenizer = tokenizer
        self._dropout = dropout
        self._random = random.Random(seed)
        self._ids: dict[str, int] = tokenizer.tokenizer_json["model"]["vocab"]
        self._ranks = tokenizer.merge_ranks

    def encode_pieces(self, pieces: Iterable[Piece]) -> Iterator[tuple[np.ndarray, bool]]:
        """Yield the ids of each segment, as uint32, and whether the segment begins a document."""
        backend = self._tokenizer.backend
        for segment, starts_document in segments(pieces, self._tokenizer.split_points):
            text = segment.decode("utf-8")
            if backend.normalizer is not None:
                text = backend.normalizer.normalize_str(text)
            words = backend.pre_tokenizer.pre_tokenize_str(text) if backend.pre_tokenizer is not None else [(text, None)]
            yield np.array([id for word, _ in words for id in self._encode_word(word)], dtype=np.uint32), starts_document

    def _encode_word(self, word: str) -> list[int]:
        if not all(character in self._ids for character in word):  # byte fallback, which has no merges
            return [token.id for token in self._tokenizer.backend.model.tokenize(word)]
        symbols = list(word)
        draw, ranks, dropout = self._random.random, self._ranks, self._dropout
        while len(symbols) > 1:
            candidates = [
                (ranks[pair], i) for i, pair in enumerate(itertools.pairwise(symbols)) if pair in ranks and draw() >= dropout
            ]
            if not candidates:
                break
            i = min(candidates)[1]
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        return [self._ids[symbol] for symbol in symbols]

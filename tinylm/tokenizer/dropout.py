"""BPE dropout (Provilkov et al. 2020): the same text in other tokens each time, for training a model that does not depend on one.

Of the merges that could come next, each is left out with a probability; when all are, the word stays as it is. The random numbers
come from a seed and are drawn in the order of the text, so that the same seed gives the same ids however the text is cut.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator

import numpy as np

from tinylm.errors import InputError
from tinylm.text.sources import Piece
from tinylm.tokenizer.encoding import units
from tinylm.tokenizer.tokenizer import Tokenizer


class DropoutEncoder:
    """Encodes with a tokenizer of kind bpe, leaving out a `share` of merges. Raises `InputError` for other kinds."""

    def __init__(self, tokenizer: Tokenizer, share: float, seed: int = 0) -> None:
        model = tokenizer.described["model"]
        if tokenizer.kind != "bpe":
            raise InputError(f"only kind bpe has merges to leave out, and this is {tokenizer.kind}", where="dropout")
        self._tokenizer = tokenizer
        self._share = share
        self._random = random.Random(seed)
        self._ids: dict[str, int] = model["vocab"]
        self._ranks = tokenizer.merge_ranks

    def encode_pieces(self, pieces: Iterable[Piece]) -> Iterator[tuple[np.ndarray, bool]]:
        """(ids as uint32, whether they begin a document), in order."""
        backend = self._tokenizer.backend
        for text, starts in units(pieces, self._tokenizer.borders):
            written = text.decode("utf-8")
            if backend.normalizer is not None:
                written = backend.normalizer.normalize_str(written)
            words = backend.pre_tokenizer.pre_tokenize_str(written) if backend.pre_tokenizer is not None else [(written, None)]
            yield np.array([id for word, _ in words for id in self._word(word)], dtype=np.uint32), starts

    def _word(self, word: str) -> list[int]:
        if not all(character in self._ids for character in word):
            return [token.id for token in self._tokenizer.backend.model.tokenize(word)]  # what falls back to bytes has no merges
        symbols = list(word)
        draw, ranks, share = self._random.random, self._ranks, self._share
        while len(symbols) > 1:
            found = [(ranks[pair], at) for at, pair in enumerate(itertools.pairwise(symbols)) if pair in ranks and draw() >= share]
            if not found:
                break
            at = min(found)[1]
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        return [self._ids[symbol] for symbol in symbols]

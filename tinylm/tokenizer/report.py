"""How well a tokenizer fits a text: compression, coverage, balance, and whether decoding gives the text back."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tinylm.errors import InputError
from tinylm.text.sources import Piece
from tinylm.tokenizer.tokenizer import Tokenizer

RENYI_ALPHA = 2.5


@dataclass(frozen=True)
class TokenizerReport:
    """Figures of one tokenizer on one text; the names are the keys of `tinylm tokenize report --json`."""

    kind: str
    vocab_size: int
    documents: int
    bytes: int
    characters: int
    words: int
    tokens: int
    bytes_per_token: float
    tokens_per_word: float
    unused_tokens: int
    unknown_tokens: int
    renyi_efficiency: float
    """Rényi entropy of order 2.5 of the token frequencies over log of the vocabulary (Zouhar et al. 2023)."""
    round_trip_failures: int
    """Pieces of text that decoding did not give back exactly."""
    encode_megabytes_per_second: float
    frequent_tokens: list[tuple[str, int]]
    longest_tokens: list[str]


def report(tokenizer: Tokenizer, pieces: Iterable[Piece]) -> TokenizerReport:
    """Encode and decode a text and count. Raises `InputError` when the text is empty."""
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    documents = size = characters = words = failures = 0
    seconds = 0.0
    for piece in pieces:
        start = time.perf_counter()
        ids = tokenizer.encode(piece.text)
        seconds += time.perf_counter() - start
        counts += np.bincount(ids, minlength=len(counts))
        documents += piece.starts_document
        size += len(piece.text.encode("utf-8"))
        characters += len(piece.text)
        words += len(piece.text.split())
        failures += tokenizer.decode(ids) != piece.text
    tokens = int(counts.sum())
    if not tokens:
        raise InputError("the text is empty")
    table = tokenizer.token_bytes
    used = np.flatnonzero(counts)
    frequent = used[np.argsort(-counts[used], kind="stable")][:10]
    longest = sorted((int(id) for id in used), key=lambda id: (-len(table[id]), id))[:10]
    return TokenizerReport(
        kind=tokenizer.kind,
        vocab_size=tokenizer.vocab_size,
        documents=documents,
        bytes=size,
        characters=characters,
        words=words,
        tokens=tokens,
        bytes_per_token=size / tokens,
        tokens_per_word=tokens / max(words, 1),
        unused_tokens=int((counts == 0).sum()),
        unknown_tokens=int(counts[tokenizer.unknown]) if tokenizer.unknown is not None else 0,
        renyi_efficiency=_renyi_efficiency(counts),
        round_trip_failures=failures,
        encode_megabytes_per_second=size / 1e6 / max(seconds, 1e-9),
        frequent_tokens=[(table[id].decode("utf-8", "replace"), int(counts[id])) for id in frequent],
        longest_tokens=[table[id].decode("utf-8", "replace") for id in longest],
    )


def _renyi_efficiency(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / counts.sum()
    entropy = np.log(np.sum(shares**RENYI_ALPHA)) / (1 - RENYI_ALPHA)
    return float(entropy / np.log(len(counts))) if len(counts) > 1 else 0.0

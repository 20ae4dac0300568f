"""Sample the n-grams in a text to measure how much of another text also occurs in it. This module does not import torch.

An n-gram is in the sample if its hash is small. If two texts contain the same n-gram, either both sample it or both skip it. The
fraction of a text's sampled n-grams that occur in the other text is therefore an unbiased estimate of the fraction for all its
n-grams. This is the sketch of Broder (1997) with a threshold on the hash.

One in `rate` distinct n-grams is stored as a 32-bit hash. The rate is 1 for texts with up to 65,536 tokens and rises to 4 (one byte
per token). For very large texts, it is higher, so that the sample has no more than about 4 million hashes (16 MiB). The
probability of a false positive is (number of hashes) / 2**32, which is about 0.1% or less.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
from safetensors.numpy import save

from tinylm.data.shards import Counts, Shard
from tinylm.errors import InputError
from tinylm.paths import atomic_file

MIN_LENGTH = 13
"""Minimum number of tokens in an n-gram. Brown et al. (2020), appendix C, use 13 words."""
_MIN_BYTES = 40
"""Approximate minimum number of bytes in an n-gram. If tokens are short, such as characters, n-grams have more tokens."""
_EXACT_TOKENS = 1 << 16
_USUAL_RATE = 4
_MAX_HASHES = 1 << 22
_CHUNK = 1 << 15
"""Number of positions that are hashed at once. The arrays for one chunk fit in the CPU's caches."""
_MULTIPLIERS = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


@dataclass(frozen=True)
class Overlap:
    """How much of a text also occurs in another text."""

    share: float
    """The fraction of the text's n-grams that also occur in the other text. A document shorter than an n-gram is hashed as a
    whole."""
    length: int
    """Number of tokens in an n-gram."""
    sampled: int
    """Number of n-grams from the text that were looked up."""


@dataclass(frozen=True)
class NgramSample:
    """The n-grams sampled from a text."""

    hashes: np.ndarray
    """The distinct hashes in sorted order, uint32."""
    length: int
    """Number of tokens in an n-gram."""
    rate: int
    """One in `rate` n-grams is in the sample."""

    def overlap(self, shard: Shard) -> Overlap | None:
        """Measure how much of a text with the same tokenizer also occurs in this one.

        Returns None if the text has no sampled n-grams.
        """
        hashes, weights = _sample(shard, self.length, self.rate)
        total = int(weights.sum())
        if not total:
            return None
        places = np.searchsorted(self.hashes, hashes)
        found = np.zeros(len(hashes), dtype=bool)
        inside = places < len(self.hashes)
        found[inside] = self.hashes[places[inside]] == hashes[inside]
        return Overlap(float(weights[found].sum() / total), self.length, len(hashes))


def sample_ngrams(shard: Shard) -> NgramSample:
    """Sample the n-grams in a text."""
    return sample_ngrams_of_parts([shard], shard.counts)


def sample_ngrams_of_parts(parts: Iterable[Shard], counts: Counts) -> NgramSample:
    """Sample the n-grams in a text that consists of several shards. `counts` are the counts of the whole text."""
    length = max(MIN_LENGTH, round(_MIN_BYTES * counts.tokens / max(counts.bytes, 1)))
    rate = max(1, min(_USUAL_RATE, -(-counts.tokens // _EXACT_TOKENS)), -(-counts.tokens // _MAX_HASHES))
    hashes = np.sort(np.concatenate([_sample(part, length, rate)[0] for part in parts]))  # much faster than np.unique
    first = np.append(True, hashes[1:] != hashes[:-1])[: len(hashes)]
    return NgramSample(hashes[first], length, rate)


def save_ngrams(sample: NgramSample, file: Path) -> None:
    """Write a sample to a safetensors file atomically."""
    data = save({"hashes": sample.hashes}, {"length": str(sample.length), "rate": str(sample.rate)})
    with atomic_file(file) as temporary:
        temporary.write_bytes(_with_sorted_header(data))


def _with_sorted_header(data: bytes) -> bytes:
    """Sort the keys in the header of a safetensors file, which are in a random order, so that equal samples are equal files."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def open_ngrams(file: Path) -> NgramSample:
    """Read a sample. Raises `InputError` if the file is missing or damaged."""
    try:
        with safetensors.safe_open(file, "np") as opened:
            metadata, hashes = opened.metadata() or {}, opened.get_tensor("hashes")
        length, rate = int(metadata["length"]), int(metadata["rate"])
        if hashes.dtype != np.uint32 or hashes.ndim != 1 or not 1 <= length <= 1 << 16 or not 1 <= rate < 1 << 32:
            raise ValueError("unexpected content")
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise InputError(f"the n-grams are missing or damaged: {error}", where=str(file)) from None
    return NgramSample(hashes, length, rate)


def _sample(shard: Shard, length: int, rate: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the hash (uint32) of each sampled n-gram and its weight in tokens.

    The weight of an n-gram is 1, because an n-gram starts at almost every token. The weight of a document that is shorter than an
    n-gram is its number of tokens.
    """
    tokens, end_of_text = shard.tokens, shard.end_of_text
    numbers = _random_numbers(int(tokens.max(initial=0)) + 1)
    limit = np.uint64((1 << 64) // rate - 1)
    parts = []
    for start in range(0, max(len(tokens) - length + 1, 0), _CHUNK):
        chunk = np.asarray(tokens[start : start + _CHUNK + length - 1])
        hashes = _hash_ngrams(numbers.take(chunk, mode="clip"), length)
        sampled = hashes <= limit
        ends = np.flatnonzero(chunk == end_of_text)
        if len(ends):
            sampled[_starts_across(ends, length, len(sampled))] = False
        parts.append(_identifier(hashes.take(np.flatnonzero(sampled))))
    long = np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint32)
    short, weights = _hash_short_documents(shard, numbers, length)
    kept = short <= limit
    return (
        np.concatenate((long, _identifier(short[kept]))),
        np.concatenate((np.ones(len(long), dtype=np.int64), weights[kept])),
    )


def _random_numbers(count: int) -> np.ndarray:
    """Return a random 64-bit number for each token, for tabulation hashing. The numbers are the same in every process."""
    return np.random.default_rng(0).integers(0, 1 << 64, count, dtype=np.uint64)


def _identifier(hashes: np.ndarray) -> np.ndarray:
    """Return the 32 bits of each hash that are stored.

    The highest bits are not stored because they select the sample. The lowest bits are not stored because they are less random.
    """
    return (hashes >> np.uint64(16)).astype(np.uint32)


def _hash_ngrams(values: np.ndarray, length: int) -> np.ndarray:
    """Hash all n-grams with `length` tokens. The width of the hashed windows doubles until two windows cover an n-gram."""
    width = 1
    while width < length:
        offset = min(width, length - width)
        longer = values[:-offset] * np.uint64(_MULTIPLIERS[width.bit_length() % len(_MULTIPLIERS)])
        longer += values[offset:]
        values = longer
        width += offset
    return values


def _starts_across(ends: np.ndarray, length: int, count: int) -> np.ndarray:
    """Return the positions below `count` at which an n-gram would contain one of the end-of-text tokens at `ends`."""
    starts = (ends[:, None] - np.arange(length)).ravel()
    return starts[(starts >= 0) & (starts < count)]


def _hash_short_documents(shard: Shard, numbers: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Hash each document with fewer than `length` tokens as a whole. Returns the hashes and the token counts."""
    boundaries = np.flatnonzero(np.asarray(shard.tokens) == shard.end_of_text)
    starts, sizes = boundaries[:-1] + 1, np.diff(boundaries) - 1
    short = (sizes > 0) & (sizes < length)
    starts, sizes = starts[short], sizes[short]
    hashes = sizes.astype(np.uint64)
    for offset in range(int(sizes.max(initial=0))):
        longer = sizes > offset
        hashes[longer] = hashes[longer] * np.uint64(_MULTIPLIERS[0]) + numbers[shard.tokens[starts[longer] + offset]]
    return hashes, sizes

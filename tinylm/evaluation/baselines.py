"""Baselines for a model, in bits per byte of the same held-out text: n-gram models and general-purpose compressors.

The n-gram models use modified Kneser-Ney smoothing. They are trained on the same tokens as the network and also score each document
independently. xz and zstd compress the held-out text with the training text as a dictionary.
"""

from __future__ import annotations

import importlib
import lzma
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tinylm.data.shards import Shard

MAX_ORDER = 5


class KneserNey:
    """An n-gram model of a shard's tokens: interpolated modified Kneser-Ney smoothing (Chen & Goodman 1999, section 3).

    N-grams do not cross document boundaries. The end-of-text token before a document is the context of its first token. The
    end-of-text token after it is counted like any other token. A k-gram is identified by its index among the sorted keys of
    order k. Its key encodes the index of its prefix, a (k-1)-gram, and its last token.
    """

    def __init__(self, shard: Shard, vocab_size: int, order: int = MAX_ORDER) -> None:
        self.order, self.vocab_size = order, vocab_size
        self._end_of_text = shard.end_of_text
        tokens = np.asarray(shard.tokens, dtype=np.int64)
        max_lengths = _max_ngram_lengths(tokens, self._end_of_text)
        self._keys: list[np.ndarray] = []
        first_positions = [np.unique(tokens, return_index=True)[1]]  # for each k, the position where each k-gram first occurs
        counts = [np.bincount(tokens, minlength=vocab_size).astype(float)]
        starting = [tokens.copy()]  # for each k, the k-gram that starts at each position, or -1
        for k in range(2, order + 1):
            longer = np.full(len(tokens), -1, dtype=np.int64)
            valid = np.flatnonzero((starting[-1] >= 0) & (max_lengths >= k))
            keys = starting[-1][valid] * vocab_size + tokens[valid + k - 1]
            unique, first, inverse, count = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
            longer[valid] = inverse
            starting.append(longer)
            self._keys.append(unique)
            first_positions.append(valid[first])
            counts.append(count.astype(float))
        self._levels = [
            _Level(
                counts[k - 1]
                if k == order
                else np.bincount(starting[k - 1][first_positions[k] + 1], minlength=len(counts[k - 1])).astype(float),
                None if k == 1 else self._keys[k - 2] // vocab_size,
                len(counts[k - 2]) if k > 1 else 1,
            )
            for k in range(1, order + 1)
        ]

    def logprobs(self, shard: Shard, order: int | None = None) -> np.ndarray:
        """Log-probability in nats of every token of a shard given the tokens before it, `(tokens,)`; NaN for end-of-text tokens."""
        order = order or self.order
        tokens = np.asarray(shard.tokens, dtype=np.int64)
        preceding = _preceding_tokens(tokens, self._end_of_text)
        starting = tokens  # the k-gram that starts at each position, or -1
        ending = [tokens]  # for each k, the k-gram that ends at each position, or -1
        for k in range(2, order + 1):
            longer = np.full(len(tokens), -1, dtype=np.int64)
            positions = max(len(tokens) - k + 1, 0)
            valid = np.flatnonzero(starting[:positions] >= 0)
            keys = starting[valid] * self.vocab_size + tokens[valid + k - 1]
            known_keys = self._keys[k - 2]
            indices = np.searchsorted(known_keys, keys).clip(max=max(len(known_keys) - 1, 0))
            known = known_keys[indices] == keys if len(known_keys) else np.zeros(len(keys), dtype=bool)
            longer[valid[known]] = indices[known]
            starting = longer
            shifted = np.full(len(tokens), -1, dtype=np.int64)
            shifted[k - 1 :] = longer[:positions]
            ending.append(shifted)
        probability = np.full(len(tokens), 1 / self.vocab_size)
        for k in range(1, order + 1):
            context = np.zeros(len(tokens), dtype=np.int64)
            if k > 1:
                context = np.full(len(tokens), -1, dtype=np.int64)
                context[1:] = ending[k - 2][:-1]
                context[preceding < k - 1] = -1
            probability = self._levels[k - 1].interpolate(probability, ending[k - 1], context)
        with np.errstate(divide="ignore"):
            logs = np.log(probability)
        logs[tokens == self._end_of_text] = np.nan
        return np.asarray(logs)


class _Level:
    """The n-grams of one order: their discounted counts, and the probability mass that each context assigns to the lower order."""

    def __init__(self, counts: np.ndarray, contexts: np.ndarray | None, size: int) -> None:
        contexts = np.zeros(len(counts), dtype=np.int64) if contexts is None else contexts
        n = [max(int((counts == times).sum()), 1) for times in (1, 2, 3, 4)]  # the number of n-grams that occur once, twice, ...
        y = n[0] / (n[0] + 2 * n[1])
        discounts = np.array([0.0, *(times - (times + 1) * y * n[times] / n[times - 1] for times in (1, 2, 3))]).clip(0, None)
        discounts[1:] = np.minimum(discounts[1:], (1, 2, 3))
        discounted = discounts[np.minimum(counts, 3).astype(np.int64)]
        self._kept = counts - discounted
        self._total = np.bincount(contexts, weights=counts, minlength=size)
        self._backoff = np.bincount(contexts, weights=discounted, minlength=size)

    def interpolate(self, lower: np.ndarray, ngrams: np.ndarray, contexts: np.ndarray) -> np.ndarray:
        """Interpolate with `lower`, the probabilities of the lower order. Where the context is unknown, return them unchanged."""
        known = contexts >= 0
        known[known] = self._total[contexts[known]] > 0
        total = np.where(known, self._total[np.where(known, contexts, 0)], 1.0)
        kept = np.where(ngrams >= 0, self._kept[np.where(ngrams >= 0, ngrams, 0)], 0.0)
        probabilities: np.ndarray = np.where(known, (kept + self._backoff[np.where(known, contexts, 0)] * lower) / total, lower)
        return probabilities


def _max_ngram_lengths(tokens: np.ndarray, end_of_text: int) -> np.ndarray:
    """Maximum length of an n-gram that starts at each position.

    The n-gram must not extend past the end-of-text token after the document.
    """
    boundaries = np.flatnonzero(tokens == end_of_text)
    following = np.searchsorted(boundaries, np.arange(len(tokens)), side="right")
    closing = np.append(boundaries, len(tokens) - 1)[following]
    return np.asarray(closing - np.arange(len(tokens)) + 1)


def _preceding_tokens(tokens: np.ndarray, end_of_text: int) -> np.ndarray:
    """Number of tokens that precede each token in its document, including the end-of-text token before the document."""
    boundaries = np.flatnonzero(tokens == end_of_text)
    opening = np.searchsorted(boundaries, np.arange(len(tokens)), side="left") - 1
    return np.where(opening >= 0, np.arange(len(tokens)) - boundaries[np.maximum(opening, 0)], np.arange(len(tokens)))


def kneser_ney_bits(train: Shard, heldout: Shard, vocab_size: int, size: int) -> dict[str, float]:
    """Bits per byte of a held-out text of `size` bytes under n-gram models of order 1 to `MAX_ORDER`, by name."""
    bits = {}
    for order in range(1, MAX_ORDER + 1):
        nats = -np.nansum(KneserNey(train, vocab_size, order).logprobs(heldout))
        bits[f"{order}-gram Kneser-Ney"] = float(nats) / math.log(2) / max(size, 1)
    return bits


def compressor_bits(train: bytes, heldout: bytes) -> dict[str, float]:
    """Bits per byte of the held-out text, compressed by xz and (if installed) zstd with the training text as a dictionary."""
    sizes = {"xz": _xz_size(train + heldout) - _xz_size(train)}
    zstd_size = _load_zstd()
    if zstd_size is not None:
        sizes["zstd"] = zstd_size(train, heldout)
    return {f"{name}, the training text as dictionary": 8 * size / max(len(heldout), 1) for name, size in sizes.items()}


def _xz_size(data: bytes) -> int:
    """Compressed size in bytes, at the highest preset and with a window that covers all of the data."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": min(max(len(data), 1 << 16), 1536 << 20)}]
    return len(lzma.compress(data, format=lzma.FORMAT_XZ, filters=filters))


def _import_optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _load_zstd() -> Callable[[bytes, bytes], int] | None:
    """Return a function (training text, held-out text) -> compressed size in bytes, or None if zstd is not installed.

    The function compresses at level 19 with a window that covers both texts.
    """
    zstd: Any = next((module for name in ("compression.zstd", "backports.zstd") if (module := _import_optional(name))), None)
    if zstd is None:
        return None
    parameters = zstd.CompressionParameter

    def size(train: bytes, heldout: bytes) -> int:
        window = min(max((len(train) + len(heldout)).bit_length(), 10), 30)
        options = {parameters.compression_level: 19, parameters.window_log: window}
        dictionary = zstd.ZstdDict(train, is_raw=True) if len(train) >= 8 else None
        return len(zstd.compress(heldout, options=options, zstd_dict=dictionary))

    return size

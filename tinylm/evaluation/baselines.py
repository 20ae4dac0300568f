"""What a number means: the same held-out text under models everyone understands, made from the same training text.

An n-gram model with modified Kneser-Ney smoothing predicts the same tokens as the network, each document by itself; xz and zstd
compress the held-out text with the training text as their dictionary. All are told in bits per byte.
"""

from __future__ import annotations

import importlib
import lzma
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tinylm.data.shards import Shard

ORDERS = 5


class KneserNey:
    """Interpolated modified Kneser-Ney (Chen & Goodman 1999, section 3) of orders up to `order` over a shard's tokens.

    n-grams stay inside their document; the end-of-text token before it is the first context, and the one after it is predicted
    like any other token.
    """

    def __init__(self, shard: Shard, vocab_size: int, order: int = ORDERS) -> None:
        self.order, self.vocab_size = order, vocab_size
        self._end = shard.end_of_text
        tokens = np.asarray(shard.tokens, dtype=np.int64)
        room = _room(tokens, self._end)
        self._keys: list[np.ndarray] = []
        starts = tokens.copy()  # which k-gram begins at each place; -1: none
        firsts, counts = [np.unique(tokens, return_index=True)[1]], [np.bincount(tokens, minlength=vocab_size).astype(float)]
        named = [starts]
        for k in range(2, order + 1):
            longer = np.full(len(tokens), -1, dtype=np.int64)
            valid = np.flatnonzero((named[-1] >= 0) & (room >= k))
            keys = named[-1][valid] * vocab_size + tokens[valid + k - 1]
            unique, first, inverse, count = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
            longer[valid] = inverse
            named.append(longer)
            self._keys.append(unique)
            firsts.append(valid[first])
            counts.append(count.astype(float))
        self._levels = [
            _Level(
                counts[k - 1]
                if k == order
                else np.bincount(named[k - 1][firsts[k] + 1], minlength=len(counts[k - 1])).astype(float),
                None if k == 1 else self._keys[k - 2] // vocab_size,
                len(counts[k - 2]) if k > 1 else 1,
            )
            for k in range(1, order + 1)
        ]

    def logprobs(self, shard: Shard, order: int | None = None) -> np.ndarray:
        """Natural log-probability of every token of a shard after those before it, (tokens,); NaN for end-of-text tokens."""
        order = order or self.order
        tokens = np.asarray(shard.tokens, dtype=np.int64)
        back = _back(tokens, self._end)
        starts, ending = tokens, [tokens]
        for k in range(2, order + 1):
            longer = np.full(len(tokens), -1, dtype=np.int64)
            reach = max(len(tokens) - k + 1, 0)
            valid = np.flatnonzero(starts[:reach] >= 0)
            keys = starts[valid] * self.vocab_size + tokens[valid + k - 1]
            at = np.searchsorted(self._keys[k - 2], keys).clip(max=max(len(self._keys[k - 2]) - 1, 0))
            found = self._keys[k - 2][at] == keys if len(self._keys[k - 2]) else np.zeros(len(keys), dtype=bool)
            longer[valid[found]] = at[found]
            starts = longer
            shifted = np.full(len(tokens), -1, dtype=np.int64)
            shifted[k - 1 :] = longer[:reach]
            ending.append(shifted)
        probability = np.full(len(tokens), 1 / self.vocab_size)
        for k in range(1, order + 1):
            context = np.zeros(len(tokens), dtype=np.int64)
            if k > 1:
                context = np.full(len(tokens), -1, dtype=np.int64)
                context[1:] = ending[k - 2][:-1]
                context[back < k - 1] = -1
            probability = self._levels[k - 1].interpolated(probability, ending[k - 1], context)
        with np.errstate(divide="ignore"):
            logs = np.log(probability)
        logs[tokens == self._end] = np.nan
        return np.asarray(logs)


class _Level:
    """One order: discounted counts of its n-grams, and what their contexts leave to the order below."""

    def __init__(self, counts: np.ndarray, contexts: np.ndarray | None, size: int) -> None:
        contexts = np.zeros(len(counts), dtype=np.int64) if contexts is None else contexts
        often = [max(int((counts == times).sum()), 1) for times in (1, 2, 3, 4)]
        y = often[0] / (often[0] + 2 * often[1])
        discounts = np.array([0.0, *(times - (times + 1) * y * often[times] / often[times - 1] for times in (1, 2, 3))]).clip(
            0, None
        )
        discounts[1:] = np.minimum(discounts[1:], (1, 2, 3))
        taken = discounts[np.minimum(counts, 3).astype(np.int64)]
        self._kept = counts - taken
        self._total = np.bincount(contexts, weights=counts, minlength=size)
        self._left = np.bincount(contexts, weights=taken, minlength=size)

    def interpolated(self, below: np.ndarray, grams: np.ndarray, contexts: np.ndarray) -> np.ndarray:
        """Probabilities at each place, where its context is known; else those of the order below."""
        known = contexts >= 0
        known[known] = self._total[contexts[known]] > 0
        total = np.where(known, self._total[np.where(known, contexts, 0)], 1.0)
        kept = np.where(grams >= 0, self._kept[np.where(grams >= 0, grams, 0)], 0.0)
        mixed: np.ndarray = np.where(known, (kept + self._left[np.where(known, contexts, 0)] * below) / total, below)
        return mixed


def _room(tokens: np.ndarray, end: int) -> np.ndarray:
    """How many tokens an n-gram that begins here may have: up to the end-of-text token that closes its document."""
    places = np.flatnonzero(tokens == end)
    following = np.searchsorted(places, np.arange(len(tokens)), side="right")
    closing = np.append(places, len(tokens) - 1)[following]
    return np.asarray(closing - np.arange(len(tokens)) + 1)


def _back(tokens: np.ndarray, end: int) -> np.ndarray:
    """How many tokens stand before this one in its document, the end-of-text token that opens it included."""
    places = np.flatnonzero(tokens == end)
    opening = np.searchsorted(places, np.arange(len(tokens)), side="left") - 1
    return np.where(opening >= 0, np.arange(len(tokens)) - places[np.maximum(opening, 0)], np.arange(len(tokens)))


def kneser_ney_bits(train: Shard, heldout: Shard, vocab_size: int, size: int) -> dict[str, float]:
    """Bits per byte of the held-out text under n-gram models of order 1 to 5, by name."""
    found = {}
    for order in range(1, ORDERS + 1):
        nats = -np.nansum(KneserNey(train, vocab_size, order).logprobs(heldout))
        found[f"{order}-gram Kneser-Ney"] = float(nats) / math.log(2) / max(size, 1)
    return found


def compressor_bits(train: bytes, heldout: bytes) -> dict[str, float]:
    """Bits per byte of the held-out text packed by xz and, where it is installed, zstd, which know the training text already."""
    packed = {"xz": _xz(train + heldout) - _xz(train)}
    zstd = _zstd()
    if zstd is not None:
        packed["zstd"] = zstd(train, heldout)
    return {f"{name}, the training text as dictionary": 8 * size / max(len(heldout), 1) for name, size in packed.items()}


def _xz(data: bytes) -> int:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": min(max(len(data), 1 << 16), 1536 << 20)}]
    return len(lzma.compress(data, format=lzma.FORMAT_XZ, filters=filters))


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _zstd() -> Callable[[bytes, bytes], int] | None:
    """Level 19 with a window over all of the training text."""
    zstd: Any = next((module for name in ("compression.zstd", "backports.zstd") if (module := _imported(name))), None)
    if zstd is None:
        return None
    parameters = zstd.CompressionParameter

    def size(train: bytes, heldout: bytes) -> int:
        window = min(max((len(train) + len(heldout)).bit_length(), 10), 30)
        options = {parameters.compression_level: 19, parameters.window_log: window}
        known = zstd.ZstdDict(train, is_raw=True) if len(train) >= 8 else None
        return len(zstd.compress(heldout, options=options, zstd_dict=known))

    return size

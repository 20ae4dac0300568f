"""The inner loops over words, n-grams and MinHash functions, compiled with numba."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinylm.jit import cached_njit

_START, _PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)
"""The constants of the hash function FNV-1a."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_SHIFT, _HALF = np.uint64(31), np.uint64(32)

_njit = cached_njit()


@_njit
def scan_words(codes: Any, classes: Any, letter: int, space: int) -> Any:
    """Find the words in a text of character codes. Words are separated by characters of the class `space`.

    `classes` contains the class of each character code. Returns (hash of each word, length of each word in characters, number of
    words that contain a character of the class `letter`).
    """
    hashes = np.empty(len(codes) // 2 + 1, dtype=np.uint64)
    lengths = np.empty(len(hashes), dtype=np.int64)
    count, with_letter, length = 0, 0, 0
    value, has_letter = _START, False
    for i in range(len(codes) + 1):
        kind = classes[codes[i]] if i < len(codes) else space
        if kind != space:
            value = (value ^ np.uint64(codes[i])) * _PRIME
            has_letter |= kind == letter
            length += 1
        elif length:
            hashes[count] = _mixed(value)
            lengths[count] = length
            with_letter += has_letter
            count += 1
            value, has_letter, length = _START, False, 0
    return hashes[:count].copy(), lengths[:count].copy(), with_letter


@_njit
def hash_ngrams(hashes: Any, length: int) -> Any:
    """See `Words.ngram_hashes`."""
    result = np.empty(max(len(hashes) - length + 1, 0), dtype=np.uint64)
    for start in range(len(result)):
        result[start] = _ngram(hashes, start, length)
    return result


@_njit
def top_ngram(hashes: Any, lengths: Any, length: int) -> Any:
    """See `Words.top_ngram`."""
    total = max(len(hashes) - length + 1, 0)
    if total == 0:
        return 0, 0
    keys, counts, firsts = _table(total), np.zeros(_size(total), dtype=np.int64), np.empty(_size(total), dtype=np.int64)
    best, first = 0, 0
    for start in range(total):
        key = _ngram(hashes, start, length)
        slot = _find(keys, key)
        if keys[slot] == 0:
            keys[slot], firsts[slot] = key, start
        counts[slot] += 1
        count = counts[slot]
        if count > best or (count == best and firsts[slot] < first):
            best, first = count, firsts[slot]
    return best, lengths[first : first + length].sum() + length - 1


@_njit
def repeated_characters(hashes: Any, lengths: Any, length: int) -> int:
    """See `Words.repeated_characters`."""
    total = max(len(hashes) - length + 1, 0)
    keys = _table(total)
    characters = start = 0
    while start < total:
        key = _ngram(hashes, start, length)
        slot = _find(keys, key)
        if keys[slot] == key:
            characters += lengths[start : start + length].sum()
            start += length
        else:
            keys[slot] = key
            start += 1
    return characters


@_njit
def minima(values: Any, factors: Any, offsets: Any) -> Any:
    """For each function, return the minimum of the higher 32 bits of factor * x + offset modulo 2**64 over all `values` x.

    All arguments are uint64, and the result is uint32 (functions,).
    """
    result = np.full(len(factors), 0xFFFFFFFF, dtype=np.uint32)
    for x in values:
        for i in range(len(factors)):
            result[i] = min(result[i], np.uint32((x * factors[i] + offsets[i]) >> _HALF))
    return result


@_njit
def _mixed(value: Any) -> Any:
    value = (value ^ (value >> _SHIFT)) * _MIX
    return value ^ (value >> _SHIFT)


@_njit
def _ngram(hashes: Any, start: int, length: int) -> Any:
    """Return the hash of an n-gram, which is never 0."""
    value = np.uint64(0)
    for i in range(start, start + length):
        value = value * _MULTIPLIER + hashes[i]
    return _mixed(value) | np.uint64(1)


@_njit
def _size(entries: int) -> int:
    """Return the size of a hash table: a power of 2 that is at least twice the number of entries."""
    size = 2
    while size < 2 * entries:
        size *= 2
    return size


@_njit
def _table(entries: int) -> Any:
    """Return an empty hash table. Empty slots are 0."""
    return np.zeros(_size(entries), dtype=np.uint64)


@_njit
def _find(keys: Any, key: Any) -> Any:
    """Return the slot of a key or, if it is missing, the slot where it belongs."""
    mask = len(keys) - 1
    slot = np.int64(key >> np.uint64(32)) & mask
    while keys[slot] != 0 and keys[slot] != key:
        slot = (slot + 1) & mask
    return slot

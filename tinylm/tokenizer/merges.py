"""Learn the merges of byte-pair encoding (BPE) from word counts.

Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units": every word starts as a sequence of characters.
The pair of neighboring symbols with the highest count is merged into a new symbol, until the vocabulary is large enough. Pairs
with equal counts are merged in the order of their ids, as in `tokenizers`.

For example, with the words `low` (5 times), `lower` (2), `newest` (6) and `widest` (3):

    e + s -> es      9 times: in newest and widest
    es + t -> est    9 times
    l + o -> lo      7 times: in low and lower
    lo + w -> low    7 times

WordPiece vocabularies (Schuster and Nakajima 2012, "Japanese and Korean Voice Search") are learned in the same way.

All words are stored in one array as linked lists of symbols. Merging a pair rewrites all its occurrences and updates the counts of
the neighboring pairs, so the cost is proportional to the number of occurrences. Counts are 64-bit integers.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinylm.tokenizer import kernel_loading
from tinylm.tokenizer.constants import PAIR_SHIFT
from tinylm.tokenizer.word_counts import WordCounts

_MASK = (1 << PAIR_SHIFT) - 1
_EXCLUDED = -(1 << 62)
"""The count that marks a pair that must not be merged."""


@dataclass
class Merges:
    """A learned vocabulary: the tokens in id order, starting with the alphabet, and the merges as pairs of ids."""

    tokens: list[str]
    pairs: list[tuple[int, int]] = field(default_factory=list)

    def as_text(self) -> list[tuple[str, str]]:
        """Return the merges as pairs of tokens."""
        return [(self.tokens[left], self.tokens[right]) for left, right in self.pairs]


def concatenate(left: str, right: str) -> str:
    return left + right


def learn(
    word_counts: WordCounts,
    alphabet: list[str],
    vocab_size: int,
    *,
    inner_alphabet: list[str] | None = None,
    min_frequency: int = 1,
    max_token_length: int | None = None,
    join: Callable[[str, str], str] = concatenate,
    reserved: Set[str] = frozenset(),
) -> Merges:
    """Learn merges until there are `vocab_size` tokens or no pair occurs at least `min_frequency` times.

    `alphabet` lists the characters that are tokens at the start of a word. `inner_alphabet` lists the tokens for the same
    characters inside a word, for example `##a` for `a` in WordPiece. By default, these tokens are the same. Characters that are not
    in the alphabet are never merged. Merges are skipped if the new token would be longer than `max_token_length` characters or is
    in `reserved`. `join` returns the token that results from merging two tokens.
    """
    tokens = [*alphabet, *(inner_alphabet or [])]
    symbols, starts = _symbols(word_counts, alphabet, inner_alphabet is not None)
    kernels = kernel_loading.kernels_if_worthwhile(len(symbols))
    pairs = (
        _Pairs(symbols, starts, word_counts.counts)
        if kernels is None
        else _CompiledPairs(kernels, symbols, starts, word_counts.counts)
    )
    learned = Merges(tokens)
    ids = {token: id for id, token in enumerate(tokens)}
    while len(tokens) < vocab_size:
        pair = pairs.best(max(1, min_frequency))
        if pair is None:
            break
        token = join(tokens[pair[0]], tokens[pair[1]])
        if token in reserved or (max_token_length is not None and len(token) > max_token_length):
            pairs.exclude(pair)
            continue
        id = ids.setdefault(token, len(tokens))
        if id == len(tokens):
            tokens.append(token)
        learned.pairs.append(pair)
        pairs.merge(pair, id)
    return learned


def _symbols(word_counts: WordCounts, alphabet: list[str], has_inner: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the symbol of each character in all words, int64 (characters,), and the start of each word, int64 (words,).

    A symbol is the character's index in `alphabet`, or -1 if the alphabet does not contain it. With `has_inner`, len(alphabet) is
    added to the symbols that do not begin a word.
    """
    codes = np.frombuffer("".join(word_counts.words).encode("utf-32-le"), dtype="<u4").astype(np.int64)
    known = np.array([ord(character) for character in alphabet], dtype=np.int64)
    order = np.argsort(known)
    index = np.minimum(np.searchsorted(known[order], codes), len(known) - 1)
    symbols = np.where(known[order][index] == codes, order[index], -1) if len(known) else np.full(len(codes), -1)
    lengths = np.fromiter(map(len, word_counts.words), dtype=np.int64, count=len(word_counts.words))
    starts = np.cumsum(lengths) - lengths
    if has_inner:
        inside = np.ones(len(symbols), dtype=bool)
        inside[starts] = False
        symbols = np.where(inside & (symbols >= 0), symbols + len(alphabet), symbols)
    return symbols, starts


def _linked(symbols: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return, for each position, the symbol, the positions of the next and previous symbols in the word, and the word's count.

    The position `len(symbols)` means that there is no neighbor. A negative symbol is not part of any pair.
    """
    size = len(symbols)
    following, preceding = np.arange(1, size + 2, dtype=np.int32), np.arange(-1, size, dtype=np.int32)
    following[starts[1:] - 1] = size
    following[size - 1 :] = size
    preceding[starts] = size
    preceding[size] = size
    weight = np.append(np.repeat(counts, np.diff(np.append(starts, size))), 0)
    return np.append(symbols, -1).astype(np.int32), following, preceding, weight


class _CompiledPairs:
    """`_Pairs` with compiled loops. Pairs are in a hash table, their positions in linked lists, and their counts in a heap."""

    def __init__(self, kernels: Any, symbols: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> None:
        self._kernels = kernels
        self._words = _linked(symbols, starts, counts)
        self._used = np.zeros(3, np.int64)  # numbers of table keys, list entries and heap items; see `kernels`
        entries = 3 * len(symbols) + 1  # a merge removes one symbol and adds at most two pairs
        self._lists = np.empty(entries, np.int32), np.empty(entries, np.int32)
        self._table = _pair_table(1 << 16)
        self._heap = np.empty(0, np.int64), np.empty(0, np.int64)
        self._reserve(min(len(np.unique(symbols)) ** 2, len(symbols)))
        kernels.count_pairs(self._words, self._table, self._lists, self._used)
        kernels.fill_heap(self._table, self._heap, self._used)

    def _reserve(self, n_pairs: int) -> None:
        """Grow the table and the heap so that `n_pairs` more pairs fit. The table stays at most half full."""
        size = len(self._table[0])
        while 2 * (int(self._used[0]) + n_pairs) > size:
            size *= 2
        if size > len(self._table[0]):
            larger = _pair_table(size)
            self._kernels.rehash(self._table, larger)
            self._table = larger
        counts, keys = self._heap
        if self._used[2] + n_pairs > len(keys):
            extra = np.empty(len(keys) + n_pairs, np.int64)
            self._heap = np.concatenate((counts, extra)), np.concatenate((keys, extra))

    def best(self, min_count: int) -> tuple[int, int] | None:
        """Return the pair to merge next, or None if no pair occurs at least `min_count` times."""
        key = int(self._kernels.best_pair(self._table, self._heap, self._used, min_count))
        return None if key < 0 else (key >> PAIR_SHIFT, key & _MASK)

    def exclude(self, pair: tuple[int, int]) -> None:
        """Prevent `best` from returning this pair again."""
        keys, counts = self._table[:2]
        counts[self._kernels.slot_of(keys, pair[0] << PAIR_SHIFT | pair[1])] = _EXCLUDED

    def merge(self, pair: tuple[int, int], new: int) -> None:
        """Replace all occurrences of a pair with the symbol `new`."""
        key = pair[0] << PAIR_SHIFT | pair[1]
        self._reserve(2 * int(self._table[2][self._kernels.slot_of(self._table[0], key)]))
        self._kernels.merge_pair(self._words, self._table, self._lists, self._used, self._heap, key, new)


def _pair_table(size: int) -> tuple[np.ndarray, ...]:
    """Create an empty hash table: keys (-1 if empty), counts, numbers of positions, and first list entries (-1 if empty)."""
    return np.full(size, -1, np.int64), np.zeros(size, np.int64), np.zeros(size, np.int32), np.full(size, -1, np.int32)


class _Pairs:
    """The count and the positions of every pair of neighboring symbols. A pair's position is the position of its left symbol."""

    def __init__(self, symbols: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> None:
        size = len(symbols)
        self._symbol, self._following, self._preceding, self._weight = _linked(symbols, starts, counts)
        self._is_merged = np.zeros(size + 1, dtype=bool)
        self._counts: dict[int, int] = {}
        self._positions: dict[int, list[np.ndarray]] = {}
        self._heap: list[tuple[int, int]] = []
        self._heap_min_count = 1 << 62
        """The heap does not contain pairs with lower counts."""
        left = np.flatnonzero((symbols >= 0) & (self._symbol[self._following[:size]] >= 0)).astype(np.int32)
        self._add(self._key(symbols[left], self._symbol[self._following[left]]), left)

    @staticmethod
    def _key(left: np.ndarray | int, right: np.ndarray | int) -> np.ndarray:
        return np.asarray(np.int64(left) << PAIR_SHIFT | right)

    def best(self, min_count: int) -> tuple[int, int] | None:
        """Return the pair to merge next, or None if no pair occurs at least `min_count` times.

        To keep the heap small, it contains only the most frequent pairs. When it is empty, it is refilled with a lower limit.
        """
        while True:
            while self._heap:
                count, key = heapq.heappop(self._heap)
                current = self._counts.get(key, 0)
                if current == -count:
                    return (key >> PAIR_SHIFT, key & _MASK) if current >= min_count else None
                if current >= self._heap_min_count:  # the count has changed since this item was pushed
                    heapq.heappush(self._heap, (-current, key))
            highest = max(self._counts.values(), default=0)
            if highest < min_count:
                return None
            self._heap_min_count = 1 + highest // 50
            self._heap = [(-count, key) for key, count in self._counts.items() if count >= self._heap_min_count]
            heapq.heapify(self._heap)

    def exclude(self, pair: tuple[int, int]) -> None:
        """Prevent `best` from returning this pair again."""
        key = pair[0] << PAIR_SHIFT | pair[1]
        self._counts[key] = _EXCLUDED

    def merge(self, pair: tuple[int, int], new: int) -> None:
        """Replace all occurrences of a pair with the symbol `new`: L a b R becomes L new R."""
        a, b = pair
        symbol, following, preceding = self._symbol, self._following, self._preceding
        key = a << PAIR_SHIFT | b
        del self._counts[key]
        A = np.concatenate(self._positions.pop(key))  # positions of a
        A = A[symbol[A] == a]
        B = following[A]  # positions of b
        still_b = symbol[B] == b
        A, B = A[still_b], B[still_b]
        if a == b:
            A, B = _without_overlaps(A, B)
        L, R = preceding[A], following[B]
        old_left, right = symbol[L], symbol[R]
        symbol[A], symbol[B] = new, -2
        following[A], preceding[R] = R, A
        self._is_merged[A] = True
        right_unmerged = ~self._is_merged[R]  # if the right neighbor was merged too, the pair is counted there
        self._is_merged[A] = False
        L = preceding[A]
        left = symbol[L]
        has_left, has_right = left >= 0, right_unmerged & (right >= 0)
        self._subtract(
            np.concatenate((self._key(old_left[has_left], a), self._key(b, right[has_right]))),
            np.concatenate((self._weight[A[has_left]], self._weight[A[has_right]])),
        )
        self._add(
            np.concatenate((self._key(left[has_left], new), self._key(new, right[has_right]))),
            np.concatenate((L[has_left], A[has_right])),
        )

    def _subtract(self, keys: np.ndarray, weights: np.ndarray) -> None:
        if not len(keys):
            return
        order = np.argsort(keys)
        keys = keys[order]
        firsts = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
        totals = np.add.reduceat(weights[order], firsts)
        for key, total in zip(keys[firsts].tolist(), totals.tolist(), strict=True):
            if key in self._counts:
                self._counts[key] -= total

    def _add(self, keys: np.ndarray, positions: np.ndarray) -> None:
        if not len(keys):
            return
        order = np.argsort(keys, kind="stable")
        keys, positions = keys[order], positions[order]
        firsts = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
        totals = np.add.reduceat(self._weight[positions], firsts)
        parts = np.split(positions, firsts[1:])
        for key, total, part in zip(keys[firsts].tolist(), totals.tolist(), parts, strict=True):
            if key in self._counts:
                self._counts[key] += total
                self._positions[key].append(part)
            else:
                self._counts[key] = total
                self._positions[key] = [part]
            if self._counts[key] >= self._heap_min_count:
                heapq.heappush(self._heap, (-self._counts[key], key))


def _without_overlaps(A: np.ndarray, B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keep only the left of two overlapping pairs, as in `aaa`. A and B are the positions of each pair's two symbols."""
    order = np.argsort(A)
    A, B = A[order], B[order]
    kept, previous = [], -1
    for index, (first, second) in enumerate(zip(A.tolist(), B.tolist(), strict=True)):
        if first != previous:
            kept.append(index)
            previous = second
    return A[kept], B[kept]

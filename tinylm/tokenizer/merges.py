"""Byte-pair encoding (Sennrich et al. 2016) from counted words: which pairs of symbols to merge, in what order.

The merge of highest count comes next; of equals, the pair whose tokens have the lower ids: the rule of `tokenizers`, with the same
result. All words lie in one array as a linked list of symbols. A merge rewrites every place of its pair at once and updates the
counts of the pairs beside them, so that its cost is that of the places it touches. Counts have 64 bits.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinylm.tokenizer.compiled import kernels
from tinylm.tokenizer.counting import Words

_SHIFT = 24
_MASK = (1 << _SHIFT) - 1
_NEVER = -(1 << 62)
"""The count of a pair that is not to be merged."""


def joined(left: str, right: str) -> str:
    return left + right


@dataclass
class Merges:
    """What was learned: `tokens[id]`, alphabet first, and the merges in order as pairs of ids."""

    tokens: list[str]
    pairs: list[tuple[int, int]] = field(default_factory=list)

    def written(self) -> list[tuple[str, str]]:
        return [(self.tokens[left], self.tokens[right]) for left, right in self.pairs]


def learn(
    words: Words,
    first: list[str],
    inner: list[str] | None,
    wanted: int,
    *,
    min_frequency: int = 1,
    longest: int | None = None,
    join: Callable[[str, str], str] = joined,
    reserved: Set[str] = frozenset(),
) -> Merges:
    """Merges until there are `wanted` tokens, or no pair is left that occurs `min_frequency` times.

    `first` are the single characters with which words begin, `inner` what they are called further inside (WordPiece; None: the
    same). Characters not among them are borders. No token is longer than `longest` characters or in `reserved`.
    """
    tokens = [*first, *(inner or [])]
    symbols, starts = _symbols(words, first, inner is not None)
    loops = kernels(len(symbols))
    state = _Places(symbols, starts, words.counts) if loops is None else _CompiledPlaces(loops, symbols, starts, words.counts)
    learned = Merges(tokens)
    ids = {token: id for id, token in enumerate(tokens)}
    while len(tokens) < wanted:
        pair = state.best(max(1, min_frequency))
        if pair is None:
            break
        token = join(tokens[pair[0]], tokens[pair[1]])
        if token in reserved or (longest is not None and len(token) > longest):
            state.drop(pair)
            continue
        id = ids.setdefault(token, len(tokens))
        if id == len(tokens):
            tokens.append(token)
        learned.pairs.append(pair)
        state.merge(pair, id)
    return learned


def _symbols(words: Words, alphabet: list[str], inner: bool) -> tuple[np.ndarray, np.ndarray]:
    """Every character's id in `alphabet`, -1 where it is not there, with len(alphabet) added inside words when `inner`."""
    codes = np.frombuffer("".join(words.texts).encode("utf-32-le"), dtype="<u4").astype(np.int64)
    known = np.array([ord(character) for character in alphabet], dtype=np.int64)
    order = np.argsort(known)
    at = np.minimum(np.searchsorted(known[order], codes), len(known) - 1)
    symbols = np.where(known[order][at] == codes, order[at], -1) if len(known) else np.full(len(codes), -1)
    lengths = np.fromiter(map(len, words.texts), dtype=np.int64, count=len(words.texts))
    starts = np.cumsum(lengths) - lengths
    if inner:
        inside = np.ones(len(symbols), dtype=bool)
        inside[starts] = False
        symbols = np.where(inside & (symbols >= 0), symbols + len(alphabet), symbols)
    return symbols, starts


def _linked(symbols: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, ...]:
    """Each symbol, the position of the next and of the one before in its word, and the word's count.

    Position N, one behind the last, stands for no neighbor; a symbol below 0 belongs to no pair.
    """
    size = len(symbols)
    following, before = np.arange(1, size + 2, dtype=np.int32), np.arange(-1, size, dtype=np.int32)
    following[starts[1:] - 1] = size
    following[size - 1 :] = size
    before[starts] = size
    before[size] = size
    weight = np.append(np.repeat(counts, np.diff(np.append(starts, size))), 0)
    return np.append(symbols, -1).astype(np.int32), following, before, weight


class _CompiledPlaces:
    """What `_Places` does, by machine code: pairs in a hash table, their places in lists, the counts in a heap."""

    def __init__(self, loops: Any, symbols: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> None:
        self._loops = loops
        self._words = _linked(symbols, starts, counts)
        self._used = np.zeros(3, np.int64)
        entries = 3 * len(symbols) + 1  # each merge takes a symbol away and makes two pairs at most
        self._lists = np.empty(entries, np.int32), np.empty(entries, np.int32)
        self._table = _pair_table(1 << 16)
        self._heap = np.empty(0, np.int64), np.empty(0, np.int64)
        self._reserve(min(len(np.unique(symbols)) ** 2, len(symbols)))
        loops.begin(self._words, self._table, self._lists, self._used)
        loops.fill_heap(self._table, self._heap, self._used)

    def _reserve(self, more: int) -> None:
        """Have room for so many more pairs: the table at most half full."""
        size = len(self._table[0])
        while 2 * (int(self._used[0]) + more) > size:
            size *= 2
        if size > len(self._table[0]):
            larger = _pair_table(size)
            self._loops.rehash(self._table, larger)
            self._table = larger
        counts, keys = self._heap
        if self._used[2] + more > len(keys):
            room = np.empty(len(keys) + more, np.int64)
            self._heap = np.concatenate((counts, room)), np.concatenate((keys, room))

    def best(self, least: int) -> tuple[int, int] | None:
        """The pair to merge next, or None when none occurs `least` times."""
        key = int(self._loops.best(self._table, self._heap, self._used, least))
        return None if key < 0 else (key >> _SHIFT, key & _MASK)

    def drop(self, pair: tuple[int, int]) -> None:
        """Never offer a pair again."""
        keys, counts = self._table[:2]
        counts[self._loops.slot_of(keys, pair[0] << _SHIFT | pair[1])] = _NEVER

    def merge(self, pair: tuple[int, int], new: int) -> None:
        """Write `new` in every place of a pair."""
        key = pair[0] << _SHIFT | pair[1]
        self._reserve(2 * int(self._table[2][self._loops.slot_of(self._table[0], key)]))
        self._loops.merge(self._words, self._table, self._lists, self._used, self._heap, key, new)


def _pair_table(size: int) -> tuple[np.ndarray, ...]:
    """Keys (-1: none), counts, numbers of places, the first of them."""
    return np.full(size, -1, np.int64), np.zeros(size, np.int64), np.zeros(size, np.int32), np.full(size, -1, np.int32)


class _Places:
    """Where every pair stands, in arrays."""

    def __init__(self, symbols: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> None:
        size = len(symbols)
        self._symbol, self._next, self._before, self._weight = _linked(symbols, starts, counts)
        self._marked = np.zeros(size + 1, dtype=bool)
        self._counts: dict[int, int] = {}
        self._places: dict[int, list[np.ndarray]] = {}
        self._heap: list[tuple[int, int]] = []
        self._floor = 1 << 62
        left = np.flatnonzero((symbols >= 0) & (self._symbol[self._next[:size]] >= 0)).astype(np.int32)
        self._add(self._key(symbols[left], self._symbol[self._next[left]]), left)

    @staticmethod
    def _key(left: np.ndarray | int, right: np.ndarray | int) -> np.ndarray:
        return np.asarray(np.int64(left) << _SHIFT | right)

    def best(self, least: int) -> tuple[int, int] | None:
        """The pair to merge next, or None when none occurs `least` times. Pairs below a floor wait until it is reached."""
        while True:
            while self._heap:
                count, key = heapq.heappop(self._heap)
                now = self._counts.get(key, 0)
                if now == -count:
                    return (key >> _SHIFT, key & _MASK) if now >= least else None
                if now >= self._floor:
                    heapq.heappush(self._heap, (-now, key))
            waiting = max(self._counts.values(), default=0)
            if waiting < least:
                return None
            self._floor = 1 + waiting // 50
            self._heap = [(-count, key) for key, count in self._counts.items() if count >= self._floor]
            heapq.heapify(self._heap)

    def drop(self, pair: tuple[int, int]) -> None:
        """Never offer a pair again."""
        key = pair[0] << _SHIFT | pair[1]
        self._counts[key] = _NEVER

    def merge(self, pair: tuple[int, int], new: int) -> None:
        """Write `new` in every place of a pair."""
        a, b = pair
        symbol, following, before = self._symbol, self._next, self._before
        key = a << _SHIFT | b
        del self._counts[key]
        P = np.concatenate(self._places.pop(key))  # the places of a
        P = P[symbol[P] == a]
        Q = following[P]  # the places of b
        here = symbol[Q] == b
        P, Q = P[here], Q[here]
        if a == b:
            P, Q = _without_overlaps(P, Q)
        L, R = before[P], following[Q]
        was_left, right = symbol[L], symbol[R]
        symbol[P], symbol[Q] = new, -2
        following[P], before[R] = R, P
        self._marked[P] = True
        alone = ~self._marked[R]  # a place whose right neighbor is merged too is counted from there
        self._marked[P] = False
        L = before[P]
        left = symbol[L]
        has_left, has_right = left >= 0, alone & (right >= 0)
        self._take(
            np.concatenate((self._key(was_left[has_left], a), self._key(b, right[has_right]))),
            np.concatenate((self._weight[P[has_left]], self._weight[P[has_right]])),
        )
        self._add(
            np.concatenate((self._key(left[has_left], new), self._key(new, right[has_right]))),
            np.concatenate((L[has_left], P[has_right])),
        )

    def _take(self, keys: np.ndarray, weights: np.ndarray) -> None:
        if not len(keys):
            return
        order = np.argsort(keys)
        keys = keys[order]
        firsts = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
        totals = np.add.reduceat(weights[order], firsts)
        for key, total in zip(keys[firsts].tolist(), totals.tolist(), strict=True):
            if key in self._counts:
                self._counts[key] -= total

    def _add(self, keys: np.ndarray, places: np.ndarray) -> None:
        if not len(keys):
            return
        order = np.argsort(keys, kind="stable")
        keys, places = keys[order], places[order]
        firsts = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
        totals = np.add.reduceat(self._weight[places], firsts)
        parts = np.split(places, firsts[1:])
        for key, total, part in zip(keys[firsts].tolist(), totals.tolist(), parts, strict=True):
            if key in self._counts:
                self._counts[key] += total
                self._places[key].append(part)
            else:
                self._counts[key] = total
                self._places[key] = [part]
            if self._counts[key] >= self._floor:
                heapq.heappush(self._heap, (-self._counts[key], key))


def _without_overlaps(P: np.ndarray, Q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of aaa, only the first two: from left to right each symbol is merged once."""
    order = np.argsort(P)
    P, Q = P[order], Q[order]
    kept, taken = [], -1
    for index, (first, second) in enumerate(zip(P.tolist(), Q.tolist(), strict=True)):
        if first != taken:
            kept.append(index)
            taken = second
    return P[kept], Q[kept]

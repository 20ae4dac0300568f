"""The inner loops of finding chunks, and of learning merges, compiled by numba: what `chunks`, `splits` and `merges` do in arrays.

Everything here gives what the array operations give, number for number; `tinylm.tokenizer.compiled` decides when it is loaded.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinylm.jit import compiled
from tinylm.tokenizer.chunks import MULTIPLIERS

SHIFT = 24
"""A pair of ids is left << SHIFT | right."""
EMPTY = -1
_M0, _M1, _M2 = MULTIPLIERS


_compiled = compiled()


@_compiled
def find_borders(text: Any, before: Any, after: Any, wide: Any, graphic: Any, lines: bool, found: Any) -> int:
    """Write the borders of `text` (bytes) into `found`; how many. See `splits.Borders`."""
    count = 0
    for i in range(1, len(text)):
        left = text[i - 1]
        if lines and left == 10:
            j = i
            while j < len(text) and text[j] == 32:
                j += 1
            at = j < len(text) and graphic[text[j]]
        else:
            at = (before[left] & after[text[i]]) != 0
            if at and left >= 128 and i >= 2:
                at = not wide[np.int64(text[i - 2]) << 8 | np.int64(left)]
        if at:
            found[count] = i
            count += 1
    return count


@_compiled
def _slot_of_chunk(slots: Any, packed: Any, lengths: Any, length: int, first: Any, second: Any, third: Any) -> Any:
    """Where a chunk's number stands, or will."""
    hashed = np.uint64(length) * _M1
    hashed = (hashed ^ first) * _M0
    hashed ^= hashed >> np.uint64(29)
    hashed = (hashed ^ second) * _M1
    hashed ^= hashed >> np.uint64(29)
    hashed = (hashed ^ third) * _M2
    hashed ^= hashed >> np.uint64(29)
    mask = len(slots) - 1
    slot = np.int64(hashed & np.uint64(mask))
    while True:
        number = slots[slot]
        if number < 0 or (
            lengths[number] == length and packed[0, number] == first and packed[1, number] == second and packed[2, number] == third
        ):
            return slot
        slot = (slot + 1) & mask


@_compiled
def index_chunks(slots: Any, packed: Any, lengths: Any, count: int) -> None:
    """Enter the first `count` numbers, as far as they are of short chunks, into `slots`, which is all -1."""
    for number in range(count):
        if lengths[number] >= 0:
            slot = _slot_of_chunk(slots, packed, lengths, lengths[number], packed[0, number], packed[1, number], packed[2, number])
            slots[slot] = number


@_compiled
def number_chunks(
    text: Any, starts: Any, slots: Any, packed: Any, lengths: Any, known: int, found: Any, new: Any, long: Any
) -> Any:
    """The number of each chunk of `text` into `found`; chunks not met before get the numbers from `known` on.

    Into `new` which chunks those are, and into `long` which are longer than 24 bytes and have no number yet; how many of both.
    See `chunks.ChunkIndex`.
    """
    fresh, others, last = 0, 0, len(starts) - 1
    for chunk in range(len(starts)):
        start = starts[chunk]
        length = (starts[chunk + 1] if chunk < last else len(text)) - start
        if length > 24:
            long[others] = chunk
            others += 1
            continue
        first, second, third = np.uint64(0), np.uint64(0), np.uint64(0)
        for i in range(min(length, 8)):
            first |= np.uint64(text[start + i]) << np.uint64(8 * i)
        for i in range(8, min(length, 16)):
            second |= np.uint64(text[start + i]) << np.uint64(8 * (i - 8))
        for i in range(16, length):
            third |= np.uint64(text[start + i]) << np.uint64(8 * (i - 16))
        slot = _slot_of_chunk(slots, packed, lengths, length, first, second, third)
        if slots[slot] < 0:
            number = known + fresh
            slots[slot], lengths[number] = number, length
            packed[0, number], packed[1, number], packed[2, number] = first, second, third
            new[fresh] = chunk
            fresh += 1
        found[chunk] = slots[slot]
    return fresh, others


@_compiled
def gather(flat: Any, starts: Any, sizes: Any, numbers: Any, into: Any) -> None:
    """The ids of chunks, one after another: `flat[starts[n] : starts[n] + sizes[n]]` for each number."""
    at = 0
    for i in range(len(numbers)):
        start = starts[numbers[i]]
        for j in range(sizes[numbers[i]]):
            into[at] = flat[start + j]
            at += 1


# Learning merges. `words`: each symbol, the position of the next and of the one before, and its weight. `table`: the keys of
# pairs, their counts, how many entries they have, and the first of those. `lists`: an entry's place, and the next entry. `heap`:
# counts and keys. `used`: how many keys, entries, and members of the heap there are.


@_compiled
def slot_of(keys: Any, key: int) -> Any:
    """Where a key is, or would be."""
    mask = len(keys) - 1
    slot = np.int64((np.uint64(key) * _M0) >> np.uint64(32)) & mask
    while keys[slot] != key and keys[slot] != EMPTY:
        slot = (slot + 1) & mask
    return slot


@_compiled
def _before(heap: Any, i: int, j: int) -> Any:
    """Whether i comes before j: the higher count, and of equals the lower key."""
    counts, keys = heap
    return counts[i] > counts[j] if counts[i] != counts[j] else keys[i] < keys[j]


@_compiled
def _swap(heap: Any, i: int, j: int) -> None:
    counts, keys = heap
    counts[i], counts[j] = counts[j], counts[i]
    keys[i], keys[j] = keys[j], keys[i]


@_compiled
def _push(heap: Any, used: Any, count: int, key: int) -> None:
    i = used[2]
    used[2] += 1
    heap[0][i], heap[1][i] = count, key
    while i > 0 and _before(heap, i, (i - 1) // 2):
        _swap(heap, i, (i - 1) // 2)
        i = (i - 1) // 2


@_compiled
def _pop(heap: Any, used: Any) -> None:
    """Take the first away."""
    used[2] -= 1
    size = used[2]
    _swap(heap, 0, size)
    i = 0
    while True:
        child = 2 * i + 1
        if child >= size:
            return
        if child + 1 < size and _before(heap, child + 1, child):
            child += 1
        if not _before(heap, child, i):
            return
        _swap(heap, child, i)
        i = child


@_compiled
def _add(table: Any, lists: Any, used: Any, key: int, weight: int, place: int) -> None:
    """Count a pair at a place."""
    keys, counts, sizes, heads = table
    slot = slot_of(keys, key)
    if keys[slot] == EMPTY:
        keys[slot] = key
        used[0] += 1
    counts[slot] += weight
    sizes[slot] += 1
    entry = used[1]
    used[1] += 1
    lists[0][entry], lists[1][entry] = place, heads[slot]
    heads[slot] = entry


@_compiled
def begin(words: Any, table: Any, lists: Any, used: Any) -> None:
    """Count the pairs of all places."""
    symbol, following, _, weight = words
    for place in range(len(symbol) - 1):
        left, right = symbol[place], symbol[following[place]]
        if left >= 0 and right >= 0:
            _add(table, lists, used, np.int64(left) << SHIFT | right, weight[place], place)


@_compiled
def fill_heap(table: Any, heap: Any, used: Any) -> None:
    for slot in range(len(table[0])):
        if table[0][slot] != EMPTY and table[1][slot] > 0:
            _push(heap, used, table[1][slot], table[0][slot])


@_compiled
def rehash(table: Any, larger: Any) -> None:
    """Everything into larger tables."""
    keys, counts, sizes, heads = table
    for slot in range(len(keys)):
        if keys[slot] != EMPTY:
            other = slot_of(larger[0], keys[slot])
            larger[0][other], larger[1][other] = keys[slot], counts[slot]
            larger[2][other], larger[3][other] = sizes[slot], heads[slot]


@_compiled
def best(table: Any, heap: Any, used: Any, least: int) -> Any:
    """The key of the pair to merge next, or -1 where none occurs `least` times."""
    while used[2] > 0:
        count, key = heap[0][0], heap[1][0]
        now = table[1][slot_of(table[0], key)]
        if now == count:
            return key if now >= least else EMPTY
        _pop(heap, used)
        if 0 < now < count:
            _push(heap, used, now, key)
    return EMPTY


@_compiled
def merge(words: Any, table: Any, lists: Any, used: Any, heap: Any, key: int, new: int) -> None:
    """Write `new` in every place of a pair, from left to right, and count the pairs beside."""
    symbol, following, before, weight = words
    keys, counts, sizes, heads = table
    a, b = key >> SHIFT, key & ((1 << SHIFT) - 1)
    slot = slot_of(keys, key)
    at = np.empty(sizes[slot], np.int32)
    entry, size = heads[slot], 0
    while entry >= 0:
        place = lists[0][entry]
        if symbol[place] == a:
            at[size] = place
            size += 1
        entry = lists[1][entry]
    at = at[:size]
    if a == b:
        at = np.sort(at)
    heads[slot], sizes[slot] = -1, 0
    touched, pushes = np.empty(2 * size, np.int64), 0
    for place in at:
        other = following[place]
        if symbol[place] != a or symbol[other] != b:
            continue
        left, right = before[place], following[other]
        x, y = np.int64(symbol[left]), np.int64(symbol[right])
        symbol[place], symbol[other] = new, -2
        following[place], before[right] = right, place
        if x >= 0:
            counts[slot_of(keys, x << SHIFT | a)] -= weight[place]
            touched[pushes] = x << SHIFT | new
            _add(table, lists, used, touched[pushes], weight[place], left)
            pushes += 1
        if y >= 0:
            counts[slot_of(keys, b << SHIFT | y)] -= weight[place]
            touched[pushes] = new << SHIFT | y
            _add(table, lists, used, touched[pushes], weight[place], place)
            pushes += 1
    counts[slot] = 0
    changed = np.sort(touched[:pushes])
    for i in range(pushes):
        if i == 0 or changed[i] != changed[i - 1]:
            now = counts[slot_of(keys, changed[i])]
            if now > 0:
                _push(heap, used, now, changed[i])

"""The inner loops that find chunks and learn merges, compiled with numba.

They return the same results as the NumPy code in `split_points`, `chunks`, `encoding` and `merges`. `kernel_loading` decides
when they are used.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinylm.jit import cached_njit
from tinylm.tokenizer.constants import HASH_MULTIPLIERS, PACKED_WORDS, PAIR_SHIFT

_MAX_PACKED_BYTES = 8 * PACKED_WORDS
_M0, _M1, _M2 = HASH_MULTIPLIERS
_EMPTY = -1
"""The key of an empty slot in a pair table."""


_njit = cached_njit()


@_njit
def find_split_points(
    text: Any, class_bits: Any, allowed_bits: Any, wide_space: Any, visible: Any, before_line_starts: bool, positions: Any
) -> int:
    """Write the split points of `text` (bytes) into `positions` and return their number. See `split_points.SplitPoints`."""
    count = 0
    for i in range(1, len(text)):
        left = text[i - 1]
        if before_line_starts and left == 10:
            j = i
            while j < len(text) and text[j] == 32:
                j += 1
            is_split = j < len(text) and visible[text[j]]
        else:
            is_split = (class_bits[left] & allowed_bits[text[i]]) != 0
            if is_split and left >= 128 and i >= 2:
                is_split = not wide_space[np.int64(text[i - 2]) << 8 | np.int64(left)]
        if is_split:
            positions[count] = i
            count += 1
    return count


@_njit
def _slot_of_chunk(slots: Any, packed: Any, lengths: Any, length: int, first: Any, second: Any, third: Any) -> Any:
    """Return the slot that contains a chunk's number, or the empty slot where it belongs."""
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


@_njit
def index_chunks(slots: Any, packed: Any, lengths: Any, count: int) -> None:
    """Insert the first `count` chunks, except those too long to be packed, into `slots`. All slots must be -1."""
    for number in range(count):
        if lengths[number] >= 0:
            slot = _slot_of_chunk(slots, packed, lengths, lengths[number], packed[0, number], packed[1, number], packed[2, number])
            slots[slot] = number


@_njit
def number_chunks(
    text: Any, starts: Any, slots: Any, packed: Any, lengths: Any, n_known: int, numbers: Any, new: Any, long: Any
) -> Any:
    """Write the number of each chunk of `text` into `numbers`. New chunks are numbered from `n_known`.

    Also write the indices of new chunks into `new`. Chunks that are too long to be packed are not numbered; their indices are
    written into `long`. Return the number of new chunks and the number of long chunks. See `chunks.ChunkIndex`.
    """
    n_new, n_long, last = 0, 0, len(starts) - 1
    for chunk in range(len(starts)):
        start = starts[chunk]
        length = (starts[chunk + 1] if chunk < last else len(text)) - start
        if length > _MAX_PACKED_BYTES:
            long[n_long] = chunk
            n_long += 1
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
            number = n_known + n_new
            slots[slot], lengths[number] = number, length
            packed[0, number], packed[1, number], packed[2, number] = first, second, third
            new[n_new] = chunk
            n_new += 1
        numbers[chunk] = slots[slot]
    return n_new, n_long


@_njit
def gather_ids(flat: Any, starts: Any, sizes: Any, numbers: Any, ids: Any) -> None:
    """Concatenate the ids of chunks into `ids`: `flat[starts[n] : starts[n] + sizes[n]]` for each chunk number n."""
    position = 0
    for i in range(len(numbers)):
        start = starts[numbers[i]]
        for j in range(sizes[numbers[i]]):
            ids[position] = flat[start + j]
            position += 1


# Learning merges. The functions below share these arguments, which `merges._CompiledPairs` creates:
#
# words   (symbol, following, preceding, weight): for each position, the symbol, the neighbors' positions and the word's count
# table   (keys, counts, sizes, heads): a hash table of pairs, with the count, the number of positions and the first list entry
# lists   (positions, next entries): linked lists of the positions where each pair occurs
# heap    (counts, keys): a binary heap of pairs, highest count first, which may contain outdated items
# used    the numbers of table keys, list entries and heap items


@_njit
def slot_of(keys: Any, key: int) -> Any:
    """Return the slot that contains a key, or the empty slot where it belongs."""
    mask = len(keys) - 1
    slot = np.int64((np.uint64(key) * _M0) >> np.uint64(32)) & mask
    while keys[slot] != key and keys[slot] != _EMPTY:
        slot = (slot + 1) & mask
    return slot


@_njit
def _comes_before(heap: Any, i: int, j: int) -> Any:
    """Whether item i comes before item j: it has a higher count, or an equal count and a lower key."""
    counts, keys = heap
    return counts[i] > counts[j] if counts[i] != counts[j] else keys[i] < keys[j]


@_njit
def _swap(heap: Any, i: int, j: int) -> None:
    counts, keys = heap
    counts[i], counts[j] = counts[j], counts[i]
    keys[i], keys[j] = keys[j], keys[i]


@_njit
def _push(heap: Any, used: Any, count: int, key: int) -> None:
    i = used[2]
    used[2] += 1
    heap[0][i], heap[1][i] = count, key
    while i > 0 and _comes_before(heap, i, (i - 1) // 2):
        _swap(heap, i, (i - 1) // 2)
        i = (i - 1) // 2


@_njit
def _pop(heap: Any, used: Any) -> None:
    """Remove the first item."""
    used[2] -= 1
    size = used[2]
    _swap(heap, 0, size)
    i = 0
    while True:
        child = 2 * i + 1
        if child >= size:
            return
        if child + 1 < size and _comes_before(heap, child + 1, child):
            child += 1
        if not _comes_before(heap, child, i):
            return
        _swap(heap, child, i)
        i = child


@_njit
def _add_pair(table: Any, lists: Any, used: Any, key: int, weight: int, position: int) -> None:
    """Count an occurrence of a pair at `position`, in a word whose count is `weight`."""
    keys, counts, sizes, heads = table
    slot = slot_of(keys, key)
    if keys[slot] == _EMPTY:
        keys[slot] = key
        used[0] += 1
    counts[slot] += weight
    sizes[slot] += 1
    entry = used[1]
    used[1] += 1
    lists[0][entry], lists[1][entry] = position, heads[slot]
    heads[slot] = entry


@_njit
def count_pairs(words: Any, table: Any, lists: Any, used: Any) -> None:
    """Count the pairs at all positions."""
    symbol, following, _, weight = words
    for position in range(len(symbol) - 1):
        left, right = symbol[position], symbol[following[position]]
        if left >= 0 and right >= 0:
            _add_pair(table, lists, used, np.int64(left) << PAIR_SHIFT | right, weight[position], position)


@_njit
def fill_heap(table: Any, heap: Any, used: Any) -> None:
    for slot in range(len(table[0])):
        if table[0][slot] != _EMPTY and table[1][slot] > 0:
            _push(heap, used, table[1][slot], table[0][slot])


@_njit
def rehash(table: Any, larger: Any) -> None:
    """Copy a table into a larger, empty one."""
    keys, counts, sizes, heads = table
    for slot in range(len(keys)):
        if keys[slot] != _EMPTY:
            new_slot = slot_of(larger[0], keys[slot])
            larger[0][new_slot], larger[1][new_slot] = keys[slot], counts[slot]
            larger[2][new_slot], larger[3][new_slot] = sizes[slot], heads[slot]


@_njit
def best_pair(table: Any, heap: Any, used: Any, min_count: int) -> Any:
    """Return the key of the pair to merge next, or -1 if no pair occurs at least `min_count` times."""
    while used[2] > 0:
        count, key = heap[0][0], heap[1][0]
        current = table[1][slot_of(table[0], key)]
        if current == count:
            return key if current >= min_count else _EMPTY
        _pop(heap, used)  # the count has changed since this item was pushed
        if 0 < current < count:
            _push(heap, used, current, key)
    return _EMPTY


@_njit
def merge_pair(words: Any, table: Any, lists: Any, used: Any, heap: Any, key: int, new: int) -> None:
    """Replace all occurrences of a pair with the symbol `new`, from left to right, and update the counts of neighboring pairs."""
    symbol, following, preceding, weight = words
    keys, counts, sizes, heads = table
    a, b = key >> PAIR_SHIFT, key & ((1 << PAIR_SHIFT) - 1)
    slot = slot_of(keys, key)
    positions = np.empty(sizes[slot], np.int32)
    entry, size = heads[slot], 0
    while entry >= 0:
        position = lists[0][entry]
        if symbol[position] == a:
            positions[size] = position
            size += 1
        entry = lists[1][entry]
    positions = positions[:size]
    if a == b:
        positions = np.sort(positions)  # in `aaa`, the first two symbols are merged
    heads[slot], sizes[slot] = -1, 0
    new_keys, n_new = np.empty(2 * size, np.int64), 0
    for position in positions:
        second = following[position]
        if symbol[position] != a or symbol[second] != b:
            continue
        left, right = preceding[position], following[second]
        left_symbol, right_symbol = np.int64(symbol[left]), np.int64(symbol[right])
        symbol[position], symbol[second] = new, -2
        following[position], preceding[right] = right, position
        if left_symbol >= 0:
            counts[slot_of(keys, left_symbol << PAIR_SHIFT | a)] -= weight[position]
            new_keys[n_new] = left_symbol << PAIR_SHIFT | new
            _add_pair(table, lists, used, new_keys[n_new], weight[position], left)
            n_new += 1
        if right_symbol >= 0:
            counts[slot_of(keys, b << PAIR_SHIFT | right_symbol)] -= weight[position]
            new_keys[n_new] = new << PAIR_SHIFT | right_symbol
            _add_pair(table, lists, used, new_keys[n_new], weight[position], position)
            n_new += 1
    counts[slot] = 0
    changed = np.sort(new_keys[:n_new])
    for i in range(n_new):
        if i == 0 or changed[i] != changed[i - 1]:
            current = counts[slot_of(keys, changed[i])]
            if current > 0:
                _push(heap, used, current, changed[i])

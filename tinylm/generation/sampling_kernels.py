"""The loops of `tinylm.generation.fast_sampling` in numba. Arrays are pointers, because numba would count references to arrays.

Legend: `B` rows, `V` vocabulary, `K` most likely tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from tinylm.jit import cached_njit, pointer_cast

_floats, _doubles = pointer_cast(np.float32), pointer_cast(np.float64)
_ids, _bits = pointer_cast(np.int64), pointer_cast(np.int32)
_compiled = cached_njit()


def choose(records: Any) -> None:
    """Choose one id per row, given a pointer to a `SAMPLING` record. `NativeFunction` compiles this function."""
    record = carray(records, 1)[0]
    uniforms, chosen = _doubles(record.uniforms), _ids(record.chosen)
    for row in range(record.rows):
        scores = record.scores + row * record.vocab_size * 4
        if record.top_k == 0:
            chosen[row] = _sample(_floats(scores), record.vocab_size, uniforms[row])
        else:
            ids, weights = _ids(record.ids), _doubles(record.weights)
            _select(_bits(scores), record.vocab_size, record.top_k, _bits(record.keys), ids)
            _to_weights(_floats(scores), record.top_k, record.temperature, ids, weights)
            chosen[row] = ids[_sample_largest_first(weights, record.top_k, uniforms[row])]


@_compiled
def _sample(probabilities: Any, size: Any, uniform: Any) -> Any:
    """Sample an id by inverting the cumulative distribution of `probabilities` (V,)."""
    total, cumulative, chosen = 0.0, 0.0, 0
    for id in range(size):
        total += np.float64(probabilities[id])
    target = uniform * total
    for id in range(size):
        cumulative += np.float64(probabilities[id])
        chosen = id
        if cumulative > target:
            break
    return chosen


@_compiled
def _threshold(keys: Any, count: Any, size: Any) -> Any:
    """Return a threshold such that exactly `size` of `count` keys are greater than or equal to it.

    If ties make this impossible, return the largest threshold that at least `size` keys reach. Uses bisection.
    """
    low, high = keys[0], keys[0]
    for i in range(count):
        low, high = min(low, keys[i]), max(high, keys[i])
    while low < high:
        middle = np.int32((np.int64(low) + np.int64(high) + 1) >> 1)
        reached = np.int32(0)
        for i in range(count):
            reached = np.int32(reached + np.int32(keys[i] >= middle))
        if reached == size:
            return middle
        if reached > size:
            low = middle
        else:
            high = np.int32(middle - np.int32(1))
    return low


@_compiled
def _select(bits: Any, count: Any, size: Any, keys: Any, ids: Any) -> None:
    """Write the ids of the `size` largest logits to `ids` (K,). `bits` (V,) are the logits reinterpreted as integers."""
    for id in range(count):  # integers that sort in the same order as the logits
        keys[id] = bits[id] ^ np.int32((bits[id] >> np.int32(31)) & np.int32(0x7FFFFFFF))
    threshold, found = _threshold(keys, count, size), 0
    for id in range(count):
        if keys[id] > threshold:
            ids[found] = id
            found += 1
    for id in range(count):  # among equal logits, lower ids come first
        if found == size:
            break
        if keys[id] == threshold:
            ids[found] = id
            found += 1


@_compiled
def _to_weights(logits: Any, size: Any, temperature: Any, ids: Any, weights: Any) -> None:
    """Write exp((logit - largest logit) / temperature) of each id to `weights` (K,)."""
    largest = np.float64(logits[ids[0]])
    for i in range(size):
        largest = max(largest, np.float64(logits[ids[i]]))
    for i in range(size):
        weights[i] = np.exp((np.float64(logits[ids[i]]) - largest) / temperature)


@_compiled
def _sample_largest_first(weights: Any, size: Any, uniform: Any) -> Any:
    """Sample an index of `weights` (K,) by subtracting the weights, largest first, until the target is negative.

    Used weights are overwritten.
    """
    total = 0.0
    for i in range(size):
        total += weights[i]
    target, choice = uniform * total, 0
    for _ in range(size):
        likeliest = 0
        for i in range(1, size):
            if weights[i] > weights[likeliest]:
                likeliest = i
        if not weights[likeliest] > 0:
            break
        choice = likeliest
        target -= weights[choice]
        if target < 0:
            break
        weights[choice] = -1.0
    return choice

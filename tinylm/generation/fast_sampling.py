"""Drawing from the likeliest tokens, compiled by numba: `sampling.choose` for the usual case, without its dozen small tensors.

It draws from the same distribution by the same numbers; sums are in float64, so that a number which falls on a border to the
last bit of float32 may choose the neighbor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinylm.generation import sampling
from tinylm.generation.sampling import SamplingOptions
from tinylm.jit import compiled


def choose(logits: Tensor, options: SamplingOptions, drawn: Tensor | None) -> Tensor:
    """Next ids (B,) for logits (B, V) in float32 on the CPU: what `sampling.choose` gives."""
    if drawn is None or options.temperature == 0 or options.top_k is None or options.top_p is not None or options.min_p:
        return sampling.choose(logits, options, drawn)
    chosen = np.empty(len(logits), dtype=np.int64)
    size = min(options.top_k, logits.shape[1])
    _draw(logits.numpy(), drawn.numpy(), max(options.temperature, 1e-5), size, chosen)
    return torch.from_numpy(chosen)


_compiled = compiled()


@_compiled
def _bound(keys: Any, size: int) -> Any:
    """The size-th largest key, or any number between it and the next: found by halving, counting each time."""
    low, high = keys[0], keys[0]
    for i in range(len(keys)):
        low, high = min(low, keys[i]), max(high, keys[i])
    while low < high:
        middle = np.int32((np.int64(low) + np.int64(high) + 1) >> 1)
        found = np.int32(0)
        for i in range(len(keys)):
            found = np.int32(found + np.int32(keys[i] >= middle))
        if found == size:
            return middle
        if found > size:
            low = middle
        else:
            high = np.int32(middle - np.int32(1))
    return low


@_compiled
def _draw(logits: Any, drawn: Any, temperature: float, size: int, chosen: Any) -> None:
    ids, weights = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.float64)
    keys = np.empty(logits.shape[1], dtype=np.int32)
    for row in range(len(logits)):
        bits = logits[row].view(np.int32)
        for id in range(len(keys)):  # whole numbers in the order of the float32 whose bits they are
            keys[id] = bits[id] ^ np.int32((bits[id] >> np.int32(31)) & np.int32(0x7FFFFFFF))
        bound, count = _bound(keys, size), 0
        for id in range(len(keys)):
            if keys[id] > bound:
                ids[count] = id
                count += 1
        for id in range(len(keys)):  # of equals, the first
            if count == size:
                break
            if keys[id] == bound:
                ids[count] = id
                count += 1
        most, total = np.float64(logits[row, ids[0]]), 0.0
        for i in range(size):
            most = max(most, np.float64(logits[row, ids[i]]))
        for i in range(size):
            weights[i] = np.exp((np.float64(logits[row, ids[i]]) - most) / temperature)
            total += weights[i]
        target: Any = drawn[row] * total
        place: Any = 0
        for _ in range(size):  # likeliest first, as far as the number goes
            likeliest = np.argmax(weights)
            if not weights[likeliest] > 0:
                break
            place = likeliest
            target -= weights[place]
            if target < 0:
                break
            weights[place] = -1.0
        chosen[row] = ids[place]

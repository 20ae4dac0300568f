"""Temperature and top-k sampling on the CPU in numba kernels, which avoid the overhead of small tensors in `sampling.choose`.

The distribution and the random numbers are the same as in `sampling.choose`. Sums are computed in float64, so a different token may
be selected if a random number is within float32 rounding error of the boundary between two tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinylm.generation import sampling
from tinylm.generation.sampling import SamplingOptions
from tinylm.jit import cached_njit


def choose(logits: Tensor, options: SamplingOptions, uniforms: Tensor | None) -> Tensor:
    """Choose the next ids `(B,)` from float32 logits `(B, V)` on the CPU, like `sampling.choose`.

    If the kernel does not support the options, `sampling.choose` is called instead.
    """
    if uniforms is None or options.temperature == 0 or options.top_p is not None or options.min_p:
        return sampling.choose(logits, options, uniforms)
    chosen = np.empty(len(logits), dtype=np.int64)
    if options.top_k is None:
        probabilities, _ = sampling.distribution(logits, options)
        _sample(probabilities.numpy(), uniforms.numpy(), chosen)
        return torch.from_numpy(chosen)
    size = min(options.top_k, logits.shape[1])
    _sample_top_k(logits.numpy(), uniforms.numpy(), max(options.temperature, 1e-5), size, chosen)
    return torch.from_numpy(chosen)


_compiled = cached_njit()


@_compiled
def _sample(probabilities: Any, uniforms: Any, chosen: Any) -> None:
    """Sample one id from each row of `probabilities` `(B, V)` by inverting the cumulative distribution. Fills `chosen` `(B,)`."""
    for row in range(len(probabilities)):
        total, cumulative = 0.0, 0.0
        for id in range(probabilities.shape[1]):
            total += np.float64(probabilities[row, id])
        target: Any = uniforms[row] * total
        for id in range(probabilities.shape[1]):
            cumulative += np.float64(probabilities[row, id])
            chosen[row] = id
            if cumulative > target:
                break


@_compiled
def _threshold(keys: Any, size: int) -> Any:
    """Return a threshold such that exactly `size` keys are greater than or equal to it.

    If ties make this impossible, return the largest threshold that at least `size` keys reach. Uses bisection.
    """
    low, high = keys[0], keys[0]
    for i in range(len(keys)):
        low, high = min(low, keys[i]), max(high, keys[i])
    while low < high:
        middle = np.int32((np.int64(low) + np.int64(high) + 1) >> 1)
        count = np.int32(0)
        for i in range(len(keys)):
            count = np.int32(count + np.int32(keys[i] >= middle))
        if count == size:
            return middle
        if count > size:
            low = middle
        else:
            high = np.int32(middle - np.int32(1))
    return low


@_compiled
def _sample_top_k(logits: Any, uniforms: Any, temperature: float, size: int, chosen: Any) -> None:
    """For each row of `logits` `(B, V)`, sample one of the `size` most likely tokens and write its id to `chosen` `(B,)`."""
    ids, weights = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.float64)
    keys = np.empty(logits.shape[1], dtype=np.int32)
    for row in range(len(logits)):
        bits = logits[row].view(np.int32)
        for id in range(len(keys)):  # reinterpret float32 bits as integers that sort in the same order
            keys[id] = bits[id] ^ np.int32((bits[id] >> np.int32(31)) & np.int32(0x7FFFFFFF))
        threshold, count = _threshold(keys, size), 0
        for id in range(len(keys)):
            if keys[id] > threshold:
                ids[count] = id
                count += 1
        for id in range(len(keys)):  # among equal logits, lower ids come first
            if count == size:
                break
            if keys[id] == threshold:
                ids[count] = id
                count += 1
        largest, total = np.float64(logits[row, ids[0]]), 0.0
        for i in range(size):
            largest = max(largest, np.float64(logits[row, ids[i]]))
        for i in range(size):
            weights[i] = np.exp((np.float64(logits[row, ids[i]]) - largest) / temperature)
            total += weights[i]
        target: Any = uniforms[row] * total
        choice: Any = 0
        for _ in range(size):  # subtract the weights, largest first, until the target is negative
            likeliest = np.argmax(weights)
            if not weights[likeliest] > 0:
                break
            choice = likeliest
            target -= weights[choice]
            if target < 0:
                break
            weights[choice] = -1.0
        chosen[row] = ids[choice]

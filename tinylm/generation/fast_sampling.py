"""Temperature and top-k sampling on the CPU in compiled code, which avoids the overhead of small tensors in `sampling.choose`.

The distribution and the random numbers are the same as in `sampling.choose`. Sums are computed in float64, so a different token may
be selected if a random number is within float32 rounding error of the boundary between two tokens.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinylm.generation import sampling
from tinylm.generation.sampling import SamplingOptions
from tinylm.model.state import TokenChooser
from tinylm.native import NativeFunction

_ADDRESS, _COUNT = np.int64, np.int64
SAMPLING = np.dtype(
    [
        ("rows", _COUNT),
        ("vocab_size", _COUNT),
        ("top_k", _COUNT),  # 0: the scores are probabilities, and all tokens are candidates
        ("temperature", np.float64),
        ("scores", _ADDRESS),  # logits or probabilities (B, V), float32
        ("uniforms", _ADDRESS),  # random numbers (B,), float64
        *((name, _ADDRESS) for name in ("keys", "ids", "weights")),  # workspace: (V,) int32, (top_k,) int64, (top_k,) float64
        ("chosen", _ADDRESS),  # the result (B,), int64
    ]
)
CHOICE = NativeFunction("tinylm.generation.sampling_kernels", "choose", SAMPLING, ("tinylm.generation.fast_sampling", "tinylm.jit"))


def choose(logits: Tensor, options: SamplingOptions, uniforms: Tensor | None) -> Tensor:
    """Choose the next ids `(B,)` from float32 logits `(B, V)` on the CPU, like `sampling.choose`.

    If the compiled code does not support the options, `sampling.choose` is called instead.
    """
    if uniforms is None or options.temperature == 0 or options.top_p is not None or options.min_p:
        return sampling.choose(logits, options, uniforms)
    scores, size = logits, min(options.top_k or 0, logits.shape[1])
    if options.top_k is None:
        scores, _ = sampling.distribution(logits, options)
    scores = scores.contiguous()
    chosen = torch.empty(len(scores), dtype=torch.long)
    keys, ids, weights = np.empty(scores.shape[1], np.int32), np.empty(size, np.int64), np.empty(size, np.float64)
    record = np.zeros(1, SAMPLING)
    record[0] = (
        *scores.shape,
        size,
        max(options.temperature, 1e-5),
        scores.data_ptr(),
        uniforms.data_ptr(),
        *(array.ctypes.data for array in (keys, ids, weights)),
        chosen.data_ptr(),
    )
    _code()(record.ctypes.data)
    return chosen


def supports_run(options: SamplingOptions) -> bool:
    """Whether `Run` supports the options: temperature and top-k only, with nothing to record."""
    only_top_k = options.temperature != 0 and options.top_k is not None and options.top_p is None and not options.min_p
    return only_top_k and options.needs_only_logits


class Run:
    """The arguments of the compiled code for several steps with the same options, for a model that runs ahead."""

    def __init__(self, logits: Tensor, options: SamplingOptions, uniforms: np.ndarray) -> None:
        """`logits` (B, V) is float32 and contiguous. `uniforms` (steps, B) contains one random number per step and row."""
        (rows, vocab_size), steps = logits.shape, len(uniforms)
        size = min(options.top_k or 0, vocab_size)
        self._workspace = (np.empty(vocab_size, np.int32), np.empty(size, np.int64), np.empty(size, np.float64))
        self._uniforms, self._records = np.ascontiguousarray(uniforms, np.float64), np.zeros(steps, SAMPLING)
        chosen = np.empty((steps, rows), np.int64)
        keys, ids, weights = (array.ctypes.data for array in self._workspace)
        first, written = self._uniforms.ctypes.data, chosen.ctypes.data
        for step in range(steps):
            offset = 8 * rows * step
            self._records[step] = (
                rows,
                vocab_size,
                size,
                max(options.temperature, 1e-5),
                logits.data_ptr(),
                first + offset,
                keys,
                ids,
                weights,
                written + offset,
            )
        self.chooser = TokenChooser(CHOICE.address, self._records.ctypes.data, SAMPLING.itemsize, logits, chosen)


@cache
def _code() -> Any:
    """Load the compiled code. This compiles it if necessary."""
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(CHOICE.address)

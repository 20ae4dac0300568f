"""The decoding steps of a recurrent network in numba. A step runs all layers and the head on one token per row.

Every sum is computed in a fixed order, so a row's result does not depend on the other rows.

Legend: `B` rows, `L` layers, `G` gates, `S` vectors in a layer's state, `C` width, `R` weight rows, `V` vocabulary,
`N` tokens per row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from tinylm.jit import cached_njit, call_address

TANH, RELU, LSTM, GRU = range(4)
"""Layer kinds: simple RNN with tanh, simple RNN with ReLU, LSTM and GRU."""
_FAST = {"reassoc", "contract", "arcp", "nsz"}
"""Allows the compiler to reorder sums for vectorization, in the same way for each row."""
_ONE = np.float32(1.0)


@njit(nogil=True, error_model="numpy", fastmath=_FAST)
def _product(weight: Any, x: Any, out: Any) -> None:
    """out (B, R) = x (B, C) @ weight (R, C) transposed. Each weight row is read once for all rows of `x`.

    Four weight rows are processed together, so that each element of `x` is loaded once for all four.
    """
    quads = weight.shape[0] // 4 * 4
    for r in range(0, quads, 4):
        for b in range(x.shape[0]):
            total0, total1, total2, total3 = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
            for c in range(weight.shape[1]):
                value = x[b, c]
                total0 += weight[r, c] * value
                total1 += weight[r + 1, c] * value
                total2 += weight[r + 2, c] * value
                total3 += weight[r + 3, c] * value
            out[b, r], out[b, r + 1], out[b, r + 2], out[b, r + 3] = total0, total1, total2, total3
    for r in range(quads, weight.shape[0]):
        for b in range(x.shape[0]):
            total = np.float32(0.0)
            for c in range(weight.shape[1]):
                total += weight[r, c] * x[b, c]
            out[b, r] = total


@njit(nogil=True, error_model="numpy", inline="always")
def _sigmoid(x: Any) -> Any:
    return _ONE / (_ONE + np.exp(-x))


@njit(nogil=True, error_model="numpy", inline="always")
def _tanh(x: Any) -> Any:
    return np.float32(2.0) * _sigmoid(np.float32(2.0) * x) - _ONE


@njit(nogil=True, error_model="numpy")
def _update(kind: int, inputs: Any, recurrent: Any, bias_ih: Any, bias_hh: Any, state: Any) -> None:
    """Update a layer's state (S, C) from its input and recurrent projections (G C,). Gates are in torch's order."""
    width = state.shape[1]
    for c in range(width):
        if kind == LSTM:
            i = _sigmoid(inputs[c] + bias_ih[c] + recurrent[c] + bias_hh[c])
            f, g, o = width + c, 2 * width + c, 3 * width + c
            forget = _sigmoid(inputs[f] + bias_ih[f] + recurrent[f] + bias_hh[f])
            new = _tanh(inputs[g] + bias_ih[g] + recurrent[g] + bias_hh[g])
            output = _sigmoid(inputs[o] + bias_ih[o] + recurrent[o] + bias_hh[o])
            state[1, c] = forget * state[1, c] + i * new
            state[0, c] = output * _tanh(state[1, c])
        elif kind == GRU:
            z, n = width + c, 2 * width + c
            reset = _sigmoid(inputs[c] + bias_ih[c] + recurrent[c] + bias_hh[c])
            update = _sigmoid(inputs[z] + bias_ih[z] + recurrent[z] + bias_hh[z])
            new = _tanh(inputs[n] + bias_ih[n] + reset * (recurrent[n] + bias_hh[n]))
            state[0, c] = (_ONE - update) * new + update * state[0, c]
        else:
            total = inputs[c] + bias_ih[c] + recurrent[c] + bias_hh[c]
            state[0, c] = _tanh(total) if kind == TANH else max(total, np.float32(0.0))


@njit(nogil=True, error_model="numpy")
def _advance(
    kind: int,
    weight_ih: Any,
    weight_hh: Any,
    bias_ih: Any,
    bias_hh: Any,
    head: Any,
    inputs: Any,
    recurrent: Any,
    before: Any,
    x: Any,
    state: Any,
    logits: Any,
) -> None:
    """See `step`. `recurrent` (B, G C), `before` (B, C) and `x` (B, C) are overwritten."""
    for layer in range(weight_ih.shape[0]):
        before[:] = state[:, layer, 0]
        if layer:
            _product(weight_ih[layer], x, inputs)
        _product(weight_hh[layer], before, recurrent)
        for b in range(x.shape[0]):
            _update(kind, inputs[b], recurrent[b], bias_ih[layer], bias_hh[layer], state[b, layer])
            x[b] = state[b, layer, 0]
    _product(head, x, logits)


@cached_njit()
def step(
    kind: int,
    weight_ih: Any,
    weight_hh: Any,
    bias_ih: Any,
    bias_hh: Any,
    head: Any,
    inputs: Any,
    state: Any,
    logits: Any,
) -> None:
    """Process one token per row. Update `state` (B, L, S, C) and fill `logits` (B, V).

    `inputs` (B, G C) contains the embeddings multiplied by the first layer's `weight_ih`, and is overwritten. The other shapes are
    (L, G C, C) for `weight_ih` and `weight_hh`, (L, G C) for `bias_ih` and `bias_hh`, and (V, C) for `head`. All arrays are
    float32.
    """
    recurrent = np.empty_like(inputs)
    before = np.empty((inputs.shape[0], weight_hh.shape[2]), dtype=np.float32)
    x = np.empty_like(before)
    _advance(kind, weight_ih, weight_hh, bias_ih, bias_hh, head, inputs, recurrent, before, x, state, logits)


@cached_njit()
def run(
    kind: int,
    weight_ih: Any,
    weight_hh: Any,
    bias_ih: Any,
    bias_hh: Any,
    head: Any,
    table: Any,
    state: Any,
    logits: Any,
    choose: int,
    records: int,
    record_size: int,
    chosen: Any,
) -> Any:
    """Choose and process up to N tokens per row, and return the number of processed tokens. Stop if a logit is not finite.

    `choose` is the address of a C function that chooses one token per row from `logits` (B, V). For token n, it is called with the
    address `records + n * record_size`, and writes the ids to `chosen[n]` (B,). `table` (V, G C) contains the embeddings multiplied
    by the first layer's `weight_ih`. The other arguments are those of `step`.
    """
    inputs = np.empty((logits.shape[0], table.shape[1]), dtype=np.float32)
    recurrent = np.empty_like(inputs)
    before = np.empty((inputs.shape[0], weight_hh.shape[2]), dtype=np.float32)
    x = np.empty_like(before)
    for n in range(len(chosen)):
        if not np.isfinite(np.sum(logits)):
            return n
        call_address(choose, records + n * record_size)
        for b in range(len(inputs)):
            inputs[b] = table[chosen[n, b]]
        _advance(kind, weight_ih, weight_hh, bias_ih, bias_hh, head, inputs, recurrent, before, x, state, logits)
    return len(chosen)

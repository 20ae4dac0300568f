"""The decoding step of an encoder-decoder in numba: the decoder blocks, the head and the selection of the best next tokens.

The rows are partial translations. A row attends to the keys and values of its own earlier tokens, which other rows may have
computed: `origins` contains the row that computed each of them, so the search never copies keys and values. All rows of a sentence
attend to the same keys and values of the encoder.

Several threads run the code in parallel. Each computes its share of the outputs or rows, and all synchronize at barriers. Every sum
is computed by one thread in a fixed order, so a row's result does not depend on the number of threads or on the other rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from tinylm.jit import pointer_cast
from tinylm.model.kernels import (
    apply_epilogue,
    barrier,
    call,
    exp,
    fast,
    load,
    load_id,
    make_multiply,
    normalize,
    softmax,
    store,
    store_id,
    vector_registers,
)
from tinylm.model.step_records import ADD, MATRIX, SOFTCAP, STORE, TILE
from tinylm.model.translation_records import (
    ATTENTION_OUTPUT,
    COMPUTE_LOGITS,
    CROSS_OUTPUT,
    CROSS_QUERY,
    DOWN,
    GATE,
    LAYER,
    MATRICES_PER_LAYER,
    QKV,
    ROWS,
    UP,
)

_layers_at, _matrices_at = pointer_cast(LAYER), pointer_cast(MATRIX)
_LANES, _ = vector_registers()
_COLUMNS = 2 * _LANES if _LANES == 8 else 4 * _LANES
"""Number of outputs that are computed at once. Six rows and four vectors need the fewest instructions per product. Their sums
use 24 of 32 registers, but AVX2 has only 16."""
_multiply, _PASSES = make_multiply(ROWS, 4, TILE, _COLUMNS, rereads=True)
_HEAD_WIDTH = 64
_CHUNK = 64
"""Number of logits that are compared together with the smallest of the largest logits so far."""


@fast
def _matmul(step: Any, index: Any, thread: Any, threads: Any, inputs: Any, out: Any, epilogue: Any) -> None:
    """Compute this thread's share of a matrix product with an epilogue: inputs (rows, inputs) -> out (rows, outputs)."""
    matrix = carray(_matrices_at(step.matrices), 1 << 30)[index]
    sums = step.scratch + thread * step.scratch_bytes
    count, outputs, rows = matrix.inputs, matrix.outputs, step.rows
    tiles, blocks, size = (outputs + TILE - 1) // TILE, (rows + ROWS - 1) // ROWS, matrix.inputs * TILE * 4
    stride = TILE * 4 // (blocks * _PASSES)  # each pass prefetches an equal part of the next tile
    for tile in range(tiles * thread // threads, tiles * (thread + 1) // threads):
        begin, weights = tile * TILE, matrix.weights + tile * size
        width, prefetch = min(TILE, outputs - begin), weights + size
        for first in range(0, rows, ROWS):
            _multiply(weights, inputs + first * count * 4, count * 4, count, sums, prefetch, stride)
            prefetch += _PASSES * stride * count
            for row in range(first, min(first + ROWS, rows)):
                y, target = sums + (row - first) * TILE * 4, out + (row * outputs + begin) * 4
                if width == TILE:  # the compiler vectorizes loops of constant length without a remainder
                    _finish(step, matrix, begin, y, np.int64(TILE), target, epilogue)
                else:
                    _finish(step, matrix, begin, y, width, target, epilogue)


@fast
def _finish(step: Any, matrix: Any, begin: Any, y: Any, width: Any, out: Any, epilogue: Any) -> None:
    """Add the biases to the `width` outputs at `y`, and apply the epilogue."""
    if matrix.biases:
        for i in range(width):
            store(y, i, load(y, i) + load(matrix.biases, begin + i))
    apply_epilogue(step, y, width, out, epilogue)


@fast
def _embed(step: Any, row: Any) -> None:
    """Write a row's input of the first layer to the residual stream."""
    width, token = step.width, load_id(step.tokens, row)
    residual = step.residual + row * width * 4
    vector = step.embedding + token * width * 4 if token >= 0 else step.start
    for i in range(width):
        store(residual, i, load(vector, i) * step.embedding_scale if vector else np.float32(0.0))
    if step.position_table:
        table = step.position_table + step.position * width * 4
        for i in range(width):
            store(residual, i, load(residual, i) + load(table, i))
    if step.embedding_norm:
        normalize(residual, width, step.layer_norm, step.norm_eps, step.embedding_gain, step.embedding_bias, residual)


@fast
def _before(step: Any, thread: Any, threads: Any, gain: Any, bias: Any) -> Any:
    """Return the address of a layer's input: the residual stream, normalized unless norms follow the layers."""
    if step.post_norm:
        return step.residual
    _normalize_rows(step, thread, threads, gain, bias, step.normed)
    return step.normed


@fast
def _after(step: Any, thread: Any, threads: Any, gain: Any, bias: Any) -> None:
    """Wait until a layer's output was added to the residual stream. Then normalize it if norms follow the layers."""
    barrier(step, threads)
    if step.post_norm:
        _normalize_rows(step, thread, threads, gain, bias, step.residual)


@fast
def _normalize_rows(step: Any, thread: Any, threads: Any, gain: Any, bias: Any, out: Any) -> None:
    """Normalize this thread's share of the residual stream's rows, and wait for the other threads."""
    width = step.width
    for row in range(thread, step.rows, threads):
        offset = row * width * 4
        normalize(step.residual + offset, width, step.layer_norm, step.norm_eps, gain, bias, out + offset)
    barrier(step, threads)


@fast
def _norm_and_rotate(step: Any, x: Any, gain: Any, rotates: Any) -> None:
    """Normalize a query or key, and apply its rotary position embedding, in place."""
    width = step.head_width
    if step.qk_norm_eps >= np.float32(0.0):
        normalize(x, width, 0, step.qk_norm_eps, gain, 0, x)
    if rotates and step.cosines:
        half = width // 2
        cosines, sines, other = step.cosines + step.position * half * 4, step.sines + step.position * half * 4, x + half * 4
        for i in range(half):
            a, b, cosine, sine = load(x, i), load(other, i), load(cosines, i), load(sines, i)
            store(x, i, a * cosine - b * sine)
            store(other, i, b * cosine + a * sine)


@fast
def _attend(step: Any, thread: Any, queries: Any, keys: Any, values: Any, count: Any, attended: Any) -> None:
    """Call `_attend_heads`, with a constant head width if it is the most common one, which makes its loops faster."""
    if step.head_width == _HEAD_WIDTH:
        _attend_heads(step, thread, queries, keys, values, count, attended, np.int64(_HEAD_WIDTH))
    else:
        _attend_heads(step, thread, queries, keys, values, count, attended, step.head_width)


@fast
def _attend_heads(step: Any, thread: Any, queries: Any, keys: Any, values: Any, count: Any, attended: Any, width: Any) -> None:
    """Compute a row's attention to `count` keys and values, at this thread's byte offsets from `keys` and `values`.

    The order of memory accesses is position by position, with all heads of a position together.
    """
    kv_heads, heads = step.kv_heads, step.heads
    group, scale = heads // kv_heads, np.float32(1.0) / np.sqrt(np.float32(width))
    scores = step.scratch + thread * step.scratch_bytes + step.scores_offset
    offsets = step.scratch + thread * step.scratch_bytes + step.offsets_offset
    for t in range(count):
        key = keys + load_id(offsets, t)
        for head in range(kv_heads):
            k = key + head * width * 4
            for query in range(head * group, (head + 1) * group):
                q, score = queries + query * width * 4, np.float32(0.0)
                for i in range(width):
                    score += load(q, i) * load(k, i)
                store(scores, query * count + t, score * scale)
    for query in range(heads):
        softmax(scores + query * count * 4, count)
    for i in range(heads * width):
        store(attended, i, np.float32(0.0))
    for t in range(0, count - 1, 2):  # two positions at a time reduce the number of writes
        first, second = values + load_id(offsets, t), values + load_id(offsets, t + 1)
        for query in range(heads):
            at, out = query // group * width, attended + query * width * 4
            a, b = load(scores, query * count + t), load(scores, query * count + t + 1)
            for i in range(width):
                store(out, i, load(out, i) + (a * load(first, at + i) + b * load(second, at + i)))
    if count % 2:
        last = values + load_id(offsets, count - 1)
        for query in range(heads):
            at, out, weight = query // group * width, attended + query * width * 4, load(scores, query * count + count - 1)
            for i in range(width):
                store(out, i, load(out, i) + weight * load(last, at + i))


@fast
def _self_attention(step: Any, layer: Any, layer_index: Any, thread: Any, row: Any) -> None:
    """Store a row's keys and values, and attend to those of the row's tokens so far."""
    width, position = step.head_width, step.position
    size = step.kv_heads * width
    queries = step.qkv + row * (step.heads + 2 * step.kv_heads) * width * 4
    new_keys = queries + step.heads * width * 4
    for query in range(step.heads):
        _norm_and_rotate(step, queries + query * width * 4, layer.query_gain, True)
    for head in range(step.kv_heads):
        _norm_and_rotate(step, new_keys + head * width * 4, layer.key_gain, True)
    offsets = step.scratch + thread * step.scratch_bytes + step.offsets_offset
    for t in range(position):
        origin = load_id(step.origins, row * step.origin_capacity + t)
        store_id(offsets, t, ((t * step.layer_count + layer_index) * step.row_capacity + origin) * size * 4)
    own = ((position * step.layer_count + layer_index) * step.row_capacity + row) * size * 4
    store_id(offsets, position, own)
    for i in range(size):
        store(step.keys + own, i, load(new_keys, i))
        store(step.values + own, i, load(new_keys, size + i))
    _attend(step, thread, queries, step.keys, step.values, position + 1, step.attended + row * step.heads * width * 4)


@fast
def _cross_attention(step: Any, layer: Any, layer_index: Any, thread: Any, row: Any) -> None:
    """Attend to the encoder's output for a row's sentence."""
    width, sentence = step.head_width, load_id(step.sentences, row)
    size, heads_width = step.kv_heads * width, step.heads * width
    queries = step.qkv + row * heads_width * 4
    for query in range(step.heads):
        _norm_and_rotate(step, queries + query * width * 4, layer.cross_query_gain, False)
    count = load_id(step.memory_lengths, sentence)
    offsets = step.scratch + thread * step.scratch_bytes + step.offsets_offset
    for t in range(count):
        store_id(offsets, t, t * size * 4)
    begin = (layer_index * step.sentence_count + sentence) * step.memory_capacity * size * 4
    attended = step.attended + row * heads_width * 4
    _attend(step, thread, queries, step.memory_keys + begin, step.memory_values + begin, count, attended)


@fast
def _compute_logits(step: Any, thread: Any, threads: Any) -> None:
    """Run this thread's share of the decoder and the head for one token in each row."""
    for row in range(thread, step.rows, threads):
        _embed(step, row)
    barrier(step, threads)
    layers = carray(_layers_at(step.layers), 1 << 30)
    for layer_index in range(step.layer_count):
        layer, first = layers[layer_index], layer_index * MATRICES_PER_LAYER
        x = _before(step, thread, threads, layer.attention_gain, layer.attention_bias)
        _matmul(step, first + QKV, thread, threads, x, step.qkv, STORE)
        barrier(step, threads)
        for row in range(thread, step.rows, threads):
            _self_attention(step, layer, layer_index, thread, row)
        barrier(step, threads)
        _matmul(step, first + ATTENTION_OUTPUT, thread, threads, step.attended, step.residual, ADD)
        _after(step, thread, threads, layer.attention_gain, layer.attention_bias)
        x = _before(step, thread, threads, layer.cross_gain, layer.cross_bias)
        _matmul(step, first + CROSS_QUERY, thread, threads, x, step.qkv, STORE)
        barrier(step, threads)
        for row in range(thread, step.rows, threads):
            _cross_attention(step, layer, layer_index, thread, row)
        barrier(step, threads)
        _matmul(step, first + CROSS_OUTPUT, thread, threads, step.attended, step.residual, ADD)
        _after(step, thread, threads, layer.cross_gain, layer.cross_bias)
        x = _before(step, thread, threads, layer.feed_forward_gain, layer.feed_forward_bias)
        _matmul(step, first + GATE, thread, threads, x, step.hidden, STORE)
        _matmul(step, first + UP, thread, threads, x, step.hidden, step.activation)
        barrier(step, threads)
        _matmul(step, first + DOWN, thread, threads, step.hidden, step.residual, ADD)
        _after(step, thread, threads, layer.feed_forward_gain, layer.feed_forward_bias)
    x = _before(step, thread, threads, step.final_gain, step.final_bias)
    epilogue = SOFTCAP if step.softcap > np.float32(0.0) else STORE
    _matmul(step, step.layer_count * MATRICES_PER_LAYER, thread, threads, x, step.logits, epilogue)


@fast
def _find_top(step: Any, row: Any) -> None:
    """Find a row's `top_count` largest logits and their ids, largest first, and the sum of exp(logit - largest logit).

    Equal logits are in the order of their ids. If there are fewer logits, the rest is -inf.
    """
    count, vocab_size = step.top_count, step.vocab_size
    logits, top = step.logits + row * vocab_size * 4, step.top_logits + row * count * 4
    ids = step.top_ids + row * count * 8
    for place in range(count):
        store(top, place, np.float32(-np.inf))
        store_id(ids, place, 0)
    chunks = vocab_size // _CHUNK * _CHUNK
    for begin in range(0, chunks, _CHUNK):
        smallest, larger = load(top, count - 1), np.int32(0)
        for i in range(_CHUNK):
            larger += np.int32(load(logits, begin + i) > smallest)
        if larger:
            for i in range(begin, begin + _CHUNK):
                _insert(top, ids, count, load(logits, i), i)
    for i in range(chunks, vocab_size):
        _insert(top, ids, count, load(logits, i), i)
    largest, total = load(top, 0), np.float32(0.0)
    for i in range(vocab_size):
        total += exp(load(logits, i) - largest)
    store(step.exp_sums, row, total)


@fast
def _insert(top: Any, ids: Any, count: Any, value: Any, id: Any) -> None:
    """Insert a value into the `count` largest ones, which are sorted, if it is one of them."""
    if not value > load(top, count - 1):
        return
    place = count - 1
    while place > 0 and value > load(top, place - 1):
        store(top, place, load(top, place - 1))
        store_id(ids, place, load_id(ids, place - 1))
        place -= 1
    store(top, place, value)
    store_id(ids, place, id)


def decode(steps: Any) -> None:
    """Run this thread's share of a step. `NativeFunction` compiles this function."""
    step = carray(steps, 1)[0]
    thread, threads = np.int64(0), np.int64(1)
    if step.get_thread_num:
        thread, threads = np.int64(call(step.get_thread_num)), np.int64(call(step.get_num_threads))
    if step.task == COMPUTE_LOGITS:
        _compute_logits(step, thread, threads)
    else:
        for row in range(thread, step.rows, threads):
            _find_top(step, row)

"""The decoding step in numba: all of `Decoder.decode_one_token` for all rows, compiled for the host CPU.

The code reads addresses from the records in `tinylm.model.step_records`, which `CompiledStep` fills in. Several threads run it in
parallel: each computes its share of the outputs, and all synchronize at barriers. Every sum is computed by one thread in a
fixed order. Results are therefore bit-identical for any number of threads, and a row's result does not depend on the other rows in
the batch.

Matrices are stored as tiles of 64 outputs, and each tile consists of two panels of 32. In a panel, the weights of one input are
contiguous, and the product reads them sequentially. Up to four rows are multiplied by both panels of a tile at once. Larger batches
are multiplied by one panel at a time in blocks of eight rows. Each block rereads the panel from the CPU cache while it prefetches
part of the next panel. bfloat16 and int8 weights are converted to float32 when they are loaded; inputs and sums are float32.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from tinylm.jit import pointer_cast
from tinylm.model.ngrams import HASH_MULTIPLIER
from tinylm.model.step_records import (
    ADD,
    ATTENTION_OUTPUT,
    DOWN,
    GATE,
    GELU,
    LAYER,
    MATRICES_PER_LAYER,
    MATRIX,
    PANEL,
    QKV,
    RELU,
    RELU2,
    ROW_BLOCK,
    SILU,
    SOFTCAP,
    STORE,
    SWIGLU,
    TILE,
    UP,
)

_SPINS_BEFORE_SLEEP = 1000
"""A thread that waits at a barrier goes to sleep after this many spins (about 50 microseconds)."""
_PREFETCH_BYTES = 8192
"""Prefetch distance for products that read each tile only once."""
_FLOAT, _HALF, _BYTE, _I32, _I64 = ir.FloatType(), ir.IntType(16), ir.IntType(8), ir.IntType(32), ir.IntType(64)
fast = njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "arcp", "nsz"})
"""Allows the compiler to reorder sums for vectorization, in the same way for each row. NaN and infinity are handled correctly."""
_strict = njit(nogil=True, error_model="numpy", fastmath={"contract"})
"""Makes the compiler keep the order of operations. Without any flag, a function would inherit its caller's flags."""


def _architecture() -> str:
    return str(llvmlite.binding.get_process_triple()).split("-")[0]


@cache
def vector_registers() -> tuple[int, int]:
    """Return the number of float32 lanes per vector register, and the number of registers to use for sums."""
    features = llvmlite.binding.get_host_cpu_features()
    if features.get("avx512f"):
        return 16, 16
    return (8, 8) if features.get("avx2") else (4, 16)


def _load_intrinsic(llvm_type: Any, numba_type: Any) -> Any:
    """Return a function (address, index) that loads an array element."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, index = arguments
        return builder.load(builder.gep(builder.inttoptr(address, llvm_type.as_pointer()), [index]))

    @intrinsic
    def load(context: Any, address: Any, index: Any) -> Any:
        return numba_type(types.int64, types.int64), emit

    return load


def _store_intrinsic(llvm_type: Any, numba_type: Any) -> Any:
    """Return a function (address, index, value) that stores an array element."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, index, value = arguments
        builder.store(value, builder.gep(builder.inttoptr(address, llvm_type.as_pointer()), [index]))
        return context.get_dummy_value()

    @intrinsic
    def store(context: Any, address: Any, index: Any, value: Any) -> Any:
        return types.void(types.int64, types.int64, numba_type), emit

    return store


def _bitcast_intrinsic(source: Any, target: Any, llvm_target: Any) -> Any:
    """Return a function (number) that reinterprets the bits of a number as another type."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], llvm_target)

    @intrinsic
    def cast(context: Any, number: Any) -> Any:
        return target(source), emit

    return cast


@intrinsic
def call(context: Any, address: Any) -> Any:
    """Call the function at an address without arguments, and return its result."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.call(builder.inttoptr(arguments[0], ir.FunctionType(_I32, []).as_pointer()), [])

    return types.int32(types.int64), emit


@intrinsic
def _call_usleep(context: Any, address: Any, microseconds: Any) -> Any:
    """Call `usleep`, given its address."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.call(builder.inttoptr(arguments[0], ir.FunctionType(_I32, [_I32]).as_pointer()), [arguments[1]])

    return types.int32(types.int64, types.int32), emit


@intrinsic
def _atomic_add(context: Any, address: Any, increment: Any) -> Any:
    """Atomically add to the integer at an address. Return its previous value."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(arguments[0], _I64.as_pointer()), arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), emit


@intrinsic
def _pause(context: Any) -> Any:
    """Emit the CPU's spin-wait hint."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if _architecture() == "x86_64":
            hint = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, hint, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), emit


load, store = _load_intrinsic(_FLOAT, types.float32), _store_intrinsic(_FLOAT, types.float32)
load_id, store_id = _load_intrinsic(_I64, types.int64), _store_intrinsic(_I64, types.int64)
_layers_at, _matrices_at = pointer_cast(LAYER), pointer_cast(MATRIX)
_to_bits, _from_bits = _bitcast_intrinsic(types.float32, types.int32, _I32), _bitcast_intrinsic(types.int32, types.float32, _FLOAT)


def make_multiply(rows: int, weight_bytes: int, outputs: int, columns: int, *, rereads: bool) -> Any:
    """Return a function that multiplies `rows` rows by `outputs` outputs (a tile or a panel), and its number of passes.

    A pass computes `columns` outputs, whose sums must fit in the registers. The function's arguments are the weight address, the
    input address, the number of bytes between input rows, the number of inputs, and the address of the sums (rows, TILE). If the
    caller `rereads` the weights for several blocks of rows, the last two arguments are the address to prefetch from and its
    increment in bytes per input.
    """
    lanes, _ = vector_registers()
    vectors, passes = columns // lanes, outputs // columns
    vector, int_vector = ir.VectorType(_FLOAT, lanes), ir.VectorType(_I32, lanes)
    stored = ir.VectorType({4: _FLOAT, 2: _HALF, 1: _BYTE}[weight_bytes], lanes)

    def to_float32(builder: Any, weights: Any) -> Any:
        if weight_bytes == 1:
            return builder.sitofp(builder.sext(weights, int_vector), vector)
        if weight_bytes == 2:
            return builder.bitcast(builder.shl(builder.zext(weights, int_vector), ir.Constant(int_vector, [16] * lanes)), vector)
        return weights

    def broadcast(builder: Any, scalar: Any) -> Any:
        undefined = ir.Constant(vector, ir.Undefined)
        first_lane = builder.insert_element(undefined, scalar, _I32(0))
        return builder.shuffle_vector(first_lane, undefined, ir.Constant(int_vector, [0] * lanes))

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        panel, inputs, row_bytes, count, sums, prefetch, prefetch_stride = arguments
        module, add, times = builder.module, builder.add, builder.mul
        fma = cgutils.get_or_insert_function(module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{lanes}f32")
        hint = ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _I32, _I32, _I32])
        fetch = cgutils.get_or_insert_function(module, hint, "llvm.prefetch.p0i8")
        # Loop over the inputs. The running totals for all rows and outputs in a pass stay in registers.
        before, loop, after = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("after")
        builder.branch(loop)
        builder.position_at_end(loop)
        index = builder.phi(_I64)
        totals = [builder.phi(vector) for _ in range(rows * vectors)]
        current = add(panel, times(index, _I64(PANEL * weight_bytes)))
        next_panel = times(count, _I64(PANEL * weight_bytes))
        addresses, prefetches = [], []
        for part in range(vectors):
            panel_index, column = divmod(part * lanes, PANEL)
            addresses.append(add(add(current, times(next_panel, _I64(panel_index))), _I64(column * weight_bytes)))
            if not rereads and column * weight_bytes % 64 == 0:
                prefetches.append(add(addresses[-1], _I64(_PREFETCH_BYTES)))
        if rereads:
            lines = max(1, outputs * weight_bytes // 64 // passes)
            prefetches = [add(add(prefetch, times(index, prefetch_stride)), _I64(64 * line)) for line in range(lines)]
        for address in prefetches:
            builder.call(fetch, [builder.inttoptr(address, _BYTE.as_pointer()), _I32(0), _I32(2), _I32(1)])
        pointers = [builder.inttoptr(address, stored.as_pointer()) for address in addresses]
        weights = [to_float32(builder, builder.load(pointer, align=weight_bytes)) for pointer in pointers]
        new_totals = []
        for row in range(rows):
            input_address = add(add(inputs, times(row_bytes, _I64(row))), times(index, _I64(4)))
            x = broadcast(builder, builder.load(builder.inttoptr(input_address, _FLOAT.as_pointer()), align=4))
            new_totals += [builder.call(fma, [x, w, totals[row * vectors + part]]) for part, w in enumerate(weights)]
        next_index = add(index, _I64(1))
        builder.cbranch(builder.icmp_signed("<", next_index, count), loop, after)
        index.add_incoming(_I64(0), before)
        index.add_incoming(next_index, loop)
        for total, new_total in zip(totals, new_totals, strict=True):
            total.add_incoming(ir.Constant(vector, [0.0] * lanes), before)
            total.add_incoming(new_total, loop)
        builder.position_at_end(after)
        for number, new_total in enumerate(new_totals):
            row, part = divmod(number, vectors)
            address = add(sums, _I64(4 * (TILE * row + lanes * part)))
            builder.store(new_total, builder.inttoptr(address, vector.as_pointer()), align=4)
        return context.get_dummy_value()

    @intrinsic
    def multiply(
        context: Any, panel: Any, inputs: Any, row_bytes: Any, count: Any, sums: Any, prefetch: Any, prefetch_stride: Any
    ) -> Any:
        return types.void(*(types.int64,) * 7), emit

    @fast
    def all_columns(weights: Any, inputs: Any, row_bytes: Any, count: Any, sums: Any, prefetch: Any, prefetch_stride: Any) -> None:
        for part in range(passes):
            first = part * columns
            panel = weights + (first // PANEL * count * PANEL + first % PANEL) * weight_bytes
            multiply(panel, inputs, row_bytes, count, sums + first * 4, prefetch + part * prefetch_stride * count, prefetch_stride)

    return all_columns, passes


def _make_multiply_any(rows: int) -> Any:
    """Like `make_multiply` for a tile (a panel if `rows` is `ROW_BLOCK`), but the function takes `weight_bytes` as its first
    argument."""
    lanes, registers = vector_registers()
    outputs = TILE if rows < ROW_BLOCK else PANEL
    columns = max(lanes, min(outputs, lanes * registers // rows))
    (fp32, passes), (bf16, _), (int8, _) = (
        make_multiply(rows, weight_bytes, outputs, columns, rereads=rows == ROW_BLOCK) for weight_bytes in (4, 2, 1)
    )

    @fast
    def multiply(
        weight_bytes: Any,
        weights: Any,
        inputs: Any,
        row_bytes: Any,
        count: Any,
        sums: Any,
        prefetch: Any,
        prefetch_stride: Any,
    ) -> None:
        if weight_bytes == 4:
            fp32(weights, inputs, row_bytes, count, sums, prefetch, prefetch_stride)
        elif weight_bytes == 2:
            bf16(weights, inputs, row_bytes, count, sums, prefetch, prefetch_stride)
        else:
            int8(weights, inputs, row_bytes, count, sums, prefetch, prefetch_stride)

    return multiply, passes


(_multiply_one, _), (_multiply_four, _), (_multiply_block, _BLOCK_PASSES) = (_make_multiply_any(rows) for rows in (1, 4, ROW_BLOCK))


@_strict
def exp(x: Any) -> Any:
    """exp(x) within 2 ulp, in vectorizable operations: 2 ** n (assembled from its bits) times a polynomial in the remainder."""
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    shifted = x * np.float32(1.44269504) + np.float32(12582912.0)  # adding 1.5 * 2 ** 23 rounds to an integer
    n = shifted - np.float32(12582912.0)
    rest = x - n * np.float32(0.693359375)  # log(2) in two parts; multiples of the first part are exact
    rest = rest + n * np.float32(2.12194440e-4)
    value = np.float32(1 / 5040)
    value = value * rest + np.float32(1 / 720)
    value = value * rest + np.float32(1 / 120)
    value = value * rest + np.float32(1 / 24)
    value = value * rest + np.float32(1 / 6)
    value = value * rest + np.float32(0.5)
    value = value * rest + np.float32(1.0)
    value = value * rest + np.float32(1.0)
    return value * _from_bits(np.int32((_to_bits(shifted) - np.int32(0x4B400000 - 127)) << np.int32(23)))


@fast
def _times_sigmoid(x: Any, gate: Any) -> Any:
    """x * sigmoid(gate)."""
    return x / (np.float32(1.0) + exp(-gate))


@fast
def barrier(step: Any, threads: Any) -> None:
    """Wait for all threads. After spinning for a while, a thread sleeps, because there may be more threads than free cores."""
    if threads == 1:
        return
    generation = _atomic_add(step.barrier + 8, 0)
    if _atomic_add(step.barrier, 1) == threads - 1:
        _atomic_add(step.barrier, -threads)
        _atomic_add(step.barrier + 8, 1)
        return
    spins = 0
    while _atomic_add(step.barrier + 8, 0) == generation:
        spins += 1
        if spins < _SPINS_BEFORE_SLEEP:
            _pause()
        else:
            _call_usleep(step.usleep, np.int32(1))


@fast
def _tile_sums(matrix: Any, tile: Any, rows: Any, inputs: Any, row_bytes: Any, sums: Any) -> None:
    """Multiply every row by one weight tile, and write the results to `sums` (rows, TILE). Input rows are `row_bytes` apart."""
    count, weight_bytes = matrix.inputs, matrix.weight_bytes
    size = count * PANEL * weight_bytes
    weights = matrix.weights + tile * (TILE // PANEL) * size
    remainder = rows % ROW_BLOCK if rows % ROW_BLOCK <= ROW_BLOCK // 2 else 0  # more than half a block is padded to a full block
    if rows > remainder:
        # Each pass prefetches an equal part of the next panel.
        prefetch_stride = PANEL * weight_bytes // ((rows - remainder + ROW_BLOCK - 1) // ROW_BLOCK * _BLOCK_PASSES)
        for part in range(TILE // PANEL):
            panel = weights + part * size
            prefetch = panel + size
            for row in range(0, rows - remainder, ROW_BLOCK):
                y = sums + (row * TILE + part * PANEL) * 4
                _multiply_block(weight_bytes, panel, inputs + row * row_bytes, row_bytes, count, y, prefetch, prefetch_stride)
                prefetch += _BLOCK_PASSES * prefetch_stride * count
    x, y = inputs + (rows - remainder) * row_bytes, sums + (rows - remainder) * TILE * 4
    if remainder == 1:
        _multiply_one(weight_bytes, weights, x, row_bytes, count, y, 0, 0)
    elif remainder:
        _multiply_four(weight_bytes, weights, x, row_bytes, count, y, 0, 0)


@fast
def apply_epilogue(step: Any, y: Any, width: Any, out: Any, epilogue: Any) -> None:
    """Apply an epilogue to the `width` outputs at `y`, and write the results to `out`."""
    if epilogue == STORE:
        for i in range(width):
            store(out, i, load(y, i))
    elif epilogue == ADD:
        for i in range(width):
            store(out, i, load(out, i) + load(y, i))
    elif epilogue == GELU:
        for i in range(width):
            value = load(y, i)
            inner = np.float32(1.5957691216) * (value + np.float32(0.044715) * value * value * value)  # 2 sqrt(2 / pi)
            store(out, i, _times_sigmoid(value, inner))
    elif epilogue == RELU:
        for i in range(width):
            store(out, i, max(load(y, i), np.float32(0.0)))
    elif epilogue == RELU2:
        for i in range(width):
            value = max(load(y, i), np.float32(0.0))
            store(out, i, value * value)
    elif epilogue == SILU:
        for i in range(width):
            value = load(y, i)
            store(out, i, _times_sigmoid(value, value))
    elif epilogue == SWIGLU:
        for i in range(width):
            gate = load(out, i)
            store(out, i, _times_sigmoid(gate, gate) * load(y, i))
    else:
        cap = step.softcap
        for i in range(width):  # tanh(z) = 2 sigmoid(2 z) - 1
            store(out, i, _times_sigmoid(np.float32(2.0) * cap, np.float32(2.0) * load(y, i) / cap) - cap)


@fast
def _matmul(step: Any, index: Any, thread: Any, threads: Any, rows: Any, inputs: Any, out: Any, epilogue: Any) -> None:
    """Compute this thread's share of a matrix product with an epilogue: inputs (rows, inputs) -> out (rows, outputs)."""
    matrix = carray(_matrices_at(step.matrices), 1 << 30)[index]
    sums = step.scratch + thread * step.scratch_bytes + step.sums_offset
    outputs = matrix.outputs
    tiles = (outputs + TILE - 1) // TILE
    for tile in range(tiles * thread // threads, tiles * (thread + 1) // threads):
        _tile_sums(matrix, tile, rows, inputs, matrix.inputs * 4, sums)
        begin = tile * TILE
        width = min(TILE, outputs - begin)
        for row in range(rows):
            y = sums + row * TILE * 4
            if matrix.scales:
                for i in range(width):
                    store(y, i, load(y, i) * load(matrix.scales, begin + i))
            if matrix.biases:
                for i in range(width):
                    store(y, i, load(y, i) + load(matrix.biases, begin + i))
            apply_epilogue(step, y, width, out + (row * outputs + begin) * 4, epilogue)


@fast
def normalize(x: Any, count: Any, layer_norm: Any, eps: Any, gain: Any, bias: Any, out: Any) -> None:
    """Apply LayerNorm or RMSNorm to the `count` numbers at `x`, and write the results to `out`."""
    mean, square = np.float32(0.0), np.float32(0.0)
    if layer_norm:
        for i in range(count):
            mean += load(x, i)
        mean /= np.float32(count)
    for i in range(count):
        difference = load(x, i) - mean
        square += difference * difference
    scale = np.float32(1.0) / np.sqrt(square / np.float32(count) + eps)
    for i in range(count):
        store(out, i, (load(x, i) - mean) * scale)
    if gain:
        for i in range(count):
            store(out, i, load(out, i) * load(gain, i))
    if bias:
        for i in range(count):
            store(out, i, load(out, i) + load(bias, i))


@fast
def _normalize_rows(step: Any, thread: Any, gain: Any, bias: Any) -> Any:
    """Normalize every row into this thread's scratch area and return its address.

    Each thread normalizes all rows, which takes less time than another barrier.
    """
    scratch, width = step.scratch + thread * step.scratch_bytes, step.width
    for row in range(step.rows):
        offset = row * width * 4
        normalize(step.residual + offset, width, step.layer_norm, step.norm_eps, gain, bias, scratch + offset)
    return scratch


@fast
def _embed_token(step: Any, row: Any) -> None:
    """Write a row's token embedding to the residual stream and its concatenated n-gram embeddings to `hidden`."""
    width, token, position = step.width, load_id(step.tokens, row), load_id(step.positions, row)
    embedded, residual = step.embedding + token * width * 4, step.residual + row * width * 4
    for i in range(width):
        store(residual, i, load(embedded, i))
    cached = step.cached_tokens + load_id(step.cache_row_indices, row) * step.capacity * 8
    store_id(cached, position, token)
    for order_index in range(step.ngram_order_count):
        order = load_id(step.ngram_orders, order_index)
        key = order
        for t in range(position - order + 1, position + 1):
            key = (key + (step.pad_id if t < 0 else load_id(cached, t)) + 1) * HASH_MULTIPLIER
            key = key ^ (key >> 29)
        vector = step.ngram_table + (key % step.ngram_rows + order_index * step.ngram_rows) * step.ngram_width * 4
        out = step.hidden + (row * step.ngram_order_count + order_index) * step.ngram_width * 4
        for i in range(step.ngram_width):
            store(out, i, load(vector, i))


@fast
def _embed(step: Any, thread: Any, threads: Any) -> None:
    """Write the input of the first layer to the residual stream."""
    rows, width = step.rows, step.width
    for row in range(thread, rows, threads):
        _embed_token(step, row)
    if step.ngram_order_count:
        barrier(step, threads)
        _matmul(step, step.layer_count * MATRICES_PER_LAYER + 1, thread, threads, rows, step.hidden, step.residual, ADD)
        barrier(step, threads)
    for row in range(thread, rows, threads):
        residual = step.residual + row * width * 4
        if step.position_table:
            position_vector = step.position_table + load_id(step.positions, row) * width * 4
            for i in range(width):
                store(residual, i, load(residual, i) + load(position_vector, i))
        if step.embedding_norm:
            normalize(residual, width, step.layer_norm, step.norm_eps, step.embedding_gain, step.embedding_bias, residual)


@fast
def _norm_and_rotate(step: Any, x: Any, gain: Any, position: Any) -> None:
    """Normalize a query or key, and apply its rotary position embedding, in place."""
    width = step.head_width
    if step.qk_norm_eps >= np.float32(0.0):
        normalize(x, width, 0, step.qk_norm_eps, gain, 0, x)
    if step.cosines:
        half = width // 2
        cosines, sines, other = step.cosines + position * half * 4, step.sines + position * half * 4, x + half * 4
        for i in range(half):
            a, b, cosine, sine = load(x, i), load(other, i), load(cosines, i), load(sines, i)
            store(x, i, a * cosine - b * sine)
            store(other, i, b * cosine + a * sine)


@fast
def _store_keys_values(step: Any, layer: Any, layer_index: Any, row: Any, first: Any, last: Any) -> None:
    """Write the keys and values of a row's key/value heads [first, last) to the cache."""
    width, row_bytes = step.head_width, step.kv_heads * step.head_width * 4
    new_keys = step.qkv + (row * (step.heads + 2 * step.kv_heads) + step.heads) * width * 4
    position = load_id(step.positions, row)
    begin = ((layer_index * step.cache_row_count + load_id(step.cache_row_indices, row)) * step.capacity + position) * row_bytes
    for head in range(first, last):
        _norm_and_rotate(step, new_keys + head * width * 4, layer.key_gain, position)
    for i in range(first * width, last * width):
        store(step.keys + begin, i, load(new_keys, i))
    for i in range(first * width, last * width):
        store(step.values + begin, i, load(new_keys + row_bytes, i))


@fast
def _attend(step: Any, layer: Any, layer_index: Any, thread: Any, row: Any, first: Any, last: Any) -> None:
    """Compute attention for a row's query heads that use the key/value heads [first, last).

    Reads the cache sequentially: position by position, with all heads of a position together.
    """
    width, group = step.head_width, step.heads // step.kv_heads
    position, row_bytes = load_id(step.positions, row), step.kv_heads * width * 4
    queries = step.qkv + row * (step.heads + 2 * step.kv_heads) * width * 4
    begin = (layer_index * step.cache_row_count + load_id(step.cache_row_indices, row)) * step.capacity * row_bytes
    for query in range(first * group, last * group):
        _norm_and_rotate(step, queries + query * width * 4, layer.query_gain, position)
    scores, score_bytes = step.scratch + thread * step.scratch_bytes + step.scores_offset, step.capacity * 4
    keys, shifted = step.keys + begin, step.shifted_heads
    _attention_scores(queries, keys, shifted, position + 1, row_bytes, first, last, group, width, scores, score_bytes)
    for query in range(first * group, last * group):
        softmax(scores + query * score_bytes, position + 1)
    attended = step.attended + row * step.heads * width * 4
    _weighted_values(scores, score_bytes, step.values + begin, position + 1, row_bytes, first, last, group, width, attended)


@fast
def _attention_scores(
    queries: Any,
    keys: Any,
    shifted: Any,
    count: Any,
    row_bytes: Any,
    first: Any,
    last: Any,
    group: Any,
    width: Any,
    scores: Any,
    score_bytes: Any,
) -> None:
    """Compute scaled dot products of queries and keys at `count` positions: (queries, positions), `score_bytes` per query.

    The first `shifted` heads use the key of the previous position, which is 0 at the first position.
    """
    scale = np.float32(1.0) / np.sqrt(np.float32(width))
    for t in range(count):
        for head in range(first, last):
            shift = 1 if head < shifted else 0
            k, length = keys + (t - shift) * row_bytes + head * width * 4, width if t >= shift else 0
            for query in range(head * group, (head + 1) * group):
                q, score = queries + query * width * 4, np.float32(0.0)
                for i in range(length):
                    score += load(q, i) * load(k, i)
                store(scores + query * score_bytes, t, score * scale)


@fast
def _weighted_values(
    weights: Any,
    score_bytes: Any,
    values: Any,
    count: Any,
    row_bytes: Any,
    first: Any,
    last: Any,
    group: Any,
    width: Any,
    attended: Any,
) -> None:
    """Compute weighted sums of the values at `count` positions. Four positions at a time reduce the number of writes."""
    for i in range(first * group * width, last * group * width):
        store(attended, i, np.float32(0.0))
    for t in range(0, count - 3, 4):
        for head in range(first, last):
            v = values + t * row_bytes + head * width * 4
            for query in range(head * group, (head + 1) * group):
                weight, out = weights + query * score_bytes + t * 4, attended + query * width * 4
                a, b, c, d = load(weight, 0), load(weight, 1), load(weight, 2), load(weight, 3)
                for i in range(width):
                    weighted = (
                        a * load(v, i)
                        + b * load(v + row_bytes, i)
                        + c * load(v + 2 * row_bytes, i)
                        + d * load(v + 3 * row_bytes, i)
                    )
                    store(out, i, load(out, i) + weighted)
    for t in range(count - count % 4, count):
        for head in range(first, last):
            v = values + t * row_bytes + head * width * 4
            for query in range(head * group, (head + 1) * group):
                weight, out = load(weights + query * score_bytes, t), attended + query * width * 4
                for i in range(width):
                    store(out, i, load(out, i) + weight * load(v, i))


@fast
def softmax(scores: Any, count: Any) -> None:
    """Replace `count` scores with their softmax, in place."""
    maximum, total = np.float32(-np.inf), np.float32(0.0)
    for i in range(count):
        maximum = max(maximum, load(scores, i))
    for i in range(count):
        weight = exp(load(scores, i) - maximum)
        store(scores, i, weight)
        total += weight
    scale = np.float32(1.0) / total
    for i in range(count):
        store(scores, i, load(scores, i) * scale)


@fast
def _attention(step: Any, layer: Any, layer_index: Any, thread: Any, threads: Any) -> None:
    """Compute attention for this thread's share of the rows and heads. The caller must wait at a barrier afterwards."""
    units = step.rows * step.kv_heads
    start, stop = units * thread // threads, units * (thread + 1) // threads
    for storing in (True, False):
        unit = start
        while unit < stop:
            row, head = unit // step.kv_heads, unit % step.kv_heads
            heads = min(step.kv_heads - head, stop - unit)
            if storing:
                _store_keys_values(step, layer, layer_index, row, head, head + heads)
            else:
                _attend(step, layer, layer_index, thread, row, head, head + heads)
            unit += heads
        if storing and step.is_prefill:  # a row attends to keys that other threads write
            barrier(step, threads)


@fast
def _decode(step: Any, thread: Any, threads: Any) -> None:
    """Run this thread's share of a step."""
    _embed(step, thread, threads)
    barrier(step, threads)
    layers, rows = carray(_layers_at(step.layers), 1 << 30), step.rows
    for layer_index in range(step.layer_count):
        layer, first = layers[layer_index], layer_index * MATRICES_PER_LAYER
        normed = _normalize_rows(step, thread, layer.attention_gain, layer.attention_bias)
        _matmul(step, first + QKV, thread, threads, rows, normed, step.qkv, STORE)
        barrier(step, threads)
        _attention(step, layer, layer_index, thread, threads)
        barrier(step, threads)
        _matmul(step, first + ATTENTION_OUTPUT, thread, threads, rows, step.attended, step.residual, ADD)
        barrier(step, threads)
        normed = _normalize_rows(step, thread, layer.feed_forward_gain, layer.feed_forward_bias)
        _matmul(step, first + GATE, thread, threads, rows, normed, step.hidden, STORE)
        _matmul(step, first + UP, thread, threads, rows, normed, step.hidden, step.activation)
        barrier(step, threads)
        _matmul(step, first + DOWN, thread, threads, rows, step.hidden, step.residual, ADD)
        barrier(step, threads)
    first_row = rows - 1 if step.is_prefill else 0
    normed = _normalize_rows(step, thread, step.final_gain, step.final_bias) + first_row * step.width * 4
    epilogue = SOFTCAP if step.softcap > np.float32(0.0) else STORE
    _matmul(step, step.layer_count * MATRICES_PER_LAYER, thread, threads, rows - first_row, normed, step.logits, epilogue)


def decode(steps: Any) -> None:
    """Run this thread's share of a step. `NativeFunction` compiles this function."""
    step = carray(steps, 1)[0]
    thread, threads = np.int64(0), np.int64(1)
    if step.get_thread_num:
        thread, threads = np.int64(call(step.get_thread_num)), np.int64(call(step.get_num_threads))
    _decode(step, thread, threads)

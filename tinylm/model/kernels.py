"""A decoding step as machine code: all that `Decoder.advance` does, for all rows, compiled by numba for this processor.

The code works on addresses, which the records `STEP`, `LAYER` and `MATRIX` hold; `CompiledStep` fills them in. Threads run it side
by side, each for its share of the outputs, and meet at barriers. A sum is formed by one thread in one order, whatever rows stand
beside it and however many threads there are: neither changes a bit.

Matrices are cut into tiles of 64 outputs, tiles into panels of 32, inside which the weights of one input lie side by side: each
panel is read from its beginning to its end. Up to four rows read both panels of a tile at once; more read one after the other,
again for every eight rows, from the cache, while the next panel is fetched. bfloat16 and int8 are widened on the way to the
sums, which are float32, as the inputs are.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import carray, cfunc, from_dtype, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from tinylm.model.ngrams import MULTIPLIER

TILE, PANEL = 64, 32
"""Outputs of a tile, and of a panel."""
ROWS = 8
"""Rows that are multiplied at once, at most: room for rows is a multiple of it."""
STORE, ADD, GELU, RELU, RELU2, GATE, CAP = range(7)
"""What becomes of an output: stored, added to what is there, activated, multiplied by SiLU of what is there, or capped."""
QKV, OUTPUT, GATES, WIDEN, NARROW = range(5)
MATRICES = 5
"""Of a layer, in this order; GATES has outputs only where there are gates. After all layers come the head and the n-grams'."""

_ADDRESS, _COUNT = np.int64, np.int64
MATRIX = np.dtype(
    [
        ("weights", _ADDRESS),  # tiles one after the other, each (TILE / PANEL, inputs, PANEL)
        ("bytes", _COUNT),  # of a weight: 4 float32, 2 bfloat16, 1 int8
        ("inputs", _COUNT),
        ("outputs", _COUNT),
        ("scales", _ADDRESS),  # a float32 for each output; 0, as everywhere: there are none
        ("biases", _ADDRESS),
    ]
)
LAYER = np.dtype(
    [(name, _ADDRESS) for name in ("attention_gain", "attention_bias", "feed_gain", "feed_bias", "query_gain", "key_gain")]
)
_MODEL = [
    *((name, _ADDRESS) for name in ("layers", "matrices", "embedding", "positions", "cosines", "sines", "ngram_table", "orders")),
    *((name, _ADDRESS) for name in ("embedding_gain", "embedding_bias", "final_gain", "final_bias")),
    *((name, _COUNT) for name in ("layer_count", "width", "heads", "kv_heads", "head_width", "activation")),
    *((name, _COUNT) for name in ("layer_norm", "embedding_norm", "ngram_rows", "ngram_width", "order_count", "missing")),
    ("norm_eps", np.float32),
    ("qk_norm_eps", np.float32),  # negative: queries and keys are not normalised
    ("softcap", np.float32),  # 0: none
]
_ROWS_OF_A_STEP = [
    *((name, _COUNT) for name in ("rows", "capacity", "cache_rows")),
    ("reading", _COUNT),  # 1: rows are the tokens of one text, and only the last one's logits are wanted
    *((name, _ADDRESS) for name in ("keys", "values", "read", "tokens", "places", "texts", "logits")),
]
_ROOM = [  # of all threads, then each thread's own: first normalised inputs, then the sums of a tile, then scores
    *((name, _ADDRESS) for name in ("stream", "qkv", "mixed", "hidden", "own")),
    *((name, _COUNT) for name in ("own_bytes", "sums_at", "scores_at")),
]
_THREADS = [  # functions of the threads' library and the system's, and two numbers; thread_number 0: there is one thread
    (name, _ADDRESS) for name in ("thread_number", "thread_count", "nap", "meeting")
]
STEP = np.dtype([*_MODEL, *_ROWS_OF_A_STEP, *_ROOM, *_THREADS], align=True)

_PATIENCE = 1000
"""Looks at whether all are here before a nap: some 50 microseconds."""
_NEAR = 8192
"""Bytes ahead that are fetched where a tile is read once."""
_FLOAT, _HALF, _BYTE, _I32, _I64 = ir.FloatType(), ir.IntType(16), ir.IntType(8), ir.IntType(32), ir.IntType(64)
_compiled = njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "arcp", "nsz"})
"""Sums may be reordered into vector instructions, each row's in the same way; what is not a number must stay so."""
_as_written = njit(nogil=True, error_model="numpy", fastmath={"contract"})
"""In the order that is written. (Without any such flag a function gets those of its caller.)"""


def is_supported() -> bool:
    """Whether this processor multiplies and adds in one instruction; where not, that would be a call for each product."""
    return _architecture() in ("aarch64", "arm64") or bool(llvmlite.binding.get_host_cpu_features().get("fma"))


def _architecture() -> str:
    return str(llvmlite.binding.get_process_triple()).split("-")[0]


@cache
def _registers() -> tuple[int, int]:
    """(float32 numbers in a vector register, registers to keep sums in) of this processor."""
    features = llvmlite.binding.get_host_cpu_features()
    if features.get("avx512f"):
        return 16, 16
    return (8, 8) if features.get("avx2") else (4, 16)


def _reading(element: Any, result: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, index = arguments
        return builder.load(builder.gep(builder.inttoptr(address, element.as_pointer()), [index]))

    @intrinsic
    def read(context: Any, address: Any, index: Any) -> Any:
        """The index-th number from an address on."""
        return result(types.int64, types.int64), emit

    return read


def _writing(element: Any, kind: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, index, value = arguments
        builder.store(value, builder.gep(builder.inttoptr(address, element.as_pointer()), [index]))
        return context.get_dummy_value()

    @intrinsic
    def write(context: Any, address: Any, index: Any, value: Any) -> Any:
        return types.void(types.int64, types.int64, kind), emit

    return write


def _records_at(dtype: np.dtype[Any]) -> Any:
    pointer = types.CPointer(from_dtype(dtype))

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    @intrinsic
    def pointed(context: Any, address: Any) -> Any:
        return pointer(types.int64), emit

    return pointed


def _same_bits(given: Any, result: Any, element: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], element)

    @intrinsic
    def cast(context: Any, number: Any) -> Any:
        return result(given), emit

    return cast


@intrinsic
def _called(context: Any, address: Any) -> Any:
    """What the function there, which takes nothing, returns."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.call(builder.inttoptr(arguments[0], ir.FunctionType(_I32, []).as_pointer()), [])

    return types.int32(types.int64), emit


@intrinsic
def _napped(context: Any, address: Any, microseconds: Any) -> Any:
    """Call the function there, which sleeps that long."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.call(builder.inttoptr(arguments[0], ir.FunctionType(_I32, [_I32]).as_pointer()), [arguments[1]])

    return types.int32(types.int64, types.int32), emit


@intrinsic
def _counted(context: Any, address: Any, more: Any) -> Any:
    """Add to the number there, which several threads do; what it was before."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(arguments[0], _I64.as_pointer()), arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), emit


@intrinsic
def _pause(context: Any) -> Any:
    """Tell the processor that nothing but waiting is done."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if _architecture() == "x86_64":
            hint = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, hint, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), emit


_get, _set = _reading(_FLOAT, types.float32), _writing(_FLOAT, types.float32)
_get_id, _set_id = _reading(_I64, types.int64), _writing(_I64, types.int64)
_layers_at, _matrices_at = _records_at(LAYER), _records_at(MATRIX)
_to_bits, _from_bits = _same_bits(types.float32, types.int32, _I32), _same_bits(types.int32, types.float32, _FLOAT)


def _multiplier(rows: int, bytes: int) -> Any:
    """(a compiled function, how often it reads what it reads): the sums of `rows` rows for a tile, or, of ROWS rows, a panel.

    Its arguments: the weights, of so many bytes each; the rows' inputs and the bytes from one row's to the next's; how many
    inputs there are; where to put the sums (rows, TILE); for ROWS rows, what to fetch and the bytes to go on there with each input.
    """
    lanes, registers = _registers()
    outputs = TILE if rows < ROWS else PANEL
    columns = max(lanes, min(outputs, lanes * registers // rows))
    vectors, passes = columns // lanes, outputs // columns
    vector, whole = ir.VectorType(_FLOAT, lanes), ir.VectorType(_I32, lanes)
    stored = ir.VectorType({4: _FLOAT, 2: _HALF, 1: _BYTE}[bytes], lanes)

    def widened(builder: Any, weights: Any) -> Any:
        if bytes == 1:
            return builder.sitofp(builder.sext(weights, whole), vector)
        if bytes == 2:
            return builder.bitcast(builder.shl(builder.zext(weights, whole), ir.Constant(whole, [16] * lanes)), vector)
        return weights

    def repeated(builder: Any, number: Any) -> Any:
        nothing = ir.Constant(vector, ir.Undefined)
        return builder.shuffle_vector(builder.insert_element(nothing, number, _I32(0)), nothing, ir.Constant(whole, [0] * lanes))

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        panel, inputs, pitch, count, sums, ahead, stride = arguments
        module, add, times = builder.module, builder.add, builder.mul
        fma = cgutils.get_or_insert_function(module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{lanes}f32")
        hint = ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _I32, _I32, _I32])
        fetch = cgutils.get_or_insert_function(module, hint, "llvm.prefetch.p0i8")
        before, each, after = builder.block, builder.append_basic_block("each"), builder.append_basic_block("after")
        builder.branch(each)
        builder.position_at_end(each)
        index = builder.phi(_I64)
        totals = [builder.phi(vector) for _ in range(rows * vectors)]
        here = add(panel, times(index, _I64(PANEL * bytes)))
        next_panel = times(count, _I64(PANEL * bytes))
        places, soon = [], []
        for part in range(vectors):
            beyond, column = divmod(part * lanes, PANEL)
            places.append(add(add(here, times(next_panel, _I64(beyond))), _I64(column * bytes)))
            if rows < ROWS and column * bytes % 64 == 0:
                soon.append(add(places[-1], _I64(_NEAR)))
        if rows == ROWS:
            lines = max(1, PANEL * bytes // 64 // passes)
            soon = [add(add(ahead, times(index, stride)), _I64(64 * line)) for line in range(lines)]
        for place in soon:
            builder.call(fetch, [builder.inttoptr(place, _BYTE.as_pointer()), _I32(0), _I32(2), _I32(1)])
        weights = [widened(builder, builder.load(builder.inttoptr(place, stored.as_pointer()), align=bytes)) for place in places]
        sum_after = []
        for row in range(rows):
            address = add(add(inputs, times(pitch, _I64(row))), times(index, _I64(4)))
            x = repeated(builder, builder.load(builder.inttoptr(address, _FLOAT.as_pointer()), align=4))
            sum_after += [builder.call(fma, [x, w, totals[row * vectors + part]]) for part, w in enumerate(weights)]
        following = add(index, _I64(1))
        builder.cbranch(builder.icmp_signed("<", following, count), each, after)
        index.add_incoming(_I64(0), before)
        index.add_incoming(following, each)
        for total, sum in zip(totals, sum_after, strict=True):
            total.add_incoming(ir.Constant(vector, [0.0] * lanes), before)
            total.add_incoming(sum, each)
        builder.position_at_end(after)
        for number, sum in enumerate(sum_after):
            row, part = divmod(number, vectors)
            place = add(sums, _I64(4 * (TILE * row + lanes * part)))
            builder.store(sum, builder.inttoptr(place, vector.as_pointer()), align=4)
        return context.get_dummy_value()

    @intrinsic
    def multiply(context: Any, panel: Any, inputs: Any, pitch: Any, count: Any, sums: Any, ahead: Any, stride: Any) -> Any:
        return types.void(*(types.int64,) * 7), emit

    @_compiled
    def all_columns(weights: Any, inputs: Any, pitch: Any, count: Any, sums: Any, ahead: Any, stride: Any) -> None:
        for part in range(passes):
            first = part * columns
            panel = weights + (first // PANEL * count * PANEL + first % PANEL) * bytes
            multiply(panel, inputs, pitch, count, sums + first * 4, ahead + part * stride * count, stride)

    return all_columns, passes


def _multipliers(rows: int) -> Any:
    """What `_multiplier` gives, for weights of any kind."""
    (floats, passes), (halves, _), (steps, _) = (_multiplier(rows, bytes) for bytes in (4, 2, 1))

    @_compiled
    def multiply(bytes: Any, weights: Any, inputs: Any, pitch: Any, count: Any, sums: Any, ahead: Any, stride: Any) -> None:
        if bytes == 4:
            floats(weights, inputs, pitch, count, sums, ahead, stride)
        elif bytes == 2:
            halves(weights, inputs, pitch, count, sums, ahead, stride)
        else:
            steps(weights, inputs, pitch, count, sums, ahead, stride)

    return multiply, passes


(_one_row, _), (_four_rows, _), (_eight_rows, _PASSES) = (_multipliers(rows) for rows in (1, 4, ROWS))


@_as_written
def _exp(x: Any) -> Any:
    """e ** x, to an ulp or two, by operations that become vector instructions: 2 ** n by its bits, the rest a polynomial."""
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    shifted = x * np.float32(1.44269504) + np.float32(12582912.0)  # 1.5 * 2 ** 23, which leaves room for a whole number only
    n = shifted - np.float32(12582912.0)
    rest = x - n * np.float32(0.693359375)  # ln 2 in two parts, the first of few bits, so that its multiples are exact
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


@_compiled
def _gated(x: Any, gate: Any) -> Any:
    """x times the logistic function of `gate`."""
    return x / (np.float32(1.0) + _exp(-gate))


@_compiled
def _barrier(step: Any, threads: Any) -> None:
    """Nobody goes on before all are here. Who waits long lets others have the processor: there may be more to do than cores."""
    if threads == 1:
        return
    turn = _counted(step.meeting + 8, 0)
    if _counted(step.meeting, 1) == threads - 1:
        _counted(step.meeting, -threads)
        _counted(step.meeting + 8, 1)
        return
    waited = 0
    while _counted(step.meeting + 8, 0) == turn:
        waited += 1
        if waited < _PATIENCE:
            _pause()
        else:
            _napped(step.nap, np.int32(1))


@_compiled
def _tile_sums(matrix: Any, tile: Any, rows: Any, inputs: Any, pitch: Any, sums: Any) -> None:
    """The weights of one tile times every row's inputs, which lie `pitch` bytes apart: sums (rows, TILE)."""
    count, bytes = matrix.inputs, matrix.bytes
    size = count * PANEL * bytes
    weights = matrix.weights + tile * (TILE // PANEL) * size
    left = rows % ROWS if rows % ROWS <= ROWS // 2 else 0  # more than half a block is a block
    if rows > left:
        stride = PANEL * bytes // ((rows - left + ROWS - 1) // ROWS * _PASSES)  # each pass fetches its part of the next panel
        for part in range(TILE // PANEL):
            panel = weights + part * size
            ahead = panel + size
            for row in range(0, rows - left, ROWS):
                y = sums + (row * TILE + part * PANEL) * 4
                _eight_rows(bytes, panel, inputs + row * pitch, pitch, count, y, ahead, stride)
                ahead += _PASSES * stride * count
    x, y = inputs + (rows - left) * pitch, sums + (rows - left) * TILE * 4
    if left == 1:
        _one_row(bytes, weights, x, pitch, count, y, 0, 0)
    elif left:
        _four_rows(bytes, weights, x, pitch, count, y, 0, 0)


@_compiled
def _finish(step: Any, y: Any, width: Any, out: Any, use: Any) -> None:
    """Make of the outputs y what they are wanted for."""
    if use == STORE:
        for i in range(width):
            _set(out, i, _get(y, i))
    elif use == ADD:
        for i in range(width):
            _set(out, i, _get(out, i) + _get(y, i))
    elif use == GELU:
        for i in range(width):
            value = _get(y, i)
            inner = np.float32(1.5957691216) * (value + np.float32(0.044715) * value * value * value)  # 2 sqrt(2 / pi)
            _set(out, i, _gated(value, inner))
    elif use == RELU:
        for i in range(width):
            _set(out, i, max(_get(y, i), np.float32(0.0)))
    elif use == RELU2:
        for i in range(width):
            value = max(_get(y, i), np.float32(0.0))
            _set(out, i, value * value)
    elif use == GATE:
        for i in range(width):
            gate = _get(out, i)
            _set(out, i, _gated(gate, gate) * _get(y, i))
    else:
        cap = step.softcap
        for i in range(width):  # tanh by the logistic function
            _set(out, i, _gated(np.float32(2.0) * cap, np.float32(2.0) * _get(y, i) / cap) - cap)


@_compiled
def _product(step: Any, index: Any, thread: Any, threads: Any, rows: Any, inputs: Any, out: Any, use: Any) -> None:
    """This thread's outputs of a matrix for inputs (rows, inputs), used in `out` (rows, outputs)."""
    matrix = carray(_matrices_at(step.matrices), 1 << 30)[index]
    sums = step.own + thread * step.own_bytes + step.sums_at
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
                    _set(y, i, _get(y, i) * _get(matrix.scales, begin + i))
            if matrix.biases:
                for i in range(width):
                    _set(y, i, _get(y, i) + _get(matrix.biases, begin + i))
            _finish(step, y, width, out + (row * outputs + begin) * 4, use)


@_compiled
def _normalise(x: Any, count: Any, layer_norm: Any, eps: Any, gain: Any, bias: Any, out: Any) -> None:
    """`count` numbers at x, by their mean and variance or their root mean square."""
    mean, square = np.float32(0.0), np.float32(0.0)
    if layer_norm:
        for i in range(count):
            mean += _get(x, i)
        mean /= np.float32(count)
    for i in range(count):
        away = _get(x, i) - mean
        square += away * away
    scale = np.float32(1.0) / np.sqrt(square / np.float32(count) + eps)
    for i in range(count):
        _set(out, i, (_get(x, i) - mean) * scale)
    if gain:
        for i in range(count):
            _set(out, i, _get(out, i) * _get(gain, i))
    if bias:
        for i in range(count):
            _set(out, i, _get(out, i) + _get(bias, i))


@_compiled
def _normalised(step: Any, thread: Any, gain: Any, bias: Any) -> Any:
    """Where this thread finds every row of the stream normalised: doing it again costs less than meeting once more."""
    own, width = step.own + thread * step.own_bytes, step.width
    for row in range(step.rows):
        offset = row * width * 4
        _normalise(step.stream + offset, width, step.layer_norm, step.norm_eps, gain, bias, own + offset)
    return own


@_compiled
def _look_up(step: Any, row: Any) -> None:
    """The token's embedding into the stream; those of its n-grams, side by side, where hidden numbers will be."""
    width, token, place = step.width, _get_id(step.tokens, row), _get_id(step.places, row)
    embedded, stream = step.embedding + token * width * 4, step.stream + row * width * 4
    for i in range(width):
        _set(stream, i, _get(embedded, i))
    read = step.read + _get_id(step.texts, row) * step.capacity * 8
    _set_id(read, place, token)
    for number in range(step.order_count):
        order = _get_id(step.orders, number)
        key = order
        for at in range(place - order + 1, place + 1):
            key = (key + (step.missing if at < 0 else _get_id(read, at)) + 1) * MULTIPLIER
            key = key ^ (key >> 29)
        found = step.ngram_table + (key % step.ngram_rows + number * step.ngram_rows) * step.ngram_width * 4
        out = step.hidden + (row * step.order_count + number) * step.ngram_width * 4
        for i in range(step.ngram_width):
            _set(out, i, _get(found, i))


@_compiled
def _begin(step: Any, thread: Any, threads: Any) -> None:
    """What the first layer reads, into the stream."""
    rows, width = step.rows, step.width
    for row in range(thread, rows, threads):
        _look_up(step, row)
    if step.order_count:
        _barrier(step, threads)
        _product(step, step.layer_count * MATRICES + 1, thread, threads, rows, step.hidden, step.stream, ADD)
        _barrier(step, threads)
    for row in range(thread, rows, threads):
        stream = step.stream + row * width * 4
        if step.positions:
            position = step.positions + _get_id(step.places, row) * width * 4
            for i in range(width):
                _set(stream, i, _get(stream, i) + _get(position, i))
        if step.embedding_norm:
            _normalise(stream, width, step.layer_norm, step.norm_eps, step.embedding_gain, step.embedding_bias, stream)


@_compiled
def _norm_and_rotate(step: Any, x: Any, gain: Any, place: Any) -> None:
    """A query or key, in place: normalised, and turned to its position."""
    width = step.head_width
    if step.qk_norm_eps >= np.float32(0.0):
        _normalise(x, width, 0, step.qk_norm_eps, gain, 0, x)
    if step.cosines:
        half = width // 2
        cosines, sines, other = step.cosines + place * half * 4, step.sines + place * half * 4, x + half * 4
        for i in range(half):
            a, b, cosine, sine = _get(x, i), _get(other, i), _get(cosines, i), _get(sines, i)
            _set(x, i, a * cosine - b * sine)
            _set(other, i, b * cosine + a * sine)


@_compiled
def _remember(step: Any, layer: Any, number: Any, row: Any, first: Any, last: Any) -> None:
    """Store a row's keys and values of the key/value heads [first, last)."""
    width, pitch = step.head_width, step.kv_heads * step.head_width * 4
    new_keys = step.qkv + (row * (step.heads + 2 * step.kv_heads) + step.heads) * width * 4
    place = _get_id(step.places, row)
    begin = ((number * step.cache_rows + _get_id(step.texts, row)) * step.capacity + place) * pitch
    for head in range(first, last):
        _norm_and_rotate(step, new_keys + head * width * 4, layer.key_gain, place)
    for i in range(first * width, last * width):
        _set(step.keys + begin, i, _get(new_keys, i))
    for i in range(first * width, last * width):
        _set(step.values + begin, i, _get(new_keys + pitch, i))


@_compiled
def _attend(step: Any, layer: Any, number: Any, thread: Any, row: Any, first: Any, last: Any) -> None:
    """Mix values for a row's queries that share the key/value heads [first, last).

    Positions are gone through in the order in which they lie, all heads of one at a time.
    """
    width, group = step.head_width, step.heads // step.kv_heads
    place, pitch = _get_id(step.places, row), step.kv_heads * width * 4
    queries = step.qkv + row * (step.heads + 2 * step.kv_heads) * width * 4
    begin = (number * step.cache_rows + _get_id(step.texts, row)) * step.capacity * pitch
    for query in range(first * group, last * group):
        _norm_and_rotate(step, queries + query * width * 4, layer.query_gain, place)
    scores, room = step.own + thread * step.own_bytes + step.scores_at, step.capacity * 4
    _score(queries, step.keys + begin, place + 1, pitch, first, last, group, width, scores, room)
    for query in range(first * group, last * group):
        _soft_max(scores + query * room, place + 1)
    mixed = step.mixed + row * step.heads * width * 4
    _mix(scores, room, step.values + begin, place + 1, pitch, first, last, group, width, mixed)


@_compiled
def _score(
    queries: Any, keys: Any, count: Any, pitch: Any, first: Any, last: Any, group: Any, width: Any, scores: Any, room: Any
) -> None:
    """Each query of the heads times the keys of `count` positions: scores (queries, positions), `room` bytes for a query."""
    scale = np.float32(1.0) / np.sqrt(np.float32(width))
    for at in range(count):
        for head in range(first, last):
            k = keys + at * pitch + head * width * 4
            for query in range(head * group, (head + 1) * group):
                q, score = queries + query * width * 4, np.float32(0.0)
                for i in range(width):
                    score += _get(q, i) * _get(k, i)
                _set(scores + query * room, at, score * scale)


@_compiled
def _mix(
    shares: Any, room: Any, values: Any, count: Any, pitch: Any, first: Any, last: Any, group: Any, width: Any, mixed: Any
) -> None:
    """The values of `count` positions, each times its share: four at a time, so that sums are written a quarter as often."""
    for i in range(first * group * width, last * group * width):
        _set(mixed, i, np.float32(0.0))
    for at in range(0, count - 3, 4):
        for head in range(first, last):
            v = values + at * pitch + head * width * 4
            for query in range(head * group, (head + 1) * group):
                share, out = shares + query * room + at * 4, mixed + query * width * 4
                a, b, c, d = _get(share, 0), _get(share, 1), _get(share, 2), _get(share, 3)
                for i in range(width):
                    more = a * _get(v, i) + b * _get(v + pitch, i) + c * _get(v + 2 * pitch, i) + d * _get(v + 3 * pitch, i)
                    _set(out, i, _get(out, i) + more)
    for at in range(count - count % 4, count):
        for head in range(first, last):
            v = values + at * pitch + head * width * 4
            for query in range(head * group, (head + 1) * group):
                share, out = _get(shares + query * room, at), mixed + query * width * 4
                for i in range(width):
                    _set(out, i, _get(out, i) + share * _get(v, i))


@_compiled
def _soft_max(scores: Any, count: Any) -> None:
    most, total = np.float32(-np.inf), np.float32(0.0)
    for i in range(count):
        most = max(most, _get(scores, i))
    for i in range(count):
        share = _exp(_get(scores, i) - most)
        _set(scores, i, share)
        total += share
    scale = np.float32(1.0) / total
    for i in range(count):
        _set(scores, i, _get(scores, i) * scale)


@_compiled
def _look_back(step: Any, layer: Any, number: Any, thread: Any, threads: Any) -> None:
    """Attention of this thread's rows and heads, to be met after by all."""
    units = step.rows * step.kv_heads
    start, stop = units * thread // threads, units * (thread + 1) // threads
    for storing in (True, False):
        unit = start
        while unit < stop:
            row, head = unit // step.kv_heads, unit % step.kv_heads
            heads = min(step.kv_heads - head, stop - unit)
            if storing:
                _remember(step, layer, number, row, head, head + heads)
            else:
                _attend(step, layer, number, thread, row, head, head + heads)
            unit += heads
        if storing and step.reading:  # rows see what others have stored
            _barrier(step, threads)


@_compiled
def _run(step: Any, thread: Any, threads: Any) -> None:
    _begin(step, thread, threads)
    _barrier(step, threads)
    layers, rows = carray(_layers_at(step.layers), 1 << 30), step.rows
    for number in range(step.layer_count):
        layer, first = layers[number], number * MATRICES
        normal = _normalised(step, thread, layer.attention_gain, layer.attention_bias)
        _product(step, first + QKV, thread, threads, rows, normal, step.qkv, STORE)
        _barrier(step, threads)
        _look_back(step, layer, number, thread, threads)
        _barrier(step, threads)
        _product(step, first + OUTPUT, thread, threads, rows, step.mixed, step.stream, ADD)
        _barrier(step, threads)
        normal = _normalised(step, thread, layer.feed_gain, layer.feed_bias)
        _product(step, first + GATES, thread, threads, rows, normal, step.hidden, STORE)
        _product(step, first + WIDEN, thread, threads, rows, normal, step.hidden, step.activation)
        _barrier(step, threads)
        _product(step, first + NARROW, thread, threads, rows, step.hidden, step.stream, ADD)
        _barrier(step, threads)
    wanted = rows - 1 if step.reading else 0
    normal = _normalised(step, thread, step.final_gain, step.final_bias) + wanted * step.width * 4
    use = CAP if step.softcap > np.float32(0.0) else STORE
    _product(step, step.layer_count * MATRICES, thread, threads, rows - wanted, normal, step.logits, use)


def _step(steps: Any) -> None:
    step = carray(steps, 1)[0]
    thread, threads = np.int64(0), np.int64(1)
    if step.thread_number:
        thread, threads = np.int64(_called(step.thread_number)), np.int64(_called(step.thread_count))
    _run(step, thread, threads)


@cache
def entry() -> int:
    """The address of the machine code: void step(STEP *), for every thread of a team. Compiled once for a machine, then loaded."""
    signature = types.void(types.CPointer(from_dtype(STEP)))
    try:
        compiled = cfunc(signature, nopython=True, cache=True)(_step)
    except RuntimeError:  # no folder that could be written to
        compiled = cfunc(signature, nopython=True)(_step)
    address: int = compiled.address
    return address

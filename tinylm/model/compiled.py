"""A decoder's step as one call of machine code: weights laid out for it, room to work in, threads.

`tinylm.model.kernels` is the code itself, and needs numba. Threads are those that torch computes with, through the entry points
that compilers call for OpenMP (libgomp has them, libomp and Intel's too): a second team would fight with the first for the
same cores. Where they are not found, one thread does it.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from tinylm.errors import InputError, need_extra
from tinylm.model.cache import KeyValueCache
from tinylm.model.layers import Block
from tinylm.model.packed import Int8Linear, TransposedLinear
from tinylm.model.transformer import Transformer

_ALIGNMENT = 64
_PRODUCTS = 4_000_000
"""Of a weight and an input, for each thread: fewer are done before another thread has begun. No timing decides that, so that
equal work is done alike."""
_PATIENCE = 1.5
"""Seconds of compiling before it is told: more than it takes to load what was compiled before."""
_START_SECONDS, _STEP_SECONDS, _BYTE_SECONDS = 2.0, 4e-4, 16e-12
"""What compiled steps cost before the first (loading numba and the code, once read from the disk), and what each of them
saves, with a share for each byte of weights; measured on two cores of one Xeon, and taken large, small and small."""


def kernels() -> Any:
    """The machine code's module. Raises `InputError` where numba is not installed."""
    try:
        from tinylm.model import kernels as compiled
    except ImportError:
        raise need_extra("fast", "compiling the decoding step for a CPU") from None
    return compiled


def unsupported(network: Transformer) -> str | None:
    """What the machine code does not know about a network on the CPU, or None."""
    model = network.model
    unknown = {
        "norm_position: post": model.norm_position == "post",
        "parallel_residual": model.parallel_residual,
        "value_embeddings": model.value_embeddings > 0,
        "value_residual": model.value_residual,
        "embedding_shortcut": model.embedding_shortcut,
        "feed_forward: gelu_exact": model.feed_forward == "gelu_exact",
        "a model in another type than float32": network.embedding.weight.dtype != torch.float32,
    }
    return next((part for part, there in unknown.items() if there), None)


def pays(network: Transformer, steps: int | None) -> bool:
    """Whether so many steps are enough for compiled ones to be worth their start; None: no end of them."""
    possible = find_spec("numba") is not None and network.embedding.weight.device.type == "cpu" and unsupported(network) is None
    saved = _STEP_SECONDS + _BYTE_SECONDS * sum(4 * parameter.numel() for parameter in network.parameters())
    return possible and (steps is None or steps * saved > _START_SECONDS) and bool(kernels().is_supported())


def load(say: Callable[[str], None]) -> None:
    """Have the machine code ready. `say` hears when that takes a while: the first time on a machine, when it is compiled."""
    talk = threading.Timer(_PATIENCE, say, ["compiling the decoding step for this machine, once: some 10 seconds"])
    talk.daemon = True
    talk.start()
    try:
        kernels().entry()
    finally:
        talk.cancel()


class CompiledStep:
    """What `Decoder.step` does, for networks on the CPU, packed or plain, in which there is no `unsupported`.

    It has its own copy of the matrices, and reads embeddings where the network holds them. Raises `InputError` where numba is
    not installed, and for what it does not know.
    """

    def __init__(self, network: Transformer) -> None:
        self._kernels = kernels()
        unknown = unsupported(network)
        if unknown is None and not self._kernels.is_supported():
            unknown = "a processor without fused multiply-add"
        if unknown is not None:
            raise InputError(f"{unknown} is nothing that the compiled step knows", where="--compile", hint="leave it out")
        self._network = network
        self._step = np.zeros(1, self._kernels.STEP)
        self._layers = np.zeros(network.model.n_layer, self._kernels.LAYER)
        self._matrices = np.zeros(network.model.n_layer * self._kernels.MATRICES + 2, self._kernels.MATRIX)
        self._weights = _Arena()
        self._describe()
        self._weights.fill()
        self._products = int((self._matrices["inputs"] * self._matrices["outputs"]).sum())
        self._room: np.ndarray | None = None
        self._room_for = (0, 0, 0)
        self._lock = threading.Lock()
        self._code = self._kernels.entry()
        self._alone = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._code)

    def __call__(self, cache: KeyValueCache, tokens: Tensor) -> Tensor:
        """Add one id (B,) to every row; the logits (B, V) after it. `cache.lengths` stay as they are."""
        rows = len(cache.lengths)
        return self._run(cache, tokens, np.arange(rows), cache.lengths)

    def read(self, cache: KeyValueCache, row: int, tokens: Tensor) -> Tensor:
        """Fill a row with ids (T,) from the beginning; the logits (V,) after the last. `cache.lengths` stay as they are."""
        cache.tokens[row, : len(tokens)] = tokens
        return self._run(cache, tokens, row, np.arange(len(tokens)), reading=True)[0]

    def _run(self, cache: KeyValueCache, tokens: Tensor, texts: Any, places: Any, reading: bool = False) -> Tensor:
        rows, team = len(tokens), _team()
        threads = 1 if team is None else min(torch.get_num_threads(), max(1, rows * self._products // _PRODUCTS))
        logits = torch.empty(1 if reading else rows, self._network.vocab_size)
        with self._lock:
            self._make_room(max(rows, len(cache.tokens)), cache.capacity, threads)
            self._ids[0, :rows], self._ids[1, :rows], self._ids[2, :rows] = tokens.numpy(), places, texts
            self._check(self._ids[0, :rows], self._ids[1, :rows], cache)
            step = self._step[0]
            step["rows"], step["reading"] = rows, reading
            step["capacity"], step["cache_rows"] = cache.capacity, len(cache.tokens)
            step["keys"], step["values"], step["read"] = cache.keys.data_ptr(), cache.values.data_ptr(), cache.tokens.data_ptr()
            step["logits"] = logits.data_ptr()
            if team is None or threads == 1:
                step["thread_number"] = 0
                self._alone(self._step.ctypes.data)
            else:
                step["thread_number"], step["thread_count"], step["nap"] = team.number, team.count, team.nap
                team.run(self._code, self._step.ctypes.data, threads, 0)
        return logits

    def _check(self, ids: np.ndarray, places: np.ndarray, cache: KeyValueCache) -> None:
        """Machine code reads and writes wherever it is told to."""
        room = min(cache.capacity, self._network.model.context_length)
        if ids.min() < 0 or ids.max() >= self._network.vocab_size or places.max() >= room:
            raise IndexError("an id beyond the vocabulary, or a row that is full")

    def _describe(self) -> None:
        network, model, step = self._network, self._network.model, self._step
        step["layers"], step["matrices"] = self._layers.ctypes.data, self._matrices.ctypes.data
        step["layer_count"], step["width"] = model.n_layer, model.n_embd
        step["heads"], step["kv_heads"], step["head_width"] = model.n_head, model.kv_heads, model.head_width
        names = {"gelu": "GELU", "relu": "RELU", "relu2": "RELU2", "swiglu": "GATE"}
        step["activation"] = getattr(self._kernels, names[model.feed_forward])
        step["layer_norm"], step["norm_eps"] = model.norm == "layernorm", model.norm_eps
        step["qk_norm_eps"] = model.norm_eps if model.qk_norm else -1.0
        step["softcap"] = model.logit_softcap or 0.0
        step["embedding"] = network.embedding.weight.data_ptr()
        if network.positions is not None:
            step["positions"] = network.positions.weight.data_ptr()
        elif model.position == "sinusoidal":
            step["positions"] = network.get_buffer("sinusoids").data_ptr()
        elif model.position == "rope":
            step["cosines"], step["sines"] = (network.get_buffer(f"rope_{name}").data_ptr() for name in ("cosines", "sines"))
        step["embedding_norm"] = network.embedding_norm is not None
        self._norm(step, "embedding", network.embedding_norm)
        self._norm(step, "final", network.final_norm)
        for number, block in enumerate(network.blocks):
            self._describe_layer(number, cast(Block, block))
        self._matrix(model.n_layer * self._kernels.MATRICES, network.head)
        if (ngrams := network.ngrams) is not None:
            self._orders = np.array(ngrams.orders, dtype=np.int64)
            step["orders"], step["order_count"] = self._orders.ctypes.data, len(ngrams.orders)
            step["ngram_table"], step["ngram_rows"] = ngrams.table.weight.data_ptr(), ngrams.rows
            step["ngram_width"], step["missing"] = model.ngram_width, ngrams.missing
            self._matrix(model.n_layer * self._kernels.MATRICES + 1, ngrams.projection)

    def _describe_layer(self, number: int, block: Block) -> None:
        attention, feed = block.attention, block.feed_forward
        layer, first = self._layers[number : number + 1], number * self._kernels.MATRICES
        self._norm(layer, "attention", block.attention_norm)
        self._norm(layer, "feed", block.feed_forward_norm)
        if attention.query_gain is not None and attention.key_gain is not None:
            self._weights.vector(layer, "query_gain", attention.query_gain)
            self._weights.vector(layer, "key_gain", attention.key_gain)
        self._matrix(first + self._kernels.QKV, attention.qkv)
        self._matrix(first + self._kernels.OUTPUT, attention.output)
        if feed.kind == "swiglu":
            self._matrix(first + self._kernels.GATES, feed.input, 0, 2)
            self._matrix(first + self._kernels.WIDEN, feed.input, 1, 2)
        else:
            self._matrix(first + self._kernels.WIDEN, feed.input)
        self._matrix(first + self._kernels.NARROW, feed.output)

    def _norm(self, record: np.ndarray, name: str, norm: nn.Module | None) -> None:
        for field, found in (("gain", getattr(norm, "weight", None)), ("bias", getattr(norm, "bias", None))):
            if found is not None:
                self._weights.vector(record, f"{name}_{field}", found)

    def _matrix(self, index: int, linear: nn.Module, part: int = 0, parts: int = 1) -> None:
        """Describe a linear layer, or one of `parts` equal parts of its outputs."""
        weight, scale = _weight_and_scale(linear)
        outputs = len(weight) // parts
        own = slice(part * outputs, (part + 1) * outputs)
        record = self._matrices[index : index + 1]
        record["bytes"], record["inputs"], record["outputs"] = weight.element_size(), weight.shape[1], outputs
        self._weights.tiles(record, "weights", weight[own], self._kernels.TILE, self._kernels.PANEL)
        for field, found in (("scales", scale), ("biases", linear.bias)):
            if found is not None:
                self._weights.vector(record, field, cast(Tensor, found)[own])

    def _make_room(self, rows: int, capacity: int, threads: int) -> None:
        had = self._room_for
        if rows <= had[0] and capacity <= had[1] and threads <= had[2]:
            return
        self._room_for = rows, capacity, threads = max(rows, had[0]), max(capacity, had[1]), max(threads, had[2])
        model, step = self._network.model, self._step
        padded = -(-rows // self._kernels.ROWS) * self._kernels.ROWS
        heads = model.n_head + 2 * model.kv_heads
        hidden = max(model.feed_forward_width, len(model.ngram_embeddings) * model.ngram_width)
        widths = {"stream": model.n_embd, "qkv": heads * model.head_width, "mixed": model.n_head * model.head_width}
        sizes = {name: _aligned(4 * padded * width) for name, width in (widths | {"hidden": hidden}).items()}
        step["sums_at"] = _aligned(4 * padded * model.n_embd)
        step["scores_at"] = step["sums_at"] + _aligned(4 * padded * self._kernels.TILE)
        step["own_bytes"] = step["scores_at"] + _aligned(4 * model.n_head * capacity)
        self._ids = np.zeros((3, rows), dtype=np.int64)
        step["tokens"], step["places"], step["texts"] = (ids.ctypes.data for ids in self._ids)
        sizes["meeting"] = 2 * _ALIGNMENT
        self._room, address = _aligned_bytes(sum(sizes.values()) + threads * int(step["own_bytes"][0]))
        for name, size in (sizes | {"own": 0}).items():
            step[name] = address
            address += size


def _weight_and_scale(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(outputs, inputs), and one factor per output."""
    if isinstance(linear, Int8Linear):
        return linear.weight[:, : linear.inputs], linear.scale.float()
    weight = cast(Tensor, linear.weight).detach()
    return weight.t() if isinstance(linear, TransposedLinear) else weight, None


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _aligned_bytes(size: int) -> tuple[np.ndarray, int]:
    """Zeros, and the first address among them that is aligned."""
    room = np.zeros(size + _ALIGNMENT, dtype=np.uint8)  # numpy asks the system for large pages
    return room, _aligned(room.ctypes.data)


class _Arena:
    """One stretch of memory for all weights: `tiles` and `vector` note what goes into it and who has to know where; then `fill`."""

    def __init__(self) -> None:
        self._memory: np.ndarray | None = None
        self._noted: list[tuple[np.ndarray, str, Tensor, tuple[int, ...]]] = []

    def tiles(self, record: np.ndarray, field: str, matrix: Tensor, tile: int, panel: int) -> None:
        """A matrix (outputs, inputs) as (outputs / tile, tile / panel, inputs, panel), filled up with zeros to whole tiles."""
        outputs, inputs = matrix.shape
        self._noted.append((record, field, matrix, (-(-outputs // tile) * tile // panel, inputs, panel)))

    def vector(self, record: np.ndarray, field: str, vector: Tensor) -> None:
        self._noted.append((record, field, vector.detach().float(), vector.shape))

    def fill(self) -> None:
        sizes = [math.prod(shape) * one.element_size() for _, _, one, shape in self._noted]
        self._memory, address = _aligned_bytes(sum(map(_aligned, sizes)))
        whole, start = torch.from_numpy(self._memory), address - self._memory.ctypes.data
        for size, (record, field, one, shape) in zip(sizes, self._noted, strict=True):
            place = whole[start : start + size].view(one.dtype).view(shape)
            if one.ndim == 2:
                full, rest = divmod(len(one), shape[-1])
                place[:full] = one[: len(one) - rest].reshape(full, shape[-1], shape[-2]).transpose(1, 2)
                place[full : full + 1, :, :rest] = one[len(one) - rest :].t()
            else:
                place.copy_(one)
            record[field] = self._memory.ctypes.data + start
            start += _aligned(size)
        self._noted.clear()


class _Team:
    """OpenMP's threads: `run(code, argument, threads, 0)` has them all do the same, and waits for them."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.run = library.GOMP_parallel
        self.run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        self.run.restype = None
        names = ("omp_get_thread_num", "omp_get_num_threads", "usleep")
        self.number, self.count, self.nap = (cast(int, ctypes.cast(library[name], ctypes.c_void_p).value) for name in names)


@cache
def _team() -> _Team | None:
    try:
        return _Team(ctypes.CDLL(None))  # what torch has loaded is found among everything that is loaded
    except (TypeError, OSError, AttributeError):  # Windows, and where torch came without
        return None

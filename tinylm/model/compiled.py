"""Decode on a CPU with numba-compiled code: pack the weights, allocate the workspace and run each step on several threads.

The compiled code itself is in `tinylm.model.kernels`. Once it has been compiled, it is loaded without numba. It runs on torch's own
OpenMP threads, because a second thread pool would compete for the same cores. It starts these threads through the entry points for
compiler-generated code, which libgomp, libomp and Intel's library all provide. If no OpenMP library is found, steps run on one
thread.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from tinylm.errors import InputError
from tinylm.model import step_records as records
from tinylm.model.cache import KVCache
from tinylm.model.layers import Block
from tinylm.model.packed import Int8Linear, TransposedLinear
from tinylm.model.step_records import DECODING_STEP
from tinylm.model.transformer import Transformer
from tinylm.native import has_fused_multiply_add
from tinylm.recipe.support import ANY, COMMON, Supports, unsupported_parts

MIN_PRODUCTS_PER_THREAD = 4_000_000
"""Minimum number of multiplications per thread. Smaller steps use fewer threads. A constant makes the number of threads
reproducible, unlike a value measured at run time."""
SUPPORTS: Supports = {
    **COMMON,
    "norm_position": ("pre",),
    "parallel_residual": (False,),
    "value_embeddings": (0,),
    "value_residual": (False,),
    "embedding_shortcut": (False,),
    "feed_forward": ("gelu", "relu", "relu2", "silu", "swiglu"),
    "rope_scaling": ANY,
    "rope_fraction": ANY,
    "shifted_key_heads": ANY,
}
"""The values of `model:` keys that the compiled code supports. PyTorch decodes all other networks."""
_ALIGNMENT = 64
_LOAD_SECONDS, _COMPILE_SECONDS = 0.08, 20.0
"""Upper bounds on the seconds to load the compiled code and to compile it, measured on one core of a Xeon."""
_SAVED_SECONDS_PER_STEP, _SAVED_SECONDS_PER_BYTE = 4e-4, 16e-12
"""Lower bound on the seconds that a compiled step saves, measured on the same CPU: a constant plus a term per byte of weights."""


def unsupported(network: Transformer) -> str | None:
    """Return the first property of a network that the compiled code does not support, or None."""
    properties = list(unsupported_parts(network.model, SUPPORTS))
    if network.embedding.weight.dtype != torch.float32:
        properties.append("a dtype other than float32")
    return properties[0] if properties else None


def is_supported(network: Transformer) -> bool:
    """Whether a network can be decoded with compiled code on this machine."""
    return network.embedding.weight.device.type == "cpu" and unsupported(network) is None and has_fused_multiply_add()


def is_worthwhile(network: Transformer, steps: int | None, *, once_compiled: bool = False) -> bool:
    """Whether compiled steps are supported and save more time than it takes to load them, and to compile them if necessary.

    `steps=None` means unlimited steps. With `once_compiled`, return whether they will save time after they have been compiled.
    """
    if not is_supported(network):
        return False
    cost = _LOAD_SECONDS if once_compiled or DECODING_STEP.is_compiled() else _COMPILE_SECONDS
    weight_bytes = sum(4 * tensor.numel() for tensor in (*network.parameters(), *network.buffers()))  # packed weights are buffers
    return steps is None or steps * (_SAVED_SECONDS_PER_STEP + _SAVED_SECONDS_PER_BYTE * weight_bytes) > cost


def is_compiled() -> bool:
    """Whether the code of a step has been compiled for this CPU."""
    return DECODING_STEP.is_compiled()


def load_code(report: Callable[[str], None]) -> None:
    """Load the compiled code. If it has to be compiled first, call `report` with a message."""
    if not DECODING_STEP.is_compiled():
        report("compiling the decoding step for this CPU (once, about 15 seconds)")
    DECODING_STEP.address  # noqa: B018  reading the property loads the code


class CompiledStep:
    """Compiled versions of `Decoder.step` and `Decoder.prefill`, for packed and plain networks on the CPU.

    The network's matrices are copied, and its embeddings are read in place. Matrices whose
    values bfloat16 represents exactly are stored in bfloat16: the speed of a step is limited by memory bandwidth, and this halves
    the bytes that it reads. Raises `InputError` if the network or the CPU is not supported.
    """

    def __init__(self, network: Transformer) -> None:
        reason = unsupported(network)
        if reason is None and not has_fused_multiply_add():
            reason = "a CPU without fused multiply-add"
        if reason is not None:
            raise InputError(f"{reason} is not supported by compiled decoding", where="--compile", hint="remove the option")
        self._network = network
        self._step = np.zeros(1, records.STEP)
        self._layers = np.zeros(network.model.n_layer, records.LAYER)
        self._matrices = np.zeros(network.model.n_layer * records.MATRICES_PER_LAYER + 2, records.MATRIX)
        self._weights = WeightArena()
        self._fill_records()
        self._weights.allocate()
        self._products_per_row = int((self._matrices["inputs"] * self._matrices["outputs"]).sum())
        self._workspace: np.ndarray | None = None
        self._workspace_size = (0, 0, 0)
        self._lock = threading.Lock()
        self._code = DECODING_STEP.address
        self._call_single_threaded = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._code)

    def __call__(self, cache: KVCache, tokens: Tensor) -> Tensor:
        """Append `tokens` (B,), one id per row. Return the next-token logits (B, V). `cache.lengths` is not changed."""
        rows = len(cache.lengths)
        return self._run(cache, tokens, np.arange(rows), cache.lengths)

    def prefill(self, cache: KVCache, row: int, tokens: Tensor) -> Tensor:
        """Overwrite a row with ids (T,). Return the next-token logits (V,). `cache.lengths` is not changed."""
        cache.tokens[row, : len(tokens)] = tokens
        return self._run(cache, tokens, row, np.arange(len(tokens)), is_prefill=True)[0]

    def _run(self, cache: KVCache, tokens: Tensor, cache_rows: Any, positions: Any, is_prefill: bool = False) -> Tensor:
        """Process tokens (N,) at the given rows and positions of the cache. Return logits (N, V), or (1, V) for prefill."""
        rows, team, threads = len(tokens), openmp_team(), 1
        if team is not None:
            threads = min(torch.get_num_threads(), max(1, rows * self._products_per_row // MIN_PRODUCTS_PER_THREAD))
        logits = torch.empty(1 if is_prefill else rows, self._network.vocab_size)
        with self._lock:
            self._reserve_workspace(max(rows, len(cache.tokens)), cache.capacity, threads)
            self._inputs[0, :rows], self._inputs[1, :rows], self._inputs[2, :rows] = tokens.numpy(), positions, cache_rows
            self._check_bounds(self._inputs[0, :rows], self._inputs[1, :rows], cache)
            step = self._step[0]
            step["rows"], step["is_prefill"] = rows, is_prefill
            step["capacity"], step["cache_row_count"] = cache.capacity, len(cache.tokens)
            step["keys"], step["values"] = cache.keys.data_ptr(), cache.values.data_ptr()
            step["cached_tokens"] = cache.tokens.data_ptr()
            step["logits"] = logits.data_ptr()
            if team is None or threads == 1:
                step["get_thread_num"] = 0
                self._call_single_threaded(self._step.ctypes.data)
            else:
                step["get_thread_num"], step["get_num_threads"] = team.get_thread_num, team.get_num_threads
                step["usleep"] = team.usleep
                team.run(self._code, self._step.ctypes.data, threads, 0)
        return logits

    def _check_bounds(self, ids: np.ndarray, positions: np.ndarray, cache: KVCache) -> None:
        """Raise `IndexError` for ids and positions that are out of bounds, because the compiled code does not check them."""
        capacity = min(cache.capacity, self._network.model.context_length)
        if ids.min() < 0 or ids.max() >= self._network.vocab_size:
            raise IndexError(f"token ids must be in [0, {self._network.vocab_size})")
        if positions.max() >= capacity:
            raise IndexError(f"a row of the cache is full ({capacity} positions)")

    def update_position_tables(self) -> None:
        """Fill in the addresses of the network's position tables. Call this again after `Transformer.reserve_positions`."""
        network, step = self._network, self._step
        if network.positions is not None:
            step["position_table"] = network.positions.weight.data_ptr()
        elif network.model.position == "sinusoidal":
            step["position_table"] = network.get_buffer("sinusoids").data_ptr()
        elif network.model.position == "rope":
            step["cosines"], step["sines"] = (network.get_buffer(f"rope_{name}").data_ptr() for name in ("cosines", "sines"))

    def _fill_records(self) -> None:
        """Fill in everything that does not change between steps: settings, table addresses and weights."""
        network, model, step = self._network, self._network.model, self._step
        step["layers"], step["matrices"] = self._layers.ctypes.data, self._matrices.ctypes.data
        step["layer_count"], step["width"] = model.n_layer, model.n_embd
        step["heads"], step["kv_heads"], step["head_width"] = model.n_head, model.kv_heads, model.head_width
        step["shifted_heads"] = model.shifted_key_heads
        step["activation"] = getattr(records, model.feed_forward.upper())  # GELU, RELU, ...
        step["layer_norm"], step["norm_eps"] = model.norm == "layernorm", model.norm_eps
        step["qk_norm_eps"] = model.norm_eps if model.qk_norm else -1.0
        step["softcap"] = model.logit_softcap or 0.0
        step["embedding"] = network.embedding.weight.data_ptr()
        self.update_position_tables()
        step["embedding_norm"] = network.embedding_norm is not None
        self._weights.add_norm(step, "embedding", network.embedding_norm)
        self._weights.add_norm(step, "final", network.final_norm)
        for index, block in enumerate(network.blocks):
            self._fill_layer(index, cast(Block, block))
        self._fill_matrix(model.n_layer * records.MATRICES_PER_LAYER, network.head)
        if (ngrams := network.ngrams) is not None:
            self._ngram_orders = np.array(ngrams.orders, dtype=np.int64)
            step["ngram_orders"], step["ngram_order_count"] = self._ngram_orders.ctypes.data, len(ngrams.orders)
            step["ngram_table"], step["ngram_rows"] = ngrams.table.weight.data_ptr(), ngrams.rows
            step["ngram_width"], step["pad_id"] = model.ngram_width, ngrams.pad_id
            self._fill_matrix(model.n_layer * records.MATRICES_PER_LAYER + 1, ngrams.projection)

    def _fill_layer(self, index: int, block: Block) -> None:
        """Fill in the norms, gains and matrices of a block."""
        attention, feed_forward = block.attention, block.feed_forward
        layer, first = self._layers[index : index + 1], index * records.MATRICES_PER_LAYER
        self._weights.add_norm(layer, "attention", block.attention_norm)
        self._weights.add_norm(layer, "feed_forward", block.feed_forward_norm)
        if attention.query_gain is not None and attention.key_gain is not None:
            self._weights.add_vector(layer, "query_gain", attention.query_gain)
            self._weights.add_vector(layer, "key_gain", attention.key_gain)
        self._fill_matrix(first + records.QKV, attention.qkv)
        self._fill_matrix(first + records.ATTENTION_OUTPUT, attention.output)
        if feed_forward.kind == "swiglu":
            self._fill_matrix(first + records.GATE, feed_forward.input, 0, 2)
            self._fill_matrix(first + records.UP, feed_forward.input, 1, 2)
        else:
            self._fill_matrix(first + records.UP, feed_forward.input)
        self._fill_matrix(first + records.DOWN, feed_forward.output)

    def _fill_matrix(self, index: int, linear: nn.Module, part: int = 0, parts: int = 1) -> None:
        """Fill in record `index` from a linear layer, or from one of `parts` equal slices of its outputs."""
        weight, scale = _weight_and_scale(linear)
        outputs = len(weight) // parts
        rows = slice(part * outputs, (part + 1) * outputs)
        record, dtype = self._matrices[index : index + 1], weight.dtype if scale is not None else _smallest_dtype(weight[rows])
        record["weight_bytes"], record["inputs"], record["outputs"] = dtype.itemsize, weight.shape[1], outputs
        self._weights.add_tiles(record, "weights", weight[rows], records.TILE, records.PANEL, dtype)
        for field, vector in (("scales", scale), ("biases", linear.bias)):
            if vector is not None:
                self._weights.add_vector(record, field, cast(Tensor, vector)[rows])

    def _reserve_workspace(self, rows: int, capacity: int, threads: int) -> None:
        """Grow the workspace if it is too small for this many rows, cached positions per row, or threads."""
        reserved = self._workspace_size
        if rows <= reserved[0] and capacity <= reserved[1] and threads <= reserved[2]:
            return
        rows, capacity, threads = max(rows, reserved[0]), max(capacity, reserved[1]), max(threads, reserved[2])
        self._workspace_size = rows, capacity, threads
        model, step = self._network.model, self._step
        padded_rows = -(-rows // records.ROW_BLOCK) * records.ROW_BLOCK
        heads = model.n_head + 2 * model.kv_heads
        hidden = max(model.feed_forward_width, len(model.ngram_embeddings) * model.ngram_width)
        widths = {"residual": model.n_embd, "qkv": heads * model.head_width, "attended": model.n_head * model.head_width}
        sizes = {name: round_up(4 * padded_rows * width) for name, width in (widths | {"hidden": hidden}).items()}
        step["sums_offset"] = round_up(4 * padded_rows * model.n_embd)
        step["scores_offset"] = step["sums_offset"] + round_up(4 * padded_rows * records.TILE)
        step["scratch_bytes"] = step["scores_offset"] + round_up(4 * model.n_head * capacity)
        self._inputs = np.zeros((3, rows), dtype=np.int64)
        step["tokens"], step["positions"], step["cache_row_indices"] = (values.ctypes.data for values in self._inputs)
        sizes["barrier"] = 2 * _ALIGNMENT
        self._workspace, address = aligned_zeros(sum(sizes.values()) + threads * int(step["scratch_bytes"][0]))
        for name, size in (sizes | {"scratch": 0}).items():
            step[name] = address
            address += size


def _weight_and_scale(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return the weight (outputs, inputs) of a linear layer and, for int8, its scales (outputs,)."""
    if isinstance(linear, Int8Linear):
        return linear.weight[:, : linear.inputs], linear.scale.float()
    weight = cast(Tensor, linear.weight).detach()
    return weight.t() if isinstance(linear, TransposedLinear) else weight, None


def _smallest_dtype(weight: Tensor) -> torch.dtype:
    """Return bfloat16 if it represents all values exactly, else the dtype of `weight`."""
    return torch.bfloat16 if torch.equal(weight.bfloat16().to(weight.dtype), weight) else weight.dtype


def round_up(size: int) -> int:
    """Round up to a multiple of the alignment."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def aligned_zeros(size: int) -> tuple[np.ndarray, int]:
    """Return a zeroed array and an aligned address inside it, with at least `size` bytes from that address to the end."""
    memory = np.zeros(size + _ALIGNMENT, dtype=np.uint8)  # numpy requests huge pages for large arrays
    return memory, round_up(memory.ctypes.data)


class WeightArena:
    """One block of memory for all weights.

    `add_tiles`, `add_vector` and `add_norm` register a tensor and the record field that will contain its address. `allocate` copies
    the tensors and sets the fields.
    """

    def __init__(self) -> None:
        self._memory: np.ndarray | None = None
        self._entries: list[tuple[np.ndarray, str, Tensor, tuple[int, ...], torch.dtype]] = []

    def add_tiles(self, record: np.ndarray, field: str, matrix: Tensor, tile: int, panel: int, dtype: torch.dtype) -> None:
        """Register a matrix (outputs, inputs). It is stored in `dtype` as (panels, inputs, `panel`), zero-padded to whole tiles."""
        outputs, inputs = matrix.shape
        self._entries.append((record, field, matrix, (-(-outputs // tile) * tile // panel, inputs, panel), dtype))

    def add_vector(self, record: np.ndarray, field: str, vector: Tensor) -> None:
        self._entries.append((record, field, vector.detach(), vector.shape, torch.float32))

    def add_norm(self, record: np.ndarray, name: str, norm: nn.Module | None) -> None:
        """Register the parameters of a norm, for the fields `NAME_gain` and `NAME_bias` of a record."""
        for field, vector in (("gain", getattr(norm, "weight", None)), ("bias", getattr(norm, "bias", None))):
            if vector is not None:
                self.add_vector(record, f"{name}_{field}", vector)

    def allocate(self) -> None:
        sizes = [math.prod(shape) * dtype.itemsize for _, _, _, shape, dtype in self._entries]
        self._memory, address = aligned_zeros(sum(map(round_up, sizes)))
        memory, start = torch.from_numpy(self._memory), address - self._memory.ctypes.data
        for size, (record, field, tensor, shape, dtype) in zip(sizes, self._entries, strict=True):
            target = memory[start : start + size].view(dtype).view(shape)
            if tensor.ndim == 2:
                full_panels, rest = divmod(len(tensor), shape[-1])
                target[:full_panels] = tensor[: len(tensor) - rest].reshape(full_panels, shape[-1], shape[-2]).transpose(1, 2)
                target[full_panels : full_panels + 1, :, :rest] = tensor[len(tensor) - rest :].t()
            else:
                target.copy_(tensor)
            record[field] = self._memory.ctypes.data + start
            start += round_up(size)
        self._entries.clear()


class OpenMPTeam:
    """OpenMP's thread pool: `run(code, argument, threads, 0)` calls `code(argument)` on each thread and waits for all of them."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.run = library.GOMP_parallel
        self.run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        self.run.restype = None
        names = ("omp_get_thread_num", "omp_get_num_threads", "usleep")
        addresses = (cast(int, ctypes.cast(library[name], ctypes.c_void_p).value) for name in names)
        self.get_thread_num, self.get_num_threads, self.usleep = addresses


@cache
def openmp_team() -> OpenMPTeam | None:
    """Return the OpenMP thread pool of this process, or None if no OpenMP library is loaded."""
    try:
        return OpenMPTeam(ctypes.CDLL(None))  # searches all loaded libraries, including torch's OpenMP
    except (TypeError, OSError, AttributeError):  # Windows, or a torch build without OpenMP
        return None

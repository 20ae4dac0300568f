"""Decode translations on a CPU with numba-compiled code. The compiled code itself is in `tinylm.model.translation_kernels`.

PyTorch runs the encoder. The compiled step runs the decoder blocks and the head for all rows, and finds the best next tokens.

Legend: `N` sentences, `R` rows, `S` source time, `K` key/value heads, `D` head width, `V` vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from tinylm.errors import InputError
from tinylm.model import step_records
from tinylm.model import translation_records as records
from tinylm.model.compiled import MIN_PRODUCTS_PER_THREAD, WeightArena, aligned_zeros, openmp_team, round_up
from tinylm.model.encoder_decoder import EncoderDecoder
from tinylm.model.hooks import has_functions
from tinylm.model.layers import Block
from tinylm.model.sequence_to_sequence import SequenceToSequence
from tinylm.model.translation_records import TRANSLATION_STEP
from tinylm.native import has_fused_multiply_add
from tinylm.recipe.support import ANY, COMMON, Supports, unsupported_parts

SUPPORTS: Supports = {
    **COMMON,
    "parallel_residual": (False,),
    "ngram_embeddings": ((),),
    "value_embeddings": (0,),
    "value_residual": (False,),
    "embedding_shortcut": (False,),
    "feed_forward": ("gelu", "relu", "relu2", "silu", "swiglu"),
    "embedding_scale": ANY,
}
"""The values of the decoder's `model:` keys that the compiled code supports. PyTorch decodes with all other networks."""
_INITIAL_POSITIONS = 32
"""Number of positions for which the cache has room at first."""


def is_supported(network: SequenceToSequence) -> bool:
    """Whether the compiled code supports the network and the CPU."""
    return (
        isinstance(network, EncoderDecoder)
        and network.device.type == "cpu"
        and network.decoder.embedding.weight.dtype == torch.float32
        and not unsupported_parts(network.decoder.model, SUPPORTS)
        and not has_functions(network)
        and has_fused_multiply_add()
    )


def load_code(report: Callable[[str], None]) -> None:
    """Load the compiled code. If it has to be compiled first, call `report` with a message."""
    if not TRANSLATION_STEP.is_compiled():
        report("compiling the decoding step for translation for this CPU (once, about 20 seconds)")
    TRANSLATION_STEP.address  # noqa: B018  reading the property loads the code


class CompiledTranslation:
    """Decodes translations of an encoder-decoder with compiled code. The decoder's matrices are copied.

    Raises `InputError` if the network is not supported. Several threads can decode at the same time.
    """

    def __init__(self, network: SequenceToSequence) -> None:
        if not is_supported(network):
            raise InputError("this model or CPU is not supported by compiled translation")
        self.network = cast(EncoderDecoder, network)
        decoder = self.network.decoder
        self.record = np.zeros(1, records.STEP)
        """A `STEP` record with the fields that do not depend on the sentences."""
        self._layers = np.zeros(len(decoder.blocks), records.LAYER)
        self._matrices = np.zeros(len(decoder.blocks) * records.MATRICES_PER_LAYER + 1, step_records.MATRIX)
        self._weights = WeightArena()
        self._fill_record()
        self._weights.allocate()
        self._products_per_row = int((self._matrices["inputs"] * self._matrices["outputs"]).sum())
        self._code = TRANSLATION_STEP.address
        self._call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._code)

    def target_state(self, sources: Sequence[Tensor], padded_lengths: Sequence[int], threads: int = 1) -> CompiledState:
        """Encode source sentences, each of ids (S,), as `SequenceToSequence.target_state` does for sentences of one length.

        `threads` is the maximum number of threads for each step. It does not affect the result.
        """
        return CompiledState(self, sources, padded_lengths, threads)

    def run(self, record: np.ndarray, threads: int) -> None:
        """Run the compiled code on this number of threads."""
        team = openmp_team()
        if team is None or threads == 1:
            record["get_thread_num"] = 0
            self._call(record.ctypes.data)
        else:
            record["get_thread_num"], record["get_num_threads"] = team.get_thread_num, team.get_num_threads
            record["usleep"] = team.usleep
            team.run(self._code, record.ctypes.data, threads, 0)

    def useful_threads(self, rows: int) -> int:
        """Return the number of threads that a step with this number of rows can use."""
        return max(1, rows * self._products_per_row // MIN_PRODUCTS_PER_THREAD)

    def _fill_record(self) -> None:
        decoder, model, step = self.network.decoder, self.network.decoder.model, self.record
        step["layers"], step["matrices"] = self._layers.ctypes.data, self._matrices.ctypes.data
        step["layer_count"], step["width"], step["vocab_size"] = len(decoder.blocks), model.n_embd, decoder.vocab_size
        step["heads"], step["kv_heads"], step["head_width"] = model.n_head, model.kv_heads, model.head_width
        step["activation"] = getattr(step_records, model.feed_forward.upper())
        step["layer_norm"], step["post_norm"] = model.norm == "layernorm", model.norm_position == "post"
        step["norm_eps"], step["qk_norm_eps"] = model.norm_eps, model.norm_eps if model.qk_norm else -1.0
        step["softcap"], step["embedding_scale"] = model.logit_softcap or 0.0, model.embedding_scale
        step["embedding"] = decoder.embedding.weight.data_ptr()
        if decoder.start is not None:
            step["start"] = decoder.start.data_ptr()
        step["embedding_norm"] = decoder.embedding_norm is not None
        self._weights.add_norm(step, "embedding", decoder.embedding_norm)
        self._weights.add_norm(step, "final", decoder.final_norm)
        for index, block in enumerate(decoder.blocks):
            self._fill_layer(index, cast(Block, block))
        self._fill_matrix(len(decoder.blocks) * records.MATRICES_PER_LAYER, decoder.head)

    def _fill_layer(self, index: int, block: Block) -> None:
        """Fill in the norms, gains and matrices of a block."""
        attention, cross, feed_forward = block.attention, block.cross_attention, block.feed_forward
        assert cross is not None
        layer, first = self._layers[index : index + 1], index * records.MATRICES_PER_LAYER
        self._weights.add_norm(layer, "attention", block.attention_norm)
        self._weights.add_norm(layer, "cross", block.cross_attention_norm)
        self._weights.add_norm(layer, "feed_forward", block.feed_forward_norm)
        gains = {
            "query_gain": attention.query_gain,
            "key_gain": attention.key_gain,
            "cross_query_gain": cross.query_gain,
        }
        for name, gain in gains.items():
            if gain is not None:
                self._weights.add_vector(layer, name, gain)
        self._fill_matrix(first + records.QKV, attention.qkv)
        self._fill_matrix(first + records.ATTENTION_OUTPUT, attention.output)
        self._fill_matrix(first + records.CROSS_QUERY, cross.qkv, slice(cross.query_rows))
        self._fill_matrix(first + records.CROSS_OUTPUT, cross.output)
        width = feed_forward.output.weight.shape[1]
        if feed_forward.kind == "swiglu":
            self._fill_matrix(first + records.GATE, feed_forward.input, slice(width))
            self._fill_matrix(first + records.UP, feed_forward.input, slice(width, None))
        else:
            self._fill_matrix(first + records.UP, feed_forward.input)
        self._fill_matrix(first + records.DOWN, feed_forward.output)

    def _fill_matrix(self, index: int, linear: nn.Linear, rows: slice = slice(None)) -> None:
        """Fill in record `index` from some outputs of a linear layer."""
        weight = linear.weight.detach()[rows]
        record = self._matrices[index : index + 1]
        record["weight_bytes"], record["inputs"], record["outputs"] = 4, weight.shape[1], len(weight)
        self._weights.add_tiles(record, "weights", weight, step_records.TILE, step_records.PANEL, weight.dtype)
        if linear.bias is not None:
            self._weights.add_vector(record, "biases", linear.bias[rows])


class CompiledState:
    """A `TargetState` for sentences of different lengths, which also finds the best next tokens.

    `sentences` (R,) contains the index of each row's sentence. `origins` (R, capacity) contains, for each earlier position of a
    row, the row that computed its keys and values. Neither these nor the encoder's keys and values are ever copied.
    """

    def __init__(
        self, compiled: CompiledTranslation, sources: Sequence[Tensor], padded_lengths: Sequence[int], threads: int
    ) -> None:
        self._compiled = compiled
        self._model = compiled.network.decoder.model
        self._step = compiled.record.copy()
        self._lengths = np.array([len(source) for source in sources], dtype=np.int64)
        self._memory = self._encode(sources, padded_lengths)
        self._sentences = np.arange(len(sources))
        self._origins = np.zeros((len(sources), 0), dtype=np.int64)
        self._position = 0
        self._keys, self._values = torch.empty(0), torch.empty(0)
        self._row_capacity = 0
        self._max_threads, self._threads = threads, 1
        self._workspace: np.ndarray | None = None
        self._logits = torch.empty(0)

    def _encode(self, sources: Sequence[Tensor], padded_lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the encoder's keys and values for each decoder block, (layers, N, S, K, D). Padding contains any numbers."""
        model, network = self._model, self._compiled.network
        shape = (model.n_layer, len(sources), int(self._lengths.max()), model.kv_heads, model.head_width)
        memory = torch.empty(shape), torch.empty(shape)
        for length in sorted(set(padded_lengths)):
            indexes = [index for index, padded in enumerate(padded_lengths) if padded == length]
            _, layers = network.encode_sources([sources[index] for index in indexes], length)
            positions = min(length, shape[2])
            for layer, keys_values in enumerate(layers):
                for stored, new in zip(memory, keys_values, strict=True):
                    stored[layer, indexes, :positions] = new[:, :positions]
        step = self._step
        step["memory_keys"], step["memory_values"] = (stored.data_ptr() for stored in memory)
        step["memory_lengths"] = self._lengths.ctypes.data
        step["sentence_count"], step["memory_capacity"] = shape[1], shape[2]
        return memory

    def keep_sources(self, sources: Sequence[int]) -> None:
        """Do nothing: `select_rows` drops the rows of the other sentences."""

    def select_rows(self, rows: Tensor, rows_per_source: int) -> None:
        parents = rows.numpy()
        self._sentences, self._origins = self._sentences[parents], self._origins[parents]

    def step(self, tokens: Tensor) -> Tensor:
        rows, position = len(tokens), self._position
        network, step = self._compiled.network, self._step
        if position >= self._model.context_length:
            raise ValueError(f"{position + 1} positions do not fit in the context length of {self._model.context_length}")
        self._threads = min(self._max_threads, self._compiled.useful_threads(rows))
        self._reserve(rows)
        network.decoder.reserve_positions(position + 1)
        ids, sentences, origins = tokens.numpy(), self._sentences, np.ascontiguousarray(self._origins)
        if ids.max() >= network.vocab_size:
            raise IndexError(f"token ids must be less than {network.vocab_size}")
        self._fill_position_tables()
        step["task"], step["rows"], step["position"] = records.COMPUTE_LOGITS, rows, position
        step["tokens"], step["sentences"], step["origins"] = ids.ctypes.data, sentences.ctypes.data, origins.ctypes.data
        step["origin_capacity"] = position
        self._compiled.run(step, self._threads)
        self._origins = np.concatenate((origins, np.arange(rows)[:, None]), axis=1)
        self._position += 1
        return self._logits[:rows]

    def top(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities and the ids of the `count` most likely next tokens in each row after `step`, (R, count).

        They are sorted, most likely first. If the vocabulary is smaller, the rest is -inf.
        """
        rows = len(self._sentences)
        logits, ids, sums = torch.empty(rows, count), torch.empty(rows, count, dtype=torch.long), torch.empty(rows)
        step = self._step
        step["task"], step["top_count"] = records.FIND_TOP, count
        step["top_logits"], step["top_ids"], step["exp_sums"] = logits.data_ptr(), ids.data_ptr(), sums.data_ptr()
        self._compiled.run(step, self._threads)
        return logits - logits[:, :1] - sums.log()[:, None], ids

    def _fill_position_tables(self) -> None:
        """Fill in the addresses of the position tables, which `reserve_positions` may have replaced."""
        decoder, step = self._compiled.network.decoder, self._step
        if decoder.positions is not None:
            step["position_table"] = decoder.positions.weight.data_ptr()
        elif self._model.position == "sinusoidal":
            step["position_table"] = decoder.get_buffer("sinusoids").data_ptr()
        elif self._model.position == "rope":
            step["cosines"], step["sines"] = (decoder.get_buffer(f"rope_{name}").data_ptr() for name in ("cosines", "sines"))

    def _reserve(self, rows: int) -> None:
        """Grow the cache if it is full, and allocate the workspace if there are more rows than before."""
        model, step = self._model, self._step
        if rows > self._row_capacity:
            assert self._position <= 1, "only the first step adds rows"
            self._allocate_workspace(rows)
        capacity = len(self._keys)
        if self._position >= capacity or rows > self._row_capacity:
            longer = max(_INITIAL_POSITIONS, 2 * capacity) if self._position >= capacity else capacity
            shape = (longer, model.n_layer, max(rows, self._row_capacity), model.kv_heads, model.head_width)
            grown = torch.empty(shape), torch.empty(shape)
            for old, new in zip((self._keys, self._values), grown, strict=True):
                if self._position:
                    new[: self._position, :, : self._row_capacity] = old[: self._position]
            self._keys, self._values = grown
            step["keys"], step["values"] = self._keys.data_ptr(), self._values.data_ptr()
            step["row_capacity"] = self._row_capacity = shape[2]

    def _allocate_workspace(self, rows: int) -> None:
        """Allocate the logits and everything that a step overwrites, for this number of rows."""
        model, step = self._model, self._step
        padded_rows = -(-rows // records.ROWS) * records.ROWS
        heads = model.n_head + 2 * model.kv_heads
        widths = {"residual": model.n_embd, "normed": model.n_embd, "qkv": heads * model.head_width}
        widths |= {"attended": model.n_head * model.head_width, "hidden": model.feed_forward_width}
        sizes = {name: round_up(4 * padded_rows * width) for name, width in widths.items()}
        positions = max(model.context_length, int(self._lengths.max()))
        step["scores_offset"] = round_up(4 * records.ROWS * step_records.TILE)
        step["offsets_offset"] = step["scores_offset"] + round_up(4 * model.n_head * positions)
        step["scratch_bytes"] = step["offsets_offset"] + round_up(8 * positions)
        sizes["barrier"] = round_up(16)
        self._workspace, address = aligned_zeros(sum(sizes.values()) + self._max_threads * int(step["scratch_bytes"][0]))
        for name, size in (sizes | {"scratch": 0}).items():
            step[name] = address
            address += size
        self._logits = torch.empty(rows, self._compiled.network.vocab_size)
        step["logits"] = self._logits.data_ptr()

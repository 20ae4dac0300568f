"""Decode a batch of sentences, one token per step, so that the result for a sentence never depends on the other sentences.

Floating-point sums depend on the order of summation, and in a matrix product this order may depend on the number of rows.
Therefore, each sentence is encoded alone, its source is padded to a length that depends only on the sentence, and the number of
rows is a multiple of 16. On a CPU, all products are computed on one thread.

Legend: `R` rows, `S` padded source time, `V` vocabulary, `K` key/value heads, `D` head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from tinylm.evaluation.scoring import all_logprobs
from tinylm.model.encoder_decoder import START, EncoderDecoder
from tinylm.model.layers import KeysValues, Memory

_ROW_MULTIPLE = 16
"""If the number of rows is a multiple of this, a matrix product computes each row in the same way for any number of rows."""
_SOURCE_MULTIPLE = 16


def padded_length(source: np.ndarray) -> int:
    """Return the length to which a source sentence is padded. Only sentences with the same padded length are decoded together."""
    return -(-len(source) // _SOURCE_MULTIPLE) * _SOURCE_MULTIPLE


class _Cache:
    """The key/value cache that `Transformer.hidden` uses."""

    def __init__(self, rows: int, layers: int, capacity: int) -> None:
        self.length = 0
        self._rows, self._capacity = rows, capacity
        self._stored: list[tuple[Tensor, Tensor] | None] = [None] * layers

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values (R, K, 1, D) to a layer. Return the keys and values of all positions so far."""
        stored = self._stored[layer]
        if stored is None:
            shape = (*keys.shape[:2], self._capacity, keys.shape[3])
            stored = self._stored[layer] = (keys.new_zeros(shape), values.new_zeros(shape))
        end = self.length + keys.shape[2]
        stored[0][:, :, self.length : end], stored[1][:, :, self.length : end] = keys, values
        return stored[0][:, :, :end], stored[1][:, :, :end]

    def advance(self, positions: int) -> None:
        self.length += positions

    def select(self, rows: Tensor) -> None:
        """Replace the rows with copies of the rows at these indices."""
        for layer, stored in enumerate(self._stored):
            if stored is None:
                continue
            if len(rows) == len(stored[0]):
                for tensor in stored:
                    tensor[:, :, : self.length] = tensor[:, :, : self.length].index_select(0, rows)
            else:
                self._stored[layer] = (stored[0].index_select(0, rows), stored[1].index_select(0, rows))


class Decoding:
    """The decoding state of a batch of sentences. Each sentence has the same number of rows, which are its beams or samples.

    All sources must have the same padded length. `step` extends every row by one token. Use this class inside `decoding_mode`.
    """

    def __init__(self, network: EncoderDecoder, sources: Sequence[np.ndarray], rows_per_source: int, capacity: int) -> None:
        self._network = network
        self._memory = _memory(network, sources)
        rows = torch.arange(len(sources), device=network.device).repeat_interleave(rows_per_source)
        self._count = len(rows)
        self._memory = _select(self._memory, _completed(rows))
        self._cache = _Cache(len(_completed(rows)), network.model.decoder_layers, capacity)

    def start(self) -> Tensor:
        """Return the log-probabilities (R, V) for the first token of every row."""
        return self._advance(torch.full((self._count,), START, device=self._network.device))

    def step(self, parents: Tensor, tokens: Tensor) -> Tensor:
        """Replace the rows with copies of the rows `parents` (R,), append `tokens` (R,), and return log-probabilities (R, V).

        There may be fewer rows than before, because finished sentences are dropped with all their rows.
        """
        selected = _completed(parents)
        if len(tokens) != self._count:
            self._memory = _select(self._memory, selected)
            self._count = len(tokens)
        self._cache.select(selected)
        return self._advance(tokens)

    def _advance(self, tokens: Tensor) -> Tensor:
        hidden = self._network.decoder.hidden(_completed(tokens)[:, None], self._cache, memory=self._memory)  # type: ignore[arg-type]
        return all_logprobs(self._network.logits(hidden[:, -1]))[: self._count]


def _completed(rows: Tensor) -> Tensor:
    """Repeat the last entry until the number of rows is a multiple of `_ROW_MULTIPLE`."""
    missing = -len(rows) % _ROW_MULTIPLE
    return rows if not missing else torch.cat((rows, rows[-1:].expand(missing)))


def _memory(network: EncoderDecoder, sources: Sequence[np.ndarray]) -> Memory:
    """Encode the sentences one by one, and pad their keys and values to the same length: (sentences, S, K, D)."""
    length = max(map(padded_length, sources))
    device = network.device
    mask = torch.zeros(len(sources), 1, 1, length, dtype=torch.bool, device=device)
    stacked: list[KeysValues] = []
    for row, source in enumerate(sources):
        memory = network.encode(torch.as_tensor(source, device=device)[None])
        mask[row, ..., : len(source)] = True
        for layer, (keys, values) in enumerate(network.memory_keys_values(memory)):
            if not row:
                shape = (len(sources), length, *keys.shape[2:])
                stacked.append((keys.new_zeros(shape), values.new_zeros(shape)))
            stacked[layer][0][row, : len(source)], stacked[layer][1][row, : len(source)] = keys[0], values[0]
    return Memory(None, mask, tuple(stacked))


def _select(memory: Memory, rows: Tensor) -> Memory:
    assert memory.keys_values is not None
    assert memory.mask is not None
    selected = tuple((keys.index_select(0, rows), values.index_select(0, rows)) for keys, values in memory.keys_values)
    return Memory(None, memory.mask.index_select(0, rows), selected)


@contextmanager
def decoding_mode(network: EncoderDecoder) -> Iterator[None]:
    """Put the network in evaluation mode without gradients. On a CPU, also compute on one thread."""
    was_training, threads = network.training, torch.get_num_threads()
    network.eval()
    if network.device.type == "cpu":
        torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(threads)
        network.train(was_training)

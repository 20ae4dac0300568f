"""Decode a batch of sentences, one token per step, so that the result for a sentence never depends on the other sentences.

Floating-point sums depend on the order of summation, and in a matrix product this order may depend on the number of rows.
Therefore, each sentence is encoded alone, its source is padded to a length that depends only on the sentence, and the number of
rows is a multiple of 16. On a CPU, all products are computed on one thread.

Legend: `R` rows, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from tinylm.evaluation.scoring import all_logprobs
from tinylm.model.sequence_to_sequence import START, SequenceToSequence

_ROW_MULTIPLE = 16
"""If the number of rows is a multiple of this, a matrix product computes each row in the same way for any number of rows."""
_SOURCE_MULTIPLE = 16


def padded_length(source: np.ndarray) -> int:
    """Return the length to which a source sentence is padded. Only sentences with the same padded length are decoded together."""
    return -(-len(source) // _SOURCE_MULTIPLE) * _SOURCE_MULTIPLE


class Decoding:
    """The decoding state of a batch of sentences. Each sentence has the same number of rows, which are its beams or samples.

    All sources must have the same padded length. `step` extends every row by one token. Use this class inside `decoding_mode`.
    """

    def __init__(self, network: SequenceToSequence, sources: Sequence[np.ndarray], rows_per_source: int, capacity: int) -> None:
        self._device = network.device
        ids = [torch.as_tensor(source, device=self._device) for source in sources]
        self._state = network.target_state(ids, max(map(padded_length, sources)), capacity)
        rows = torch.arange(len(sources), device=self._device).repeat_interleave(rows_per_source)
        self._count = len(rows)
        self._select(_completed(rows), sources_change=True)

    def start(self) -> Tensor:
        """Return the log-probabilities (R, V) for the first token of every row."""
        return self._advance(torch.full((self._count,), START, device=self._device))

    def step(self, parents: Tensor, tokens: Tensor) -> Tensor:
        """Replace the rows with copies of the rows `parents` (R,), append `tokens` (R,), and return log-probabilities (R, V).

        There may be fewer rows than before, because finished sentences are dropped with all their rows.
        """
        self._select(_completed(parents), sources_change=len(tokens) != self._count)
        self._count = len(tokens)
        return self._advance(tokens)

    def _select(self, rows: Tensor, *, sources_change: bool) -> None:
        if sources_change:
            self._state.select_sources(rows)
        self._state.select_targets(rows)

    def _advance(self, tokens: Tensor) -> Tensor:
        return all_logprobs(self._state.step(_completed(tokens)))[: self._count]


def _completed(rows: Tensor) -> Tensor:
    """Repeat the last entry until the number of rows is a multiple of `_ROW_MULTIPLE`."""
    missing = -len(rows) % _ROW_MULTIPLE
    return rows if not missing else torch.cat((rows, rows[-1:].expand(missing)))


@contextmanager
def decoding_mode(network: SequenceToSequence) -> Iterator[None]:
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

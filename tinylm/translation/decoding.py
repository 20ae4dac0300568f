"""Decode a batch of sentences, one token per step, so that the result for a sentence never depends on the other sentences.

Floating-point sums depend on the order of summation, and in a matrix product this order may depend on the number of rows.
Therefore, the source is padded to a length that depends only on the sentence, and the number of rows is a multiple of 16, both in
the encoder and in the decoder. On a CPU, all products are computed on one thread.

Legend: `R` rows, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from tinylm.evaluation.scoring import all_logprobs
from tinylm.model.sequence_to_sequence import ROW_MULTIPLE, START, SequenceToSequence

_SOURCE_MULTIPLE = 16


def padded_length(source: np.ndarray) -> int:
    """Return the length to which a source sentence is padded. Only sentences with the same padded length are decoded together."""
    return -(-len(source) // _SOURCE_MULTIPLE) * _SOURCE_MULTIPLE


class Decoding:
    """The decoding state of a batch of sentences. Each sentence has the same number of rows, which are its beams or samples.

    All sources must have the same padded length. `start` returns one row per sentence, because there is only one empty translation.
    After that, `step` extends every row by one token. Use this class inside `decoding_mode`.
    """

    def __init__(self, network: SequenceToSequence, sources: Sequence[np.ndarray]) -> None:
        self._device = network.device
        self._sentences = len(sources)
        ids = [torch.as_tensor(source, device=self._device) for source in sources]
        self._state = network.target_state(ids, max(map(padded_length, sources)))

    def start(self) -> Tensor:
        """Return the log-probabilities (sentences, V) of the first token."""
        return self._advance(torch.full((self._sentences,), START, device=self._device))

    def step(self, parents: Tensor, tokens: Tensor, sources: Sequence[int] | None = None) -> Tensor:
        """Replace the rows with copies of the rows `parents` (R,), append `tokens` (R,), and return log-probabilities (R, V).

        With `sources`, keep only the source sentences at these indices, in this order. The rows of the others are dropped.
        """
        if sources is not None:
            self._state.keep_sources(sources)
            self._sentences = len(sources)
        self._state.select_rows(_completed(parents), len(parents) // self._sentences)
        return self._advance(tokens)

    def _advance(self, tokens: Tensor) -> Tensor:
        return all_logprobs(self._state.step(_completed(tokens)))[: len(tokens)]


def _completed(rows: Tensor) -> Tensor:
    """Repeat the last entry until the number of rows is a multiple of `ROW_MULTIPLE`."""
    missing = -len(rows) % ROW_MULTIPLE
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

"""Decode a batch of sentences, one token per step, so that the result for a sentence never depends on the other sentences.

Floating-point sums depend on the order of summation, and in PyTorch's matrix products this order may depend on the number of rows.
Therefore, the source is padded to a length that depends only on the sentence, and the number of rows is a multiple of 16, both in
the encoder and in the decoder. On a CPU, all of PyTorch's products are computed on one thread.

Legend: `N` sentences, `R` rows, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from tinylm.evaluation.scoring import all_logprobs
from tinylm.model.compiled_translation import CompiledState, CompiledTranslation
from tinylm.model.sequence_to_sequence import ROW_MULTIPLE, START, SequenceToSequence, TargetState

_SOURCE_MULTIPLE = 16
_BLOCK = 16
"""Number of tokens whose log-probabilities are compared together."""


def padded_length(source: np.ndarray) -> int:
    """Return the length to which a source sentence is padded. PyTorch decodes only sentences of one padded length together."""
    return -(-len(source) // _SOURCE_MULTIPLE) * _SOURCE_MULTIPLE


class Decoding:
    """The decoding state of a batch of sentences. Each sentence has the same number of rows, which are its beams or samples.

    `start` processes one row per sentence, because there is only one empty translation. After that, `step` extends every row by
    one token. Both compute the log-probabilities of the next tokens, which `logprobs` and `top_extensions` return. Use this class
    inside `decoding_mode`.

    With `compiled`, compiled code runs the decoder on up to `threads` threads. Otherwise, all sources must have the same padded
    length.
    """

    def __init__(
        self,
        network: SequenceToSequence,
        sources: Sequence[np.ndarray],
        compiled: CompiledTranslation | None,
        threads: int,
    ) -> None:
        self.device, self.vocab_size = network.device, network.vocab_size
        self._sentences = len(sources)
        ids = [torch.as_tensor(source, device=self.device) for source in sources]
        lengths = [padded_length(source) for source in sources]
        self._state: TargetState
        if compiled is None:
            self._state = network.target_state(ids, max(lengths))
        else:
            self._state = compiled.target_state(ids, lengths, threads)
        self._logits = torch.empty(0)

    def start(self) -> None:
        """Process the position before the first token."""
        self._advance(torch.full((self._sentences,), START, device=self.device))

    def step(self, parents: Tensor, tokens: Tensor, sources: Sequence[int] | None = None) -> None:
        """Replace the rows with copies of the rows `parents` (R,), and append `tokens` (R,).

        With `sources`, keep only the source sentences at these indices, in this order. The rows of the others are dropped.
        """
        if sources is not None:
            self._state.keep_sources(sources)
            self._sentences = len(sources)
        self._state.select_rows(self._completed(parents), len(parents) // self._sentences)
        self._advance(tokens)

    def logprobs(self) -> Tensor:
        """Return the log-probabilities (R, V) of the next tokens."""
        return all_logprobs(self._logits)

    def top_extensions(self, totals: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the most likely extensions of each sentence's rows, as `top_extensions` does for `logprobs`."""
        if not isinstance(self._state, CompiledState):
            return top_extensions(self.logprobs(), totals, count)
        sentences, beams = totals.shape
        vocab_size = self.vocab_size
        logprobs, ids = self._state.top(min(count, vocab_size))  # (N * beams, count)
        scores = (logprobs.view(sentences, beams, -1) + totals[..., None]).flatten(1)
        indexes = (ids.view(sentences, beams, -1) + torch.arange(0, beams * vocab_size, vocab_size)[:, None]).flatten(1)
        top = scores.topk(min(count, scores.shape[1]), dim=1)
        return top.values, indexes.gather(1, top.indices)

    def _advance(self, tokens: Tensor) -> None:
        self._logits = self._state.step(self._completed(tokens))[: len(tokens)]

    def _completed(self, rows: Tensor) -> Tensor:
        """Repeat the last entry until the number of rows is a multiple of `ROW_MULTIPLE`. Compiled code does not need this."""
        missing = 0 if isinstance(self._state, CompiledState) else -len(rows) % ROW_MULTIPLE
        return rows if not missing else torch.cat((rows, rows[-1:].expand(missing)))


def top_extensions(logprobs: Tensor, totals: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` most likely extensions of each sentence's beams, best first: totals and indices (beam * V + token).

    `logprobs` (N * beams, V) are the log-probabilities of the next tokens, and `totals` (N, beams) those of the beams. With a large
    vocabulary, `topk` is slow. Therefore, the maxima of blocks of tokens are computed first, because the `count` largest elements
    are in the blocks with the `count` largest maxima.
    """
    sentences, beams = totals.shape
    vocab_size = logprobs.shape[1]
    blocks = vocab_size // _BLOCK  # block b contains the tokens b, b + blocks, b + 2 * blocks, ...
    if count > beams * blocks:
        top = (logprobs.view(sentences, beams, -1) + totals[..., None]).flatten(1).topk(min(count, beams * vocab_size), dim=1)
        return top.values, top.indices
    maxima = logprobs[:, : _BLOCK * blocks].view(-1, _BLOCK, blocks).amax(dim=1) + totals.view(-1, 1)  # (N * beams, blocks)
    best = maxima.view(sentences, -1).topk(count, dim=1, sorted=False).indices  # (N, count)
    steps = torch.arange(0, _BLOCK * blocks, blocks, device=logprobs.device)
    in_blocks = (best // blocks * vocab_size + best % blocks)[..., None] + steps  # (N, count, block)
    rest = torch.arange(_BLOCK * blocks, vocab_size, device=logprobs.device)
    in_rest = torch.arange(0, beams * vocab_size, vocab_size, device=logprobs.device)[:, None] + rest
    indexes = torch.cat((in_blocks.flatten(1), in_rest.flatten().expand(sentences, -1)), dim=1)
    scores = logprobs.view(sentences, -1).gather(1, indexes) + totals.gather(1, indexes // vocab_size)
    top = scores.topk(count, dim=1)
    return top.values, indexes.gather(1, top.indices)


@contextmanager
def decoding_mode(network: SequenceToSequence) -> Iterator[int]:
    """Put the network in evaluation mode without gradients. On a CPU, PyTorch also computes on one thread.

    Yields the number of threads before that.
    """
    was_training, threads = network.training, torch.get_num_threads()
    network.eval()
    if network.device.type == "cpu":
        torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            yield threads
    finally:
        torch.set_num_threads(threads)
        network.train(was_training)

"""Generate text with an ensemble: every step averages the next-token probabilities of several decoders.

Each member keeps its own decoding state, so any `DecodingModel` can be a member, compiled or not. Log-probabilities take the place
of logits, so temperature, top-k and all other sampling options apply to the mean distribution.

Legend: `B` active rows, `T` time, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from tinylm.evaluation.scoring import mean_logprobs
from tinylm.model.base import Model
from tinylm.model.decoder import make_decoder
from tinylm.model.packed import WeightKind
from tinylm.model.state import DecodingModel, DecodingState
from tinylm.reporting import Reporter


class EnsembleState:
    """The states of all members. Their rows contain the same tokens."""

    def __init__(self, members: Sequence[DecodingState]) -> None:
        self.members = members
        self._limited = [member for member in members if member.capacity is not None]

    @property
    def lengths(self) -> Sequence[int]:
        return (self._limited or self.members)[0].lengths

    @property
    def capacity(self) -> int | None:
        return _smallest(self.members)

    def resize(self, rows: int) -> None:
        for member in self.members:
            member.resize(rows)

    def fork(self, source: int, rows: Sequence[int]) -> None:
        for member in self.members:
            member.fork(source, rows)

    def reorder(self, sources: Sequence[int], rows: Sequence[int]) -> None:
        for member in self.members:
            member.reorder(sources, rows)

    def evict(self, row: int, keep: int) -> int:
        """Make room in every member that has a limited capacity. If one of them needs another prefill, all members get it."""
        return max(member.evict(row, keep) for member in self._limited)


class EnsembleDecoder:
    """A `DecodingModel` that averages the probabilities of `members`, which must have the same vocabulary and device.

    The capacity is the smallest capacity of the members.
    """

    def __init__(self, members: Sequence[DecodingModel[Any]]) -> None:
        self.members = members
        self.vocab_size = members[0].vocab_size
        self.uses_numba = all(member.uses_numba for member in members)

    @property
    def device(self) -> torch.device:
        return self.members[0].device

    @property
    def capacity(self) -> int | None:
        return _smallest(self.members)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Ids (B, T) -> log-probabilities (B, T, V)."""
        return mean_logprobs([member(tokens) for member in self.members])

    def new_state(self, rows: int, max_tokens: int | None = None) -> EnsembleState:
        capacity = self.capacity
        if capacity is not None:
            max_tokens = min(max_tokens or capacity, capacity)
        return EnsembleState([member.new_state(rows, max_tokens) for member in self.members])

    @torch.inference_mode()
    def prefill(self, state: EnsembleState, row: int, ids: Sequence[int] | Tensor) -> Tensor:
        """Overwrite a row with ids (T,). Return the next-token log-probabilities (V,)."""
        return mean_logprobs([member.prefill(part, row, ids) for member, part in zip(self.members, state.members, strict=True)])

    def step(self, state: EnsembleState, tokens: Tensor) -> Tensor:
        """Append `tokens` (B,), one id per active row. Return the next-token log-probabilities (B, V)."""
        return mean_logprobs([member.step(part, tokens) for member, part in zip(self.members, state.members, strict=True)])


def _smallest(members: Sequence[DecodingModel[Any]] | Sequence[DecodingState]) -> int | None:
    """Return the smallest capacity, or None if all are unlimited."""
    return min((member.capacity for member in members if member.capacity is not None), default=None)


def make_ensemble_decoder(
    networks: Iterable[Model], *, weights: WeightKind | None, compiled: bool | None, steps: int | None, reporter: Reporter
) -> DecodingModel[Any]:
    """Make a decoder for the mean distribution of `networks`, or for a single network. See `make_decoder`.

    Whether a step is compiled is decided for each network. A message that concerns several networks is reported once. If
    `networks` is an iterator, the weights of a network are freed as soon as its decoder has its own copy.
    """
    once, remaining, members = _ReportOnce(reporter), iter(networks), []
    with suppress(StopIteration):
        while True:  # not a for loop, whose variable would keep the network
            members.append(make_decoder(next(remaining), weights=weights, compiled=compiled, steps=steps, reporter=once))
    return members[0] if len(members) == 1 else EnsembleDecoder(members)


def members_of(decoder: DecodingModel[Any]) -> Sequence[DecodingModel[Any]]:
    """Return the members of an ensemble, or the decoder itself."""
    return decoder.members if isinstance(decoder, EnsembleDecoder) else [decoder]


class _ReportOnce(Reporter):
    """Forwards each message the first time it occurs."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._reported: set[str] = set()

    def note(self, text: str) -> None:
        if text not in self._reported:
            self._reporter.note(text)
        self._reported.add(text)

    def warn(self, text: str) -> None:
        if text not in self._reported:
            self._reporter.warn(text)
        self._reported.add(text)

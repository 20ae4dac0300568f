"""The interface that generation uses: a decoding state with one row per sequence, and functions that prefill and advance its rows.

A state contains everything that a model stores about processed tokens: the keys and values of a transformer, or the hidden state of
a recurrent network. Generation works with any model or decoder that implements `DecodingModel`.

Legend: `B` active rows, `T` time, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor


class DecodingState(Protocol):
    """The state of several sequences that are decoded together, one row each. Rows can have different lengths.

    The first `len(lengths)` rows are active: `DecodingModel.step` advances only these.
    """

    @property
    def lengths(self) -> Sequence[int]:
        """The number of tokens in each active row, excluding evicted tokens."""

    @property
    def capacity(self) -> int | None:
        """The maximum number of tokens per row, or None if it is unlimited."""

    def resize(self, rows: int) -> None:
        """Set the number of active rows. Newly active rows are empty."""

    def fork(self, source: int, rows: Sequence[int]) -> None:
        """Copy row `source` to other active rows, so that several samples can continue one prompt."""

    def reorder(self, sources: Sequence[int], rows: Sequence[int]) -> None:
        """Copy row `sources[i]` to row `rows[i]` for every i. All sources are read before any row is written."""

    def evict(self, row: int, keep: int) -> int:
        """Make room in a full row by evicting all but its last `keep` tokens. Never called if `capacity` is None.

        Returns how many of the last tokens the caller must prefill into the row again. A state that can evict old tokens without
        recomputing the others returns 0.
        """


@dataclass(frozen=True)
class TokenChooser:
    """Compiled code that chooses a token for each row from its logits, with its arguments for several steps."""

    address: int
    """The address of the C function `void choose(void *record)`."""
    records: int
    """The address of the first step's record. The next steps' records follow it."""
    record_size: int
    """Size of a record in bytes."""
    logits: Tensor
    """(B, V): the logits that the function reads in every step."""
    chosen: np.ndarray
    """(steps, B): the ids that the function writes."""


@dataclass(frozen=True)
class DeviceSampler:
    """Chooses a token for each row on the model's device. It never reads a value on the host, so a CUDA graph can capture it."""

    key: Hashable
    """Samplers with equal keys choose the same tokens."""
    choose: Callable[[Tensor, Tensor], Tensor]
    """Logits (B, V) and one random number in [0, 1) per row (B,), in float64 -> ids (B,)."""

    def __call__(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Return ids (B,): -1 in rows whose logits contain NaN or infinity or are all minus infinity, else those of `choose`."""
        usable = logits.amax(dim=-1).isfinite()
        return self.choose(logits, uniforms).masked_fill(~usable, -1)


State = TypeVar("State", bound=DecodingState)
_RunState = TypeVar("_RunState", bound=DecodingState, contravariant=True)


@runtime_checkable
class DecodingModel(Protocol[State]):
    """A model that can continue a sequence token by token, or a faster decoder that computes the same results."""

    vocab_size: int
    uses_numba: bool
    """Whether a step runs in numba-compiled code. If it does, sampling is also numba-compiled."""

    @property
    def device(self) -> torch.device:
        """The device of the logits and the input tokens."""

    @property
    def capacity(self) -> int | None:
        """The maximum number of tokens that the model can process as one sequence, or None if it is unlimited."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """Ids (B, T) -> logits (B, T, V) in a single pass, without a state. T must not exceed `capacity`."""

    def new_state(self, rows: int, max_tokens: int | None = None) -> State:
        """Create a state with `rows` empty, active rows of up to `max_tokens` tokens each. Default and maximum: `capacity`."""

    def prefill(self, state: State, row: int, ids: Sequence[int] | Tensor) -> Tensor:
        """Overwrite a row with ids (T,). Return the next-token logits (V,). T must be at least 1."""

    def step(self, state: State, tokens: Tensor) -> Tensor:
        """Append `tokens` (B,), one id per active row. Return the next-token logits (B, V). No row may be full.

        Call this method in inference mode.
        """


@runtime_checkable
class RunsAhead(Protocol[_RunState]):
    """A `DecodingModel` that can also choose and append several tokens in a single call of compiled code."""

    def run(self, state: _RunState, chooser: TokenChooser) -> int:
        """Choose and append tokens until `chooser.chosen` is full or a logit is not finite. Return the number of steps.

        `chooser.logits` contains the logits before the first step, and afterwards those after the last step.
        """


@runtime_checkable
class SamplesOnDevice(Protocol[_RunState]):
    """A `DecodingModel` that can also choose tokens on its device. The host then reads them while the device computes."""

    samples_on_device: bool
    """Whether this is faster than choosing tokens on the host."""

    def sample_and_step(self, state: _RunState, logits: Tensor, sampler: DeviceSampler, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Choose tokens (B,) from logits (B, V) and append them. Return the tokens and the next-token logits (B, V).

        `uniforms` (B,) contains the random numbers, on the host. A token of -1 means that the row's logits were not usable; token 0
        is then appended. Does not wait for the device. Call this method in inference mode. No row may be full.
        """

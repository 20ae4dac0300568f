"""Models that read a text from left to right with a state of constant size: recurrent networks, window networks and n-gram models.

Evaluation and generation need only `continue_from`, which carries the state through a text of any length.

Legend: `B` rows, `T` time, `C` width of the hidden states, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tinylm.model.base import Model


class RowState:
    """A `DecodingState` with unlimited capacity. It stores one tensor of constant size per row."""

    capacity = None

    def __init__(self, empty: Tensor) -> None:
        """`empty` (B, ...) is the state of rows without tokens."""
        self.values = empty
        self.lengths = [0] * len(empty)
        self._empty = empty[:1].clone()

    def resize(self, rows: int) -> None:
        added = max(0, rows - len(self.lengths))
        self.values = torch.cat((self.values[:rows], self._empty.expand(added, *self._empty.shape[1:])))
        self.lengths = self.lengths[:rows] + [0] * added

    def fork(self, source: int, rows: Sequence[int]) -> None:
        self.reorder([source] * len(rows), rows)

    def reorder(self, sources: Sequence[int], rows: Sequence[int]) -> None:
        self.values[list(rows)] = self.values[list(sources)]
        for row, length in zip(rows, [self.lengths[source] for source in sources], strict=True):
            self.lengths[row] = length

    def evict(self, row: int, keep: int) -> int:
        raise AssertionError("a state of unlimited capacity is never full")


class StatefulModel(Model):
    """A `Model` that is also a `DecodingModel`. A subclass implements `empty_state` and `continue_from`."""

    uses_numba = False
    capacity = None

    def empty_state(self, rows: int) -> Tensor:
        """Return the state (B, ...) at the beginning of a text."""
        raise NotImplementedError

    def continue_from(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Ids (B, T) that continue from `state` (B, ...) -> final hidden states (B, T, C) and the state after the last id."""
        raise NotImplementedError

    def new_state(self, rows: int, max_tokens: int | None = None) -> RowState:
        """Create a state with `rows` empty rows. Its size does not depend on `max_tokens`."""
        return RowState(self.empty_state(rows))

    @torch.inference_mode()
    def prefill(self, state: RowState, row: int, ids: Sequence[int] | Tensor) -> Tensor:
        """Overwrite a row with ids (T,). Return the next-token logits (V,)."""
        tokens = torch.as_tensor(ids, device=self.device)[None]
        hidden, values = self.continue_from(tokens, self.empty_state(1))
        state.values[row] = values[0]
        state.lengths[row] = tokens.shape[1]
        return self.logits(hidden[:, -1])[0]

    def step(self, state: RowState, tokens: Tensor) -> Tensor:
        """Append `tokens` (B,), one id per row. Return the next-token logits (B, V)."""
        hidden, state.values = self.continue_from(tokens[:, None], state.values)
        state.lengths = [length + 1 for length in state.lengths]
        return self.logits(hidden[:, -1])

"""Generation without a KV cache or recurrent state: every step is a forward pass over all tokens so far.

This works with any causal model, and every step calls the functions at hook points.

Legend: `B` rows, `T` tokens so far, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tinylm.model.base import Model
from tinylm.model.functions import at_least_float32, attention_without_cudnn
from tinylm.model.hooks import has_functions


class TokenState:
    """A `DecodingState` that contains only the ids of each row. Evicting tokens therefore does not require another prefill."""

    def __init__(self, rows: int, capacity: int) -> None:
        self.capacity = capacity
        self.tokens: list[list[int]] = [[] for _ in range(rows)]

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.tokens]

    def resize(self, rows: int) -> None:
        self.tokens = self.tokens[:rows] + [[] for _ in range(rows - len(self.tokens))]

    def fork(self, source: int, rows: Sequence[int]) -> None:
        self.reorder([source] * len(rows), rows)

    def reorder(self, sources: Sequence[int], rows: Sequence[int]) -> None:
        for row, ids in zip(rows, [list(self.tokens[source]) for source in sources], strict=True):
            self.tokens[row] = ids

    def evict(self, row: int, keep: int) -> int:
        self.tokens[row] = self.tokens[row][len(self.tokens[row]) - keep :]
        return 0


class FullPassDecoder:
    """A `DecodingModel` for causal networks that implement only `Model`, and for transformers that `Decoder` does not support.

    Functions attached to hook points of `network` receive the activations of all tokens so far.
    """

    uses_numba = False

    def __init__(self, network: Model) -> None:
        self.network, self.vocab_size = network, network.vocab_size

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def capacity(self) -> int:
        return self.network.model.context_length

    def __call__(self, tokens: Tensor) -> Tensor:
        """Ids (B, T) -> logits (B, T, V)."""
        with attention_without_cudnn(self.device):
            return at_least_float32(self.network(tokens))

    def new_state(self, rows: int, max_tokens: int | None = None) -> TokenState:
        return TokenState(rows, min(max_tokens or self.capacity, self.capacity))

    @torch.inference_mode()
    def prefill(self, state: TokenState, row: int, ids: Sequence[int] | Tensor) -> Tensor:
        state.tokens[row] = torch.as_tensor(ids).tolist()
        return self._last_logits([state.tokens[row]])[0]

    def step(self, state: TokenState, tokens: Tensor) -> Tensor:
        """Append `tokens` (B,), one id per row. Return the next-token logits (B, V). Rows of equal length share a forward pass."""
        for ids, new_id in zip(state.tokens, tokens.tolist(), strict=True):
            ids.append(new_id)
        logits: dict[int, Tensor] = {}
        for length in set(state.lengths):
            rows = [row for row, ids in enumerate(state.tokens) if len(ids) == length]
            logits.update(zip(rows, self._last_logits([state.tokens[row] for row in rows]), strict=True))
        return torch.stack([logits[row] for row in range(len(tokens))])

    def _last_logits(self, sequences: list[list[int]]) -> Tensor:
        """Sequences of equal length (B, T) -> next-token logits (B, V)."""
        n_last = None if has_functions(self.network) else 1  # functions must receive the activations of all positions
        with attention_without_cudnn(self.device):
            hidden = self.network.hidden(torch.tensor(sequences, device=self.device), n_last=n_last)
        return at_least_float32(self.network.logits(hidden[:, -1]))

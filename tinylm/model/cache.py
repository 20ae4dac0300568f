"""The key/value cache: what a decoder remembers of the tokens it has read, in tensors that never move."""

from __future__ import annotations

import torch
from torch import Tensor

from tinylm.recipe.schema import ModelSection


class KeyValueCache:
    """Keys and values of every layer for up to `capacity` positions, allocated once.

    `length` positions are filled. All rows of the batch stand at the same position.
    """

    def __init__(self, model: ModelSection, batch: int, capacity: int, *, device: torch.device, dtype: torch.dtype) -> None:
        shape = (model.n_layer, 2, batch, model.kv_heads, capacity, model.head_width)
        self._store = torch.zeros(shape, device=device, dtype=dtype)
        self.capacity = capacity
        self.length = 0
        self._tokens = torch.zeros((batch, capacity), device=device, dtype=torch.long)

    def remember(self, tokens: Tensor) -> Tensor:
        """Note the ids (batch, new) of the positions being added; return all ids so far, the new included."""
        end = self.length + tokens.shape[1]
        self._tokens[:, self.length : end] = tokens
        return self._tokens[:, :end]

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write (batch, kv heads, new, width) after the filled positions; return all positions so far, the new included."""
        end = self.length + keys.shape[2]
        stored_keys, stored_values = self._store[layer]
        stored_keys[:, :, self.length : end] = keys
        stored_values[:, :, self.length : end] = values
        return stored_keys[:, :, :end], stored_values[:, :, :end]

    def advance(self, positions: int) -> None:
        """Count positions as filled, after every layer has written them."""
        self.length += positions

    def clear(self) -> None:
        self.length = 0

    def expand(self, batch: int) -> None:
        """Repeat a one-row cache for `batch` samples that share its prompt."""
        self._store = self._store.repeat(1, 1, batch, 1, 1, 1)
        self._tokens = self._tokens.repeat(batch, 1)

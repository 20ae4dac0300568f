"""The key/value cache: what a decoder remembers of the tokens it has read, in tensors that never move.

Legend: L layers, B rows, S capacity, K key/value heads, D head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tinylm.recipe.schema import ModelSection


class KeyValueCache:
    """Keys and values of every layer for up to `capacity` positions of each row, allocated once.

    `keys` and `values` are (L, B, S, K, D), `tokens` (B, S) the ids. `lengths` tells how many positions of each row are
    filled; rows need not stand at the same position. `layers` are views of the rows in use, `whole` of all.
    """

    def __init__(self, model: ModelSection, rows: int, capacity: int, *, device: torch.device, dtype: torch.dtype) -> None:
        shape = (model.n_layer, rows, capacity, model.kv_heads, model.head_width)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.tokens = torch.zeros((rows, capacity), device=device, dtype=torch.long)
        self.lengths: list[int] = []
        self.use(rows)
        self.whole = self.layers

    def use(self, rows: int) -> None:
        """Only the first so many rows are stepped from now on; rows that join are empty."""
        self.lengths = self.lengths[:rows] + [0] * (rows - len(self.lengths))
        self.layers = [LayerViews.of(keys[:rows], values[:rows]) for keys, values in zip(self.keys, self.values, strict=True)]

    @property
    def capacity(self) -> int:
        return self.tokens.shape[1]

    def rows(self, start: int = 0, stop: int | None = None) -> CacheRows:
        """Rows that are read into together, from their beginning on; default: all."""
        return CacheRows(self, slice(start, len(self.lengths) if stop is None else stop))

    def share(self, source: int, rows: range | list[int]) -> None:
        """Copy what row `source` holds to other rows: samples of one prompt, or beams that go on from the same text."""
        self.take([source] * len(rows), rows)

    def take(self, sources: list[int], rows: range | list[int]) -> None:
        """Row rows[i] becomes what row sources[i] was, all at once."""
        longest = max((self.lengths[source] for source in sources), default=0)
        for store in (self.keys, self.values):
            store[:, list(rows), :longest] = store[:, sources, :longest]
        self.tokens[list(rows), :longest] = self.tokens[sources, :longest]
        lengths = [self.lengths[source] for source in sources]
        for row, length in zip(rows, lengths, strict=True):
            self.lengths[row] = length


class LayerViews(NamedTuple):
    """One layer's part of a cache, as decoding wants it: (B S, K, D) to be written, (B, K, S, D) to be looked at."""

    written_keys: Tensor
    written_values: Tensor
    keys: Tensor
    values: Tensor

    @classmethod
    def of(cls, keys: Tensor, values: Tensor) -> LayerViews:
        return cls(keys.flatten(0, 1), values.flatten(0, 1), keys.transpose(1, 2), values.transpose(1, 2))


class CacheRows:
    """Rows of a cache while the same number of tokens is read into each: what `Transformer.hidden` continues."""

    def __init__(self, cache: KeyValueCache, rows: slice) -> None:
        self._cache = cache
        self._rows = rows
        self.length = 0

    def remember(self, tokens: Tensor) -> Tensor:
        """Note the ids (B, new) of the positions being added; return all ids so far, the new included."""
        end = self.length + tokens.shape[1]
        rows = self._cache.tokens[self._rows]
        rows[:, self.length : end] = tokens
        return rows[:, :end]

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, K, new, D) after the filled positions; return all positions so far, the new included."""
        end = self.length + keys.shape[2]
        stored_keys, stored_values = (store[layer, self._rows].transpose(1, 2) for store in (self._cache.keys, self._cache.values))
        stored_keys[:, :, self.length : end] = keys
        stored_values[:, :, self.length : end] = values
        return stored_keys[:, :, :end], stored_values[:, :, :end]

    def advance(self, positions: int) -> None:
        """Count positions as filled, after every layer has written them."""
        self.length += positions
        for row in range(self._rows.start, self._rows.stop):
            self._cache.lengths[row] = self.length

"""The KV cache: keys and values of the tokens that a decoder has processed, in preallocated tensors.

Legend: `L` layers, `B` rows, `S` capacity, `K` key/value heads, `D` head width, `T` new positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tinylm.recipe.transformer import TransformerSection


class KVCache:
    """The `DecodingState` of a transformer: keys and values of every layer, for up to `capacity` positions per row.

    `keys` and `values` are (L, B, S, K, D); `tokens` (B, S) contains the ids. `lengths` contains the number of filled positions in
    each active row; rows can have different lengths. `layers` contains per-layer views of the active rows, and `full_layers`
    contains per-layer views of all rows.
    """

    def __init__(self, model: TransformerSection, rows: int, capacity: int, *, device: torch.device, dtype: torch.dtype) -> None:
        shape = (model.n_layer, rows, capacity, model.kv_heads, model.head_width)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.tokens = torch.zeros((rows, capacity), device=device, dtype=torch.long)
        self.lengths = [0] * rows
        self.full_layers = self._views(rows)
        self._layers = self.full_layers
        self._layer_rows = rows

    def resize(self, rows: int) -> None:
        """Set the number of active rows. Newly active rows are empty."""
        self.lengths = self.lengths[:rows] + [0] * (rows - len(self.lengths))

    @property
    def layers(self) -> list[LayerCache]:
        if self._layer_rows != len(self.lengths):  # created on demand, because compiled steps do not use the views
            self._layer_rows = len(self.lengths)
            self._layers = self._views(self._layer_rows)
        return self._layers

    def _views(self, rows: int) -> list[LayerCache]:
        return [LayerCache.from_tensors(keys[:rows], values[:rows]) for keys, values in zip(self.keys, self.values, strict=True)]

    @property
    def capacity(self) -> int:
        return self.tokens.shape[1]

    def row_slice(self, start: int = 0, stop: int | None = None) -> CacheRows:
        """Return a view that fills rows [start, stop) together from position 0. Default: all active rows."""
        return CacheRows(self, slice(start, len(self.lengths) if stop is None else stop))

    def fork(self, source: int, rows: Sequence[int]) -> None:
        """Copy row `source` to other rows, so that several samples can continue one prompt."""
        self.reorder([source] * len(rows), rows)

    def reorder(self, sources: Sequence[int], rows: Sequence[int]) -> None:
        """Copy row `sources[i]` to row `rows[i]` for every i. All sources are read before any row is written."""
        longest = max((self.lengths[source] for source in sources), default=0)
        # For a single row, slices are faster than lists of indices.
        to, by = (rows[0], sources[0]) if len(rows) == 1 else (list(rows), list(sources))
        for store in (self.keys, self.values):
            store[:, to, :longest] = store[:, by, :longest]
        self.tokens[to, :longest] = self.tokens[by, :longest]
        lengths = [self.lengths[source] for source in sources]
        for row, length in zip(rows, lengths, strict=True):
            self.lengths[row] = length

    def evict(self, row: int, keep: int) -> int:
        """Empty a row. Return `keep`, because the last `keep` tokens must be prefilled again.

        Shifting the keys and values is not an alternative. With learned and sinusoidal position embeddings, keys and values depend
        on absolute positions. With rotary position embeddings, shifting is possible but degrades the output, because the model was
        trained only on sequences that include their first tokens.
        """
        self.lengths[row] = 0
        return keep


class LayerCache(NamedTuple):
    """Views of one layer's keys and values: (B S, K, D) for writing, (B, K, S, D) for attention."""

    flat_keys: Tensor
    flat_values: Tensor
    keys: Tensor
    values: Tensor

    @classmethod
    def from_tensors(cls, keys: Tensor, values: Tensor) -> LayerCache:
        """Create the views from keys and values (B, S, K, D)."""
        return cls(keys.flatten(0, 1), values.flatten(0, 1), keys.transpose(1, 2), values.transpose(1, 2))


class CacheRows:
    """Rows of a cache that have the same length and are filled together, for use with `Transformer.hidden`."""

    def __init__(self, cache: KVCache, rows: slice) -> None:
        self._cache = cache
        self._rows = rows
        self.length = 0

    def update_tokens(self, tokens: Tensor) -> Tensor:
        """Append ids (B, T). Return all ids so far, including the new ids."""
        end = self.length + tokens.shape[1]
        rows = self._cache.tokens[self._rows]
        rows[:, self.length : end] = tokens
        return rows[:, :end]

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, K, T, D) to a layer. Return the keys and values of all positions so far."""
        end = self.length + keys.shape[2]
        stored_keys, stored_values = (store[layer, self._rows].transpose(1, 2) for store in (self._cache.keys, self._cache.values))
        stored_keys[:, :, self.length : end] = keys
        stored_values[:, :, self.length : end] = values
        return stored_keys[:, :, :end], stored_values[:, :, :end]

    def advance(self, positions: int) -> None:
        """Mark `positions` more positions as filled. Call this method after all layers have written them."""
        self.length += positions
        for row in range(self._rows.start, self._rows.stop):
            self._cache.lengths[row] = self.length

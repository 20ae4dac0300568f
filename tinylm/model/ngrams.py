"""N-gram embeddings: vectors for the n-grams that end at each token. They are added to the token's embedding.

For each order n, a hash of the n-gram that ends at a position selects a row of a table (Pagnoni et al. 2024, "Byte Latent
Transformer", section 3.2.1). The rows of all orders are concatenated and projected to the model's width. Small models on CPUs are
limited by arithmetic, which lookups hardly need. Collisions (different n-grams with the same row) are not resolved.

Legend: `B` batch, `T` time, `C` width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tinylm.recipe.schema import TransformerSection

HASH_MULTIPLIER = 0x5851F42D4C957F2D
"""Knuth's 64-bit multiplier. Products wrap around."""


class NgramEmbedding(nn.Module):
    """One table (ngram_rows, ngram_width) for each order. A single `nn.Embedding` stacks all tables."""

    def __init__(self, model: TransformerSection, vocab_size: int) -> None:
        super().__init__()
        self.orders = model.ngram_embeddings
        self.rows = model.ngram_rows
        self.dropout = model.ngram_dropout
        self.pad_id = vocab_size
        """Id for positions before the first token."""
        self.table = nn.Embedding(len(self.orders) * self.rows, model.ngram_width)
        self.projection = nn.Linear(len(self.orders) * model.ngram_width, model.n_embd, bias=False)

    def forward(self, tokens: Tensor, segments: Tensor | None = None) -> Tensor:
        """Ids (B, T) -> (B, T, C). With `segments` (B, T), n-grams do not cross segment boundaries."""
        rows = [self.row_indices(tokens, order, segments) + index * self.rows for index, order in enumerate(self.orders)]
        indices = torch.stack(rows, dim=-1)  # (B, T, orders)
        vectors = self.table(indices)  # (B, T, orders, ngram_width)
        if self.dropout and self.training:
            kept = torch.rand(indices.shape, device=indices.device) >= self.dropout
            vectors = vectors * (kept / (1 - self.dropout)).to(vectors.dtype).unsqueeze(-1)
        projected: Tensor = self.projection(vectors.flatten(-2))
        return projected

    def row_indices(self, tokens: Tensor, order: int, segments: Tensor | None = None) -> Tensor:
        """Ids (B, T) -> the table row of each position's n-gram of length `order`, (B, T), in [0, rows).

        The row is a multiplicative hash of the ids in the n-gram. Tokens from other segments are replaced with `pad_id`.
        """
        T = tokens.shape[1]
        padded = nn.functional.pad(tokens, (order - 1, 0), value=self.pad_id)
        key = torch.full_like(tokens, order)
        for offset in range(order):
            shifted = padded[:, offset : offset + T]
            if segments is not None:
                other = nn.functional.pad(segments, (order - 1, 0))[:, offset : offset + T] != segments
                shifted = shifted.masked_fill(other, self.pad_id)
            key = (key + shifted + 1) * HASH_MULTIPLIER
            key = key ^ (key >> 29)
        return key.remainder(self.rows)

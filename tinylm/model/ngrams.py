"""N-gram embeddings: vectors for the last few tokens together, which are added to the embedding of each token.

For each order n, a hash of the n-gram that ends at a position selects a row of a table (Pagnoni et al. 2024, "Byte Latent
Transformer", section 3.2.1). The rows of all orders are concatenated and projected to the model's width. Small models on CPUs are
limited by arithmetic, and lookups need almost none. Collisions (different n-grams with the same row) are not resolved.

Legend: `B` batch, `T` time, `C` width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tinylm.recipe.schema import ModelSection

HASH_MULTIPLIER = 0x5851F42D4C957F2D
"""Knuth's 64-bit multiplier. Products wrap around."""


class NgramEmbedding(nn.Module):
    """A table of `ngram_rows` rows of width `ngram_width` for each order; one `nn.Embedding` stacks all tables."""

    def __init__(self, model: ModelSection, vocab_size: int) -> None:
        super().__init__()
        self.orders = model.ngram_embeddings
        self.rows = model.ngram_rows
        self.dropout = model.ngram_dropout
        self.pad_id = vocab_size
        """Id that stands for positions before the first token."""
        self.table = nn.Embedding(len(self.orders) * self.rows, model.ngram_width)
        self.projection = nn.Linear(len(self.orders) * model.ngram_width, model.n_embd, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Ids (B, T) -> (B, T, C)."""
        rows = [self.row_indices(tokens, order) + index * self.rows for index, order in enumerate(self.orders)]
        indices = torch.stack(rows, dim=-1)  # (B, T, orders)
        vectors = self.table(indices)  # (B, T, orders, ngram_width)
        if self.dropout and self.training:
            kept = torch.rand(indices.shape, device=indices.device) >= self.dropout
            vectors = vectors * (kept / (1 - self.dropout)).to(vectors.dtype).unsqueeze(-1)
        projected: Tensor = self.projection(vectors.flatten(-2))
        return projected

    def row_indices(self, tokens: Tensor, order: int) -> Tensor:
        """The row of each position's n-gram in the table of `order`, (B, T) in [0, rows): a multiplicative hash of its ids."""
        T = tokens.shape[1]
        padded = nn.functional.pad(tokens, (order - 1, 0), value=self.pad_id)
        key = torch.full_like(tokens, order)
        for offset in range(order):
            key = (key + padded[:, offset : offset + T] + 1) * HASH_MULTIPLIER
            key = key ^ (key >> 29)
        return key.remainder(self.rows)

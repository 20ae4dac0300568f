"""Embeddings of the last few tokens together: what a model knows of frequent pieces before any block has read them.

For each order n the n-gram that ends at a position is looked up in a table by a hash (Pagnoni et al. 2024, "Byte Latent
Transformer", section 3.2.1); the vectors of all orders, side by side, are mapped to the model's width and added to the token's
embedding. A lookup costs almost no arithmetic, which is what a small model on a CPU is short of; different n-grams that share a
row are told apart by the rest of the model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tinylm.recipe.schema import ModelSection

MULTIPLIER = 0x5851F42D4C957F2D
"""Knuth's for 64 bits; products wrap around."""


class NgramEmbedding(nn.Module):
    """A table of `ngram_rows` rows of `ngram_width` numbers for each order."""

    def __init__(self, model: ModelSection, vocab_size: int) -> None:
        super().__init__()
        self.orders = model.ngram_embeddings
        self.rows = model.ngram_rows
        self.dropout = model.ngram_dropout
        self.missing = vocab_size
        """Stands for tokens before the first."""
        self.table = nn.Embedding(len(self.orders) * self.rows, model.ngram_width)
        self.projection = nn.Linear(len(self.orders) * model.ngram_width, model.n_embd, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) ids -> (B, T, C)."""
        keys = torch.stack([self.keys(tokens, order) + index * self.rows for index, order in enumerate(self.orders)], dim=-1)
        vectors = self.table(keys)  # (B, T, orders, width)
        if self.dropout and self.training:
            kept = torch.rand(keys.shape, device=keys.device) >= self.dropout
            vectors = vectors * (kept / (1 - self.dropout)).to(vectors.dtype).unsqueeze(-1)
        projected: Tensor = self.projection(vectors.flatten(-2))
        return projected

    def keys(self, tokens: Tensor, order: int) -> Tensor:
        """The row of each position's n-gram, (B, T) in [0, rows): a multiplicative hash of the last `order` ids."""
        T = tokens.shape[1]
        before = nn.functional.pad(tokens, (order - 1, 0), value=self.missing)
        key = torch.full_like(tokens, order)
        for back in range(order):
            key = (key + before[:, back : back + T] + 1) * MULTIPLIER
            key = key ^ (key >> 29)
        return key.remainder(self.rows)

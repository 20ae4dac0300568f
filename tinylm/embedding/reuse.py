"""Start a language model from vectors: `model.init_embeddings` of a recipe.

Vectors of tokens go to their tokens; from vectors of words a token gets the mean over the words that it is a piece of,
weighted by how often they occur. All are scaled together to the standard deviation that the table starts with; tokens
without a vector keep their random start.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from tinylm.embedding.text import token_names
from tinylm.embedding.vectors import Vectors
from tinylm.errors import InputError
from tinylm.tokenizer import Tokenizer


@dataclass(frozen=True)
class Reused:
    """How many tokens began from a vector, of how many, and whether word vectors were shared out among pieces."""

    tokens: int
    vocab_size: int
    from_words: bool


def start_from(embedding: nn.Embedding, vectors: Vectors, tokenizer: Tokenizer) -> Reused:
    """Fill `embedding` (vocabulary, width). Raises `InputError` for another width, or where no token gets a vector."""
    where = "model.init_embeddings"
    if vectors.dimensions != embedding.embedding_dim:
        raise InputError(
            f"these vectors have {vectors.dimensions} dimensions and n_embd is {embedding.embedding_dim}",
            where=where,
            hint=f"train them with --dimensions {embedding.embedding_dim}, or set model.n_embd",
        )
    table = for_tokens(vectors, tokenizer) if vectors.byte_mapped else for_pieces(vectors, tokenizer)
    known = np.flatnonzero(table.any(axis=1))
    if not len(known):
        raise InputError("no token of this tokenizer has a vector there", where=where)
    with torch.no_grad():
        scale = float(embedding.weight.std()) / max(float(table[known].std()), 1e-12)
        embedding.weight[torch.from_numpy(known)] = torch.from_numpy(table[known] * np.float32(scale)).to(embedding.weight.device)
    return Reused(len(known), tokenizer.vocab_size, not vectors.byte_mapped)


def for_tokens(vectors: Vectors, tokenizer: Tokenizer) -> np.ndarray:
    """(vocabulary, width): each token's own vector by its name, zeros where there is none."""
    table = np.zeros((tokenizer.vocab_size, vectors.dimensions), dtype=np.float32)
    for id, name in enumerate(token_names(tokenizer)):
        if (row := vectors.index.get(name)) is not None:
            table[id] = vectors.matrix[row]
    return table


def for_pieces(vectors: Vectors, tokenizer: Tokenizer) -> np.ndarray:
    """(vocabulary, width): for each token the mean of the words that it is a piece of, zeros where there is none.

    Words are encoded as they stand inside a text, after a space, and capitalised after a space too.
    """
    sums = np.zeros((tokenizer.vocab_size, vectors.dimensions))
    weights = np.zeros(tokenizer.vocab_size)
    counts = np.ones(len(vectors)) if vectors.counts is None else np.maximum(vectors.counts, 1)
    for row, name in enumerate(vectors.names):
        for form in dict.fromkeys((f" {name}", f" {name.capitalize()}", name)):
            for id in set(tokenizer.encode(form)):
                sums[id] += counts[row] * vectors.matrix[row]
                weights[id] += counts[row]
    table: np.ndarray = (sums / np.maximum(weights, 1e-12)[:, None]).astype(np.float32)
    return table

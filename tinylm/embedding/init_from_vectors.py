"""Initialize the token embedding of a language model from vectors (`model.init_embeddings` of a recipe).

Token vectors are copied to the tokens with the same name. If the vectors are word vectors, each token gets the mean over the words
whose encoding contains it, weighted by word count. All vectors are scaled by the same factor to match the standard deviation of the
embedding's random initialization. Tokens without a vector keep their random values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from tinylm.embedding.encoded_text import token_names
from tinylm.embedding.vectors import Vectors
from tinylm.errors import InputError
from tinylm.tokenizer import Tokenizer


@dataclass(frozen=True)
class InitializedTokens:
    """How many tokens of the vocabulary got a vector, and whether the vectors were averaged from word vectors."""

    tokens: int
    vocab_size: int
    from_words: bool


def initialize_from_vectors(embedding: nn.Embedding, vectors: Vectors, tokenizer: Tokenizer) -> InitializedTokens:
    """Overwrite rows of `embedding`, (vocabulary, width), in place.

    Raises `InputError` if the width differs, or if no token gets a vector.
    """
    where = "model.init_embeddings"
    if vectors.dimensions != embedding.embedding_dim:
        raise InputError(
            f"the vectors have {vectors.dimensions} dimensions, but model.n_embd is {embedding.embedding_dim}",
            where=where,
            hint=f"train them with --dimensions {embedding.embedding_dim}, or set model.n_embd",
        )
    table = table_from_tokens(vectors, tokenizer) if vectors.byte_mapped else table_from_words(vectors, tokenizer)
    initialized = np.flatnonzero(table.any(axis=1))
    if not len(initialized):
        raise InputError("none of the tokenizer's tokens has a vector in this file", where=where)
    with torch.no_grad():
        scale = float(embedding.weight.std()) / max(float(table[initialized].std()), 1e-12)
        embedding.weight[torch.from_numpy(initialized)] = torch.from_numpy(table[initialized] * np.float32(scale)).to(
            embedding.weight.device
        )
    return InitializedTokens(len(initialized), tokenizer.vocab_size, not vectors.byte_mapped)


def table_from_tokens(vectors: Vectors, tokenizer: Tokenizer) -> np.ndarray:
    """Look up the vector of each token by name. Returns float32 (vocabulary, width), zero for tokens without a vector."""
    table = np.zeros((tokenizer.vocab_size, vectors.dimensions), dtype=np.float32)
    for id, name in enumerate(token_names(tokenizer)):
        if (row := vectors.index.get(name)) is not None:
            table[id] = vectors.matrix[row]
    return table


def table_from_words(vectors: Vectors, tokenizer: Tokenizer) -> np.ndarray:
    """Average word vectors into token vectors. Returns float32 (vocabulary, width), zero for tokens that are in no word.

    Each word is encoded in three forms: after a space, capitalized after a space, and without a space.
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

"""Initialize a language model's token embedding from vectors (recipe key `model.init_embeddings`).

Token vectors are copied to tokens with the same name. Word vectors are averaged: a token's vector is the mean over all words whose
encoding contains the token, weighted by word count. All vectors are scaled by one common factor to match the standard deviation of
the embedding's random initialization. Tokens without a vector keep their random values.
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
    """How many tokens in the vocabulary received a vector, and whether those vectors are averages of word vectors."""

    tokens: int
    vocab_size: int
    from_words: bool


def initialize_from_vectors(embedding: nn.Embedding, vectors: Vectors, tokenizer: Tokenizer) -> InitializedTokens:
    """Overwrite rows of `embedding`, (vocabulary, width), in place.

    Raises `InputError` if the vectors have a different width, or if no token receives a vector.
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
    """Look up each token's vector by name. Returns float32 (vocabulary, width). Rows of tokens without a vector are zero."""
    table = np.zeros((tokenizer.vocab_size, vectors.dimensions), dtype=np.float32)
    for id, name in enumerate(token_names(tokenizer)):
        if (row := vectors.index.get(name)) is not None:
            table[id] = vectors.matrix[row]
    return table


def table_from_words(vectors: Vectors, tokenizer: Tokenizer) -> np.ndarray:
    """Average word vectors into token vectors. Returns float32 (vocabulary, width). Rows of tokens that no word contains are zero.

    Each word is encoded in three forms: with a leading space, capitalized with a leading space, and without a space.
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

"""A custom architecture and objective for tests, written the way a library user would write them.

The bigram model is a table that maps each token to the logits of the next token. Its objective predicts a random subset of the
tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from tinylm.data.batch import Batch
from tinylm.data.datasets import Examples
from tinylm.model import registry
from tinylm.model.base import Model
from tinylm.recipe import ModelVariant, ObjectiveVariant
from tinylm.recipe.values import Count, Share
from tinylm.training import objectives


class BigramSection(ModelVariant):
    """The recipe section of the bigram model."""

    objectives = ("sparse_lm", "causal_lm")

    architecture: Literal["bigram"] = "bigram"
    context_length: Count = 16
    """Number of tokens in a training sequence."""


class Bigram(Model):
    def __init__(self, model: BigramSection, vocab_size: int, *, seed: int | None = 0) -> None:
        super().__init__(model, vocab_size)
        self.table = nn.Embedding(vocab_size, vocab_size)
        if seed is not None:
            nn.init.zeros_(self.table.weight)

    def hidden(self, tokens: Tensor, *, n_last: int | None = None, segments: Tensor | None = None) -> Tensor:
        rows: Tensor = self.table(tokens if n_last is None else tokens[:, -n_last:])
        return rows

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


class SparseLMObjective(ObjectiveVariant):
    """Predict a random subset of the tokens."""

    name: Literal["sparse_lm"] = "sparse_lm"
    share: Share = 0.5
    """The fraction of tokens that are predicted."""


class SparseLM(objectives.CausalLM):
    name = "sparse_lm"

    def __init__(self, section: SparseLMObjective) -> None:
        self.share = section.share

    def batch(self, examples: Examples, seed: int, start: int) -> Batch:
        batch = super().batch(examples, seed, start)
        rows, length = batch.targets.shape
        kept = np.stack([kept_targets(seed, start + row, length, self.share) for row in range(rows)])
        return replace(batch, targets=batch.targets.masked_fill(~torch.from_numpy(kept), -1))


def kept_targets(seed: int, position: int, length: int, share: float) -> np.ndarray:
    """Return a mask (length,) of the targets to predict in the example at `position` of the data order."""
    return np.random.default_rng((seed, position)).random(length) < share


@contextmanager
def registered() -> Iterator[None]:
    """Register the architecture and the objective while the context is active."""
    registry.register(BigramSection, Bigram)
    objectives.register(SparseLMObjective, SparseLM)
    try:
        yield
    finally:
        objectives.unregister(SparseLMObjective)
        registry.unregister(BigramSection)

"""Tiny models and their tokens, for the tests that need no run folder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinylm.model.transformer import Transformer
from tinylm.recipe.schema import ModelSection

PRESETS = ("modern", "gpt2", "llama")
VOCABULARY = 61


def section(preset: str = "modern", **parts: Any) -> ModelSection:
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "context_length": 16}
    return ModelSection.model_validate({"preset": preset, **shape, **parts})


def roughened(network: Transformer, seed: int = 0) -> Transformer:
    """Every parameter moved off its starting value, so that no zero or one hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return network


def model(preset: str = "modern", *, vocabulary: int = VOCABULARY, **parts: Any) -> Transformer:
    """A network ready to evaluate, with nothing at a special value."""
    return roughened(Transformer(section(preset, **parts), vocabulary)).eval()


def ids(rows: int = 2, length: int = 12, *, vocabulary: int = VOCABULARY, seed: int = 0) -> Tensor:
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))

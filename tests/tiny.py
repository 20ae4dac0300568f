"""Tiny models and token ids for tests that do not need a run folder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinylm.data.batch import Batch
from tinylm.model.transformer import Transformer
from tinylm.recipe.schema import DecoderSection
from tinylm.training.objectives import CausalLM

PRESETS = ("modern", "gpt2", "llama")
VOCAB_SIZE = 61


def section(preset: str = "modern", **overrides: Any) -> DecoderSection:
    """Return a `model:` section with 2 layers, width 32 and context length 16, changed by `overrides`."""
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "context_length": 16}
    return DecoderSection.model_validate({"preset": preset, **shape, **overrides})


def add_noise_(network: Transformer, seed: int = 0) -> Transformer:
    """Add noise to every parameter in place. Parameters that are all zeros or ones can hide an error."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return network


def model(preset: str = "modern", *, vocab_size: int = VOCAB_SIZE, **overrides: Any) -> Transformer:
    """Return a network in evaluation mode, with noise added to its initial weights."""
    return add_noise_(Transformer(section(preset, **overrides), vocab_size)).eval()


def causal_batch(tokens: Tensor, segments: Tensor | None = None) -> Batch:
    """Return a next-token prediction batch for token ids (batch, time + 1). Negative ids are padding."""
    examples = {"tokens": tokens.numpy()} if segments is None else {"tokens": tokens.numpy(), "segments": segments.numpy()}
    return CausalLM().batch(examples, seed=0, start=0)


def ids(rows: int = 2, length: int = 12, *, vocab_size: int = VOCAB_SIZE, seed: int = 0) -> Tensor:
    """Return random token ids (rows, length)."""
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))

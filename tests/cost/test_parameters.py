"""Test that parameter and FLOP counts match the model."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tinylm.cost.parameters import flops_per_token, parameter_counts
from tinylm.model.transformer import Transformer
from tinylm.recipe.presets import DECODER_PRESETS
from tinylm.recipe.schema import DecoderSection

PARTS: list[dict[str, Any]] = [
    {},
    {"norm": "layernorm"},
    {"norm": "rmsnorm"},
    {"norm_position": "post"},
    {"norm_position": "post", "parallel_residual": True},
    {"parallel_residual": True},
    {"position": "learned"},
    {"position": "sinusoidal"},
    {"position": "none"},
    {"feed_forward": "swiglu"},
    {"feed_forward": "relu2"},
    {"feed_forward_multiple": 2.7},
    {"bias": True},
    {"bias": False},
    {"bias": True, "feed_forward": "swiglu", "norm": "layernorm"},
    {"tie_embeddings": True},
    {"tie_embeddings": False},
    {"qk_norm": True},
    {"embedding_norm": True, "norm": "layernorm", "bias": True},
    {"n_kv_head": 1},
    {"n_kv_head": 2, "bias": True},
    {"norm_gain": False},
    {"norm_gain": False, "norm": "layernorm", "bias": True},
    {"qk_norm": True, "qk_gain": False},
    {"qk_norm": False, "qk_gain": True},
    {"ngram_embeddings": [2]},
    {"ngram_embeddings": [2, 3], "ngram_rows": 50},
    {"value_embeddings": 1},
    {"value_embeddings": 3, "n_kv_head": 2},
    {"value_residual": True},
    {"embedding_shortcut": True},
]


def section(**parts: Any) -> DecoderSection:
    return DecoderSection.model_validate({"n_layer": 2, "n_head": 4, "n_embd": 32, "context_length": 24, **parts})


@pytest.mark.parametrize("preset", DECODER_PRESETS)
def test_parameter_counts_match_the_model(preset: str) -> None:
    for parts, n_layer in itertools.product(PARTS, (1, 3)):
        model = section(preset=preset, n_layer=n_layer, **parts)
        counts = parameter_counts(model, 61)
        network = Transformer(model, 61)
        assert sum(counts.values()) == network.parameter_count(), parts
        matrices = sum(
            p.numel()
            for name, p in network.named_parameters()
            if p.ndim == 2 and name.startswith(("blocks.", "ngrams.projection")) and "embedding" not in name
        )
        assert counts["matrices"] == matrices


def test_gpt2_small_has_the_published_number_of_parameters() -> None:
    model = DecoderSection.model_validate({"preset": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "context_length": 1024})
    assert sum(parameter_counts(model, 50_257).values()) == 124_439_808


def test_flops_per_token_match_a_hand_calculation() -> None:
    model = section(preset="gpt2")
    weights = 2 * (4 * 32 * 32 + 2 * 32 * 128) + 61 * 32
    attended = 24 / 2  # on average, a causal position attends to half of the context
    # In each of 2 layers: scores and a weighted sum, with a multiplication and an addition per element.
    attention = 2 * (2 * attended * 32 + 2 * attended * 32)
    assert flops_per_token(model, 61) == 6 * weights + 3 * attention, "the backward pass costs twice the forward pass"

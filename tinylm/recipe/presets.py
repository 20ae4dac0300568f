"""The architectures a recipe can name. A preset is nothing but default values for the parts of `model:`."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # The default: what trains fastest at these sizes (rotary positions, QK-norm, ReLU squared, zero-initialised output
    # projections; see benchmarks/README.md for the evidence).
    "modern": {
        "norm": "rmsnorm",
        "norm_position": "pre",
        "norm_eps": 1e-6,
        "norm_gain": True,
        "position": "rope",
        "feed_forward": "relu2",
        "feed_forward_multiple": 4.0,
        "bias": False,
        "tie_embeddings": False,
        "qk_norm": True,
        "embedding_norm": True,
        "zero_init_outputs": True,
        "attention_dropout": 0.0,
    },
    # GPT-2 as Hugging Face's GPT2LMHeadModel computes it.
    "gpt2": {
        "norm": "layernorm",
        "norm_position": "pre",
        "norm_eps": 1e-5,
        "norm_gain": True,
        "position": "learned",
        "feed_forward": "gelu",
        "feed_forward_multiple": 4.0,
        "bias": True,
        "tie_embeddings": True,
        "qk_norm": False,
        "embedding_norm": False,
        "zero_init_outputs": False,
        "attention_dropout": None,
    },
    # Llama as Hugging Face's LlamaForCausalLM computes it.
    "llama": {
        "norm": "rmsnorm",
        "norm_position": "pre",
        "norm_eps": 1e-6,
        "norm_gain": True,
        "position": "rope",
        "feed_forward": "swiglu",
        "feed_forward_multiple": 8 / 3,
        "bias": False,
        "tie_embeddings": False,
        "qk_norm": False,
        "embedding_norm": False,
        "zero_init_outputs": False,
        "attention_dropout": None,
    },
}

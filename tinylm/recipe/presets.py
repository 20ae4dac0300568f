"""The presets of each architecture. A preset is a set of defaults for the other keys of `model:`."""

from __future__ import annotations

from typing import Any

DECODER_PRESETS: dict[str, dict[str, Any]] = {
    # The default. The measurements behind it are in docs/lab-notebook.md ("Ablation of `modern`").
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
    # The architecture of GPT2LMHeadModel in Hugging Face transformers.
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
    # The architecture of LlamaForCausalLM in Hugging Face transformers.
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

ENCODER_PRESETS: dict[str, dict[str, Any]] = {
    # The default, based on the decoder preset of the same name.
    "modern": {
        **DECODER_PRESETS["modern"],
        "tie_embeddings": False,
        "head_transform": False,
        "head_bias": False,
        "token_types": 0,
    },
    # The architecture of BertModel and BertForMaskedLM in Hugging Face transformers.
    "bert": {
        "norm": "layernorm",
        "norm_position": "post",
        "norm_eps": 1e-12,
        "norm_gain": True,
        "position": "learned",
        "feed_forward": "gelu_exact",
        "feed_forward_multiple": 4.0,
        "bias": True,
        "tie_embeddings": True,
        "qk_norm": False,
        "embedding_norm": True,
        "zero_init_outputs": False,
        "attention_dropout": None,
        "head_transform": True,
        "head_bias": True,
        "token_types": 2,
    },
}

ENCODER_DECODER_PRESETS: dict[str, dict[str, Any]] = {
    # The default, based on the decoder preset of the same name.
    "modern": {
        **DECODER_PRESETS["modern"],
        "tie_embeddings": "none",
        "head_bias": False,
        "scale_embeddings": False,
        "learned_start": True,
        "dropout": 0.1,
    },
    # The transformer of Vaswani et al. (2017), and the architecture of MarianMTModel in Hugging Face transformers.
    "transformer": {
        "norm": "layernorm",
        "norm_position": "post",
        "norm_eps": 1e-5,
        "norm_gain": True,
        "position": "sinusoidal",
        "feed_forward": "relu",
        "feed_forward_multiple": 4.0,
        "bias": True,
        "tie_embeddings": "all",
        "head_bias": False,
        "scale_embeddings": True,
        "learned_start": False,
        "qk_norm": False,
        "embedding_norm": False,
        "zero_init_outputs": False,
        "dropout": 0.1,
        "attention_dropout": 0.0,
    },
}

RECURRENT_ENCODER_DECODER_PRESETS: dict[str, dict[str, Any]] = {
    # Bahdanau et al. (2015): a bidirectional encoder, and a decoder with additive attention.
    "bahdanau": {"cell": "gru", "n_layer": 1, "encoder_direction": "both", "attention": "additive"},
    # Sutskever et al. (2014): the last state of an encoder that reads the reversed source is the first state of the decoder.
    "sutskever": {"cell": "lstm", "n_layer": 4, "encoder_direction": "backward", "attention": "none"},
}

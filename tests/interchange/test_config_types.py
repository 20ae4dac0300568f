"""A value of the wrong type or an absurd size in config.json produces a one-line error or a valid model."""

from __future__ import annotations

import copy
import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tinylm.errors import InputError
from tinylm.interchange import huggingface
from tinylm.interchange.hf_architectures import IMPORTED, import_state_dict, model_section_from_config
from tinylm.interchange.importing import import_model

SIZES = {"hidden_size": 32, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 320}
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE = {**ROPE, "original_max_position_embeddings": 16}
LLAMA = {
    **SIZES,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 48,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "rope_theta": 500.0,
    "rope_scaling": ROPE,
    "sliding_window": 8,
    "use_sliding_window": True,
}
GEMMA = {
    **{key: value for key, value in LLAMA.items() if key not in ("rope_scaling", "hidden_act")},
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 24,
    "final_logit_softcapping": 5.0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 32,
        "n_inner": 64,
        "n_positions": 48,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
    },
    "llama": LLAMA,
    "mistral": {**LLAMA, "rope_scaling": None},
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, "rope_parameters": {**ROPE, "rope_theta": 300.0}},
    "smollm3": {**LLAMA, "no_rope_layers": [0, 1], "no_rope_layer_interval": 4},
    "olmo2": LLAMA,
    "phi": {**SIZES, "partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5, "num_key_value_heads": 1, "hidden_act": "gelu_new"},
    "phi3": {**LLAMA, "rope_scaling": None, "partial_rotary_factor": 0.5},
    "gemma": GEMMA,
    "gemma2": {**GEMMA, "attn_logit_softcapping": 2.0},
    "gemma3_text": {
        **GEMMA,
        "rope_parameters": {"full_attention": {**ROPE, "rope_theta": 900.0}, "sliding_attention": {"rope_theta": 30.0}},
    },
    "gpt_neox": {**SIZES, "rotary_pct": 0.25, "rotary_emb_base": 100, "layer_norm_eps": 1e-5, "use_parallel_residual": True},
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 7,
        "intermediate_size": 40,
        "activation_function": "gelu_new",
    },
}
WRONG = (
    *(None, True, 0, -1, 1.5, 2**31 - 1, 10**400, 1e308, float("nan"), "x", "", "\ud800"),
    *([], [[]], ["x"], [0], [None], {}, {"a": 1}, [[["global"], 10**9]]),
)


def _paths(config: dict[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in config.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from _paths(value, (*prefix, key))


def test_every_supported_family_has_an_example() -> None:
    assert set(CONFIGS) == set(IMPORTED)
    for kind, config in CONFIGS.items():
        assert model_section_from_config({"model_type": kind, **config}, {}, "config.json").n_embd == 32


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_value_of_the_wrong_type_is_rejected_or_produces_a_valid_model(kind: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    errors = []
    for path in _paths(CONFIGS[kind]):
        for wrong in WRONG:
            config = copy.deepcopy({"model_type": kind, **CONFIGS[kind]})
            section = config
            for key in path[:-1]:
                section = section[key]
            section[path[-1]] = wrong
            try:
                model = model_section_from_config(config, {}, "config.json")
            except InputError as error:
                errors.append(str(error))
            else:
                assert not list(model.problems())
    assert all(error.startswith("config.json: ") and "\n" not in error and len(error) < 400 for error in errors)
    assert len(errors) > len(WRONG)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.mark.parametrize("kind", [None, True, 7, [], {}, ["gpt2"], "x" * 1000])
def test_an_unknown_model_type_is_rejected(kind: Any) -> None:
    with pytest.raises(InputError, match="unsupported model_type") as error:
        model_section_from_config({"model_type": kind}, {}, "config.json")
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("key", "size"), [("num_hidden_layers", 2_147_483_648), ("num_hidden_layers", 9_999), ("hidden_size", 1 << 20)]
)
def test_a_config_with_an_absurd_size_is_rejected_without_allocating_memory(
    key: str, size: int, tmp_path: Path, tokenizers: dict[str, Any]
) -> None:
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **LLAMA, key: size}))
    save_file(
        {"model.embed_tokens.weight": torch.zeros(320, 32), "model.norm.weight": torch.ones(32)}, tmp_path / "model.safetensors"
    )
    tokenizers["byte"].save(tmp_path / "tokenizer.json")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=r"must be at most|missing tensors|do not match"):
        import_model(tmp_path, tmp_path / "run")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"{", b"", b"[]", b"7", b"\xff\xfe", b'{"model_type": "gpt2", "n_layer": ' + b"9" * 5000 + b"}"]
)
def test_a_config_that_is_not_a_valid_json_object_is_rejected(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json: "):
        huggingface.read(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no named pipes")
def test_a_named_pipe_in_place_of_the_config_is_rejected(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(InputError, match="is not a file"):
        huggingface.read(tmp_path)


@pytest.mark.parametrize(
    "index", [b"[", b"[]", b"{}", b'{"weight_map": 5}', b'{"weight_map": {"a": 5}}', b'{"weight_map": {"a": "../b"}}']
)
def test_an_invalid_shard_index_is_rejected(index: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **LLAMA}))
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(InputError, match=r"invalid index|outside the folder"):
        huggingface.read(tmp_path)


def test_a_scalar_in_place_of_a_matrix_is_rejected() -> None:
    model = model_section_from_config({"model_type": "gpt_neox", **CONFIGS["gpt_neox"]}, {}, "config.json")
    with pytest.raises(InputError, match="missing tensors"):
        import_state_dict({"gpt_neox.embed_in.weight": torch.tensor(1.0)}, model, "gpt_neox", "folder")

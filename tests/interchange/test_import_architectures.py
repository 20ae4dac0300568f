"""tinylm imports a tiny random model of every supported transformers architecture and computes the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from interchange.test_huggingface import LLAMA, load_network, random_model, train_bpe
from untrained_runs import CONTEXT

from tinylm.errors import InputError
from tinylm.generation.engine import generate
from tinylm.generation.sampling import SamplingOptions
from tinylm.interchange import huggingface, verify
from tinylm.interchange.exporting import export
from tinylm.interchange.importing import import_model
from tinylm.run import Run

transformers = pytest.importorskip("transformers", minversion="5")


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 700.0, **values}}


def llama(**values: Any) -> Any:
    return transformers.LlamaConfig(**{**LLAMA, **values})


NEOX = {
    "hidden_size": 32,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": CONTEXT,
    "vocab_size": 320,
}
GPT_NEO = {
    "hidden_size": 32,
    "num_layers": 4,
    "num_heads": 4,
    "max_position_embeddings": CONTEXT,
    "vocab_size": 320,
    "attention_types": [[["global", "local"], 2]],
    "window_size": 7,
}
GEMMA = {**LLAMA, "head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 24, "num_hidden_layers": 3}
CONFIGS: dict[str, Any] = {
    "llama, linear": lambda: llama(**rope("linear", factor=3.0)),
    "llama, llama3": lambda: llama(
        **rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
    ),
    "llama, yarn": lambda: llama(**rope("yarn", factor=4.0, original_max_position_embeddings=12), head_dim=16),
    "llama, yarn with all settings": lambda: llama(
        **rope(
            "yarn",
            factor=2.0,
            original_max_position_embeddings=24,
            beta_fast=16.0,
            beta_slow=2.0,
            attention_factor=1.3,
            truncate=False,
        ),
        head_dim=32,
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**NEOX),
    "gpt_neox, half rotated": lambda: transformers.GPTNeoXConfig(
        **NEOX, use_parallel_residual=False, rotary_pct=0.5, hidden_act="gelu_new", tie_word_embeddings=True
    ),
    "gpt_neox without attention bias": lambda: transformers.GPTNeoXConfig(**NEOX, rotary_pct=1.0, attention_bias=False),
    "gpt_neo": lambda: transformers.GPTNeoConfig(**GPT_NEO),
    "gpt_neo, global": lambda: transformers.GPTNeoConfig(
        **{**GPT_NEO, "attention_types": [[["global"], 4]], "intermediate_size": 40, "activation_function": "relu"}
    ),
    "smollm3": lambda: transformers.SmolLM3Config(**{**LLAMA, "num_hidden_layers": 5}, pad_token_id=0),
    "smollm3, other blocks": lambda: transformers.SmolLM3Config(**LLAMA, no_rope_layers=[0, 1], pad_token_id=0),
    "olmo2": lambda: transformers.Olmo2Config(**LLAMA),
    "phi": lambda: transformers.PhiConfig(**LLAMA),
    "phi, tied": lambda: transformers.PhiConfig(
        **{**LLAMA, "num_attention_heads": 2}, tie_word_embeddings=True, partial_rotary_factor=0.25, hidden_act="gelu"
    ),
    "phi3": lambda: transformers.Phi3Config(**LLAMA, sliding_window=9, pad_token_id=0),
    "phi3, half rotated": lambda: transformers.Phi3Config(
        **LLAMA, rope_parameters={"rope_type": "default", "rope_theta": 700.0, "partial_rotary_factor": 0.5}, pad_token_id=0
    ),
    "gemma": lambda: transformers.GemmaConfig(**LLAMA, head_dim=16),
    "gemma2": lambda: transformers.Gemma2Config(**GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=5.0),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(
        **GEMMA, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "gemma3_text, linear": lambda: transformers.Gemma3TextConfig(
        **GEMMA,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 900.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
        },
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
}


def save(folder: Path, config: Any, english: str) -> Any:
    other = random_model(config)
    with huggingface.quiet(transformers):
        other.save_pretrained(folder)
    train_bpe(english).save(str(folder / "tokenizer.json"))
    return other


def write_as_transformers_4(folder: Path) -> None:
    """Rewrite the rotary settings in config.json in the format of transformers 4."""
    config = json.loads((folder / "config.json").read_text())
    parameters = config.pop("rope_parameters", None) or {}
    theta, fraction = parameters.pop("rope_theta", None), parameters.pop("partial_rotary_factor", None)
    if config["model_type"] == "gpt_neox":
        config |= {"rotary_emb_base": theta, "rotary_pct": fraction}
    elif theta is not None:
        config |= {"rope_theta": theta, "rope_scaling": parameters if parameters.get("rope_type", "default") != "default" else None}
        config |= {} if fraction is None else {"partial_rotary_factor": fraction}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", CONFIGS)
def test_an_imported_model_matches_transformers_and_can_be_exported_again(name: str, tmp_path: Path, english: str) -> None:
    other = save(tmp_path / "theirs", CONFIGS[name](), english)
    result = import_model(tmp_path / "theirs", tmp_path / "run")
    assert result.largest_difference is not None
    assert result.largest_difference <= 1e-4
    run = Run.open(tmp_path / "run")
    network = load_network(run)
    rows = verify.windows(run.tokenizer.encode(english[:3000]), CONTEXT)
    assert rows.shape[1] > 16
    assert verify.largest_difference(network, lambda ids: other(ids).logits, rows) <= 1e-4
    if "rope_parameters" in json.loads((tmp_path / "theirs" / "config.json").read_text()) and "gemma3" not in name:
        write_as_transformers_4(tmp_path / "theirs")
        import_model(tmp_path / "theirs", tmp_path / "older")
        assert load_network(Run.open(tmp_path / "older")).model == network.model
    greedy = generate(network, run.tokenizer, "The for statement", SamplingOptions(8, 0.0, None))[0]
    ids = torch.tensor([run.tokenizer.encode("The for statement")])
    with torch.no_grad():
        steps = verify.greedy(lambda ids: other(ids).logits, ids, 8)
    assert greedy.text == run.tokenizer.decode(steps)[: len(greedy.text)]
    assert export(run, "hf", tmp_path / "out").largest_difference <= 1e-4


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama, linear", rope("longrope", factor=2.0), "RoPE scaling type 'longrope' is not supported"),
        (
            "llama, yarn",
            rope("yarn", factor=2.0, mscale=0.7, mscale_all_dim=1.0),
            "yarn with mscale, mscale_all_dim is not supported",
        ),
        ("gpt_neox", {"hidden_act": "silu"}, "activation 'silu' is not supported"),
        ("gpt_neo", {"attention_types": [[["global"], 3]]}, "invalid attention_types"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm True is not supported"),
        ("gemma", {"hidden_activation": "relu"}, "activation 'relu' is not supported"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation 'gelu' is not supported"),
        (
            "olmo2",
            {"model_type": "olmo3"},
            "unsupported model_type 'olmo3' .*olmo2, phi3, gemma, gemma2, gemma3_text, gpt_neox, gpt_neo",
        ),
    ],
)
def test_unsupported_variants_are_rejected(name: str, changes: dict[str, Any], message: str, tmp_path: Path, english: str) -> None:
    save(tmp_path / "theirs", CONFIGS[name](), english)
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(InputError, match=message):
        import_model(tmp_path / "theirs", tmp_path / "run")
    assert not (tmp_path / "run").exists()

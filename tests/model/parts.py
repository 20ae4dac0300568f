"""Test cases for every key in `model:`, shared by the tests for the transformer, decoding, export and cost estimates.

A case is a set of overrides. A boolean key or a key with fixed choices has one case for each non-default value. Every other key
has one case, with its value from `VALUES`.
"""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

import torch
from tiny import PRESETS, VOCAB_SIZE, add_noise_, ids, section

from tinylm.model.state import DecodingModel
from tinylm.model.transformer import Transformer
from tinylm.recipe.schema import DecoderSection

VALUES: dict[str, Any] = {
    "n_layer": 3,
    "n_head": 2,
    "n_kv_head": 2,
    "n_embd": 48,
    "head_dim": 6,
    "context_length": 20,
    "norm_eps": 0.1,
    "rope_theta": 500.0,
    "rope_theta_local": 50.0,
    "rope_scaling": {"type": "llama3", "factor": 4.0, "original_context": 8},
    "rope_fraction": 0.5,
    "rope_pattern": ["none", "rope"],
    "feed_forward_multiple": 2.0,
    "n_inner": 40,
    "attention_window": 4,
    "attention_pattern": ["local", "global"],
    "ngram_embeddings": [2, 4],
    "ngram_rows": 97,
    "ngram_width": 8,
    "ngram_dropout": 0.1,
    "value_embeddings": 1,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "attention_softcap": 2.0,
    "shifted_key_heads": 1,
    "logit_softcap": 3.0,
    "embedding_scale": 3.0,
    "init_embeddings": "vectors.txt",
    "init_from": {"run": "runs/other"},
}
"""One value for each key that is neither boolean nor limited to fixed choices."""

NEEDS: dict[str, dict[str, Any]] = {
    "attention_pattern": {"attention_window": 3},
    "rope_theta": {"position": "rope"},
    "rope_theta_local": {"position": "rope", "attention_window": 3, "attention_pattern": ["local", "global"]},
    "rope_scaling": {"position": "rope"},
    "rope_fraction": {"position": "rope"},
    "rope_pattern": {"position": "rope"},
    "qk_norm_joint": {"qk_norm": True},
    "qk_gain": {"qk_norm": True},
    "ngram_rows": {"ngram_embeddings": [2]},
    "ngram_width": {"ngram_embeddings": [2]},
    "ngram_dropout": {"ngram_embeddings": [2]},
    "freeze_embeddings": {"init_embeddings": "vectors.txt", "tie_embeddings": False},
}
"""For each key that depends on other keys, the overrides that make it valid and effective."""


def _values(key: str) -> list[Any]:
    field = DecoderSection.model_fields[key]
    if get_origin(field.annotation) is Literal:
        return [value for value in get_args(field.annotation) if value != field.default or key == "preset"]
    if field.annotation is bool:
        return [value for value in (True, False) if value is not field.default]
    return [VALUES[key]]


KEYS = tuple(key for key in DecoderSection.model_fields if key != "architecture")
CASES: list[dict[str, Any]] = [{key: value, **NEEDS.get(key, {})} for key in KEYS for value in _values(key)]
"""The first key of each case is the key under test. A schema key that is missing from `VALUES` raises `KeyError` here."""


def case_section(case: dict[str, Any], preset: str) -> DecoderSection:
    """Return the model section of a case. `preset` applies unless the case sets its own."""
    return section(**{"preset": preset, **case})


def case_network(case: dict[str, Any], preset: str) -> Transformer:
    """Return a network for a case in eval mode, with noise added to its initial weights."""
    return add_noise_(Transformer(case_section(case, preset), VOCAB_SIZE)).eval()


def cases_and_presets() -> list[tuple[str, dict[str, Any]]]:
    """Return every combination of a preset and a case, except those that describe the same model as an earlier one."""
    models = {
        repr(case_section(case, preset).model_dump(exclude={"preset"})): (preset, case)
        for case in reversed(CASES)
        for preset in reversed(PRESETS)
    }
    return list(reversed(models.values()))


def assert_decoding_matches_full_passes(network: Transformer, decoder: DecodingModel[Any]) -> None:
    """Check that prefill and decode steps match full forward passes for rows of different lengths. Call this in inference mode."""
    tokens, starts = ids(3, 16), (5, 3, 8)
    full_pass = network(tokens)
    cache = decoder.new_state(3)
    for row, start in enumerate(starts):
        torch.testing.assert_close(
            decoder.prefill(cache, row, tokens[row, :start]), full_pass[row, start - 1], atol=3e-5, rtol=1e-5
        )
    for step in range(8):
        logits = decoder.step(cache, torch.stack([tokens[row, start + step] for row, start in enumerate(starts)]))
        expected = torch.stack([full_pass[row, start + step] for row, start in enumerate(starts)])
        torch.testing.assert_close(logits, expected, atol=3e-5, rtol=1e-5)

"""Decoding token by token returns the same logits as a full forward pass, for every `model:` key."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model.parts import assert_decoding_matches_full_passes, case_network, cases_and_presets
from tiny import PRESETS, ids, model
from torch import nn

from tinylm.model.decoder import Decoder, as_decoder
from tinylm.model.packed import WEIGHT_KINDS, Int8Linear, WeightKind, pack

SETTINGS: list[dict[str, Any]] = [
    {},
    {"n_kv_head": 2},
    {"ngram_embeddings": [2, 4], "ngram_rows": 97},
    {"value_embeddings": 1, "value_residual": True},
    {"embedding_shortcut": True, "logit_softcap": 3.0},
    {"norm_gain": False, "qk_gain": False},
    {"norm_position": "post"},
    {"parallel_residual": True},
    {"parallel_residual": True, "norm_position": "post"},
    {"position": "sinusoidal"},
    {"position": "none"},
    {"feed_forward": "relu"},
    {"feed_forward": "gelu_exact", "n_inner": 40},
    {"head_dim": 6},
]


@pytest.mark.parametrize("overrides", SETTINGS, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
@torch.inference_mode()
def test_steps_match_a_full_pass_for_rows_of_different_lengths(preset: str, overrides: dict[str, Any]) -> None:
    network = model(preset, **overrides)
    assert_decoding_matches_full_passes(network, Decoder(network))


@pytest.mark.parametrize(("preset", "case"), cases_and_presets(), ids=str)
@torch.inference_mode()
def test_steps_match_a_full_pass_for_every_model_key(preset: str, case: dict[str, Any]) -> None:
    network = case_network(case, preset)
    assert_decoding_matches_full_passes(network, as_decoder(network))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
@torch.inference_mode()
def test_rows_can_be_copied_reordered_and_dropped(preset: str, compiled: bool) -> None:
    network, tokens = model(preset, ngram_embeddings=[2, 3], ngram_rows=97), ids(4, 16)
    decoder = Decoder(network, compiled=compiled)
    cache = decoder.new_state(4)
    decoder.prefill(cache, 0, tokens[0, :6])
    cache.fork(0, range(1, 4))
    continuations = tokens[:, 6:9]
    for step in range(2):
        decoder.step(cache, continuations[:, step])
    cache.reorder([3], [1])
    cache.resize(2)
    logits = decoder.step(cache, continuations[[0, 3], 2])
    full = torch.cat((tokens[:1, :6].expand(4, -1), continuations), dim=1)
    torch.testing.assert_close(logits, network(full)[[0, 3], -1], atol=3e-5, rtol=1e-5)
    assert cache.lengths == [9, 9]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
@torch.inference_mode()
def test_evicting_clears_a_row_and_returns_how_many_tokens_to_prefill_again(preset: str, compiled: bool) -> None:
    network, tokens = model(preset), ids(2, 17)
    decoder = Decoder(network, compiled=compiled)
    state = decoder.new_state(2)
    decoder.prefill(state, 0, tokens[0, :16])
    decoder.prefill(state, 1, tokens[1, :9])
    assert state.lengths[0] == state.capacity == decoder.capacity == 16
    assert state.evict(0, 7) == 7
    assert state.lengths == [0, 9]
    decoder.prefill(state, 0, tokens[0, 9:16])
    logits = decoder.step(state, tokens[[0, 1], [16, 9]])
    expected = torch.stack([network(tokens[:1, 9:])[0, -1], network(tokens[1:, :10])[0, -1]])
    torch.testing.assert_close(logits, expected, atol=3e-5, rtol=1e-5)


def test_a_state_reserves_no_more_than_the_context_length() -> None:
    decoder = Decoder(model("modern"))
    assert [decoder.new_state(1, max_tokens).capacity for max_tokens in (None, 5, 16, 99)] == [16, 5, 16, 16]


@torch.inference_mode()
def test_torch_compile_receives_static_shapes_for_any_number_of_active_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace `torch.compile`, which takes a minute, with a wrapper that records the input shapes."""
    shapes = set()

    def record_shapes(function: Any, **options: Any) -> Any:
        def recorded(layers: Any, cached_tokens: Any, tokens: Any, positions: Any, kv_length: int, same_length: bool) -> Any:
            shapes.add((layers[0].keys.shape, tokens.shape, positions.shape, kv_length, same_length))
            return function(layers, cached_tokens, tokens, positions, kv_length, same_length)

        return recorded

    monkeypatch.setattr(torch, "compile", record_shapes)
    network, tokens = model("modern", ngram_embeddings=[2, 3], ngram_rows=97), ids(3, 16)
    compiled, plain = Decoder(network, compiled=True, backend="torch"), Decoder(network)
    caches = [decoder.new_state(3) for decoder in (compiled, plain)]
    for rows in (1, 3, 2):
        logits = []
        for decoder, cache in zip((compiled, plain), caches, strict=True):
            cache.resize(rows)
            for row in range(rows):
                decoder.prefill(cache, row, tokens[row, : 4 + row])
            logits += [decoder.step(cache, tokens[:rows, 9]), decoder.step(cache, tokens[:rows, 10])]
        torch.testing.assert_close(logits[:2], logits[2:], atol=2e-5, rtol=1e-5)
    assert len(shapes) == 1


@pytest.mark.parametrize("weights", WEIGHT_KINDS)
@pytest.mark.parametrize("preset", PRESETS)
@torch.inference_mode()
def test_a_packed_model_matches_the_original_within_its_precision(preset: str, weights: WeightKind) -> None:
    network, tokens = model(preset), ids(2, 12)
    packed, plain = pack(network, weights), network(tokens)
    tolerance = {"fp32": 1e-5, "bf16": 0.05, "int8": 0.15}[weights]
    assert (packed(tokens) - plain).abs().max() < tolerance * plain.std()
    assert torch.equal(network(tokens), plain), "packing must not change the network"
    assert packed.embedding.weight is network.embedding.weight
    cache = (decoder := Decoder(network, weights=weights)).new_state(2)
    for row in range(2):
        decoder.prefill(cache, row, tokens[row, :11])
    assert (decoder.step(cache, tokens[:, 11]) - plain[:, -1]).abs().max() < tolerance * plain.std()


@pytest.mark.parametrize("inputs", [8, 16, 30, 88, 100])
@pytest.mark.parametrize("outputs", [1, 7, 61])
@pytest.mark.parametrize("rows", [1, 4, 5, 70])
def test_int8_weights_are_accurate_to_half_a_quantization_step(inputs: int, outputs: int, rows: int) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(inputs, outputs), torch.randn(rows, inputs)
    packed = Int8Linear(linear)
    quantized, scale = packed.weight[:, :inputs].double(), packed.scale.double()[:, None]
    assert ((quantized * scale - linear.weight.double()).abs() <= 0.5 * scale * 1.02).all()
    exact = x.double() @ (quantized * scale).T + linear.bias.detach().double()
    torch.testing.assert_close(packed(x).double(), exact, atol=0.02 * float(exact.abs().max()), rtol=0)


def test_packing_to_int8_replaces_every_linear_layer() -> None:
    network = model("gpt2")
    packed = pack(network, "int8")
    int8 = sum(module.weight.numel() for module in packed.modules() if isinstance(module, Int8Linear))
    assert int8 == sum(module.weight.numel() for module in network.modules() if isinstance(module, nn.Linear))
    assert not any(type(module) is nn.Linear for module in packed.modules())

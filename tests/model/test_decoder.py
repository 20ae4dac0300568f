"""Decoding one token at a time gives the numbers of reading everything at once, for every part a recipe can name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import PRESETS, VOCABULARY, ids, model
from torch import nn

from tinylm.model.decoder import Decoder
from tinylm.model.packed import WEIGHT_KINDS, Int8Linear, WeightKind, pack

KINDS: list[dict[str, Any]] = [
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


@pytest.mark.parametrize("parts", KINDS, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
@torch.inference_mode()
def test_a_step_gives_the_logits_of_reading_at_once_in_rows_at_different_places(preset: str, parts: dict[str, Any]) -> None:
    network, tokens, starts = model(preset, **parts), ids(3, 16), (5, 3, 8)
    decoder, whole = Decoder(network), network(tokens)
    cache = decoder.cache(3)
    for row, start in enumerate(starts):
        torch.testing.assert_close(decoder.read(cache, row, tokens[row, :start]), whole[row, start - 1], atol=3e-5, rtol=1e-5)
    for step in range(8):
        logits = decoder.step(cache, torch.stack([tokens[row, start + step] for row, start in enumerate(starts)]))
        expected = torch.stack([whole[row, start + step] for row, start in enumerate(starts)])
        torch.testing.assert_close(logits, expected, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
@torch.inference_mode()
def test_rows_can_be_shared_moved_and_left_out(preset: str, compiled: bool) -> None:
    if compiled:
        pytest.importorskip("numba", reason="needs tinylm[fast]")
    network, tokens = model(preset, ngram_embeddings=[2, 3], ngram_rows=97), ids(4, 16)
    decoder = Decoder(network, compiled=compiled)
    cache = decoder.cache(4)
    decoder.read(cache, 0, tokens[0, :6])
    cache.share(0, range(1, 4))
    more = tokens[:, 6:9]
    for step in range(2):
        decoder.step(cache, more[:, step])
    cache.take([3], [1])
    cache.use(2)
    logits = decoder.step(cache, more[[0, 3], 2])
    read = torch.cat((tokens[:1, :6].expand(4, -1), more), dim=1)
    torch.testing.assert_close(logits, network(read)[[0, 3], -1], atol=3e-5, rtol=1e-5)
    assert cache.lengths == [9, 9]


@torch.inference_mode()
def test_what_is_compiled_sees_one_shape_whichever_rows_are_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler itself takes a minute; here it hands the function back and notes what it is given."""
    shapes = set()

    def compiler(function: Any, **options: Any) -> Any:
        def called(stored: Any, read: Any, tokens: Any, positions: Any, span: int, even: bool) -> Any:
            shapes.add((stored[0].keys.shape, tokens.shape, positions.shape, span, even))
            return function(stored, read, tokens, positions, span, even)

        return called

    monkeypatch.setattr(torch, "compile", compiler)
    network, tokens = model("modern", ngram_embeddings=[2, 3], ngram_rows=97), ids(3, 16)
    decoder, plain = Decoder(network), Decoder(network)
    monkeypatch.setattr(decoder, "_compiled", True)  # as on a GPU: a CPU has machine code instead
    decoder._look_up()
    caches = [one.cache(3) for one in (decoder, plain)]
    for rows in (1, 3, 2):
        found = []
        for one, cache in zip((decoder, plain), caches, strict=True):
            cache.use(rows)
            for row in range(rows):
                one.read(cache, row, tokens[row, : 4 + row])
            found += [one.step(cache, tokens[:rows, 9]), one.step(cache, tokens[:rows, 10])]
        torch.testing.assert_close(found[:2], found[2:], atol=2e-5, rtol=1e-5)
    assert len(shapes) == 1


@pytest.mark.parametrize("weights", WEIGHT_KINDS)
@pytest.mark.parametrize("preset", PRESETS)
@torch.inference_mode()
def test_packed_weights_are_the_same_model_within_their_precision(preset: str, weights: WeightKind) -> None:
    network, tokens = model(preset), ids(2, 12)
    packed, plain = pack(network, weights), network(tokens)
    bound = {"fp32": 1e-5, "bf16": 0.05, "int8": 0.15}[weights]
    assert (packed(tokens) - plain).abs().max() < bound * plain.std()
    assert torch.equal(network(tokens), plain), "the network itself stays as it was"
    assert packed.embedding.weight is network.embedding.weight
    cache = (decoder := Decoder(network, weights=weights)).cache(2)
    for row in range(2):
        decoder.read(cache, row, tokens[row, :11])
    assert (decoder.step(cache, tokens[:, 11]) - plain[:, -1]).abs().max() < bound * plain.std()


@pytest.mark.parametrize("inputs", [8, 16, 30, 88, 100])
@pytest.mark.parametrize("outputs", [1, 7, 61])
@pytest.mark.parametrize("rows", [1, 4, 5, 70])
def test_int8_multiplies_by_weights_that_are_off_by_half_a_step_at_most(inputs: int, outputs: int, rows: int) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(inputs, outputs), torch.randn(rows, inputs)
    packed = Int8Linear(linear)
    steps, scale = packed.weight[:, :inputs].double(), packed.scale.double()[:, None]
    assert ((steps * scale - linear.weight.double()).abs() <= 0.5 * scale * 1.02).all()
    exact = x.double() @ (steps * scale).T + linear.bias.double()
    torch.testing.assert_close(packed(x).double(), exact, atol=0.02 * float(exact.abs().max()), rtol=0)


def test_packing_shares_what_it_can_and_holds_a_quarter_of_the_rest() -> None:
    network = model("gpt2", vocabulary=VOCABULARY)
    packed = pack(network, "int8")
    int8 = sum(module.weight.numel() for module in packed.modules() if isinstance(module, Int8Linear))
    assert int8 == sum(module.weight.numel() for module in network.modules() if isinstance(module, nn.Linear))
    assert not any(type(module) is nn.Linear for module in packed.modules())

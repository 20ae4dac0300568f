"""The decoder's step as machine code: the same model, the same bits whatever stands beside a row, and clear words without numba."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import PRESETS, VOCABULARY, ids, model
from torch import Tensor

from tinylm.errors import InputError
from tinylm.model import compiled
from tinylm.model.decoder import Decoder, prepared
from tinylm.model.packed import WEIGHT_KINDS, WeightKind
from tinylm.model.transformer import Transformer
from tinylm.reporting import Reporter

PARTS: list[dict[str, Any]] = [
    {},
    {"n_kv_head": 2},
    {"ngram_embeddings": [2, 4], "ngram_rows": 97},
    {"logit_softcap": 3.0},
    {"norm_gain": False, "qk_gain": False},
    {"norm": "layernorm", "bias": True, "qk_norm": True},
    {"position": "sinusoidal"},
    {"position": "learned", "embedding_norm": True},
    {"position": "none"},
    {"feed_forward": "relu"},
    {"feed_forward": "swiglu", "n_inner": 40},
    {"head_dim": 6},
    {"n_embd": 96, "n_inner": 200},
]


@pytest.fixture
def several_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So small a step is otherwise one thread's."""
    monkeypatch.setattr(compiled, "_PRODUCTS", 1)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
@torch.inference_mode()
def test_a_step_gives_the_logits_of_reading_at_once_in_rows_at_different_places(preset: str, parts: dict[str, Any]) -> None:
    network, tokens, starts = model(preset, **parts), ids(3, 16), (5, 3, 8)
    decoder, whole = Decoder(network, compiled=True), network(tokens)
    cache = decoder.cache(3)
    for row, start in enumerate(starts):
        torch.testing.assert_close(decoder.read(cache, row, tokens[row, :start]), whole[row, start - 1], atol=3e-5, rtol=1e-5)
    for step in range(8):
        logits = decoder.step(cache, torch.stack([tokens[row, start + step] for row, start in enumerate(starts)]))
        expected = torch.stack([whole[row, start + step] for row, start in enumerate(starts)])
        torch.testing.assert_close(logits, expected, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("length", [1, 2, 9, 31, 32, 33, 60])
@torch.inference_mode()
def test_prompts_short_and_long_are_read_as_what_they_are(preset: str, length: int, several_threads: None) -> None:
    """Into the middle row, after another text stood there; the rows beside it stay as they were."""
    torch.set_num_threads(2)
    network, tokens = model(preset, context_length=64, ngram_embeddings=[2, 3], ngram_rows=97), ids(4, 64)
    decoder, whole = Decoder(network, compiled=True), network(tokens)
    cache = decoder.cache(3)
    for row in (0, 1, 2):
        decoder.read(cache, row, tokens[row, :5])
    torch.testing.assert_close(decoder.read(cache, 1, tokens[3, :length]), whole[3, length - 1], atol=3e-5, rtol=1e-5)
    assert cache.lengths == [5, length, 5]
    logits = decoder.step(cache, torch.stack([tokens[0, 5], tokens[3, length], tokens[2, 5]]))
    torch.testing.assert_close(logits, torch.stack([whole[0, 5], whole[3, length], whole[2, 5]]), atol=3e-5, rtol=1e-5)


def _after_five_steps(decoder: Decoder, tokens: Tensor, chosen: list[int], threads: int = 1) -> Tensor:
    """The logits of some of the rows, which are written together from places of their own. One thread reads the prompts."""
    cache = decoder.cache(len(chosen))
    torch.set_num_threads(1)
    for row, which in enumerate(chosen):
        decoder.read(cache, row, tokens[which, : 1 + which % 7])
    torch.set_num_threads(threads)
    for step in range(5):
        logits = decoder.step(cache, torch.stack([tokens[which, 1 + which % 7 + step] for which in chosen]))
    return logits


@pytest.mark.parametrize("weights", WEIGHT_KINDS)
@pytest.mark.parametrize("preset", PRESETS)
@torch.inference_mode()
def test_no_row_beside_it_and_no_thread_changes_a_bit(preset: str, weights: WeightKind, several_threads: None) -> None:
    network, tokens = model(preset, n_embd=96, n_inner=200, ngram_embeddings=[2], ngram_rows=97), ids(21, 16)
    decoder = Decoder(network, weights=weights, compiled=True)
    alone = torch.cat([_after_five_steps(decoder, tokens, [row]) for row in range(21)])
    for rows in (2, 4, 5, 8, 9, 12, 13, 21):
        for threads in (1, 2, 3):
            together = _after_five_steps(decoder, tokens, list(range(rows)), threads)
            assert torch.equal(together, alone[:rows]), (rows, threads)


@torch.inference_mode()
def test_without_a_library_of_threads_one_does_it(monkeypatch: pytest.MonkeyPatch, several_threads: None) -> None:
    tokens, decoder = ids(3, 16), Decoder(model("llama"), compiled=True)
    expected = _after_five_steps(decoder, tokens, [0, 1, 2], 2)
    monkeypatch.setattr(compiled, "_team", lambda: None)
    assert torch.equal(_after_five_steps(decoder, tokens, [0, 1, 2], 2), expected)


@torch.inference_mode()
def test_what_lies_outside_is_refused_before_it_is_touched() -> None:
    decoder = Decoder(model(), compiled=True)
    cache = decoder.cache(1)
    for wrong in ([3, VOCABULARY], [-1], list(range(17))):
        with pytest.raises((IndexError, RuntimeError)):
            decoder.read(cache, 0, wrong)
    decoder.read(cache, 0, list(range(16)))
    with pytest.raises(IndexError):
        decoder.step(cache, torch.tensor([1]))


@pytest.mark.parametrize("weights", ["bf16", "int8"])
@pytest.mark.parametrize("preset", PRESETS)
@torch.inference_mode()
def test_packed_weights_are_multiplied_as_what_they_stand_for(preset: str, weights: WeightKind) -> None:
    """Nearer to the rounded weights than a step whose inputs are rounded too: as a network with these very weights."""
    network, tokens = model(preset), ids(2, 12)
    decoder = Decoder(network, weights=weights, compiled=True)
    rounded = model(preset, tie_embeddings=False)
    rounded.load_state_dict({**network.state_dict(), "head.weight": network.head.weight})
    for plain, packed in zip(_linear_layers(rounded), _linear_layers(decoder.network), strict=True):
        scale = packed.scale.float()[:, None] if weights == "int8" else 1.0
        plain.weight.copy_(packed.weight[:, : plain.in_features].float() * scale)
    expected = _after_five_steps(Decoder(rounded, compiled=True), tokens, [0, 1])
    torch.testing.assert_close(_after_five_steps(decoder, tokens, [0, 1]), expected, atol=3e-5, rtol=1e-5)


def _linear_layers(network: Transformer) -> list[Any]:
    names = ("attention.qkv", "attention.output", "feed_forward.input", "feed_forward.output")
    return [block.get_submodule(name) for block in network.blocks for name in names] + [network.head]


@pytest.mark.parametrize(
    "parts",
    [
        {"norm_position": "post"},
        {"parallel_residual": True},
        {"value_embeddings": 1},
        {"value_residual": True},
        {"embedding_shortcut": True},
        {"feed_forward": "gelu_exact"},
    ],
    ids=str,
)
def test_parts_that_are_not_known_are_named_and_never_pay(parts: dict[str, Any]) -> None:
    network = model(**parts)
    with pytest.raises(InputError, match=f"{next(iter(parts))}.*--compile|--compile.*{next(iter(parts))}"):
        Decoder(network, compiled=True)
    assert not compiled.pays(network, None)


def test_compiling_pays_where_much_is_to_be_written() -> None:
    network = model()
    assert compiled.pays(network, None)
    assert compiled.pays(network, 10_000)
    assert not compiled.pays(network, 50)


def test_numba_is_only_missed_by_who_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tinylm.model.kernels", None)
    monkeypatch.delattr("tinylm.model.kernels", raising=False)
    monkeypatch.setattr(compiled, "find_spec", lambda name: None)
    network, reporter = model(), Reporter()
    assert not prepared(network, weights="fp32", compiled=None, steps=None, reporter=reporter).is_machine_code
    with pytest.raises(InputError, match=r"tinylm\[fast\]"):
        prepared(network, weights="fp32", compiled=True, steps=1, reporter=reporter)


def test_a_wait_for_the_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    compiled.load(told.append)
    assert not told, "it was compiled before, by the tests above at the latest"
    monkeypatch.setattr(compiled, "_PATIENCE", 0.01)
    monkeypatch.setattr(compiled.kernels(), "entry", lambda: time.sleep(0.3))
    compiled.load(told.append)
    assert ["compiling" in text for text in told] == [True]

"""Numba-compiled decoding: logits are correct and bit-identical for any batch size and thread count."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from model.parts import assert_decoding_matches_full_passes, case_network, cases_and_presets
from tiny import PRESETS, VOCAB_SIZE, ids, model
from torch import Tensor

from tinylm.errors import InputError
from tinylm.model import compiled
from tinylm.model.compiled import CompiledStep
from tinylm.model.decoder import Decoder, make_decoder, should_compile_for_later
from tinylm.model.packed import WEIGHT_KINDS, WeightKind, round_to_bfloat16
from tinylm.model.step_records import DECODING_STEP
from tinylm.model.transformer import Transformer
from tinylm.native import NativeFunction
from tinylm.recipe.support import unsupported
from tinylm.reporting import SILENT

SETTINGS: list[dict[str, Any]] = [
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


@pytest.fixture(scope="module", autouse=True)
def _compiled_code() -> None:
    """Compile the code once, so that it is on disk."""
    DECODING_STEP.compile()


@pytest.fixture
def several_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use several threads even for tiny models."""
    monkeypatch.setattr(compiled, "MIN_PRODUCTS_PER_THREAD", 1)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("overrides", SETTINGS, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
@torch.inference_mode()
def test_steps_match_a_full_pass_for_rows_of_different_lengths(preset: str, overrides: dict[str, Any]) -> None:
    network = model(preset, **overrides)
    assert_decoding_matches_full_passes(network, Decoder(network, compiled=True))


@pytest.mark.parametrize(("preset", "case"), cases_and_presets(), ids=str)
@torch.inference_mode()
def test_every_model_key_is_either_supported_or_rejected(preset: str, case: dict[str, Any]) -> None:
    network = case_network(case, preset)
    if unsupported(network.model, compiled.SUPPORTS):
        with pytest.raises(InputError, match="is not supported by compiled decoding"):
            Decoder(network, compiled=True)
        assert not compiled.is_worthwhile(network, None)
    else:
        assert_decoding_matches_full_passes(network, Decoder(network, compiled=True))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("length", [1, 2, 9, 31, 32, 33, 60])
@torch.inference_mode()
def test_prefill_matches_a_full_pass_for_short_and_long_prompts(preset: str, length: int, several_threads: None) -> None:
    """The prompt replaces the middle row. The other rows must not change."""
    torch.set_num_threads(2)
    network, tokens = model(preset, context_length=64, ngram_embeddings=[2, 3], ngram_rows=97), ids(4, 64)
    decoder, full_pass = Decoder(network, compiled=True), network(tokens)
    cache = decoder.new_state(3)
    for row in (0, 1, 2):
        decoder.prefill(cache, row, tokens[row, :5])
    torch.testing.assert_close(decoder.prefill(cache, 1, tokens[3, :length]), full_pass[3, length - 1], atol=3e-5, rtol=1e-5)
    assert cache.lengths == [5, length, 5]
    logits = decoder.step(cache, torch.stack([tokens[0, 5], tokens[3, length], tokens[2, 5]]))
    torch.testing.assert_close(logits, torch.stack([full_pass[0, 5], full_pass[3, length], full_pass[2, 5]]), atol=3e-5, rtol=1e-5)


def _after_five_steps(decoder: Decoder, tokens: Tensor, sequences: list[int], threads: int = 1) -> Tensor:
    """Prefill prompts of different lengths with one thread, run five decode steps, and return the last logits (B, V)."""
    cache = decoder.new_state(len(sequences))
    torch.set_num_threads(1)
    for row, sequence in enumerate(sequences):
        decoder.prefill(cache, row, tokens[sequence, : 1 + sequence % 7])
    torch.set_num_threads(threads)
    for step in range(5):
        logits = decoder.step(cache, torch.stack([tokens[sequence, 1 + sequence % 7 + step] for sequence in sequences]))
    return logits


@pytest.mark.parametrize("weights", WEIGHT_KINDS)
@pytest.mark.parametrize("preset", PRESETS)
@torch.inference_mode()
def test_logits_are_bit_identical_for_any_batch_size_and_thread_count(
    preset: str, weights: WeightKind, several_threads: None
) -> None:
    network, tokens = model(preset, n_embd=96, n_inner=200, ngram_embeddings=[2], ngram_rows=97), ids(21, 16)
    decoder = Decoder(network, weights=weights, compiled=True)
    single = torch.cat([_after_five_steps(decoder, tokens, [row]) for row in range(21)])
    for rows in (2, 4, 5, 8, 9, 12, 13, 21):
        for threads in (1, 2, 3):
            batched = _after_five_steps(decoder, tokens, list(range(rows)), threads)
            assert torch.equal(batched, single[:rows]), (rows, threads)


@torch.inference_mode()
def test_without_openmp_a_single_thread_computes_the_same_logits(monkeypatch: pytest.MonkeyPatch, several_threads: None) -> None:
    tokens, decoder = ids(3, 16), Decoder(model("llama"), compiled=True)
    expected = _after_five_steps(decoder, tokens, [0, 1, 2], 2)
    monkeypatch.setattr(compiled, "openmp_team", lambda: None)
    assert torch.equal(_after_five_steps(decoder, tokens, [0, 1, 2], 2), expected)


@torch.inference_mode()
def test_ids_and_positions_out_of_bounds_raise() -> None:
    decoder = Decoder(model(), compiled=True)
    cache = decoder.new_state(1)
    for invalid in ([3, VOCAB_SIZE], [-1], list(range(17))):
        with pytest.raises((IndexError, RuntimeError)):
            decoder.prefill(cache, 0, invalid)
    decoder.prefill(cache, 0, list(range(16)))
    with pytest.raises(IndexError):
        decoder.step(cache, torch.tensor([1]))


@pytest.mark.parametrize("weights", ["bf16", "int8"])
@pytest.mark.parametrize("preset", PRESETS)
@torch.inference_mode()
def test_packed_decoding_rounds_only_the_weights(preset: str, weights: WeightKind) -> None:
    """Inputs stay in float32, so the logits match a float32 network with the dequantized weights."""
    network, tokens = model(preset), ids(2, 12)
    decoder = Decoder(network, weights=weights, compiled=True)
    dequantized = model(preset, tie_embeddings=False)
    dequantized.load_state_dict({**network.state_dict(), "head.weight": network.head.weight})
    for plain, packed in zip(_linear_layers(dequantized), _linear_layers(decoder.network), strict=True):
        scale = packed.scale.float()[:, None] if weights == "int8" else 1.0
        plain.weight.copy_(packed.weight[:, : plain.in_features].float() * scale)
    expected = _after_five_steps(Decoder(dequantized, compiled=True), tokens, [0, 1])
    torch.testing.assert_close(_after_five_steps(decoder, tokens, [0, 1]), expected, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
@torch.inference_mode()
def test_by_default_weights_are_rounded_to_bf16_with_and_without_compilation(preset: str) -> None:
    network, tokens = model(preset), ids(2, 12)
    default, uncompiled = (
        make_decoder(network, weights=None, compiled=compiled, steps=None, reporter=SILENT) for compiled in (True, False)
    )
    assert isinstance(default, Decoder)
    assert isinstance(uncompiled, Decoder)
    assert default.uses_numba
    assert not uncompiled.uses_numba
    logits = _after_five_steps(default, tokens, [0, 1])
    assert torch.equal(logits, _after_five_steps(Decoder(network, weights="bf16", compiled=True), tokens, [0, 1]))
    torch.testing.assert_close(_after_five_steps(uncompiled, tokens, [0, 1]), logits, atol=3e-5, rtol=1e-5)
    exact = make_decoder(network, weights="fp32", compiled=True, steps=None, reporter=SILENT)
    assert isinstance(exact, Decoder)
    assert not torch.equal(_after_five_steps(exact, tokens, [0, 1]), logits)


@torch.inference_mode()
def test_long_prompts_have_the_same_logits_with_and_without_compilation() -> None:
    network, prompt = model("modern", context_length=64), ids(1, 50)[0]
    logits = []
    for uses_numba in (True, False):
        decoder = make_decoder(network, weights=None, compiled=uses_numba, steps=None, reporter=SILENT)
        logits.append(decoder.prefill(decoder.new_state(1), 0, prompt))
    torch.testing.assert_close(*logits, atol=3e-5, rtol=1e-5)


@torch.inference_mode()
def test_weights_are_not_rounded_if_compiled_decoding_does_not_support_the_model() -> None:
    network, tokens = model(parallel_residual=True), ids(1, 12)
    decoder = make_decoder(network, weights=None, compiled=None, steps=None, reporter=SILENT)
    torch.testing.assert_close(decoder.prefill(decoder.new_state(1), 0, tokens[0]), network(tokens)[0, -1], atol=3e-5, rtol=1e-5)


@torch.inference_mode()
def test_weights_that_bf16_represents_exactly_take_two_bytes() -> None:
    network = model("modern")
    assert set(CompiledStep(network)._matrices["weight_bytes"]) == {0, 4}
    assert set(CompiledStep(round_to_bfloat16(network))._matrices["weight_bytes"]) == {0, 2}


def _linear_layers(network: Transformer) -> list[Any]:
    names = ("attention.qkv", "attention.output", "feed_forward.input", "feed_forward.output")
    return [block.get_submodule(name) for block in network.blocks for name in names] + [network.head]


@pytest.mark.parametrize(
    "overrides",
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
def test_the_error_for_an_unsupported_setting_contains_its_key(overrides: dict[str, Any]) -> None:
    network = model(**overrides)
    with pytest.raises(InputError, match=f"{next(iter(overrides))}.*--compile|--compile.*{next(iter(overrides))}"):
        Decoder(network, compiled=True)
    assert not compiled.is_worthwhile(network, None)


def test_compiled_steps_are_worthwhile_if_they_save_more_time_than_loading_or_compiling_the_code_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = model()
    for is_compiled, enough_steps in ((True, 200), (False, 100_000)):
        monkeypatch.setattr(NativeFunction, "is_compiled", lambda self, is_compiled=is_compiled: is_compiled)
        assert compiled.is_worthwhile(network, None)
        assert compiled.is_worthwhile(network, enough_steps)
        assert not compiled.is_worthwhile(network, enough_steps // 4)
        assert compiled.is_worthwhile(network, 200, once_compiled=True)


def test_code_that_is_not_on_disk_is_compiled_for_later_if_a_short_generation_would_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    uncompiled = Decoder(model())
    assert not should_compile_for_later(uncompiled, 200), "the code is already on disk"
    monkeypatch.setattr(NativeFunction, "is_compiled", lambda self: False)
    assert should_compile_for_later(uncompiled, 200)
    assert not should_compile_for_later(uncompiled, 10)
    assert not should_compile_for_later(Decoder(model(parallel_residual=True)), 200)
    assert not should_compile_for_later(Decoder(model(), compiled=True), 200), "the code was compiled before the first step"


def test_a_compilation_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    compiled.load_code(notes.append)
    assert not notes, "the code is already compiled"
    monkeypatch.setattr(NativeFunction, "is_compiled", lambda self: False)
    compiled.load_code(notes.append)
    (note,) = notes
    assert "compiling" in note

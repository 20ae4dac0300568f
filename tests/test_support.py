"""Every backend detects the `model:` keys and values that it does not support."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_origin

import pytest
import torch
from model.parts import CASES, KEYS, VALUES, assert_decoding_matches_full_passes, case_network, case_section, cases_and_presets
from tiny import PRESETS, VOCAB_SIZE, section
from tokenizers import Tokenizer as Backend
from tokenizers import models

from tinylm.cost import parameters
from tinylm.errors import InputError
from tinylm.interchange import gguf, hf_architectures, huggingface, onnx
from tinylm.model import compiled, compiled_translation, decoder, lora
from tinylm.model.decoder import Decoder, as_decoder, make_decoder
from tinylm.model.full_pass import FullPassDecoder
from tinylm.model.packed import Int8Linear
from tinylm.model.transformer import Transformer
from tinylm.recipe.schema import DecoderSection, LoraSection
from tinylm.recipe.support import ANY, COMMON, TRAINING, Supports, check_supported, unsupported, unsupported_parts
from tinylm.recipe.values import Flag
from tinylm.reporting import SILENT, CollectingReporter
from tinylm.tokenizer import Tokenizer

BACKENDS: dict[str, Supports] = {
    "compiled step": compiled.SUPPORTS,
    "compiled translation": compiled_translation.SUPPORTS,
    "tensor step": decoder.SUPPORTS,
    "LoRA": lora.SUPPORTS,
    "modeling_tinylm.py": huggingface.SUPPORTS,
    **{f"transformers {family}": supports for family, supports in hf_architectures.SUPPORTS.items()},
    **{f"llama.cpp {family}": supports for family, supports in gguf.SUPPORTS.items()},
    "ONNX": onnx.SUPPORTS,
    "cost": parameters.SUPPORTS,
}


class WithNewKey(DecoderSection):
    new_key: Flag = False


def no_tokenizer() -> Tokenizer:
    return Tokenizer(Backend(models.BPE({"?": 0}, [], unk_token="?")))


def test_an_unlisted_key_is_supported_only_at_its_default() -> None:
    model = section("gpt2", n_kv_head=2, logit_softcap=3.0, ngram_embeddings=[2, 3])
    required = {key: ANY for key, field in DecoderSection.model_fields.items() if field.is_required()}
    sizes = {"preset": ANY, "n_layer": ANY, "n_head": ANY, "n_embd": ANY, "context_length": ANY}
    assert unsupported(model, required | sizes) == [("n_kv_head", 2), ("ngram_embeddings", (2, 3)), ("logit_softcap", 3.0)]
    one_head = {"n_kv_head": lambda section: section.n_head // section.n_kv_head == 2, "logit_softcap": (3.0, 5.0)}
    assert unsupported_parts(model, required | sizes | one_head) == ("ngram_embeddings [2, 3]",)
    assert ("norm", "layernorm") in unsupported(model, {}), "a key without a default must be listed"
    with pytest.raises(
        InputError, match=r"--to x: XYZ does not support model\.n_kv_head 2, model\.ngram_embeddings \[2, 3\], model"
    ):
        check_supported(model, required | sizes, "XYZ", "--to x")
    check_supported(model, COMMON, "XYZ", "--to x")


def test_every_key_in_the_schema_has_a_case() -> None:
    assert {next(iter(case)) for case in CASES} == set(KEYS)
    assert set(VALUES) <= set(KEYS)


@pytest.mark.parametrize("supports", BACKENDS.values(), ids=BACKENDS)
def test_backends_list_only_schema_keys_and_list_every_key_with_fixed_choices(supports: Supports) -> None:
    assert set(supports) <= set(DecoderSection.model_fields)
    choices = {key for key, field in DecoderSection.model_fields.items() if get_origin(field.annotation) is Literal}
    listed = {key for key, values in supports.items() if key in choices and not callable(values)}
    assert choices - listed <= set(TRAINING), "a new choice must not be supported before it is listed"
    assert listed >= {"architecture"}


@pytest.mark.parametrize("supports", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_new_choice_is_unsupported_by_every_backend(supports: Supports, preset: str) -> None:
    for key, field in DecoderSection.model_fields.items():
        if get_origin(field.annotation) is Literal and key not in TRAINING:
            assert (key, "new") in unsupported(section(preset).model_copy(update={key: "new"}), supports)


@pytest.fixture(params=PRESETS)
def network_with_new_key(request: pytest.FixtureRequest) -> Transformer:
    values = section(request.param).model_dump() | {"new_key": True}
    return Transformer(WithNewKey.model_validate(values), VOCAB_SIZE).eval()


def test_every_backend_detects_a_new_key(network_with_new_key: Transformer, tmp_path: Path) -> None:
    network, model = network_with_new_key, network_with_new_key.model
    assert all("new_key true" in unsupported_parts(model, supports) for supports in BACKENDS.values())
    with pytest.raises(InputError, match="new_key true is not supported by compiled decoding"):
        make_decoder(network, weights="fp32", compiled=True, steps=None, reporter=SILENT)
    with pytest.raises(ValueError, match="decoding with a KV cache does not support new_key true"):
        Decoder(network)
    assert not compiled.is_worthwhile(network, None)
    with pytest.raises(InputError, match=r"training\.lora: LoRA does not support model\.new_key true"):
        lora.attach(network, LoraSection())
    with pytest.raises(InputError, match=r"--to hf: .* does not support .*model\.new_key true"):
        huggingface.write(tmp_path, network, no_tokenizer(), "")
    with pytest.raises(InputError, match=r"llama.cpp does not support .*new_key true"):
        gguf.check_supported(model, no_tokenizer())
    with pytest.raises(InputError, match=r"--to onnx: ONNX export does not support model\.new_key true"):
        onnx.write(tmp_path / "model.onnx", network, "model")
    assert parameters.not_estimated(model) == ("new_key true",)


@torch.inference_mode()
def test_decoding_falls_back_to_full_forward_passes_with_a_note(network_with_new_key: Transformer) -> None:
    reporter = CollectingReporter()
    plain = make_decoder(network_with_new_key, weights="fp32", compiled=None, steps=None, reporter=reporter)
    assert reporter.notes == ["decoding with a KV cache does not support new_key true; each token takes a full forward pass"]
    for full_pass_decoder in (plain, as_decoder(network_with_new_key)):
        assert isinstance(full_pass_decoder, FullPassDecoder)
        assert_decoding_matches_full_passes(network_with_new_key, full_pass_decoder)


def test_weights_are_also_packed_for_full_forward_passes(network_with_new_key: Transformer) -> None:
    packed = make_decoder(network_with_new_key, weights="int8", compiled=None, steps=None, reporter=SILENT)
    assert isinstance(packed, FullPassDecoder)
    assert any(isinstance(module, Int8Linear) for module in packed.network.modules())


@pytest.mark.parametrize(("preset", "case"), cases_and_presets(), ids=str)
def test_exporters_reject_exactly_the_unsupported_cases(preset: str, case: dict[str, Any]) -> None:
    """The tests in `tests/interchange` check that the supported cases are exported correctly."""
    model = case_section(case, preset)
    family, parts = hf_architectures.find_family(model)
    assert (family is None) == bool(parts)
    assert family is None or not unsupported(model, hf_architectures.SUPPORTS[family])
    if family is None and unsupported(model, huggingface.SUPPORTS):
        with pytest.raises(InputError, match="--to hf"):
            huggingface.select_class(model)
    else:
        assert huggingface.select_class(model)[1] == parts
    if unsupported(model, onnx.SUPPORTS):
        with pytest.raises(InputError, match="--to onnx: ONNX export does not support"):
            onnx.check_possible(model)
    if all(unsupported(model, supports) for supports in gguf.SUPPORTS.values()):
        with pytest.raises(InputError, match=r"llama\.cpp does not support"):
            gguf.check_supported(model, no_tokenizer())


@pytest.mark.parametrize(("preset", "case"), cases_and_presets(), ids=str)
def test_the_parameter_count_is_exact_in_every_case_that_can_be_estimated(preset: str, case: dict[str, Any]) -> None:
    network = case_network(case, preset)
    counted = sum(parameters.parameter_counts(network.model, VOCAB_SIZE).values())
    assert counted == network.parameter_count() or parameters.not_estimated(network.model)

"""GGUF export, checked with transformers and llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from untrained_runs import MakeRun

from tinylm.errors import InputError, WorkError
from tinylm.interchange import gguf, llama_cpp
from tinylm.interchange.exporting import ExportResult, export
from tinylm.reporting import CollectingReporter
from tinylm.run import Run
from tinylm.tokenizer import Tokenizer


@pytest.fixture(scope="module", autouse=True)
def _packages() -> None:
    """Import the packages here and not in the module, because this takes seconds in every test process."""
    for name in ("gguf", "accelerate", "transformers"):
        pytest.importorskip(name)


# (file type, preset, llama.cpp architecture, tokenizer, model overrides)
CASES: list[tuple[str, str, str, str, dict[str, Any]]] = [
    ("f32", "gpt2", "gpt2", "gpt2", {"bias": False}),
    ("q8_0", "gpt2", "gpt2", "digits1", {"tie_embeddings": False, "n_inner": 100}),
    ("f16", "llama", "llama", "digits3", {"n_kv_head": 2}),
    ("q4_0", "llama", "llama", "byte", {"tie_embeddings": True}),
    ("f32", "llama", "llama", "gpt2", {"bias": True, "n_kv_head": 2, "head_dim": 16}),
    ("q8_0", "llama", "qwen3", "digits1", {"qk_norm": True, "n_kv_head": 1, "head_dim": 16}),
]


@pytest.mark.parametrize(("file_type", "preset", "architecture", "tokenizer", "parts"), CASES, ids=str)
def test_a_gguf_file_produces_the_same_results_in_other_programs(
    file_type: str, preset: str, architecture: str, tokenizer: str, parts: dict[str, Any], make_run: MakeRun, tmp_path: Path
) -> None:
    reporter = CollectingReporter()
    run = make_run(preset, tokenizer=tokenizer, **parts)
    result = export(run, "gguf", tmp_path / "model.gguf", type=file_type, reporter=reporter)
    assert (result.architecture, result.type) == (architecture, file_type)
    assert result.largest_difference <= 1e-4
    assert result.perplexity is not None
    assert result.run_perplexity is not None
    if file_type == "f32":
        assert result.perplexity == pytest.approx(result.run_perplexity, rel=1e-5)
    elif file_type != "q4_0":
        assert result.perplexity <= 1.01 * result.run_perplexity
    if llama_cpp.installed() and not reporter.warnings:
        assert any(name.startswith("llama-cpp-python") for name in result.verified_with)
        assert result.same_greedy == gguf.GREEDY_TOKENS if file_type == "f32" else result.same_greedy is not None


def test_the_metadata_contain_the_file_type_and_the_padding_token(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("llama")
    export(run, "gguf", tmp_path / "model.gguf")
    fields = __import__("gguf").GGUFReader(tmp_path / "model.gguf").fields
    assert fields["general.type"].contents() == "model"
    assert fields["general.quantization_version"].contents() == 2
    assert fields["tokenizer.ggml.padding_token_id"].contents() == run.tokenizer.end_of_text


def test_exporting_rope_scaling_is_rejected(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("llama", rope_scaling={"type": "linear", "factor": 2.0})
    with pytest.raises(InputError, match=r"llama\.cpp does not support rope_scaling"):
        export(run, "gguf", tmp_path / "model.gguf")


def test_file_types_are_listed_by_decreasing_file_size(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("llama", n_embd=64)
    network = run.network(run.checkpoint(), torch.device("cpu"))
    sizes = []
    for file_type in gguf.TYPES:
        gguf.write(tmp_path / file_type, network, run.tokenizer, file_type, "model")
        sizes.append((tmp_path / file_type).stat().st_size)
    assert sizes == sorted(sizes, reverse=True)


def test_a_gguf_file_contains_the_complete_tokenizer(make_run: MakeRun, tmp_path: Path) -> None:
    import gguf as library

    run = make_run("gpt2")
    network = run.network(run.checkpoint(), torch.device("cpu"))
    gguf.write(tmp_path / "model.gguf", network, run.tokenizer, "f32", "model")
    fields = library.GGUFReader(tmp_path / "model.gguf").fields
    end = run.tokenizer.end_of_text
    names = ("pre", "bos_token_id", "eos_token_id", "add_bos_token")
    assert {name: fields[f"tokenizer.ggml.{name}"].contents() for name in names} == {
        "pre": "gpt-2",
        "bos_token_id": end,
        "eos_token_id": end,
        "add_bos_token": False,
    }
    assert len(fields["tokenizer.ggml.tokens"].contents()) == network.vocab_size
    assert fields["tokenizer.ggml.token_type"].contents()[end] == library.TokenType.CONTROL


@pytest.mark.parametrize(
    ("preset", "tokenizer", "parts", "message"),
    [
        (
            "llama",
            "digits2",
            {},
            "uses a split pattern that llama.cpp does not support (the split gpt2 is supported, and the split gpt4",
        ),
        ("llama", "char", {}, "llama.cpp does not support tokenizers of the kind char (the kinds bpe and byte are supported)"),
        ("modern", "gpt2", {}, "llama.cpp does not support embedding_norm true, feed_forward relu2"),
        ("gpt2", "gpt2", {"feed_forward": "relu"}, "gpt2 does not support feed_forward relu (gelu is supported)"),
    ],
)
def test_unsupported_models_are_rejected_with_the_supported_alternative(
    preset: str, tokenizer: str, parts: dict[str, Any], message: str, make_run: MakeRun, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        export(make_run(preset, tokenizer=tokenizer, **parts), "gguf", tmp_path / "model.gguf")
    assert message in str(caught.value)
    assert not (tmp_path / "model.gguf").exists()


def test_an_export_with_wrong_logits_fails_and_leaves_no_file(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "interleave_rotary_rows", lambda rows, heads: rows)
    with pytest.raises(WorkError, match="the GGUF file does not match the original model"):
        export(make_run("llama"), "gguf", tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_export_whose_perplexity_is_too_high_fails_and_leaves_no_file(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gguf.MAX_PERPLEXITY_RATIO, "q8_0", 0.9)
    with pytest.raises(WorkError, match="the perplexity in q8_0 is"):
        export(make_run("llama"), "gguf", tmp_path / "model.gguf", type="q8_0")
    assert not (tmp_path / "model.gguf").exists()


def test_a_crash_in_llama_cpp_causes_a_warning_but_the_export_succeeds(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp, "installed", lambda: True)
    monkeypatch.setattr(gguf.importlib.metadata, "version", lambda name: "0.0")
    monkeypatch.setattr(llama_cpp, "run", lambda *arguments: "signal 11")
    reporter = CollectingReporter()
    result: ExportResult = export(make_run("gpt2"), "gguf", tmp_path / "model.gguf", reporter=reporter)
    assert result.same_greedy is None
    assert reporter.warnings == ["llama-cpp-python 0.0 failed; the file was verified with transformers only (signal 11)"]


def test_export_fails_if_llama_cpp_tokenizes_text_differently(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong_ids(path: Path, texts: list[str], *rest: Any) -> llama_cpp.LlamaCppResult:
        return llama_cpp.LlamaCppResult([tokenizer.encode(text)[1:] for text in texts], 1.0, [0] * 20)

    run: Run = make_run("gpt2")
    tokenizer: Tokenizer = run.tokenizer
    monkeypatch.setattr(llama_cpp, "installed", lambda: True)
    monkeypatch.setattr(gguf.importlib.metadata, "version", lambda name: "0.0")
    monkeypatch.setattr(llama_cpp, "run", wrong_ids)
    with pytest.raises(WorkError, match=r"llama\.cpp tokenizes .* differently from the tinylm tokenizer"):
        export(run, "gguf", tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT4 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split_by(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("parts", "ignore_merges", "name"),
    [
        ([{**BYTE_LEVEL, "use_regex": True}], False, "gpt-2"),  # GPT-2
        ([split_by(GPT4 % r"\p{N}"), BYTE_LEVEL], False, "qwen2"),  # Qwen 2 and 3
        ([split_by(GPT4 % r"\p{N}{1,3}"), BYTE_LEVEL], True, "llama-bpe"),  # Llama 3
        ([split_by(GPT4 % r"\p{N}{1,3}"), BYTE_LEVEL], False, "dbrx"),
        ([{"type": "Digits", "individual_digits": True}, {**BYTE_LEVEL, "use_regex": True}], False, "smollm"),
        ([split_by(GPT4 % r"\p{N}{1,2}"), BYTE_LEVEL], False, None),
        ([split_by(GPT4 % r"\p{N}"), BYTE_LEVEL], True, None),
        ([{**BYTE_LEVEL, "use_regex": True, "add_prefix_space": True}], False, None),
        ([split_by(r"\w+"), split_by(r"\d"), BYTE_LEVEL], False, None),
        ([{"type": "Whitespace"}], False, None),
    ],
    ids=str,
)
def test_well_known_pretokenizers_are_recognized(parts: list[dict[str, Any]], ignore_merges: bool, name: str | None) -> None:
    pre = parts[0] if len(parts) == 1 else {"type": "Sequence", "pretokenizers": parts}
    assert gguf.pretokenizer_name(pre, ignore_merges) == name

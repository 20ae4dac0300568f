"""GGUF files against the programs that read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from exchange import Make

from tinylm.errors import InputError, WorkError
from tinylm.interchange import gguf, llama_cpp
from tinylm.interchange.exporting import Exported, export
from tinylm.reporting import CollectingReporter
from tinylm.run import Run
from tinylm.tokenizer import Tokenizer

for _module in ("gguf", "accelerate", "transformers"):
    pytest.importorskip(_module)

SHAPES: list[tuple[str, str, str, str, dict[str, Any]]] = [
    ("f32", "gpt2", "gpt2", "gpt2", {"bias": False}),
    ("q8_0", "gpt2", "gpt2", "digits1", {"tie_embeddings": False, "n_inner": 100}),
    ("f16", "llama", "llama", "digits3", {"n_kv_head": 2}),
    ("q4_0", "llama", "llama", "byte", {"tie_embeddings": True}),
    ("f32", "llama", "llama", "gpt2", {"bias": True, "n_kv_head": 2, "head_dim": 16}),
    ("q8_0", "llama", "qwen3", "digits1", {"qk_norm": True, "n_kv_head": 1, "head_dim": 16}),
]


@pytest.mark.parametrize(("kind", "preset", "architecture", "tokenizer", "parts"), SHAPES, ids=str)
def test_a_file_is_the_same_model_elsewhere(
    kind: str, preset: str, architecture: str, tokenizer: str, parts: dict[str, Any], run_of: Make, tmp_path: Path
) -> None:
    reporter = CollectingReporter()
    run = run_of(preset, tokenizer=tokenizer, **parts)
    done = export(run, "gguf", tmp_path / "model.gguf", type=kind, reporter=reporter)
    assert (done.architecture, done.type) == (architecture, kind)
    assert done.largest_difference <= 1e-4
    assert done.perplexity is not None
    assert done.run_perplexity is not None
    if kind == "f32":
        assert done.perplexity == pytest.approx(done.run_perplexity, rel=1e-5)
    elif kind != "q4_0":
        assert done.perplexity <= 1.01 * done.run_perplexity
    if llama_cpp.installed() and not reporter.warnings:
        assert any(name.startswith("llama-cpp-python") for name in done.verified_with)
        assert done.same_greedy == 20 if kind == "f32" else done.same_greedy is not None


def test_smaller_types_are_smaller(run_of: Make, tmp_path: Path) -> None:
    run = run_of("llama", n_embd=64)
    network = run.network(run.checkpoint(), torch.device("cpu"))
    sizes = []
    for kind in gguf.TYPES:
        gguf.write(tmp_path / kind, network, run.tokenizer, kind, "model")
        sizes.append((tmp_path / kind).stat().st_size)
    assert sizes == sorted(sizes, reverse=True)


def test_the_tokenizer_is_described_whole(run_of: Make, tmp_path: Path) -> None:
    import gguf as library

    run = run_of("gpt2")
    network = run.network(run.checkpoint(), torch.device("cpu"))
    gguf.write(tmp_path / "model.gguf", network, run.tokenizer, "f32", "model")
    fields = library.GGUFReader(tmp_path / "model.gguf").fields
    end = run.tokenizer.end_of_text
    found = {name: fields[f"tokenizer.ggml.{name}"].contents() for name in ("pre", "bos_token_id", "eos_token_id", "add_bos_token")}
    assert found == {"pre": "gpt-2", "bos_token_id": end, "eos_token_id": end, "add_bos_token": False}
    assert len(fields["tokenizer.ggml.tokens"].contents()) == network.vocab_size
    assert fields["tokenizer.ggml.token_type"].contents()[end] == library.TokenType.CONTROL


@pytest.mark.parametrize(
    ("preset", "tokenizer", "parts", "told"),
    [
        ("llama", "digits2", {}, "splits text by a pattern that llama.cpp has no name for (split gpt2, or gpt4 with digits 1 or 3"),
        ("llama", "char", {}, "llama.cpp has no tokenizer like char (tokenizer kind bpe or byte would do)"),
        ("modern", "gpt2", {}, "llama.cpp has no model with embedding_norm true, feed_forward relu2"),
        ("gpt2", "gpt2", {"feed_forward": "relu"}, "llama.cpp's gpt2 has no feed_forward relu (gelu would do)"),
    ],
)
def test_what_llama_cpp_does_not_know_is_refused_with_what_it_does(
    preset: str, tokenizer: str, parts: dict[str, Any], told: str, run_of: Make, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        export(run_of(preset, tokenizer=tokenizer, **parts), "gguf", tmp_path / "model.gguf")
    assert told in str(caught.value)
    assert not (tmp_path / "model.gguf").exists()


def test_a_file_that_is_not_the_same_model_is_not_left(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "_interleaved", lambda rows, heads: rows)
    with pytest.raises(WorkError, match="the GGUF file is not the same model"):
        export(run_of("llama"), "gguf", tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_file_that_lost_too_much_is_not_left(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gguf.MOST_WORSE, "q8_0", 0.9)
    with pytest.raises(WorkError, match="in q8_0 the perplexity is"):
        export(run_of("llama"), "gguf", tmp_path / "model.gguf", type="q8_0")
    assert not (tmp_path / "model.gguf").exists()


def test_a_llama_cpp_that_crashes_is_told_and_not_believed(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "installed", lambda: True)
    monkeypatch.setattr(gguf.importlib.metadata, "version", lambda name: "0.0")
    monkeypatch.setattr(llama_cpp, "ask", lambda *arguments: "signal 11")
    reporter = CollectingReporter()
    done: Exported = export(run_of("gpt2"), "gguf", tmp_path / "model.gguf", reporter=reporter)
    assert done.same_greedy is None
    assert reporter.warnings == ["llama-cpp-python 0.0 does not run here; only transformers has read the file (signal 11)"]


def test_a_llama_cpp_that_finds_something_else_is_believed(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(path: Path, texts: list[str], *rest: Any) -> llama_cpp.Answers:
        return llama_cpp.Answers([tokenizer.encode(text)[1:] for text in texts], 1.0, [0] * 20)

    run: Run = run_of("gpt2")
    tokenizer: Tokenizer = run.tokenizer
    monkeypatch.setattr(llama_cpp, "installed", lambda: True)
    monkeypatch.setattr(gguf.importlib.metadata, "version", lambda name: "0.0")
    monkeypatch.setattr(llama_cpp, "ask", asked)
    with pytest.raises(WorkError, match=r"llama\.cpp splits .* into other tokens"):
        export(run, "gguf", tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT4 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split_by(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("parts", "whole", "name"),
    [
        ([{**BYTES, "use_regex": True}], False, "gpt-2"),  # GPT-2
        ([split_by(GPT4 % r"\p{N}"), BYTES], False, "qwen2"),  # Qwen 2 and 3
        ([split_by(GPT4 % r"\p{N}{1,3}"), BYTES], True, "llama-bpe"),  # Llama 3
        ([split_by(GPT4 % r"\p{N}{1,3}"), BYTES], False, "dbrx"),
        ([{"type": "Digits", "individual_digits": True}, {**BYTES, "use_regex": True}], False, "smollm"),
        ([split_by(GPT4 % r"\p{N}{1,2}"), BYTES], False, None),
        ([split_by(GPT4 % r"\p{N}"), BYTES], True, None),
        ([{**BYTES, "use_regex": True, "add_prefix_space": True}], False, None),
        ([split_by(r"\w+"), split_by(r"\d"), BYTES], False, None),
        ([{"type": "Whitespace"}], False, None),
    ],
    ids=str,
)
def test_the_splits_of_well_known_tokenizers_have_their_names(parts: list[dict[str, Any]], whole: bool, name: str | None) -> None:
    pre = parts[0] if len(parts) == 1 else {"type": "Sequence", "pretokenizers": parts}
    assert gguf._named_split(pre, whole) == name

"""GGUF files for llama.cpp and everything built on it, of models that are GPT-2, Llama or Qwen3 in their mathematics.

Tensors take the names and layouts of llama.cpp's own converter: queries and keys of Llama in the interleaved order of its rotary
positions, every bias of GPT-2. The tokenizer is described by the name of a split that llama.cpp knows; one that it does not know
is refused. `verify` loads the file with transformers and, where it is installed, with llama.cpp.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinylm.errors import InputError, WorkError
from tinylm.interchange import hf_architectures, huggingface, llama_cpp, verify
from tinylm.model.transformer import Transformer
from tinylm.recipe.schema import ModelSection
from tinylm.reporting import SILENT, Reporter
from tinylm.tokenizer import Tokenizer
from tinylm.tokenizer.splits import pattern_of

TYPES = ("f32", "f16", "q8_0", "q4_0")
MOST_WORSE = {"f32": 1.0001, "f16": 1.001, "q8_0": 1.01}
"""Perplexity of the file over that of the run, at the most; q4_0 costs a small model what it costs."""
_LLAMA_CPP_WORSE = 1.01
"""llama.cpp multiplies in 8 or 16 bits where weights have them."""
_GREEDY = 20
_BLOCK = 32
"""Numbers that share a scale in q8_0 and q4_0."""


def check(model: ModelSection, tokenizer: Tokenizer) -> tuple[str, str]:
    """The names of architecture and split in llama.cpp. Raises `InputError` with what has none there, and what would."""
    name, lacking = hf_architectures.family(model)
    if name is None:
        raise InputError(
            f"llama.cpp has no model with {', '.join(lacking)}", where="--to gguf", hint="preset gpt2 or llama has none of it"
        )
    if name == "gpt2" and model.feed_forward != "gelu":
        raise InputError(f"llama.cpp's gpt2 has no feed_forward {model.feed_forward}", where="--to gguf", hint="gelu would do")
    return name, _split(tokenizer)


def _split(tokenizer: Tokenizer) -> str:
    values = json.loads(tokenizer.backend.to_str())
    if tokenizer.kind not in ("bpe", "byte"):
        raise InputError(
            f"llama.cpp has no tokenizer like {tokenizer.kind}", where="--to gguf", hint="tokenizer kind bpe or byte would do"
        )
    whole = bool(values["model"].get("ignore_merges"))
    found = _named_split(values["pre_tokenizer"], whole) if tokenizer.kind == "bpe" else "gpt-2"
    if found is None or values["normalizer"] is not None:
        what = "normalizes text first" if found else "splits text by a pattern that llama.cpp has no name for"
        raise InputError(f"the tokenizer {what}", where="--to gguf", hint="split gpt2, or gpt4 with digits 1 or 3, would do")
    return found


def _named_split(pre: dict[str, Any] | None, whole: bool) -> str | None:
    """llama.cpp's name for a pre-tokenizer; `whole`: words in the vocabulary are taken whole, whatever the merges say."""
    parts = pre.get("pretokenizers", [pre]) if pre else []
    if not parts or parts[-1].get("type") != "ByteLevel" or parts[-1].get("add_prefix_space"):
        return None
    regular, first = parts[-1].get("use_regex", True), parts[:-1]
    if not first:
        return "gpt-2" if regular and not whole else None
    if len(first) > 1:
        return None
    if regular:
        digits = first[0] == {"type": "Digits", "individual_digits": True}
        return "smollm" if digits and not whole else None
    if first[0].get("type") != "Split" or first[0].get("behavior") != "Isolated" or first[0].get("invert"):
        return None
    return (
        ("llama-bpe" if first[0]["pattern"].get("Regex") == pattern_of("gpt4", 3) else None)
        if whole
        else _PATTERNS.get(first[0]["pattern"].get("Regex"))
    )


_PATTERNS = {
    pattern_of("gpt2", None): "gpt-2",
    pattern_of("gpt4", 1): "qwen2",
    pattern_of("gpt4", 1).replace("{1,1}", ""): "qwen2",
    pattern_of("gpt4", 3): "dbrx",
}
"""Patterns of tokenizer.json by llama.cpp's name; `llama-bpe` has the last one too, and takes words whole."""


# Writing.


def write(path: Path, network: Transformer, tokenizer: Tokenizer, kind: str, name: str) -> None:
    """Write `path`. `kind` is one of `TYPES`, `name` what the model is called. Raises `InputError` as `check` does."""
    gguf = verify.require("gguf", "gguf", "writing GGUF")
    model = network.model
    architecture, split = check(model, tokenizer)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[{"f32": "ALL_F32"}.get(kind, f"MOSTLY_{kind.upper()}")])
    _describe(writer, model, architecture)
    _describe_tokenizer(writer, gguf, tokenizer, split)
    for key, tensor in _tensors(network, architecture, gguf):
        data, stored = _stored(tensor.numpy(), _type_of(key, tensor, kind), gguf)
        writer.add_tensor(key, data, raw_dtype=stored)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _describe(writer: Any, model: ModelSection, architecture: str) -> None:
    writer.add_context_length(model.context_length)
    writer.add_embedding_length(model.n_embd)
    writer.add_block_count(model.n_layer)
    writer.add_feed_forward_length(model.feed_forward_width)
    writer.add_head_count(model.n_head)
    if architecture == "gpt2":
        writer.add_layer_norm_eps(model.norm_eps)
        return
    writer.add_head_count_kv(model.kv_heads)
    writer.add_key_length(model.head_width)
    writer.add_value_length(model.head_width)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    writer.add_rope_dimension_count(model.head_width)
    writer.add_rope_freq_base(model.rope_theta or 10000.0)


def _describe_tokenizer(writer: Any, gguf: Any, tokenizer: Tokenizer, split: str) -> None:
    values = json.loads(tokenizer.backend.to_str())
    added = tokenizer.backend.get_added_tokens_decoder()
    tokens, types = [], []
    for id in range(tokenizer.vocab_size):
        token = tokenizer.backend.id_to_token(id)
        kind = gguf.TokenType.NORMAL if token is not None else gguf.TokenType.UNUSED
        if id in added or id == tokenizer.end_of_text:
            kind = gguf.TokenType.USER_DEFINED if id in added and not added[id].special else gguf.TokenType.CONTROL
        tokens.append(token if token is not None else f"[PAD{id}]")
        types.append(kind)
    end = tokenizer.end_of_text
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in values["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges or [f"{tokens[end or 0]} {tokens[end or 0]}"])  # there must be one; this one never applies
    if end is not None:  # left out, they would be 11
        writer.add_bos_token_id(end)
        writer.add_eos_token_id(end)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)


def _tensors(network: Transformer, architecture: str, gguf: Any) -> Iterator[tuple[str, Tensor]]:
    """llama.cpp's names and layouts: matrices as (outputs, inputs)."""
    model = network.model
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], model.n_layer)
    for theirs, tensor in hf_architectures.tensors_of(network.state_dict(), model, architecture).items():
        if architecture == "gpt2" and ".c_" in theirs and tensor.ndim == 2:
            tensor = tensor.T.contiguous()
        if architecture == "llama" and ".q_proj." in theirs:
            tensor = _interleaved(tensor, model.n_head)
        if architecture == "llama" and ".k_proj." in theirs:
            tensor = _interleaved(tensor, model.kv_heads)
        yield names.get_name(theirs, try_suffixes=(".weight", ".bias")), tensor


def _interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rotary pairs (i, i + D/2) of every head as neighbors (2i, 2i + 1), which is how llama.cpp turns them in Llama."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape).contiguous()


def _type_of(key: str, tensor: Tensor, kind: str) -> str:
    """What a tensor is stored in: gains, biases and positions in full, a matrix whose rows are no whole blocks in 16 bits."""
    if tensor.ndim < 2 or key.startswith("position_embd"):
        return "f32"
    if kind.startswith("q") and tensor.shape[1] % _BLOCK:
        return "f16"
    if kind == "q4_0" and key.startswith(("token_embd", "output.")):
        return "q8_0"  # both ends of a small model are most of it, and suffer most
    return kind


def _stored(values: np.ndarray, kind: str, gguf: Any) -> tuple[np.ndarray, Any]:
    if kind == "f32":
        return values.astype(np.float32), None
    if kind == "f16":
        return values.astype(np.float16), None
    stored = gguf.GGMLQuantizationType[kind.upper()]
    return gguf.quants.quantize(values.astype(np.float32), stored), stored


# Proving.


@dataclass(frozen=True)
class Verified:
    """What a file was held against. `largest_difference`: of logits, from the same weights after rounding to the file's type."""

    largest_difference: float
    tokens: int
    perplexity: float
    run_perplexity: float
    by: tuple[str, ...]
    same_greedy: int | None
    """Tokens of the greedy continuation that llama.cpp writes the same, of 20; None where it is not installed."""


def check_export(
    path: Path, network: Transformer, tokenizer: Tokenizer, text: str, kind: str, reporter: Reporter = SILENT
) -> Verified:
    """Load the file elsewhere and compare it on `text`.

    The network with its weights rounded to the file's type must have the logits that transformers makes of the file, and not
    much more perplexity than the run; llama.cpp must split the text the same and come to the same perplexity.
    Raises `WorkError` where that does not hold, `InputError` without transformers.
    """
    transformers = verify.require("transformers", "gguf", "checking a GGUF file")
    rounded = _rounded(network, kind)
    rows = verify.windows([tokenizer.end_of_text or 0, *tokenizer.encode(text)], network.model.context_length)
    with huggingface.quiet(transformers):
        other = _loaded(transformers, path, network)
    difference = verify.largest_difference(rounded, lambda ids: other(ids).logits, rows)
    verify.check_same(difference, "the GGUF file")
    theirs, ours = verify.perplexity(lambda ids: other(ids).logits, rows), verify.perplexity(network, rows)
    if theirs > ours * MOST_WORSE.get(kind, float("inf")):
        raise WorkError(
            f"in {kind} the perplexity is {theirs:.4f}, of the run {ours:.4f}",
            hint="nothing was left; f16 keeps more of the weights",
        )
    by, greedy = [f"transformers {transformers.__version__}"], None
    if llama_cpp.installed():
        version = importlib.metadata.version("llama-cpp-python")
        answers = _asked(path, rounded, rows, text, tokenizer)
        if isinstance(answers, str):
            reporter.warn(f"llama-cpp-python {version} does not run here; only transformers has read the file ({answers})")
        else:
            greedy = _check_answers(answers, rounded, rows, theirs, tokenizer, text)
            by.append(f"llama-cpp-python {version}")
    return Verified(difference, rows.numel(), theirs, ours, tuple(by), greedy)


def _asked(path: Path, network: Transformer, rows: Tensor, text: str, tokenizer: Tokenizer) -> llama_cpp.Answers | str:
    prompt = rows[0, : _prompt_length(network.model)].tolist()
    return llama_cpp.ask(path, verify.probes(text), rows.tolist(), prompt, _GREEDY)


def _prompt_length(model: ModelSection) -> int:
    return max(1, min(16, model.context_length - _GREEDY))


def _check_answers(
    answers: llama_cpp.Answers, network: Transformer, rows: Tensor, expected: float, tokenizer: Tokenizer, text: str
) -> int:
    """How many tokens of the greedy continuation are the same. Raises `WorkError` for other ids or another perplexity."""
    ids = dict(zip(verify.probes(text), answers.ids, strict=True))
    verify.check_ids(tokenizer, ids.__getitem__, text, "llama.cpp")
    found = math.exp(min(answers.nats / max(1, rows.shape[0] * (rows.shape[1] - 1)), 700.0))
    if not expected / _LLAMA_CPP_WORSE <= found <= expected * _LLAMA_CPP_WORSE:
        raise WorkError(f"llama.cpp finds a perplexity of {found:.4f}, transformers of {expected:.4f}", hint="nothing was left")
    written = verify.greedy(network, rows[:1, : _prompt_length(network.model)], len(answers.continuation))
    same = [one == other for one, other in zip(written, answers.continuation, strict=True)]
    return same.index(False) if False in same else len(same)


def _rounded(network: Transformer, kind: str) -> Transformer:
    """The same network with its matrices as the file stores them: a scale belongs to a part of a row, whatever the rows' order."""
    import gguf

    rounded = Transformer(network.model, network.vocab_size, seed=None)
    rounded.load_state_dict(network.state_dict())
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            key = {"embedding.weight": "token_embd", "positions.weight": "position_embd", "head.weight": "output."}.get(name, name)
            data, stored = _stored(parameter.numpy(), _type_of(key, parameter, kind), gguf)
            restored = data.astype(np.float32) if stored is None else gguf.quants.dequantize(data, stored)
            parameter.copy_(torch.from_numpy(restored))
    return rounded.eval()


def _loaded(transformers: Any, path: Path, network: Transformer) -> Any:
    """The file as transformers reads it, told what its reader leaves out: GPT-2's positions, Qwen3's width of heads, biases."""
    model = network.model
    family, _ = hf_architectures.family(model)
    assert family is not None
    told = {}
    if family != "llama" or model.bias:
        config = hf_architectures.config_of(model, family, network.vocab_size)
        told["config"] = transformers.AutoConfig.for_model(family, **{k: v for k, v in config.items() if k != "model_type"})
    loader = transformers.AutoModelForCausalLM
    return loader.from_pretrained(path.parent, gguf_file=path.name, **told, **huggingface.in_float32(transformers)).eval()

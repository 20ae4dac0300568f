"""Write GGUF files for llama.cpp from models that compute the same function as GPT-2, Llama or Qwen3.

Tensor names and layouts are the same as in files from llama.cpp's own converter. Llama's query and key rows are in the interleaved
order of llama.cpp's rotary embedding. GPT-2's biases are always written and are zero if the model has none. llama.cpp identifies
pretokenizers by name, so a split pattern without a name is an error. `check_export` loads the file with transformers and, if it is
installed, with llama.cpp.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinylm.errors import InputError, WorkError
from tinylm.evaluation.metrics import perplexity_of
from tinylm.interchange import chat_files, hf_architectures, huggingface, llama_cpp, verify
from tinylm.model import registry
from tinylm.model.base import Model
from tinylm.recipe.schema import DecoderSection, ModelVariant
from tinylm.reporting import SILENT, Reporter
from tinylm.tokenizer import Tokenizer
from tinylm.tokenizer.chat_template import ChatEncoder
from tinylm.tokenizer.pretokenizer import split_pattern

TYPES = ("f32", "f16", "q8_0", "q4_0")
MAX_PERPLEXITY_RATIO = {"f32": 1.0001, "f16": 1.001, "q8_0": 1.01}
"""Maximum ratio of the file's perplexity to the run's. q4_0 has no limit, because it makes small models much worse."""
_LLAMA_CPP_MAX_RATIO = 1.01
"""Maximum ratio of llama.cpp's perplexity to transformers'. llama.cpp rounds not only weights but also activations."""
GREEDY_TOKENS = 20
"""Length of the greedy continuation that is compared with llama.cpp."""
_BLOCK_SIZE = 32
"""Number of values that share a scale in q8_0 and q4_0."""


SUPPORTS = {
    family: {key: values for key, values in hf_architectures.SUPPORTS[family].items() if key != "rope_scaling"}
    for family in ("gpt2", "llama", "qwen3")
}
"""For each architecture, the values of `model:` keys that can be exported. `check_supported` restricts gpt2 to gelu."""


def check_supported(model: ModelVariant, tokenizer: Tokenizer) -> tuple[str, str]:
    """Return llama.cpp's names for the architecture and the pretokenizer. Raises `InputError` if either is not supported."""
    name, unsupported = hf_architectures.find_family(model, SUPPORTS)
    if name is None:
        raise InputError(
            f"llama.cpp does not support {', '.join(unsupported)}",
            where="--to gguf",
            hint="the presets gpt2 and llama are supported",
        )
    model = hf_architectures.decoder_section(model)
    if name == "gpt2" and model.feed_forward != "gelu":
        raise InputError(
            f"llama.cpp's gpt2 does not support feed_forward {model.feed_forward}", where="--to gguf", hint="gelu is supported"
        )
    return name, _supported_pretokenizer(tokenizer)


def _supported_pretokenizer(tokenizer: Tokenizer) -> str:
    """Return llama.cpp's name for the tokenizer's pretokenizer. Raises `InputError` if the tokenizer is not supported."""
    values = json.loads(tokenizer.backend.to_str())
    if tokenizer.kind not in ("bpe", "byte"):
        raise InputError(
            f"llama.cpp does not support tokenizers of the kind {tokenizer.kind}",
            where="--to gguf",
            hint="the kinds bpe and byte are supported",
        )
    ignore_merges = bool(values["model"].get("ignore_merges"))
    name = pretokenizer_name(values["pre_tokenizer"], ignore_merges) if tokenizer.kind == "bpe" else "gpt-2"
    if name is None or values["normalizer"] is not None:
        problem = "normalizes text" if name else "uses a split pattern that llama.cpp does not support"
        hint = "the split gpt2 is supported, and the split gpt4 with digits 1 or 3"
        raise InputError(f"the tokenizer {problem}", where="--to gguf", hint=hint)
    return name


def pretokenizer_name(pre: dict[str, Any] | None, ignore_merges: bool) -> str | None:
    """Return llama.cpp's name for the `pre_tokenizer` in a tokenizer.json, or None if llama.cpp does not support it.

    `ignore_merges` is the BPE setting that encodes a word in the vocabulary as one token without applying merges.
    """
    parts = pre.get("pretokenizers", [pre]) if pre else []
    if not parts or parts[-1].get("type") != "ByteLevel" or parts[-1].get("add_prefix_space"):
        return None
    use_regex, first = parts[-1].get("use_regex", True), parts[:-1]
    if not first:
        return "gpt-2" if use_regex and not ignore_merges else None
    if len(first) > 1:
        return None
    if use_regex:
        splits_digits = first[0] == {"type": "Digits", "individual_digits": True}
        return "smollm" if splits_digits and not ignore_merges else None
    if first[0].get("type") != "Split" or first[0].get("behavior") != "Isolated" or first[0].get("invert"):
        return None
    pattern = first[0]["pattern"].get("Regex")
    if ignore_merges:
        return "llama-bpe" if pattern == split_pattern("gpt4", 3) else None
    return _PATTERN_NAMES.get(pattern)


_PATTERN_NAMES = {
    split_pattern("gpt2", None): "gpt-2",
    split_pattern("gpt4", 1): "qwen2",
    split_pattern("gpt4", 1).replace("{1,1}", ""): "qwen2",  # as in Qwen's own tokenizer.json
    split_pattern("gpt4", 3): "dbrx",
}
"""llama.cpp's names for split patterns. `llama-bpe` has the same pattern as `dbrx` but sets `ignore_merges`."""


# Export.


def write(path: Path, network: Model, tokenizer: Tokenizer, file_type: str, name: str, chat: ChatEncoder | None = None) -> None:
    """Write a GGUF file for a model called `name`, including the template of `chat` if there is one.

    `file_type` is one of `TYPES`. Raises `InputError` if `check_supported` rejects the model or the tokenizer.
    """
    gguf = verify.require("gguf", "gguf", "writing GGUF")
    model = hf_architectures.decoder_section(network.model)
    architecture, pretokenizer = check_supported(model, tokenizer)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType[{"f32": "ALL_F32"}.get(file_type, f"MOSTLY_{file_type.upper()}")])
    _add_hyperparameters(writer, model, architecture)
    _add_tokenizer(writer, gguf, tokenizer, pretokenizer, chat)
    for key, tensor in _tensors(network, architecture, gguf):
        data, quantization = _quantize(tensor.numpy(), _storage_type(key, tensor, file_type), gguf)
        writer.add_tensor(key, data, raw_dtype=quantization)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _add_hyperparameters(writer: Any, model: DecoderSection, architecture: str) -> None:
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


def _add_tokenizer(writer: Any, gguf: Any, tokenizer: Tokenizer, pretokenizer: str, chat: ChatEncoder | None) -> None:
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
    writer.add_tokenizer_pre(pretokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges or [f"{tokens[end or 0]} {tokens[end or 0]}"])  # must not be empty; this merge is never applied
    if end is not None:  # llama.cpp's default would be id 11
        writer.add_bos_token_id(end)
        writer.add_eos_token_id(end if chat is None else chat.end_of_turn)
        writer.add_pad_token_id(end)
    if chat is not None:
        chat_files.add_to_gguf(writer, chat)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)


def _tensors(network: Model, architecture: str, gguf: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor with llama.cpp's name and in llama.cpp's layout. Matrices are (outputs, inputs)."""
    model = hf_architectures.decoder_section(network.model)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], model.n_layer)
    for theirs, tensor in hf_architectures.export_state_dict(network.state_dict(), model, architecture).items():
        if architecture == "gpt2" and ".c_" in theirs and tensor.ndim == 2:
            tensor = tensor.T.contiguous()
        if architecture == "llama" and ".q_proj." in theirs:
            tensor = interleave_rotary_rows(tensor, model.n_head)
        if architecture == "llama" and ".k_proj." in theirs:
            tensor = interleave_rotary_rows(tensor, model.kv_heads)
        yield names.get_name(theirs, try_suffixes=(".weight", ".bias")), tensor


def interleave_rotary_rows(rows: Tensor, heads: int) -> Tensor:
    """Reorder rows so that each head's rotary pairs (i, i + D/2) become neighbors (2i, 2i + 1), as in llama.cpp's Llama."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape).contiguous()


def _storage_type(key: str, tensor: Tensor, file_type: str) -> str:
    """Return the storage type of the tensor that is called `key` in the file.

    Vectors and position embeddings are stored as f32. In a quantized file, matrices are stored as f16 if their row length is not a
    multiple of the block size.
    """
    if tensor.ndim < 2 or key.startswith("position_embd"):
        return "f32"
    if file_type.startswith("q") and tensor.shape[1] % _BLOCK_SIZE:
        return "f16"
    if file_type == "q4_0" and key.startswith(("token_embd", "output.")):
        return "q8_0"  # the embedding and output head are the largest part of a small model and the most sensitive to rounding
    return file_type


def _quantize(values: np.ndarray, storage_type: str, gguf: Any) -> tuple[np.ndarray, Any]:
    """Return the array to store and gguf's constant for a quantized type (None for f32 and f16)."""
    if storage_type == "f32":
        return values.astype(np.float32), None
    if storage_type == "f16":
        return values.astype(np.float16), None
    quantization = gguf.GGMLQuantizationType[storage_type.upper()]
    return gguf.quants.quantize(values.astype(np.float32), quantization), quantization


# Verification.


@dataclass(frozen=True)
class Verification:
    """How the file compares with the run. `largest_difference` is between the file's logits and those of the rounded weights."""

    largest_difference: float
    tokens: int
    perplexity: float
    run_perplexity: float
    programs: tuple[str, ...]
    """Names and versions of the programs that loaded the file."""
    same_greedy: int | None
    """Number of greedily decoded tokens before llama.cpp first differs, at most `GREEDY_TOKENS`. None if llama.cpp was not run."""


def check_export(
    path: Path, network: Model, tokenizer: Tokenizer, text: str, file_type: str, reporter: Reporter = SILENT
) -> Verification:
    """Load the file with other programs and compare it with the run on `text`.

    The logits from transformers must match those of `network` with weights rounded to the file's type, and the file's perplexity
    must be close to the run's. If llama.cpp is installed, it must split the text into the same tokens and compute nearly the same
    perplexity. Raises `WorkError` if a comparison fails, and `InputError` if transformers is not installed.
    """
    transformers = verify.require("transformers", "gguf", "checking a GGUF file")
    rounded = _round_weights(network, file_type)
    rows = verify.windows([tokenizer.end_of_text or 0, *tokenizer.encode(text)], network.model.context_length)
    with huggingface.quiet(transformers):
        other = _load_with_transformers(transformers, path, network)
    difference = verify.largest_difference(rounded, lambda ids: other(ids).logits, rows)
    verify.check_logits(difference, "the GGUF file")
    file_perplexity, run_perplexity = verify.perplexity(lambda ids: other(ids).logits, rows), verify.perplexity(network, rows)
    if file_perplexity > run_perplexity * MAX_PERPLEXITY_RATIO.get(file_type, float("inf")):
        raise WorkError(
            f"the perplexity in {file_type} is {file_perplexity:.4f}, too far above the run's {run_perplexity:.4f}",
            hint="nothing was saved; f16 is more precise",
        )
    programs, same_greedy = [f"transformers {transformers.__version__}"], None
    if llama_cpp.installed():
        version = importlib.metadata.version("llama-cpp-python")
        prompt = rows[0, : _prompt_length(network.model)].tolist()
        result = llama_cpp.run(path, verify.tokenizer_probes(text), rows.tolist(), prompt, GREEDY_TOKENS)
        if isinstance(result, str):
            reporter.warn(f"llama-cpp-python {version} failed; the file was verified with transformers only ({result})")
        else:
            same_greedy = _check_llama_cpp(result, rounded, rows, file_perplexity, tokenizer, text)
            programs.append(f"llama-cpp-python {version}")
    return Verification(difference, rows.numel(), file_perplexity, run_perplexity, tuple(programs), same_greedy)


def _prompt_length(model: ModelVariant) -> int:
    return max(1, min(16, model.context_length - GREEDY_TOKENS))


def _check_llama_cpp(
    result: llama_cpp.LlamaCppResult, network: Model, rows: Tensor, expected: float, tokenizer: Tokenizer, text: str
) -> int:
    """Return the number of greedily decoded tokens before the first difference.

    `expected` is the expected perplexity. Raises `WorkError` if llama.cpp's token ids or perplexity differ.
    """
    ids = dict(zip(verify.tokenizer_probes(text), result.ids, strict=True))
    verify.check_ids(tokenizer, ids.__getitem__, text, "llama.cpp")
    perplexity = perplexity_of(result.nats / max(1, rows.shape[0] * (rows.shape[1] - 1)))
    if not expected / _LLAMA_CPP_MAX_RATIO <= perplexity <= expected * _LLAMA_CPP_MAX_RATIO:
        raise WorkError(
            f"the perplexity is {perplexity:.4f} in llama.cpp but {expected:.4f} in transformers", hint="nothing was saved"
        )
    ours = verify.greedy(network, rows[:1, : _prompt_length(network.model)], len(result.continuation))
    same = [a == b for a, b in zip(ours, result.continuation, strict=True)]
    return same.index(False) if False in same else len(same)


_GGUF_PREFIXES = {"embedding.weight": "token_embd", "positions.weight": "position_embd", "head.weight": "output."}
"""Prefixes of llama.cpp's names for the tensors that `_storage_type` treats differently."""


def _round_weights(network: Model, file_type: str) -> Model:
    """Return a copy of the network with its weights rounded as in the file.

    A quantization block never spans two rows, so it does not matter that the file changes the row order.
    """
    import gguf

    rounded = registry.build(network.model, network.vocab_size, None)
    rounded.load_state_dict(network.state_dict())
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            key = _GGUF_PREFIXES.get(name, name)
            data, quantization = _quantize(parameter.numpy(), _storage_type(key, parameter, file_type), gguf)
            restored = data.astype(np.float32) if quantization is None else gguf.quants.dequantize(data, quantization)
            parameter.copy_(torch.from_numpy(restored))
    return rounded.eval()


def _load_with_transformers(transformers: Any, path: Path, network: Model) -> Any:
    """Load the file with transformers. Pass the settings that its GGUF reader ignores: positions, head width and biases."""
    model = hf_architectures.decoder_section(network.model)
    family, _ = hf_architectures.find_family(model, SUPPORTS)
    assert family is not None
    extra = {}
    if family != "llama" or model.bias:
        config = hf_architectures.make_config(model, family, network.vocab_size)
        extra["config"] = transformers.AutoConfig.for_model(family, **{k: v for k, v in config.items() if k != "model_type"})
    loader = transformers.AutoModelForCausalLM
    return loader.from_pretrained(path.parent, gguf_file=path.name, **extra, **huggingface.float32_argument(transformers)).eval()

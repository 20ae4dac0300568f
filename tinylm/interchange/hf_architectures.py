"""Map between tinylm's `model:` section and the transformers classes that compute the same function.

This module converts config.json files and state dicts in both directions for four families: gpt2, llama, qwen3 (Llama with query
and key norms) and mistral (Llama with an attention window). They differ from tinylm's decoder only in tensor names and layouts.
GPT-2's Conv1D stores matrices as (inputs, outputs). Llama stores separate matrices for queries, keys and values, and for SwiGLU's
gate and up projections. Rotary embeddings pair dimension i with i + D/2, as in tinylm. Missing biases are set to zero, and missing
norm gains to one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tinylm.errors import InputError
from tinylm.interchange import config_types, hf_variants
from tinylm.interchange.rope_config import export_rope_scaling, import_rope
from tinylm.recipe.schema import DecoderSection, ModelVariant
from tinylm.recipe.support import ANY, SIZES, TRAINING, Supports, unsupported_parts
from tinylm.recipe.values import show

CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
}
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2", "phi3", "gemma", "gemma2", "gemma3_text")
"""Values of `model_type` that are imported like Llama. These models differ in details such as sliding windows, biases and norms."""

_ACTIVATIONS = {"gelu": "gelu_new", "gelu_exact": "gelu", "relu": "relu", "relu2": "relu2"}
_ACTIVATIONS_FROM_HF = {**{theirs: ours for ours, theirs in _ACTIVATIONS.items()}, "gelu_pytorch_tanh": "gelu"}
_BUFFERS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
"""Name endings of non-parameter buffers in older checkpoints."""


_ALL_FAMILIES: Supports = {
    "architecture": ("decoder",),
    **SIZES,
    **TRAINING,
    "norm_position": ("pre",),
    "norm_gain": ANY,  # a model without gains is exported with gains of one
    "embedding_norm": (False,),
    "rope_theta": ANY,
    "qk_gain": ANY,
    "bias": ANY,
    "tie_embeddings": ANY,
}
_LLAMA_LIKE: Supports = {
    **_ALL_FAMILIES,
    "norm": ("rmsnorm",),
    "position": ("rope",),
    "feed_forward": ("swiglu",),
    "rope_scaling": lambda model: model.rope_scaling is None or model.rope_scaling.type in ("linear", "llama3", "yarn"),
}
SUPPORTS: dict[str, Supports] = {
    "gpt2": {
        **_ALL_FAMILIES,
        "norm": ("layernorm",),
        "position": ("learned",),
        "qk_norm": (False,),
        "feed_forward": tuple(_ACTIVATIONS),
        "n_kv_head": lambda model: model.kv_heads == model.n_head,
        "head_dim": lambda model: model.n_head * model.head_width == model.n_embd,
    },
    "llama": {**_LLAMA_LIKE, "qk_norm": (False,)},
    "qwen3": {**_LLAMA_LIKE, "qk_norm": (True,), "bias": (False,)},
    "mistral": {
        **_LLAMA_LIKE,
        "qk_norm": (False,),
        "bias": (False,),
        "attention_window": lambda model: model.attention_window is not None,
        "attention_pattern": lambda model: {*model.attention_pattern} == {"local"},
    },
}
"""The values of `model:` keys that each family supports."""


def find_family(model: ModelVariant, families: Mapping[str, Supports] = SUPPORTS) -> tuple[str | None, tuple[str, ...]]:
    """Return the family that supports `model`. If there is none, return None and the parts that the closest family lacks."""
    unsupported = {family: unsupported_parts(model, supports) for family, supports in families.items()}
    closest = min(unsupported, key=lambda family: len(unsupported[family]))
    return (None, unsupported[closest]) if unsupported[closest] else (closest, ())


def decoder_section(model: ModelVariant) -> DecoderSection:
    """Return `model` if it is a decoder section. Raises `InputError` for any other architecture."""
    if not isinstance(model, DecoderSection):
        raise InputError(f"only decoders can be exported in this format, not the {model.architecture} architecture", where="--to")
    return model


# Export.


def make_config(model: DecoderSection, family: str, vocab_size: int) -> dict[str, Any]:
    """Return the contents of config.json for a model in `family`, without the special token ids."""
    shared = {
        "architectures": [CLASSES[family]],
        "model_type": family,
        "vocab_size": vocab_size,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": 0.02,
        "torch_dtype": "float32",
        "use_cache": True,
    }
    if family == "gpt2":
        return {
            **shared,
            "n_positions": model.context_length,
            "n_ctx": model.context_length,
            "n_embd": model.n_embd,
            "n_layer": model.n_layer,
            "n_head": model.n_head,
            "n_inner": model.feed_forward_width,
            "activation_function": _ACTIVATIONS[model.feed_forward],
            "layer_norm_epsilon": model.norm_eps,
            "resid_pdrop": model.dropout,
            "embd_pdrop": model.dropout,
            "attn_pdrop": model.attention_dropout_p,
        }
    return {
        **shared,
        "max_position_embeddings": model.context_length,
        "hidden_size": model.n_embd,
        "intermediate_size": model.feed_forward_width,
        "num_hidden_layers": model.n_layer,
        "num_attention_heads": model.n_head,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_width,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta or 10000.0,
        "rope_scaling": export_rope_scaling(model.rope_scaling),
        "attention_dropout": model.attention_dropout_p,
        **({"attention_bias": model.bias} if family != "mistral" else {"sliding_window": model.attention_window}),
        **({"mlp_bias": model.bias} if family == "llama" else {}),
    }


def export_state_dict(state: Mapping[str, Tensor], model: DecoderSection, family: str) -> dict[str, Tensor]:
    """Convert a network's state dict to the names and layouts of `family`. A tied output head is omitted."""
    get = _with_defaults(state, model)
    converted = _to_gpt2(get, model) if family == "gpt2" else _to_llama(get, model)
    head = "lm_head.weight"
    return {key: tensor.contiguous().clone() for key, tensor in converted if not (model.tie_embeddings and key == head)}


def _with_defaults(state: Mapping[str, Tensor], model: DecoderSection) -> Callable[[str], Tensor]:
    """Return a function that looks up a tensor. It returns ones for missing gains and zeros for missing biases."""

    def get(key: str) -> Tensor:
        if key in state:
            return state[key]
        weight = f"{key.rpartition('.')[0]}.weight"
        if key.endswith("_gain"):
            return torch.ones(model.head_width)
        if weight in state:
            return torch.zeros(state[weight].shape[0])
        return torch.ones(model.n_embd) if key.endswith(".weight") else torch.zeros(model.n_embd)

    return get


_GPT2_BLOCK_NAMES = {
    "attention_norm": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.output": "attn.c_proj",
    "feed_forward_norm": "ln_2",
    "feed_forward.input": "mlp.c_fc",
    "feed_forward.output": "mlp.c_proj",
}
_GPT2_OUTER_NAMES = {
    "embedding.weight": "transformer.wte.weight",
    "positions.weight": "transformer.wpe.weight",
    "final_norm.weight": "transformer.ln_f.weight",
    "final_norm.bias": "transformer.ln_f.bias",
    "head.weight": "lm_head.weight",
}


def _gpt2_names(n_layer: int) -> Iterator[tuple[str, str, bool]]:
    """Yield (tinylm's name, GPT-2's name, whether GPT-2 stores the tensor as a Conv1D matrix)."""
    for ours, theirs in _GPT2_OUTER_NAMES.items():
        yield ours, theirs, False
    for layer in range(n_layer):
        for ours, theirs in _GPT2_BLOCK_NAMES.items():
            for part in ("weight", "bias"):
                yield f"blocks.{layer}.{ours}.{part}", f"transformer.h.{layer}.{theirs}.{part}", part == "weight" and "." in ours


def _to_gpt2(get: Callable[[str], Tensor], model: DecoderSection) -> Iterator[tuple[str, Tensor]]:
    for ours, theirs, is_conv1d in _gpt2_names(model.n_layer):
        tensor = get(ours)
        yield theirs, tensor.T if is_conv1d else tensor


_LLAMA_OUTER_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_LLAMA_BLOCK_NAMES = {
    "attention_norm.weight": "input_layernorm.weight",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
    "attention.output.weight": "self_attn.o_proj.weight",
    "feed_forward.output.weight": "mlp.down_proj.weight",
}
_LLAMA_FUSED_NAMES = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "feed_forward.input": ("mlp.gate_proj", "mlp.up_proj"),
}
_QWEN3_GAIN_NAMES = {"attention.query_gain": "self_attn.q_norm.weight", "attention.key_gain": "self_attn.k_norm.weight"}
_LLAMA_BIAS_NAMES = {"attention.output.bias": "self_attn.o_proj.bias", "feed_forward.output.bias": "mlp.down_proj.bias"}


def _llama_block_names(model: DecoderSection) -> dict[str, str]:
    biases = _LLAMA_BIAS_NAMES if model.bias else {}
    return _LLAMA_BLOCK_NAMES | biases | (_QWEN3_GAIN_NAMES if model.qk_norm else {})


def _llama_fused_rows(model: DecoderSection) -> dict[str, tuple[int, ...]]:
    """Return the number of rows of each Llama matrix in tinylm's fused matrices."""
    kv_rows = model.kv_heads * model.head_width
    return {
        "attention.qkv": (model.n_head * model.head_width, kv_rows, kv_rows),
        "feed_forward.input": (model.feed_forward_width, model.feed_forward_width),
    }


def _to_llama(get: Callable[[str], Tensor], model: DecoderSection) -> Iterator[tuple[str, Tensor]]:
    for ours, theirs in _LLAMA_OUTER_NAMES.items():
        yield theirs, get(ours)
    for layer in range(model.n_layer):
        our_block, their_block = f"blocks.{layer}", f"model.layers.{layer}"
        for ours, theirs in _llama_block_names(model).items():
            yield f"{their_block}.{theirs}", get(f"{our_block}.{ours}")
        for fused, rows in _llama_fused_rows(model).items():
            for part in ("weight", "bias") if model.bias else ("weight",):
                tensors = torch.split(get(f"{our_block}.{fused}.{part}"), list(rows))
                for name, tensor in zip(_LLAMA_FUSED_NAMES[fused], tensors, strict=True):
                    yield f"{their_block}.{name}.{part}", tensor


# Import.


def model_section_from_config(config: Mapping[str, Any], tensors: Mapping[str, Any], where: str) -> DecoderSection:
    """Return the `model:` section for the model that config.json describes.

    The names of `tensors` show whether a Llama model has biases. Raises `InputError` if the model is not supported.
    """
    kind = config.get("model_type")
    if kind not in IMPORTED:
        raise InputError(f"unsupported model_type {show(kind)} (supported: {', '.join(IMPORTED)})", where=where)
    config_types.check_types(config, where)
    try:
        _check_supported(config, kind, where)
        if kind == "gpt2":
            values = _gpt2_section_values(config)
        elif kind in LLAMA_LIKE:
            values = {**_llama_section_values(config, tensors, where), **hf_variants.section_values(config, where)}
        else:
            values = hf_variants.section_values(config, where)
        model = DecoderSection.model_validate(values)
        for key, problem in model.problems():
            raise InputError(f"invalid model configuration: {key} {problem}", where=where)
        return model
    except KeyError as error:
        raise InputError(f"missing key {error}", where=where) from None
    except ValueError as error:
        raise InputError(f"invalid model configuration: {' '.join(str(error).split())}", where=where) from None


_REQUIRED_SETTINGS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "quantization_config": None,
    },
    "llama": {"hidden_act": "silu", "quantization_config": None},
}
"""Keys in config.json that affect the computation, with the only supported value of each."""


IMPORTED = ("gpt2", *LLAMA_LIKE, *hf_variants.CONVERTED)
"""Values of `model_type` that can be imported."""


def _check_supported(config: Mapping[str, Any], kind: str, where: str) -> None:
    for key, value in {**hf_variants.REQUIRED_SETTINGS, **_REQUIRED_SETTINGS}.get(kind, _REQUIRED_SETTINGS["llama"]).items():
        if config.get(key, value) != value:
            raise InputError(f"{key} {show(config[key])} is not supported", where=where)
    if kind == "gpt2" and config.get("activation_function", "gelu_new") not in _ACTIVATIONS_FROM_HF:
        raise InputError(f"activation_function {show(config['activation_function'])} is not supported", where=where)


def _gpt2_section_values(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "preset": "gpt2",
        "n_layer": config["n_layer"],
        "n_head": config["n_head"],
        "n_embd": config["n_embd"],
        "n_inner": config.get("n_inner") or 4 * config["n_embd"],
        "context_length": config.get("n_positions", config.get("n_ctx", 1024)),
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "feed_forward": _ACTIVATIONS_FROM_HF.get(config.get("activation_function", "gelu_new"), "gelu"),
        "tie_embeddings": config.get("tie_word_embeddings", True),
    }


def _llama_section_values(config: Mapping[str, Any], tensors: Mapping[str, Any], where: str) -> dict[str, Any]:
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or width // heads
    context = config.get("max_position_embeddings", 2048)
    all_local = config["model_type"] in ("mistral", "phi3")
    windowed = config.get("use_sliding_window", all_local)
    window = config.get("sliding_window") if windowed else None
    return {
        "preset": "llama",
        "n_layer": config["num_hidden_layers"],
        "n_head": heads,
        "n_kv_head": config.get("num_key_value_heads") or heads,
        "n_embd": width,
        "head_dim": None if head_dim * heads == width else head_dim,
        "n_inner": config["intermediate_size"],
        # In Qwen models, only some blocks have a window, which has no effect on sequences that fit into it.
        "context_length": context if all_local else min(context, window or context),
        "attention_window": window if all_local and window and window < context else None,
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        **import_rope(config, where),
        "bias": any(name.endswith("_proj.bias") for name in tensors),
        "qk_norm": config["model_type"] == "qwen3",
        "tie_embeddings": config.get("tie_word_embeddings", False),
    }


def import_state_dict(
    tensors: Mapping[str, Tensor], model: DecoderSection, kind: str, where: str, config: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """Convert a state dict from another program to tinylm's names and layouts.

    `kind` is the `model_type`, or "nanogpt" for GPT-2 without Conv1D's transposed layout. `config` contains the contents of
    config.json. Raises `InputError` with the names of missing and unexpected tensors.
    """
    remaining = dict(tensors)
    if kind in ("gpt2", "nanogpt"):
        remaining = {
            name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": tensor
            for name, tensor in remaining.items()
        }
    remaining = {name: tensor for name, tensor in remaining.items() if not name.endswith(_BUFFERS)}
    missing: list[str] = []

    def pop(name: str, zeros: int | None = None) -> Tensor:
        """Remove a tensor from `remaining` and return it. If it is missing, return `zeros` zeros or record the missing name."""
        if name in remaining:
            return remaining.pop(name).float()
        if zeros is None:
            missing.append(name)
        return torch.zeros(zeros or 0)

    if kind in ("gpt2", "nanogpt"):
        state = dict(_from_gpt2(pop, model, transposed=kind == "gpt2"))
    elif kind in LLAMA_LIKE:
        if kind == "phi3":
            remaining = hf_variants.split_fused(remaining, model)
        state = dict(_from_llama(pop, model, hf_variants.BLOCK_NAMES.get(kind)))
        if not missing:
            state = hf_variants.adjust(state, model, kind, (config or {}).get("query_pre_attn_scalar"))
    else:
        state = dict(hf_variants.convert(pop, model, kind))
    for head in ("lm_head.weight", "embed_out.weight"):  # some files also store a tied head
        remaining.pop(head, None)
    if missing or remaining:
        problems = [f"missing tensors: {_abbreviate(missing)}"] if missing else []
        problems += [f"unexpected tensors: {_abbreviate(sorted(remaining))}"] if remaining else []
        raise InputError("; ".join(problems), where=where)
    return state


def _abbreviate(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


PopTensor = Callable[..., Tensor]
"""The type of the function `pop` in `import_state_dict`."""


def _from_gpt2(pop: PopTensor, model: DecoderSection, transposed: bool) -> Iterator[tuple[str, Tensor]]:
    for ours, theirs, is_conv1d in _gpt2_names(model.n_layer):
        tied = ours == "head.weight" and model.tie_embeddings
        if not tied and (model.bias or not ours.endswith("bias")):
            tensor = pop(theirs)
            yield ours, tensor.T.contiguous() if is_conv1d and transposed and tensor.ndim == 2 else tensor


def _from_llama(pop: PopTensor, model: DecoderSection, norms: Mapping[str, str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield a network's tensors. `norms` replaces the norms in `_LLAMA_BLOCK_NAMES` for architectures with different norms."""
    rows = _llama_fused_rows(model)
    block_names = _llama_block_names(model)
    if norms is not None:
        block_names = {ours: theirs for ours, theirs in block_names.items() if "_norm." not in ours} | dict(norms)
    for ours, theirs in _LLAMA_OUTER_NAMES.items():
        if not (ours == "head.weight" and model.tie_embeddings):
            yield ours, pop(theirs)
    for layer in range(model.n_layer):
        our_block, their_block = f"blocks.{layer}", f"model.layers.{layer}"
        for ours, theirs in block_names.items():
            yield f"{our_block}.{ours}", pop(f"{their_block}.{theirs}", model.n_embd if ours.endswith("bias") else None)
        for fused, names in _LLAMA_FUSED_NAMES.items():
            yield f"{our_block}.{fused}.weight", torch.cat([pop(f"{their_block}.{name}.weight") for name in names])
            if model.bias:
                parts = [pop(f"{their_block}.{name}.bias", size) for name, size in zip(names, rows[fused], strict=True)]
                yield f"{our_block}.{fused}.bias", torch.cat(parts)

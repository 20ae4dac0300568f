"""Which of transformers' own classes computes what a `model:` section computes: its config.json and names of tensors, both ways.

Three families are known: gpt2, llama, and qwen3, which is Llama with normalised queries and keys. Their differences from
`Transformer` are names and layouts only: Conv1D stores its matrices as (inputs, outputs); Llama keeps queries, keys and values
apart, and gate and values of SwiGLU. Both turn the same halves in rotary positions. A bias that one side lacks is zero, a gain one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tinylm.errors import InputError
from tinylm.recipe.schema import ModelSection

FAMILIES = ("gpt2", "llama", "qwen3")
CLASSES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3")
"""Model types of config.json with Llama's mathematics; Mistral and Qwen2 differ in windows and biases only."""

_ACTIVATIONS = {"gelu": "gelu_new", "gelu_exact": "gelu", "relu": "relu", "relu2": "relu2"}
_READ_ACTIVATIONS = {**{theirs: ours for ours, theirs in _ACTIVATIONS.items()}, "gelu_pytorch_tanh": "gelu"}
_BUFFERS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")
"""Endings of what older files hold beside weights."""


def family(model: ModelSection) -> tuple[str | None, tuple[str, ...]]:
    """The family that computes the same, or None and the parts that the nearest one lacks."""
    found = {name: obstacles(model, name) for name in FAMILIES}
    name = min(found, key=lambda name: len(found[name]))
    return (None, found[name]) if found[name] else (name, ())


def obstacles(model: ModelSection, name: str) -> tuple[str, ...]:
    """The parts of `model` that family `name` has no place for, as a recipe would say them."""
    wanted: dict[str, Any] = {
        "norm_position": "pre",
        "embedding_norm": False,
        "ngram_embeddings": (),
        "value_embeddings": 0,
        "value_residual": False,
        "embedding_shortcut": False,
        "parallel_residual": False,
        "logit_softcap": None,
    }
    if name == "gpt2":
        wanted |= {"norm": "layernorm", "position": "learned", "qk_norm": False}
    else:
        wanted |= {"norm": "rmsnorm", "position": "rope", "qk_norm": name == "qwen3", "feed_forward": "swiglu"}
    found = [f"{key} {_said(getattr(model, key))}" for key, value in wanted.items() if getattr(model, key) != value]
    if name == "gpt2":
        found += ["feed_forward swiglu"] if model.feed_forward == "swiglu" else []
        found += [f"n_kv_head {model.kv_heads}"] if model.kv_heads != model.n_head else []
        found += [f"head_dim {model.head_dim}"] if model.n_head * model.head_width != model.n_embd else []
    elif name == "qwen3" and model.bias:
        found.append("bias true")
    return tuple(found)


def _said(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value).lower()


# Writing.


def config_of(model: ModelSection, name: str, vocab_size: int) -> dict[str, Any]:
    """config.json of a model of family `name`, without its special ids."""
    shared = {
        "architectures": [CLASSES[name]],
        "model_type": name,
        "vocab_size": vocab_size,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": 0.02,
        "torch_dtype": "float32",
        "use_cache": True,
    }
    if name == "gpt2":
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
            "attn_pdrop": model.attention_drops,
        }
    theta = model.rope_theta or 10000.0
    biases = {"attention_bias": model.bias}
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
        "rope_theta": theta,
        "rope_scaling": None,
        "attention_dropout": model.attention_drops,
        **(biases | {"mlp_bias": model.bias} if name == "llama" else biases),
    }


def tensors_of(state: Mapping[str, Tensor], model: ModelSection, name: str) -> dict[str, Tensor]:
    """A network's state dict under the names and in the layout of family `name`; a tied head is left out."""
    complete = _with_defaults(state, model)
    written = _as_gpt2(complete, model) if name == "gpt2" else _as_llama(complete, model, name)
    head = "lm_head.weight"
    return {key: tensor.contiguous().clone() for key, tensor in written if not (model.tie_embeddings and key == head)}


def _with_defaults(state: Mapping[str, Tensor], model: ModelSection) -> Callable[[str], Tensor]:
    """Look up a tensor; a gain that the model does without is one, a bias zero."""

    def look_up(key: str) -> Tensor:
        if key in state:
            return state[key]
        beside = f"{key.rpartition('.')[0]}.weight"
        if key.endswith("_gain"):
            return torch.ones(model.head_width)
        if beside in state:
            return torch.zeros(state[beside].shape[0])
        return torch.ones(model.n_embd) if key.endswith(".weight") else torch.zeros(model.n_embd)

    return look_up


_GPT2_LAYER = {
    "attention_norm": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.output": "attn.c_proj",
    "feed_forward_norm": "ln_2",
    "feed_forward.input": "mlp.c_fc",
    "feed_forward.output": "mlp.c_proj",
}
_GPT2_ENDS = {
    "embedding.weight": "transformer.wte.weight",
    "positions.weight": "transformer.wpe.weight",
    "final_norm.weight": "transformer.ln_f.weight",
    "final_norm.bias": "transformer.ln_f.bias",
    "head.weight": "lm_head.weight",
}


def _gpt2_names(layers: int) -> Iterator[tuple[str, str, bool]]:
    """(our name, theirs, whether it is a matrix inside a block, stored by Conv1D)."""
    for ours, theirs in _GPT2_ENDS.items():
        yield ours, theirs, False
    for layer in range(layers):
        for ours, theirs in _GPT2_LAYER.items():
            for part in ("weight", "bias"):
                yield f"blocks.{layer}.{ours}.{part}", f"transformer.h.{layer}.{theirs}.{part}", part == "weight" and "." in ours


def _as_gpt2(state: Callable[[str], Tensor], model: ModelSection) -> Iterator[tuple[str, Tensor]]:
    for ours, theirs, conv in _gpt2_names(model.n_layer):
        tensor = state(ours)
        yield theirs, tensor.T if conv else tensor


_LLAMA_ENDS = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_LLAMA_LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
    "attention.output.weight": "self_attn.o_proj.weight",
    "feed_forward.output.weight": "mlp.down_proj.weight",
}
_LLAMA_JOINED = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "feed_forward.input": ("mlp.gate_proj", "mlp.up_proj"),
}
_QWEN3_GAINS = {"attention.query_gain": "self_attn.q_norm.weight", "attention.key_gain": "self_attn.k_norm.weight"}
_LLAMA_BIASES = {"attention.output.bias": "self_attn.o_proj.bias", "feed_forward.output.bias": "mlp.down_proj.bias"}


def _llama_layer(model: ModelSection) -> dict[str, str]:
    biases = _LLAMA_BIASES if model.bias else {}
    return _LLAMA_LAYER | biases | (_QWEN3_GAINS if model.qk_norm else {})


def _llama_rows(model: ModelSection) -> dict[str, tuple[int, ...]]:
    keys = model.kv_heads * model.head_width
    return {
        "attention.qkv": (model.n_head * model.head_width, keys, keys),
        "feed_forward.input": (model.feed_forward_width, model.feed_forward_width),
    }


def _as_llama(state: Callable[[str], Tensor], model: ModelSection, name: str) -> Iterator[tuple[str, Tensor]]:
    for ours, theirs in _LLAMA_ENDS.items():
        yield theirs, state(ours)
    for layer in range(model.n_layer):
        here, there = f"blocks.{layer}", f"model.layers.{layer}"
        for ours, theirs in _llama_layer(model).items():
            yield f"{there}.{theirs}", state(f"{here}.{ours}")
        for joined, rows in _llama_rows(model).items():
            for part in ("weight", "bias") if model.bias else ("weight",):
                pieces = torch.split(state(f"{here}.{joined}.{part}"), list(rows))
                yield from ((f"{there}.{name}.{part}", piece) for name, piece in zip(_LLAMA_JOINED[joined], pieces, strict=True))


# Reading.


def model_of(config: Mapping[str, Any], tensors: Mapping[str, Any], where: str) -> ModelSection:
    """The `model:` section that computes what config.json describes. Raises `InputError` for what no section computes."""
    kind = config.get("model_type")
    if kind != "gpt2" and kind not in LIKE_LLAMA:
        known = ", ".join(("gpt2", *LIKE_LLAMA))
        raise InputError(f"a model of type {kind!r} is not read here (known: {known})", where=where)
    try:
        parts = _gpt2_parts(config) if kind == "gpt2" else _llama_parts(config, tensors)
        _check_all_taken(config, kind, where)
        return ModelSection.model_validate(parts)
    except KeyError as error:
        raise InputError(f"lacks {error}", where=where) from None
    except ValueError as error:
        raise InputError(f"not the shape of a model: {' '.join(str(error).split())}", where=where) from None


_REFUSED_PARTS: dict[str, dict[str, Any]] = {
    "gpt2": {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    "llama": {"hidden_act": "silu", "quantization_config": None},
}
"""Settings that change the mathematics, with the value that leaves it as it is here."""


def _check_all_taken(config: Mapping[str, Any], kind: str, where: str) -> None:
    plain: dict[str, Any] = {**_REFUSED_PARTS["gpt2" if kind == "gpt2" else "llama"], "quantization_config": None}
    for key, value in plain.items():
        if config.get(key, value) != value:
            raise InputError(f"{key} {config[key]!r} is not computed here", where=where)
    if kind == "gpt2" and config.get("activation_function", "gelu_new") not in _READ_ACTIVATIONS:
        raise InputError(f"activation_function {config['activation_function']!r} is not computed here", where=where)
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key) or {}
        scaled = rope.get("rope_type", rope.get("type", "default")) != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0
        if scaled:
            raise InputError(f"scaled rotary positions ({rope}) are not computed here", where=where)


def _gpt2_parts(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "preset": "gpt2",
        "n_layer": config["n_layer"],
        "n_head": config["n_head"],
        "n_embd": config["n_embd"],
        "n_inner": config.get("n_inner") or 4 * config["n_embd"],
        "context_length": config.get("n_positions", config.get("n_ctx", 1024)),
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "feed_forward": _READ_ACTIVATIONS.get(config.get("activation_function", "gelu_new"), "gelu"),
        "tie_embeddings": config.get("tie_word_embeddings", True),
    }


def _llama_parts(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    heads, width = config["num_attention_heads"], config["hidden_size"]
    theta = (config.get("rope_parameters") or {}).get("rope_theta", config.get("rope_theta")) or 10000.0
    head_dim = config.get("head_dim") or width // heads
    context = config.get("max_position_embeddings", 2048)
    windowed = config.get("use_sliding_window", config["model_type"] == "mistral")
    window = config.get("sliding_window") if windowed else None
    return {
        "preset": "llama",
        "n_layer": config["num_hidden_layers"],
        "n_head": heads,
        "n_kv_head": config.get("num_key_value_heads") or heads,
        "n_embd": width,
        "head_dim": None if head_dim * heads == width else head_dim,
        "n_inner": config["intermediate_size"],
        "context_length": min(context, window or context),  # within a window nothing is out of sight
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_theta": float(theta),
        "bias": any(name.endswith("_proj.bias") for name in tensors),
        "qk_norm": config["model_type"] == "qwen3",
        "tie_embeddings": config.get("tie_word_embeddings", False),
    }


def state_of(tensors: Mapping[str, Tensor], model: ModelSection, kind: str, where: str) -> dict[str, Tensor]:
    """Our state dict of a family's tensors; kind `nanogpt` is GPT-2 without Conv1D's layout.

    Raises `InputError`, naming them, for tensors that are missing or left over.
    """
    there = dict(tensors)
    if kind in ("gpt2", "nanogpt"):
        there = {name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": t for name, t in there.items()}
    there = {name: tensor for name, tensor in there.items() if not name.endswith(_BUFFERS)}
    missing: list[str] = []

    def take(name: str, zeros: int | None = None) -> Tensor:
        """A tensor, once; where it is missing so many zeros, if they stand for it."""
        if name in there:
            return there.pop(name).float()
        if zeros is None:
            missing.append(name)
        return torch.zeros(zeros or 0)

    read = _from_llama(take, model) if kind in LIKE_LLAMA else _from_gpt2(take, model, transposed=kind == "gpt2")
    state = dict(read)
    there.pop("lm_head.weight", None)  # a tied head may be stored too
    if missing or there:
        told = [f"lacks {_some(missing)}"] if missing else []
        told += [f"holds {_some(sorted(there))}, which has no place here"] if there else []
        raise InputError("; ".join(told), where=where)
    return state


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


Take = Callable[..., Tensor]


def _from_gpt2(take: Take, model: ModelSection, transposed: bool) -> Iterator[tuple[str, Tensor]]:
    for ours, theirs, conv in _gpt2_names(model.n_layer):
        tied = ours == "head.weight" and model.tie_embeddings
        if not tied and (model.bias or not ours.endswith("bias")):
            tensor = take(theirs)
            yield ours, tensor.T.contiguous() if conv and transposed and tensor.ndim == 2 else tensor


def _from_llama(take: Take, model: ModelSection) -> Iterator[tuple[str, Tensor]]:
    rows = _llama_rows(model)
    for ours, theirs in _LLAMA_ENDS.items():
        if not (ours == "head.weight" and model.tie_embeddings):
            yield ours, take(theirs)
    for layer in range(model.n_layer):
        here, there = f"blocks.{layer}", f"model.layers.{layer}"
        for ours, theirs in _llama_layer(model).items():
            yield f"{here}.{ours}", take(f"{there}.{theirs}", model.n_embd if ours.endswith("bias") else None)
        for joined, names in _LLAMA_JOINED.items():
            yield f"{here}.{joined}.weight", torch.cat([take(f"{there}.{name}.weight") for name in names])
            if model.bias:
                parts = [take(f"{there}.{name}.bias", size) for name, size in zip(names, rows[joined], strict=True)]
                yield f"{here}.{joined}.bias", torch.cat(parts)

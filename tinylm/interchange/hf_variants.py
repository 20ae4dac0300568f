"""Import models of further transformers architectures: GPT-NeoX (Pythia), GPT-Neo (TinyStories), SmolLM3, OLMo 2, Gemma, Phi.

Each model is converted to a decoder that computes the same logits. Differences that the `model:` section cannot express are folded
into the weights. GPT-Neo does not scale attention scores by 1 / sqrt(D). Gemma scales them by a different factor and adds 1 to norm
gains. GPT-NeoX and Phi rotate only the first dimensions of a head, which are reordered into pairs (i, i + D/2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tinylm.errors import InputError
from tinylm.interchange.rope_config import import_rope, import_rope_scaling
from tinylm.recipe.schema import DecoderSection
from tinylm.recipe.values import show

PopTensor = Callable[..., Tensor]
CONVERTED = ("gpt_neox", "gpt_neo", "phi")
"""Values of `model_type` that `convert` supports. The other architectures use Llama's tensor names, except for norms."""

_ACTIVATIONS = {"gelu_new": "gelu", "gelu_fast": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact", "relu": "relu"}
_GEMMA_ACTIVATION = "gelu_pytorch_tanh"
REQUIRED_SETTINGS: dict[str, dict[str, Any]] = {
    "gpt_neox": {"quantization_config": None},
    "gpt_neo": {"quantization_config": None},
    "phi": {"qk_layernorm": False, "quantization_config": None},
    "phi3": {"hidden_act": "silu", "quantization_config": None},
    "gemma": {"attention_bias": False, "quantization_config": None},
    "gemma2": {"hidden_activation": _GEMMA_ACTIVATION, "attention_bias": False, "quantization_config": None},
    "gemma3_text": {
        "hidden_activation": _GEMMA_ACTIVATION,
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "use_bidirectional_attention": False,
        "quantization_config": None,
    },
}
"""Keys in config.json that affect the computation, with the only supported value of each."""

_GEMMA_NORMS = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention_output_norm.weight": "post_attention_layernorm.weight",
    "feed_forward_norm.weight": "pre_feedforward_layernorm.weight",
    "feed_forward_output_norm.weight": "post_feedforward_layernorm.weight",
}
BLOCK_NAMES: dict[str, Mapping[str, str]] = {
    "olmo2": {
        "attention_norm.weight": "post_attention_layernorm.weight",
        "feed_forward_norm.weight": "post_feedforward_layernorm.weight",
    },
    "gemma2": _GEMMA_NORMS,
    "gemma3_text": _GEMMA_NORMS,
}
"""Names of the norms in a block, for architectures whose names differ from Llama's."""


def section_values(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return values for the `model:` section. For Llama-like architectures, return only the values that differ from Llama's."""
    functions = {
        "gpt_neox": _gpt_neox,
        "gpt_neo": _gpt_neo,
        "phi": _phi,
        "smollm3": _smollm3,
        "olmo2": _olmo2,
        "gemma": _gemma1,
        "gemma2": _gemma,
        "gemma3_text": _gemma,
    }
    function = functions.get(config["model_type"])
    return {} if function is None else function(config, where)


def _activation(name: str, where: str) -> str:
    if name not in _ACTIVATIONS:
        raise InputError(f"activation {show(name)} is not supported", where=where)
    return _ACTIVATIONS[name]


def _gpt_neox(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {
        "preset": "gpt2",
        "n_layer": config["num_hidden_layers"],
        "n_head": config["num_attention_heads"],
        "n_embd": config["hidden_size"],
        "n_inner": config["intermediate_size"],
        "context_length": config.get("max_position_embeddings", 2048),
        "norm_eps": config.get("layer_norm_eps", 1e-5),
        "position": "rope",
        **import_rope({"rotary_pct": 0.25, **config}, where),
        "feed_forward": _activation(config.get("hidden_act", "gelu"), where),
        "parallel_residual": config.get("use_parallel_residual", True),
        "tie_embeddings": config.get("tie_word_embeddings", False),
    }


def _gpt_neo(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    kinds = [kind for kinds, count in config["attention_types"] for kind in kinds * count]
    if set(kinds) - {"global", "local"} or len(kinds) != config["num_layers"]:
        raise InputError(f"invalid attention_types {show(config['attention_types'])}", where=where)
    windowed = {"attention_window": config.get("window_size", 256), "attention_pattern": kinds} if "local" in kinds else {}
    return {
        "preset": "gpt2",
        "n_layer": config["num_layers"],
        "n_head": config["num_heads"],
        "n_embd": config["hidden_size"],
        "n_inner": config.get("intermediate_size") or 4 * config["hidden_size"],
        "context_length": config.get("max_position_embeddings", 2048),
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "feed_forward": _activation(config.get("activation_function", "gelu_new"), where),
        "tie_embeddings": config.get("tie_word_embeddings", True),
        **windowed,
    }


def _phi(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {
        "preset": "gpt2",
        "n_layer": config["num_hidden_layers"],
        "n_head": config["num_attention_heads"],
        "n_kv_head": config.get("num_key_value_heads"),
        "n_embd": config["hidden_size"],
        "n_inner": config["intermediate_size"],
        "context_length": config.get("max_position_embeddings", 2048),
        "norm_eps": config.get("layer_norm_eps", 1e-5),
        "position": "rope",
        **import_rope({"partial_rotary_factor": 0.5, **config}, where),
        "feed_forward": _activation(config.get("hidden_act", "gelu_new"), where),
        "parallel_residual": True,
        "head_bias": True,
        "tie_embeddings": config.get("tie_word_embeddings", False),
    }


def _smollm3(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    layers, interval = config["num_hidden_layers"], config.get("no_rope_layer_interval", 4)
    flags = config.get("no_rope_layers") or [(layer + 1) % interval != 0 for layer in range(layers)]  # true means with RoPE
    return {"rope_pattern": ["rope" if flag else "none" for flag in flags[:layers]]}


def _olmo2(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {"norm_position": "output", "qk_norm": True, "qk_norm_joint": True}


def _gemma1(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    activation = config.get("hidden_activation") or config.get("hidden_act", _GEMMA_ACTIVATION)
    if activation not in (
        _GEMMA_ACTIVATION,
        "gelu",
    ):  # transformers computes "gelu" with the same approximation in this architecture
        raise InputError(f"activation {show(activation)} is not supported", where=where)
    return {
        "feed_forward": "geglu",
        "embedding_scale": math.sqrt(config["hidden_size"]),
        "tie_embeddings": config.get("tie_word_embeddings", True),
        "head_dim": config.get("head_dim", 256),
        "context_length": config.get("max_position_embeddings", 8192),
    }


def _gemma(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    third = config["model_type"] == "gemma3_text"
    layers, window = config["num_hidden_layers"], config.get("sliding_window", 4096)
    interval = config.get("sliding_window_pattern", config.get("_sliding_window_pattern", 6 if third else 2))
    types = config.get("layer_types") or ["sliding_attention" if (i + 1) % interval else "full_attention" for i in range(layers)]
    pattern = ["local" if kind == "sliding_attention" else "global" for kind in types]
    values = {
        "norm_position": "both",
        "feed_forward": "geglu",
        "embedding_scale": math.sqrt(config["hidden_size"]),
        "tie_embeddings": config.get("tie_word_embeddings", True),
        "logit_softcap": config.get("final_logit_softcapping", None if third else 30.0),
        "attention_softcap": None if third else config.get("attn_logit_softcapping", 50.0),
        "qk_norm": third,
        "head_dim": config.get("head_dim", 256),
        "context_length": config.get("max_position_embeddings", 131072 if third else 8192),
        "attention_window": window if "local" in pattern else None,
        "attention_pattern": pattern if "local" in pattern else ["local"],
    }
    return values | (_gemma3_rope(config, "local" in pattern, where) if third else {})


def _gemma3_rope(config: Mapping[str, Any], has_local: bool, where: str) -> dict[str, Any]:
    """Return the RoPE keys for Gemma 3, which uses different bases for local and global blocks. Only global ones can be scaled."""
    parameters = config.get("rope_parameters") or {}
    full = parameters.get("full_attention") or {"rope_theta": config.get("rope_theta", 1e6), **(config.get("rope_scaling") or {})}
    local = parameters.get("sliding_attention") or {"rope_theta": config.get("rope_local_base_freq", 10000.0)}
    if import_rope_scaling(local, config, where) is not None:
        raise InputError("scaled rotary embeddings in local blocks are not supported", where=where)
    return {
        "rope_theta": float(full.get("rope_theta") or 1e6),
        "rope_scaling": import_rope_scaling(full, config, where),
        "rope_theta_local": float(local.get("rope_theta") or 10000.0) if has_local else None,
    }


def adjust(state: dict[str, Tensor], model: DecoderSection, kind: str, scalar: float | None = None) -> dict[str, Tensor]:
    """Fold Gemma's norm gains and attention scale into the weights, and reorder the dimensions of Phi-3's heads.

    `scalar` is `query_pre_attn_scalar` from config.json.
    """
    if kind == "phi3" and model.rope_fraction < 1:
        return {name: _reorder_heads(tensor, model) if ".qkv." in name else tensor for name, tensor in state.items()}
    if not kind.startswith("gemma"):
        return state
    is_gain = ("norm.weight", "_gain")
    state = {name: tensor + 1 if name.endswith(is_gain) else tensor for name, tensor in state.items()}
    if kind == "gemma":
        return state
    scale = math.sqrt(model.head_width / (scalar or 256))
    for layer in range(model.n_layer):
        name = f"blocks.{layer}.attention." + ("query_gain" if model.qk_norm else "qkv.weight")
        state[name] = _scale_queries(state[name], scale, len(state[name]) if model.qk_norm else model.n_head * model.head_width)
    return state


def _reorder_heads(weight: Tensor, model: DecoderSection) -> Tensor:
    """Apply `_rotary_order` to the rows of queries and keys."""
    order, width = _rotary_order(model), model.head_width
    rows = [model.n_head * width, model.kv_heads * width, model.kv_heads * width]
    if weight.shape[0] != sum(rows):
        return weight  # missing or of the wrong shape; the caller reports the error
    queries, keys, values = torch.split(weight, rows)
    parts = [part.view(-1, width, *part.shape[1:])[:, order].flatten(0, 1) for part in (queries, keys)]
    return torch.cat((*parts, values))


_PHI3_FUSED_NAMES = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def split_fused(tensors: Mapping[str, Tensor], model: DecoderSection) -> dict[str, Tensor]:
    """Split Phi-3's fused matrices into Llama's. Matrices of the wrong shape stay unchanged, and the caller reports them."""
    keys = model.kv_heads * model.head_width
    rows = {
        "self_attn.qkv_proj": [model.n_head * model.head_width, keys, keys],
        "mlp.gate_up_proj": [model.feed_forward_width, model.feed_forward_width],
    }
    split = {}
    for name, tensor in tensors.items():
        fused = next((fused for fused in rows if name.endswith(f"{fused}.weight")), None)
        if fused is None or not tensor.ndim or tensor.shape[0] != sum(rows[fused]):
            split[name] = tensor
            continue
        for part, matrix in zip(_PHI3_FUSED_NAMES[fused], torch.split(tensor, rows[fused]), strict=True):
            split[name.replace(fused, part)] = matrix
    return split


def _scale_queries(weight: Tensor, scale: float, rows: int) -> Tensor:
    """Scale the first `rows` rows, which compute the queries."""
    return torch.cat((weight[:rows] * scale, weight[rows:]))


def convert(pop: PopTensor, model: DecoderSection, kind: str) -> Iterator[tuple[str, Tensor]]:
    """Yield a network's tensors, converted from the tensors that `pop` returns. `kind` is in `CONVERTED`."""
    return {"gpt_neox": _from_gpt_neox, "gpt_neo": _from_gpt_neo, "phi": _from_phi}[kind](pop, model)


def _from_gpt_neox(pop: PopTensor, model: DecoderSection) -> Iterator[tuple[str, Tensor]]:
    yield "embedding.weight", pop("gpt_neox.embed_in.weight")
    if not model.tie_embeddings:
        yield "head.weight", pop("embed_out.weight")
    for part in ("weight", "bias"):
        yield f"final_norm.{part}", pop(f"gpt_neox.final_layer_norm.{part}")
    order = _rotary_order(model)
    for layer in range(model.n_layer):
        ours, theirs = f"blocks.{layer}", f"gpt_neox.layers.{layer}"
        for part in ("weight", "bias"):
            yield f"{ours}.attention_norm.{part}", pop(f"{theirs}.input_layernorm.{part}")
            yield f"{ours}.feed_forward_norm.{part}", pop(f"{theirs}.post_attention_layernorm.{part}")
            yield f"{ours}.attention.qkv.{part}", _split_heads(pop, f"{theirs}.attention.query_key_value.{part}", model, order)
            zeros = model.n_embd if part == "bias" else None  # attention_bias: false
            yield f"{ours}.attention.output.{part}", pop(f"{theirs}.attention.dense.{part}", zeros)
            yield f"{ours}.feed_forward.input.{part}", pop(f"{theirs}.mlp.dense_h_to_4h.{part}")
            yield f"{ours}.feed_forward.output.{part}", pop(f"{theirs}.mlp.dense_4h_to_h.{part}")


def _rotary_order(model: DecoderSection) -> list[int]:
    """Return the GPT-NeoX index of each head dimension in tinylm, which pairs dimension i with i + D/2 across the whole head."""
    pairs, half = int(model.head_width // 2 * model.rope_fraction), model.head_width // 2
    first, second = range(pairs), range(pairs, 2 * pairs)
    rest = range(2 * pairs, model.head_width)
    return [*first, *rest[: half - pairs], *second, *rest[half - pairs :]]


def _split_heads(pop: PopTensor, name: str, model: DecoderSection, order: list[int]) -> Tensor:
    """Reorder rows from (H, 3, D) to (3, H, D), and apply `order` to the dimensions of queries and keys."""
    rows = 3 * model.n_head * model.head_width
    tensor = pop(name, rows if name.endswith("bias") else None)
    if tensor.shape[0] != rows:
        return tensor  # missing or of the wrong shape; the caller reports the error
    q, k, v = tensor.view(model.n_head, 3, model.head_width, *tensor.shape[1:]).unbind(1)  # (H, D, ...)
    return torch.cat((q[:, order], k[:, order], v)).flatten(0, 1)


_GPT_NEO_BLOCK_NAMES = {
    "attention_norm": "ln_1",
    "attention.output": "attn.attention.out_proj",
    "feed_forward_norm": "ln_2",
    "feed_forward.input": "mlp.c_fc",
    "feed_forward.output": "mlp.c_proj",
}


def _from_gpt_neo(pop: PopTensor, model: DecoderSection) -> Iterator[tuple[str, Tensor]]:
    yield "embedding.weight", pop("transformer.wte.weight")
    yield "positions.weight", pop("transformer.wpe.weight")
    if not model.tie_embeddings:
        yield "head.weight", pop("lm_head.weight")
    for part in ("weight", "bias"):
        yield f"final_norm.{part}", pop(f"transformer.ln_f.{part}")
    width = model.n_head * model.head_width
    for layer in range(model.n_layer):
        ours, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
        for our_name, their_name in _GPT_NEO_BLOCK_NAMES.items():
            for part in ("weight", "bias"):
                yield f"{ours}.{our_name}.{part}", pop(f"{theirs}.{their_name}.{part}")
        parts = [pop(f"{theirs}.attn.attention.{name}_proj.weight") for name in ("q", "k", "v")]
        yield f"{ours}.attention.qkv.weight", _scale_queries(torch.cat(parts), math.sqrt(model.head_width), width)
        yield f"{ours}.attention.qkv.bias", torch.zeros(3 * width)


_PHI_BLOCK_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.output": "self_attn.dense",
    "feed_forward.input": "mlp.fc1",
    "feed_forward.output": "mlp.fc2",
}


def _from_phi(pop: PopTensor, model: DecoderSection) -> Iterator[tuple[str, Tensor]]:
    """Phi's attention and feed-forward layers share a norm, which becomes two equal norms."""
    yield "embedding.weight", pop("model.embed_tokens.weight")
    for part in ("weight", "bias"):
        yield f"final_norm.{part}", pop(f"model.final_layernorm.{part}")
        if not (part == "weight" and model.tie_embeddings):
            yield f"head.{part}", pop(f"lm_head.{part}")
    for layer in range(model.n_layer):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        for part in ("weight", "bias"):
            tensors = {our_name: pop(f"{theirs}.{their_name}.{part}") for our_name, their_name in _PHI_BLOCK_NAMES.items()}
            tensors["feed_forward_norm"] = tensors["attention_norm"].clone()
            projections = [pop(f"{theirs}.self_attn.{name}_proj.{part}") for name in ("q", "k", "v")]
            tensors["attention.qkv"] = _reorder_heads(torch.cat(projections), model)
            yield from ((f"{ours}.{name}.{part}", tensor) for name, tensor in tensors.items())

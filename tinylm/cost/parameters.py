"""Count the parameters and FLOPs of a model from its `model:` section. This module does not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tinylm.errors import InputError
from tinylm.recipe.encoder import EncoderSection
from tinylm.recipe.encoder_decoder import EncoderDecoderSection
from tinylm.recipe.fixed_context import FeedForwardSection
from tinylm.recipe.recurrent import GruSection, LstmSection, RecurrentEncoderDecoderSection, RnnSection
from tinylm.recipe.schema import DecoderSection, LoraSection, ModelVariant, TransformerSection
from tinylm.recipe.support import ANY, COMMON, Supports, unsupported_parts

SUPPORTS: Supports = {**COMMON, "rope_scaling": ANY, "rope_fraction": ANY, "shifted_key_heads": ANY}
"""The `model:` keys and values of a decoder that are covered by all estimates in `tinylm.cost`: parameters, FLOPs, memory and
time."""
_STACK = {key: values for key, values in SUPPORTS.items() if key != "architecture"}
_SUPPORTS_BY_SECTION: Mapping[type[ModelVariant], Supports] = {
    DecoderSection: SUPPORTS,
    EncoderSection: _STACK | dict.fromkeys(("architecture", "token_types", "head_transform", "head_bias", "norm_first_block"), ANY),
    EncoderDecoderSection: _STACK
    | dict.fromkeys(("architecture", "n_decoder_layer", "head_bias", "scale_embeddings", "learned_start"), ANY),
    **{
        section: dict.fromkeys(section.model_fields, ANY)
        for section in (RecurrentEncoderDecoderSection, RnnSection, LstmSection, GruSection, FeedForwardSection)
    },
}
"""`SUPPORTS` for each architecture that has estimates."""


def not_estimated(model: ModelVariant) -> tuple[str, ...]:
    """Return the parts of `model` that the estimates ignore, as "key value". The estimates are for a model without these parts.

    For an architecture without estimates, the only part is the architecture.
    """
    supports = _supports(model)
    return (f"architecture {model.architecture}",) if supports is None else unsupported_parts(model, supports)


def has_estimates(model: ModelVariant) -> bool:
    """Return whether `tinylm.cost` can estimate models with this architecture."""
    return _supports(model) is not None


def _supports(model: ModelVariant) -> Supports | None:
    return next((supports for section, supports in _SUPPORTS_BY_SECTION.items() if isinstance(model, section)), None)


def estimated(model: ModelVariant) -> DecoderSection:
    """Return `model` if it is a decoder. Raises `InputError` otherwise. `network.network_cost` supports more architectures."""
    if not isinstance(model, DecoderSection):
        raise InputError(f"the cost of the {model.architecture} architecture cannot be estimated", where="model.architecture")
    return model


def parameter_counts(model: TransformerSection, vocab_size: int) -> dict[str, int]:
    """Return the number of parameters in each part of a stack of blocks with its embedding and head.

    The parts are `embedding` (token embedding, including a tied head), `positions` (learned position embeddings), `tables` (all
    other tables indexed by token or n-gram), `head` (an untied head), `matrices` (the matrices that Muon updates) and `rest`
    (gains, biases and scalars).
    """
    width, hidden = model.n_embd, model.feed_forward_width
    queries, keys = model.n_head * model.head_width, model.kv_heads * model.head_width
    norm = norm_parameters(model)
    inputs = 2 * hidden if model.is_gated else hidden
    matrices = width * (queries + 2 * keys) + queries * width + width * inputs + hidden * width
    biases = (queries + 2 * keys) + width + inputs + width if model.bias else 0
    norms_per_block = 1 if model.norm_position == "post" and model.parallel_residual else 4 if model.norm_position == "both" else 2
    gains = queries + keys if model.qk_norm_joint else 2 * model.head_width
    small = norms_per_block * norm + biases + (gains if model.qk_norm and model.qk_gain else 0)
    small += 2 if model.embedding_shortcut else 0
    outside = (norm if model.norm_position != "post" else 0) + (norm if model.embedding_norm else 0)
    return {
        "embedding": vocab_size * width,
        "positions": model.context_length * width if model.position == "learned" else 0,
        "tables": len(model.ngram_embeddings) * model.ngram_rows * model.ngram_width
        + min(2 * model.value_embeddings, model.n_layer) * vocab_size * keys,
        "head": 0 if model.tie_embeddings else vocab_size * width,
        "matrices": model.n_layer * matrices + len(model.ngram_embeddings) * model.ngram_width * width,
        "rest": model.n_layer * small + outside + (model.n_layer - 1 if model.value_residual else 0),
    }


def norm_parameters(model: TransformerSection) -> int:
    """Return the number of parameters in a norm of the model's width."""
    return model.n_embd * (model.norm_gain + (model.norm_gain and model.bias and model.norm == "layernorm"))


def lora_parameters(model: TransformerSection, lora: LoraSection) -> int:
    """Return the number of parameters in the LoRA adapters."""
    width, hidden, queries = model.n_embd, model.feed_forward_width, model.n_head * model.head_width
    shapes = {
        "attention.qkv": (width, queries + 2 * model.kv_heads * model.head_width),
        "attention.output": (queries, width),
        "feed_forward.input": (width, 2 * hidden if model.is_gated else hidden),
        "feed_forward.output": (hidden, width),
    }
    return model.n_layer * lora.rank * sum(sum(shapes[target]) for target in lora.targets)


def trained_parameters(model: DecoderSection, vocab_size: int, lora: LoraSection | None) -> int:
    """Return the number of trained parameters. With LoRA, only the adapters are trained."""
    return lora_parameters(model, lora) if lora else sum(parameter_counts(model, vocab_size).values())


def flops_per_token(model: DecoderSection, vocab_size: int, lora: LoraSection | None = None) -> float:
    """Return the FLOPs per token in the forward and backward pass.

    The count is 6 per weight in a matrix product, including the head, plus causal attention. With `lora`, it is 6 per adapter
    weight and 4 per frozen weight, because the gradients of frozen weights are not computed.
    """
    attention = 6 * model.n_layer * model.context_length * model.n_head * model.head_width
    return weight_flops_per_token(model, vocab_size, lora) + attention


def teacher_flops_per_token(teachers: Sequence[ModelVariant], vocab_size: int) -> float:
    """Return the FLOPs per token of the forward passes of distilled models. Those without estimates are ignored."""
    return sum(flops_per_token(teacher, vocab_size) / 3 for teacher in teachers if isinstance(teacher, DecoderSection))


def weight_flops_per_token(model: DecoderSection, vocab_size: int, lora: LoraSection | None) -> float:
    """Return `flops_per_token` without attention: the products of queries with keys, and of probabilities with values."""
    weights = parameter_counts(model, vocab_size)["matrices"] + vocab_size * model.n_embd
    return 6.0 * weights if lora is None else 4.0 * weights + 6.0 * lora_parameters(model, lora)

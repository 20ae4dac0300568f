"""The types of the values of config.json that an import reads.

They are checked before anything is computed with them, because the file may come from someone else: a value of another type, or a
number that is too large for a model, raises `InputError` with the name of its key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from tinylm.errors import InputError
from tinylm.recipe.values import Blocks, ContextLength, Flag, OptionalPositive, OptionalWidth, Positive, ShareAboveZero, Width

_OPEN = ConfigDict(extra="allow")


@with_config(_OPEN)
class _Rope(TypedDict, total=False):
    rope_type: str
    type: str
    factor: OptionalPositive
    rope_theta: OptionalPositive
    partial_rotary_factor: ShareAboveZero | None
    original_max_position_embeddings: ContextLength | None
    low_freq_factor: OptionalPositive
    high_freq_factor: OptionalPositive
    beta_fast: OptionalPositive
    beta_slow: OptionalPositive
    attention_factor: OptionalPositive
    truncate: Flag | None


@with_config(_OPEN)
class _RopeParameters(_Rope, total=False):
    full_attention: _Rope | None
    sliding_attention: _Rope | None


@with_config(_OPEN)
class _Config(TypedDict, total=False):
    """The keys of all families. A key that is absent has the family's default, and null is accepted where transformers accepts it."""

    n_layer: Blocks
    num_layers: Blocks
    num_hidden_layers: Blocks
    n_head: Width
    num_heads: Width
    num_attention_heads: Width
    num_key_value_heads: OptionalWidth
    n_embd: Width
    hidden_size: Width
    n_inner: OptionalWidth
    intermediate_size: OptionalWidth
    head_dim: OptionalWidth
    n_positions: ContextLength
    n_ctx: ContextLength
    max_position_embeddings: ContextLength
    layer_norm_epsilon: Positive
    layer_norm_eps: Positive
    rms_norm_eps: Positive
    activation_function: str
    hidden_act: str
    hidden_activation: str | None
    tie_word_embeddings: Flag
    use_parallel_residual: Flag
    use_sliding_window: Flag
    sliding_window: ContextLength | None
    sliding_window_pattern: Blocks | None
    window_size: ContextLength
    layer_types: list[str] | None
    attention_types: list[tuple[list[str], Blocks]]
    no_rope_layers: list[Flag | int] | None
    no_rope_layer_interval: Blocks
    rope_theta: OptionalPositive
    rope_local_base_freq: Positive
    rotary_emb_base: OptionalPositive
    rotary_pct: ShareAboveZero | None
    partial_rotary_factor: ShareAboveZero | None
    rope_scaling: _Rope | None
    rope_parameters: _RopeParameters | None
    query_pre_attn_scalar: OptionalPositive
    attn_logit_softcapping: OptionalPositive
    final_logit_softcapping: OptionalPositive


_CONFIG = TypeAdapter(_Config)


def check_types(config: Mapping[str, Any], where: str) -> None:
    """Raise `InputError` for the first value of an unexpected type or size. Keys that no family has are ignored."""
    try:
        _CONFIG.validate_python(dict(config))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"] if part in config or isinstance(part, int) or str(part).islower())
        message = str(first["msg"]).removeprefix("Value error, ")
        raise InputError(f"{key}: {message[0].lower()}{message[1:]}", where=where) from None

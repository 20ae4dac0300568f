"""The types of the values that an import reads from config.json.

The types are checked before the values are used, because the file may come from an untrusted source. A value of the wrong type, or
a number that is too large for a model, raises `InputError` with the name of the key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError, create_model

from tinylm.errors import InputError
from tinylm.recipe.values import (
    Blocks,
    ContextLength,
    CountOrZero,
    Flag,
    OptionalPositive,
    OptionalWidth,
    Positive,
    ShareAboveZero,
    ShareBelowOne,
    Width,
)


def _keys(types: Mapping[str, Any]) -> type[BaseModel]:
    """Return a schema in which every key is optional. Unlisted keys are ignored."""
    return create_model("ConfigJson", **{name: (kind, None) for names, kind in types.items() for name in names.split()})  # type: ignore[call-overload,no-any-return]


_ROPE = {
    "rope_type type": str,
    "factor rope_theta low_freq_factor high_freq_factor beta_fast beta_slow attention_factor": OptionalPositive,
    "partial_rotary_factor": ShareAboveZero | None,
    "original_max_position_embeddings": ContextLength | None,
    "truncate": Flag | None,
}
_Rope = _keys(_ROPE)
_RopeParameters = _keys({**_ROPE, "full_attention sliding_attention": _Rope | None})
_Config = _keys(
    {
        "n_layer n_layers num_layers num_hidden_layers no_rope_layer_interval global_attn_every_n_layers": Blocks,
        "n_head n_heads num_heads num_attention_heads n_embd hidden_size dim hidden_dim local_attention": Width,
        "num_key_value_heads n_inner intermediate_size head_dim": OptionalWidth,
        "n_positions n_ctx max_position_embeddings window_size": ContextLength,
        "sliding_window": ContextLength | None,
        "sliding_window_pattern": Blocks | None,
        "layer_norm_epsilon layer_norm_eps norm_eps rms_norm_eps rope_local_base_freq": Positive,
        "type_vocab_size": CountOrZero,
        "pad_token_id": CountOrZero | None,
        "hidden_dropout_prob": ShareBelowOne,
        "global_rope_theta local_rope_theta": OptionalPositive,
        "rope_theta rotary_emb_base query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping": OptionalPositive,
        "rotary_pct partial_rotary_factor": ShareAboveZero | None,
        "activation_function hidden_act": str,
        "hidden_activation": str | None,
        "tie_word_embeddings use_parallel_residual": Flag,
        "use_sliding_window": Flag | None,
        "layer_types": list[str] | None,
        "no_rope_layers": list[bool | int] | None,
        "attention_types": list[tuple[list[str], Blocks]],
        "rope_scaling": _Rope | None,
        "rope_parameters": _RopeParameters | None,
    }
)
"""The keys of all model families. Keys accept null if transformers does."""


def check_types(config: Mapping[str, Any], where: str) -> None:
    """Raise `InputError` for the first value with an unexpected type or size."""
    try:
        _Config.model_validate(dict(config))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"][: 2 if first["loc"][0] in ("rope_scaling", "rope_parameters") else 1])
        message = str(first["msg"]).removeprefix("Value error, ")
        raise InputError(f"{key}: {message[0].lower()}{message[1:]}", where=where) from None

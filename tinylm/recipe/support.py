"""Declare and check which `model:` keys a backend supports.

A backend is code that reimplements the model (a decoding step, an exporter) or depends on its structure (LoRA, cost estimates).
Each backend declares a mapping `SUPPORTS` from keys to supported values. A key that is not listed is supported only at its default
value, so a backend cannot silently ignore a key that was added later.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from pydantic import BaseModel

from tinylm.errors import InputError

Supports = Mapping[str, Collection[Any] | Callable[[Any], bool]]
"""Maps each key to its supported values, or to a predicate on the whole section."""


def ANY(section: BaseModel) -> bool:  # noqa: N802  used like a constant in `Supports` mappings
    """Support every value of a key. Do not use this for a key with a fixed list of choices, because choices may be added."""
    return True


SIZES: Supports = dict.fromkeys(
    (
        "n_layer",
        "n_head",
        "n_kv_head",
        "n_embd",
        "head_dim",
        "context_length",
        "feed_forward_multiple",
        "n_inner",
        "ngram_rows",
        "ngram_width",
        "norm_eps",
    ),
    ANY,
)
"""The numbers that set tensor shapes, and the epsilon of norms."""

TRAINING: Supports = dict.fromkeys(
    (
        "preset",
        "zero_init_outputs",
        "dropout",
        "attention_dropout",
        "ngram_dropout",
        "init_embeddings",
        "freeze_embeddings",
        "init_from",
    ),
    ANY,
)
"""The keys that only affect initialization and training. A backend that runs a trained model can ignore them."""

COMMON: Supports = {
    "architecture": ("decoder",),
    **SIZES,
    **TRAINING,
    "norm": ("layernorm", "rmsnorm"),
    "norm_position": ("pre", "post"),
    "norm_gain": ANY,
    "position": ("learned", "sinusoidal", "rope", "none"),
    "rope_theta": ANY,
    "feed_forward": ("gelu", "gelu_exact", "relu", "relu2", "swiglu"),
    "bias": ANY,
    "tie_embeddings": ANY,
    "qk_norm": ANY,
    "qk_gain": ANY,
    "embedding_norm": ANY,
    "ngram_embeddings": ANY,
    "value_embeddings": ANY,
    "value_residual": ANY,
    "embedding_shortcut": ANY,
    "parallel_residual": ANY,
    "logit_softcap": ANY,
}
"""The values that most backends support. A backend that supports fewer values overrides entries. Never add a new key or value
here. Instead, add it to the `SUPPORTS` of each backend that implements it."""


def unsupported(section: BaseModel, supports: Supports) -> list[tuple[str, Any]]:
    """Return (key, value) for each key of `section` whose value is not supported.

    A key that `supports` does not list is supported only at its default value, and never if it has no default. The result is in
    the order of `supports`, followed by unlisted keys in schema order. Keys that `section` does not have are skipped.
    """
    fields = type(section).model_fields
    unsupported_keys = []
    for key in dict.fromkeys((*(key for key in supports if key in fields), *fields)):
        value = getattr(section, key)
        supported = supports.get(key, () if fields[key].is_required() else (fields[key].get_default(call_default_factory=True),))
        if not (supported(section) if callable(supported) else value in supported):
            unsupported_keys.append((key, value))
    return unsupported_keys


def unsupported_parts(section: BaseModel, supports: Supports) -> tuple[str, ...]:
    """Return the unsupported keys and values formatted for messages, such as "norm_position post"."""
    return tuple(f"{key} {_format_value(value)}" for key, value in unsupported(section, supports))


def _format_value(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_format_value, value))}]"
    return "null" if value is None else value if isinstance(value, str) else str(value).lower()


def check_supported(section: BaseModel, supports: Supports, backend: str, where: str) -> None:
    """Raise an `InputError` that lists the keys that a backend does not support, if there are any."""
    parts = unsupported_parts(section, supports)
    if parts:
        raise InputError(f"{backend} does not support model.{', model.'.join(parts)}", where=where)

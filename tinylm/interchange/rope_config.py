"""Convert RoPE settings between config.json and a recipe's `model:` section.

Imports read both layouts of config.json: transformers 4 writes `rope_theta`, `rope_scaling` and `partial_rotary_factor`, and
transformers 5 nests these settings under `rope_parameters`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tinylm.errors import InputError
from tinylm.recipe.schema import RopeScaling
from tinylm.recipe.values import show

_NAMES = {
    "factor": "factor",
    "original_context": "original_max_position_embeddings",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
    "truncate": "truncate",
}
"""The keys of `model.rope_scaling` and their names in config.json."""
_OTHER_KEYS = {"type", "rope_type", "rope_theta", "partial_rotary_factor"}
TYPES = ("linear", "llama3", "yarn")


def export_rope_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """Convert `model.rope_scaling` to the value of `rope_scaling` in config.json."""
    if scaling is None:
        return None
    values = scaling.model_dump(mode="json")
    return {
        "rope_type": scaling.type,
        **{_NAMES[key]: value for key, value in values.items() if key in _NAMES and value is not None},
    }


def import_rope(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return `rope_theta`, `rope_scaling` and `rope_fraction`. Raises `InputError` if the scaling type is not supported."""
    parameters = config.get("rope_parameters") or {}
    rope = {**(config.get("rope_scaling") or {}), **parameters}
    fraction = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", config.get("rotary_pct")))
    return {
        "rope_theta": float(rope.get("rope_theta", config.get("rope_theta", config.get("rotary_emb_base"))) or 10000.0),
        "rope_scaling": import_rope_scaling(rope, config, where),
        "rope_fraction": 1.0 if fraction is None else float(fraction),
    }


def import_rope_scaling(rope: Mapping[str, Any], config: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """Convert `rope_scaling` or `rope_parameters` from config.json to the value of `model.rope_scaling`."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in TYPES:
        known = ", ".join(TYPES)
        raise InputError(f"RoPE scaling type {show(kind)} is not supported (supported: {known})", where=where)
    unknown = {key for key in rope if key not in _OTHER_KEYS and key not in _NAMES.values() and rope[key] is not None}
    if kind == "yarn" and unknown:
        raise InputError(f"yarn with {', '.join(sorted(unknown))} is not supported", where=where)
    if rope.get("factor") is None:
        raise InputError(f"RoPE scaling type {show(kind)} requires `factor`", where=where)
    original = rope.get("original_max_position_embeddings") or config.get("max_position_embeddings") or 0
    values = {ours: rope[theirs] for ours, theirs in _NAMES.items() if rope.get(theirs) is not None}
    if kind == "linear":
        return {"type": kind, "factor": float(rope["factor"])}
    keys = (
        ("low_freq_factor", "high_freq_factor") if kind == "llama3" else ("beta_fast", "beta_slow", "attention_factor", "truncate")
    )
    chosen = {key: values[key] for key in keys if key in values}
    return {"type": kind, "factor": float(rope["factor"]), "original_context": int(original), **chosen}

"""Determine which recipe keys do not change the trained model, except for rounding."""

from __future__ import annotations

from tinylm.recipe.schema import Recipe, flattened

SAFE_KEYS = ("name", "tracking", "training.log_every", "training.parallel", "training.guards.", "checkpoint.", "sampling.")
"""Keys and sections that do not change the trained model. A name that ends in a dot is a section."""
SAFE_KEYS_WITHOUT_DROPOUT = ("training.compile", "training.micro_batch_size")
"""Additional safe keys for models without dropout. Apart from dropout masks, they only affect rounding."""


def safe_keys(recipe: Recipe) -> tuple[str, ...]:
    """Return the keys and sections that do not change the model that this recipe trains."""
    return SAFE_KEYS if recipe.model.uses_dropout else (*SAFE_KEYS, *SAFE_KEYS_WITHOUT_DROPOUT)


def covers(name: str, key: str) -> bool:
    """Whether `name` is the key or a section that contains it."""
    return key == name or key.startswith(name.rstrip(".") + ".")


def settings_without_seed(recipe: Recipe) -> dict[str, object]:
    """Return the settings that determine the trained model, except for the seed. Recipes with equal settings are replicates."""
    ignored = ("seed", *safe_keys(recipe), *SAFE_KEYS_WITHOUT_DROPOUT)
    return {key: value for key, value in flattened(recipe.as_dict()).items() if not any(covers(name, key) for name in ignored)}

"""Load and validate recipes. A recipe is a YAML file that describes a whole experiment. This package does not import torch."""

from tinylm.recipe.embeddings import EmbeddingRecipe
from tinylm.recipe.loader import RecipeError, load, load_any, loads, loads_any
from tinylm.recipe.schema import (
    ModelVariant,
    ObjectiveVariant,
    Recipe,
    changes,
    register_model_section,
    register_objective_section,
    unregister_section,
)

__all__ = [
    "EmbeddingRecipe",
    "ModelVariant",
    "ObjectiveVariant",
    "Recipe",
    "RecipeError",
    "changes",
    "load",
    "load_any",
    "loads",
    "loads_any",
    "register_model_section",
    "register_objective_section",
    "unregister_section",
]

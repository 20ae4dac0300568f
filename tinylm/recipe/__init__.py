"""A recipe is one YAML file that describes a whole experiment. Does not import torch."""

from tinylm.recipe.embeddings import EmbeddingRecipe
from tinylm.recipe.loader import RecipeError, load, load_any, loads, loads_any
from tinylm.recipe.schema import Recipe, changes

__all__ = ["EmbeddingRecipe", "Recipe", "RecipeError", "changes", "load", "load_any", "loads", "loads_any"]

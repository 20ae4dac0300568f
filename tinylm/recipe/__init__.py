"""The recipe language: what an experiment is, in one YAML file. Imports without torch."""

from tinylm.recipe.embeddings import EmbeddingRecipe
from tinylm.recipe.loader import RecipeError, load, load_any, loads, loads_any
from tinylm.recipe.schema import Recipe, changes

__all__ = ["EmbeddingRecipe", "Recipe", "RecipeError", "changes", "load", "load_any", "loads", "loads_any"]

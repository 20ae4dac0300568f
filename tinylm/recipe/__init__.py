"""The recipe language: what an experiment is, in one YAML file. Imports without torch."""

from tinylm.recipe.loader import RecipeError, load, loads
from tinylm.recipe.schema import Recipe, changes

__all__ = ["Recipe", "RecipeError", "changes", "load", "loads"]

"""The size of a recipe's training examples, from which the other modules of `tinylm.cost` estimate memory and time."""

from __future__ import annotations

from dataclasses import dataclass

from tinylm.recipe import Recipe
from tinylm.recipe.chat import PreferencesSection
from tinylm.recipe.labels import LabelsSection
from tinylm.recipe.pairs import PairsSection


@dataclass(frozen=True)
class ExampleSize:
    """The number of positions in a training example. In a sentence pair, `length` and `longest` describe the target."""

    tokens: float
    """Mean number of tokens that the model reads, excluding padding: `tokens_per_example` of the dataset."""
    length: float
    """Mean number of positions, including padding."""
    longest: int
    """The largest number of positions."""
    source_length: float = 0.0
    source_longest: int = 0
    filled: float = 1.0
    """The fraction of a batch's rows that contain an example. The means are over all rows."""

    @property
    def positions(self) -> float:
        """Mean number of positions, including padding, of both sides."""
        return self.length + self.source_length

    @classmethod
    def largest(cls, recipe: Recipe) -> ExampleSize:
        """Return the size of an example that fills the context. This is the size of every window of a text."""
        model = recipe.model
        context = model.context_length
        if isinstance(recipe.data, PairsSection):
            return cls(2 * context, context, context, context, context)
        if isinstance(recipe.data, PreferencesSection):  # two conversations
            return cls(2 * context, 2 * context, 2 * context)
        positions = context if isinstance(recipe.data, LabelsSection) else context + model.warmup_tokens
        return cls(positions, positions, positions)

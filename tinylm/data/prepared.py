"""`PreparedData` holds a tokenizer and cached, encoded examples that are ready for training. Each data format has a subclass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tinylm.recipe import Recipe
from tinylm.tokenizer import Tokenizer

PART_ADJECTIVES = {"train": "training", "heldout": "held-out", "test": "test"}
"""The adjective that messages use for each split of the data."""


@dataclass(frozen=True)
class PreparedData:
    """The prepared data that training, evaluation and the run folder need, whatever the data format."""

    tokenizer: Tokenizer
    folder: Path
    """The cache folder that contains the encoded examples."""
    fingerprint: str
    """A hash of the content, the split and the tokenizer."""

    @property
    def heldout_files(self) -> tuple[str, ...]:
        """The names of the files in `folder` that a run folder keeps for later evaluations."""
        raise NotImplementedError

    @property
    def chat_template(self) -> str | None:
        """The content of the run's chat_template.json, or None if the data contains no conversations."""
        return None

    def fill_in(self, recipe: Recipe) -> Recipe:
        """Return the recipe with the keys that depend on the data filled in. Raises `InputError` if it contradicts the data."""
        return recipe

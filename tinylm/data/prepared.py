"""`PreparedData` is a tokenizer with cached, encoded examples that are ready for training. Each data format has a subclass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tinylm.recipe import Recipe
from tinylm.tokenizer import Tokenizer

PART_ADJECTIVES = {"train": "training", "heldout": "held-out", "test": "test"}
"""The adjective for each part of the data in messages."""


@dataclass(frozen=True)
class PreparedData:
    """The prepared data that training, evaluation and the run folder need in every format."""

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
        """Set the keys of a recipe that depend on the data. Raises `InputError` if the recipe contradicts the data."""
        return recipe

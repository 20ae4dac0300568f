"""`PreparedData`: a tokenizer and encoded examples in the cache, ready for training. Each data format has a subclass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tinylm.recipe import Recipe
from tinylm.tokenizer import Tokenizer


@dataclass(frozen=True)
class PreparedData:
    """The parts of the data that training, evaluation and the run folder use, in every format."""

    tokenizer: Tokenizer
    folder: Path
    """The cache folder that contains the encoded examples."""
    fingerprint: str
    """A hash of the content, the split and the tokenizer."""

    @property
    def heldout_files(self) -> tuple[str, ...]:
        """The names of the files in `folder` that a run folder keeps to evaluate the model again."""
        raise NotImplementedError

    @property
    def chat_template(self) -> str | None:
        """The content of the run's chat_template.json, for conversations."""
        return None

    def fill_in(self, recipe: Recipe) -> Recipe:
        """Set the keys of a recipe that depend on the data. Raises `InputError` if the recipe contradicts the data."""
        return recipe

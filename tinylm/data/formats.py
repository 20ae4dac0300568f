"""Data formats prepare the sources for each value of `data.format`. `register` adds a format:

register(LabelsSection, LabelsFormat())
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from tinylm.data import masking, mixture
from tinylm.data.chat import ChatFormat
from tinylm.data.datasets import Dataset
from tinylm.data.framing import with_control_tokens
from tinylm.data.labels import LabelsFormat
from tinylm.data.pairs import PairsFormat
from tinylm.data.preferences import PreferencesFormat
from tinylm.data.prepare import PreparedText, open_prepared, prepare
from tinylm.recipe import Recipe
from tinylm.recipe.chat import ChatSection, PreferencesSection
from tinylm.recipe.encoder import MaskedLMObjective
from tinylm.recipe.labels import LabelsSection
from tinylm.recipe.pairs import PairsSection
from tinylm.recipe.schema import DataSection, DataVariant, register_data_section, require_text, unregister_section
from tinylm.reporting import Reporter


class DataFormat(Protocol):
    """Prepares data in one format. `prepare` and `open` return a subclass of `PreparedData`, which is passed to `dataset`."""

    def prepare(self, recipe: Recipe, reporter: Reporter, workers: int) -> Any:
        """Read, split and encode the sources, or open the cached result. The result does not depend on `workers`.

        Raises `InputError` if the sources cannot be read, split or encoded.
        """
        ...

    def open(self, recipe: Recipe, folder: Path, fingerprint: str, tokenizer_json: str) -> Any:
        """Open data that another process has prepared. `tokenizer_json` is the content of its tokenizer.json."""
        ...

    def dataset(self, recipe: Recipe, prepared: Any) -> Dataset:
        """Build the training dataset. Raises `InputError` if there is not enough data for one example."""
        ...


class TextFormat:
    """Plain text, which is encoded as one stream of tokens."""

    def prepare(self, recipe: Recipe, reporter: Reporter, workers: int) -> PreparedText:
        return prepare(require_text(recipe.data), with_control_tokens(recipe.tokenizer, recipe.model), reporter, workers)

    def open(self, recipe: Recipe, folder: Path, fingerprint: str, tokenizer_json: str) -> PreparedText:
        return open_prepared(folder, fingerprint, tokenizer_json)

    def dataset(self, recipe: Recipe, prepared: PreparedText) -> Dataset:
        if isinstance(recipe.objective, MaskedLMObjective):
            return masking.build(recipe, recipe.objective, prepared)
        dataset = mixture.build(recipe, prepared, recipe.model)
        if isinstance(dataset, mixture.Mixture):
            dataset.set_total(mixture.planned_examples(recipe, dataset))
        return dataset


_FORMATS: dict[type[DataVariant], DataFormat] = {
    DataSection: TextFormat(),
    LabelsSection: LabelsFormat(),
    PairsSection: PairsFormat(),
    ChatSection: ChatFormat(),
    PreferencesSection: PreferencesFormat(),
}


def register(section: type[DataVariant], data_format: DataFormat) -> None:
    """Add a format. `section` becomes a variant of `data:` in recipes. Raises `ValueError` if the format already exists."""
    register_data_section(section)
    _FORMATS[section] = data_format


def unregister(section: type[DataVariant]) -> None:
    """Remove a format that `register` added."""
    unregister_section(section)
    del _FORMATS[section]


def find(data: DataVariant) -> DataFormat:
    """Return the format that a `data:` section uses."""
    return _FORMATS[type(data)]

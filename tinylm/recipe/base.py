"""The base classes of the sections of a recipe, and of the variants of `data:`, `model:` and `objective:`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from tinylm.recipe.values import Flag, RequiredPath


class Section(BaseModel):
    """A part of a recipe. Unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class DataVariant(Section):
    """The base class of the variants of `data:`, one for each format. `register_data_section` adds a variant.

    A variant declares the key `format`, whose only value and default is the name of the format.
    """

    default_objective: ClassVar[str | None] = None
    """The objective of a recipe without the key `objective.name`; None: the default of the architecture."""

    format: str

    def sources(self) -> dict[str, tuple[str, ...]]:
        """Return the sources by key, such as `train`, to check that their files exist."""
        raise NotImplementedError


class ObjectiveVariant(Section):
    """The base class of the variants of `objective:`. `register_objective_section` adds a variant.

    A variant declares the key `name`, whose only value and default is the name of the objective.
    """

    architectures: ClassVar[tuple[str, ...]] = ()
    """The architectures that can be trained with the objective, in addition to those that list it in `objectives`."""
    data_formats: ClassVar[tuple[str, ...]] = ("text",)
    """The values of `data.format` that the objective can be trained on."""
    filled_in: ClassVar[tuple[str, ...]] = ()
    """The keys that `PreparedData.fill_in` sets from the data. A resumed run keeps their values."""

    name: str


class InitFrom(Section):
    """Start from the weights of another run instead of random weights."""

    run: RequiredPath
    """A run folder, whose best checkpoint is used, or a checkpoint folder."""
    head: Flag = True
    """Load the output head. false initializes it, as well as every table indexed by token if the tokenizer differs."""


class ModelVariant(Section):
    """The base class of the variants of `model:`, one for each architecture. `register_model_section` adds a variant.

    A variant declares the keys `architecture`, whose only value and default is the name of the variant, and `context_length`. Other
    code reads the properties and methods below from every architecture.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """The defaults of the other keys for each value of the key `preset`. Empty for an architecture without this key."""
    objectives: ClassVar[tuple[str, ...]] = ("causal_lm",)
    """The objectives that the model can be trained with, by name. The first one is the default."""
    training_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """For each key of `training:` with values that the architecture does not support, the supported values."""
    training_keys: ClassVar[tuple[str, ...] | None] = None
    """The keys of `training:` that have an effect; None: all."""
    learns_by_counting: ClassVar[bool] = False
    """Whether the model is trained by counting instead of gradients."""
    reads_across_documents: ClassVar[bool | None] = None
    """Whether a prediction can depend on earlier documents of the training text; None: `data.document_mask` decides."""
    bidirectional: ClassVar[bool] = False
    """Whether a position depends on later positions, so that the model cannot generate text from left to right."""
    needs_full_window: ClassVar[bool] = True
    """Whether the training text must have more than `context_length` tokens."""

    architecture: str

    if TYPE_CHECKING:  # each variant declares this key itself, which sets its place in the order of keys
        context_length: int

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not cls.presets:
            return values
        default = cls.presets[cls.model_fields["preset"].default]
        preset = values.get("preset")
        return {**(cls.presets.get(preset, default) if isinstance(preset, str) else default), **values}

    @property
    def uses_dropout(self) -> bool:
        """Whether training uses any kind of dropout, and therefore random numbers."""
        return False

    @property
    def warmup_tokens(self) -> int:
        """Number of tokens that a training sequence contains before its first target, as context."""
        return 0

    @property
    def pretrained(self) -> InitFrom | None:
        """The value of `init_from`, for architectures with this key: the run whose weights are loaded."""
        return None

    @property
    def pretrained_embeddings(self) -> str | None:
        """The value of `init_embeddings`, for architectures with this key: the vectors that initialize the embedding."""
        return None

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield each problem that involves several keys of this section, as (key, message)."""
        yield from ()

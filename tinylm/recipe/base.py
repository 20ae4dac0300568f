"""Base classes for recipe sections, and for the variants of `data:`, `model:` and `objective:`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from tinylm.recipe.values import Flag, RequiredPath


class Section(BaseModel):
    """A section of a recipe. Unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class DataVariant(Section):
    """Base class for the variants of `data:`, one per format. `register_data_section` adds a variant.

    A variant declares the key `format`, with the format's name as the default and only allowed value.
    """

    default_objective: ClassVar[str | None] = None
    """The objective if the recipe does not set `objective.name`. None means the architecture's default."""

    format: str

    def sources(self) -> dict[str, tuple[str, ...]]:
        """Return the sources by key, such as `train`, to check that their files exist."""
        raise NotImplementedError


class ObjectiveVariant(Section):
    """Base class for the variants of `objective:`. `register_objective_section` adds a variant.

    A variant declares the key `name`, with the objective's name as the default and only allowed value.
    """

    architectures: ClassVar[tuple[str, ...]] = ()
    """The architectures that can be trained with the objective, in addition to those that list it in `objectives`."""
    data_formats: ClassVar[tuple[str, ...]] = ("text",)
    """The values of `data.format` that the objective supports."""
    filled_in: ClassVar[tuple[str, ...]] = ()
    """The keys that `PreparedData.fill_in` sets from the data. A resumed run keeps their values."""

    name: str


class InitFrom(Section):
    """Start from the weights of another run instead of random weights."""

    run: RequiredPath
    """A run folder, whose best checkpoint is used, or a checkpoint folder."""
    head: Flag = True
    """Load the output head. If false, initialize a new head and, if the tokenizer differs, also new embedding tables."""


class ModelVariant(Section):
    """Base class for the variants of `model:`, one per architecture. `register_model_section` adds a variant.

    A variant declares the key `architecture`, with the variant's name as the default and only allowed value, and the key
    `context_length`. Code outside the variant uses only the attributes and methods below.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """The defaults of the other keys for each value of `preset`. Empty for an architecture without this key."""
    objectives: ClassVar[tuple[str, ...]] = ("causal_lm",)
    """Names of the objectives that the model can be trained with. The first one is the default."""
    training_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """The supported values of `training:` keys. All values are supported for keys that are not listed."""
    training_keys: ClassVar[tuple[str, ...] | None] = None
    """The keys of `training:` that have an effect, or None if all of them do."""
    learns_by_counting: ClassVar[bool] = False
    """Whether the model is trained by counting n-grams instead of gradient descent."""
    reads_across_documents: ClassVar[bool | None] = None
    """Whether a prediction can depend on earlier documents in the training text. None means that `data.document_mask` decides."""
    bidirectional: ClassVar[bool] = False
    """Whether positions attend to later positions. Such a model cannot generate text from left to right."""
    needs_full_window: ClassVar[bool] = True
    """Whether the training text must have more than `context_length` tokens."""
    inspectable: ClassVar[bool] = True
    """Whether `tinylm inspect` supports the architecture."""

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
        """Number of context tokens before the first target in a training sequence."""
        return 0

    @property
    def pretrained(self) -> InitFrom | None:
        """The value of `init_from`, or None for architectures without this key."""
        return None

    @property
    def pretrained_embeddings(self) -> str | None:
        """The value of `init_embeddings`, or None for architectures without this key."""
        return None

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield each problem that involves several keys of this section, as (key, message)."""
        yield from ()

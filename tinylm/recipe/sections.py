"""Find the sections that each key of a recipe can contain, with their variants and short forms, in the pydantic models.

The loader and the generated reference use this module, so a new variant or short form requires no change in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, GetCoreSchemaHandler, Tag
from pydantic_core import CoreSchema, core_schema


class OpenUnion:
    """Annotates a key with the sections that it can contain, to which more can be added, including from outside the library.

    Unlike `Field(discriminator=...)`, it accepts a union of a single section. A class whose schema contains the union must be
    rebuilt after `add` and `remove`.
    """

    def __init__(self, discriminator: str, *sections: type[BaseModel]) -> None:
        """The first section is the default."""
        self.discriminator = discriminator
        self._sections = {_literal(section, discriminator): section for section in sections}

    def add(self, section: type[BaseModel]) -> None:
        """Add a section. The type of its discriminator must be a `Literal` with a single value, its tag."""
        self._sections[_literal(section, self.discriminator)] = section

    def remove(self, section: type[BaseModel]) -> None:
        """Remove a section that was added."""
        del self._sections[_literal(section, self.discriminator)]

    @property
    def sections(self) -> Mapping[str, type[BaseModel]]:
        """The sections by tag, in the order in which they were added."""
        return MappingProxyType(self._sections)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        choices = {tag: handler.generate_schema(section) for tag, section in self._sections.items()}
        return core_schema.tagged_union_schema(choices, discriminator=self.discriminator)


@dataclass(frozen=True)
class Variants:
    """The sections that one key can contain, by tag. If there is only one section and it has no discriminator, its tag is ""."""

    by_tag: Mapping[str, type[BaseModel]]
    discriminator: str | None = None
    """The key whose value is the tag. None if the tag depends on which keys are present."""

    @property
    def is_union(self) -> bool:
        """Whether pydantic adds the tag to the location of an error."""
        return len(self.by_tag) > 1 or self.discriminator is not None

    @property
    def default(self) -> type[BaseModel]:
        return next(iter(self.by_tag.values()))

    def first_with(self, key: str) -> type[BaseModel]:
        """The first variant that has `key`, or the default variant."""
        return next((section for section in self.by_tag.values() if key in section.model_fields), self.default)

    def with_key(self, key: str) -> list[str]:
        """The tags of the variants that have `key`."""
        return [tag for tag, section in self.by_tag.items() if key in section.model_fields]


def variants_of(section: type[BaseModel], key: str | int) -> Variants | None:
    """Return the sections that `key` of `section` can contain, or None for a plain value or an unknown key."""
    field = section.model_fields.get(str(key))
    if field is None:
        return None
    for item in field.metadata:
        if isinstance(item, OpenUnion):
            return Variants(dict(item.sections), item.discriminator)
    name = field.discriminator if isinstance(field.discriminator, str) else _discriminator_in(field.annotation)
    tagged = list(_sections_in(field.annotation))
    if not tagged:
        return None
    if len(tagged) == 1:
        return Variants({"": tagged[0][1]})
    return Variants({tag or _literal(kind, name): kind for tag, kind in tagged}, name)


def _discriminator_in(annotation: Any) -> str | None:
    """The discriminator of a union inside an annotation, such as that of an optional section."""
    for item in getattr(annotation, "__metadata__", ()):
        if isinstance(discriminator := getattr(item, "discriminator", None), str):
            return discriminator
    return next((name for part in get_args(annotation) if (name := _discriminator_in(part)) is not None), None)


def _sections_in(annotation: Any, tag: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section in an annotation, with the `Tag` next to it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield tag, annotation
        return
    parts = get_args(annotation)
    tag = next((part.tag for part in parts if isinstance(part, Tag)), tag)
    for part in parts:
        yield from _sections_in(part, tag)


def _literal(section: type[BaseModel], key: str | None) -> str:
    """The value of the discriminator `key` in `section`, whose type is a `Literal` with a single value."""
    annotation = section.model_fields[str(key)].annotation
    assert get_origin(annotation) is Literal
    return str(get_args(annotation)[0])


def all_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted paths of all keys and sections in a section, including those of all its variants."""
    for key in section.model_fields:
        yield f"{prefix}{key}"
        variants = variants_of(section, key)
        for inner in variants.by_tag.values() if variants is not None else ():
            yield from all_keys(inner, f"{prefix}{key}.")


def expand(section: type[BaseModel], key: str, value: Any) -> Any:
    """Expand a short form to a section, such as `optimizer: adamw` to `{name: adamw}`. Return other values unchanged."""
    if key not in section.model_fields:
        return value
    for item in reversed(section.model_fields[key].metadata):
        if isinstance(item, BeforeValidator):
            if isinstance(value, dict):
                break
            value = item.func(value)  # type: ignore[call-arg]
    return value

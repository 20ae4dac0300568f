"""Inspect the pydantic models of a recipe: the sections that each key accepts, their variants and their short forms.

The loader and the generated reference use this module, so neither needs a change when a variant or short form is added.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, GetCoreSchemaHandler, Tag
from pydantic_core import CoreSchema, core_schema


class OpenUnion:
    """Annotates a key that accepts one of several sections. Code outside the library can add further sections.

    Unlike `Field(discriminator=...)`, an `OpenUnion` can have a single section. After `add` or `remove`, every class whose schema
    contains the union must be rebuilt.
    """

    def __init__(self, discriminator: str, *sections: type[BaseModel]) -> None:
        """`discriminator` is the key whose value selects the section. The first of the `sections` is the default."""
        self.discriminator = discriminator
        self._sections = {_literal(section, discriminator): section for section in sections}

    def add(self, section: type[BaseModel]) -> None:
        """Add a section. The type of its discriminator must be a `Literal` with a single value, which becomes its tag."""
        self._sections[_literal(section, self.discriminator)] = section

    def remove(self, section: type[BaseModel]) -> None:
        """Remove a section from the union."""
        del self._sections[_literal(section, self.discriminator)]

    @property
    def sections(self) -> Mapping[str, type[BaseModel]]:
        """The sections by tag, in the order of addition."""
        return MappingProxyType(self._sections)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        choices = {tag: handler.generate_schema(section) for tag, section in self._sections.items()}
        return core_schema.tagged_union_schema(choices, discriminator=self.discriminator)


@dataclass(frozen=True)
class Variants:
    """The sections that one key accepts, by tag. The tag is "" if the key accepts a single section without a discriminator."""

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
        """Return the first variant that has `key`, or the default variant."""
        return next((section for section in self.by_tag.values() if key in section.model_fields), self.default)

    def with_key(self, key: str) -> list[str]:
        """Return the tags of the variants that have `key`."""
        return [tag for tag, section in self.by_tag.items() if key in section.model_fields]


def variants_of(section: type[BaseModel], key: str | int) -> Variants | None:
    """Return the sections that `key` of `section` accepts. Return None if the key is unknown or accepts only plain values."""
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
    """Return the discriminator of the first union inside an annotation, for example in an optional section, or None."""
    for item in getattr(annotation, "__metadata__", ()):
        if isinstance(discriminator := getattr(item, "discriminator", None), str):
            return discriminator
    return next((name for part in get_args(annotation) if (name := _discriminator_in(part)) is not None), None)


def _sections_in(annotation: Any, tag: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield the tag and the class of every section in an annotation. The tag is "" for a section without a `Tag`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield tag, annotation
        return
    parts = get_args(annotation)
    tag = next((part.tag for part in parts if isinstance(part, Tag)), tag)
    for part in parts:
        yield from _sections_in(part, tag)


def _literal(section: type[BaseModel], key: str | None) -> str:
    """Return the tag of `section`, which is the only value that the `Literal` type of its discriminator `key` allows."""
    annotation = section.model_fields[str(key)].annotation
    assert get_origin(annotation) is Literal
    return str(get_args(annotation)[0])


def all_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted paths of all keys in a section and its nested sections, including every variant."""
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

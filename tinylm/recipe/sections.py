"""Which sections each key of a recipe can hold, with their variants and short forms, read from the pydantic models.

For a section's class, returns the classes of the sections that its keys can hold. The loader and the generated reference use it, so
that a new variant or short form requires no change in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, Tag


@dataclass(frozen=True)
class Variants:
    """The sections that one key can hold, by tag. If there is only one, its tag is ""."""

    by_tag: Mapping[str, type[BaseModel]]
    discriminator: str | None = None
    """The key whose value is the tag. None if the tag depends on which keys are present."""

    @property
    def is_union(self) -> bool:
        """Whether pydantic adds the tag to the location of an error."""
        return len(self.by_tag) > 1

    @property
    def default(self) -> type[BaseModel]:
        return next(iter(self.by_tag.values()))

    def first_with(self, key: str) -> type[BaseModel]:
        """The first variant that has `key`, or the default one."""
        return next((section for section in self.by_tag.values() if key in section.model_fields), self.default)

    def with_key(self, key: str) -> list[str]:
        """The tags of the variants that have `key`."""
        return [tag for tag, section in self.by_tag.items() if key in section.model_fields]


def variants_of(section: type[BaseModel], key: str | int) -> Variants | None:
    """The sections that `key` of `section` can hold; None for a plain value or an unknown key."""
    field = section.model_fields.get(str(key))
    if field is None:
        return None
    name = field.discriminator if isinstance(field.discriminator, str) else None
    found = list(_sections_in(field.annotation))
    if not found:
        return None
    if len(found) == 1:
        return Variants({"": found[0][1]})
    return Variants({tag or _literal(kind, name): kind for tag, kind in found}, name)


def _sections_in(annotation: Any, tag: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section in an annotation, with the `Tag` written beside it."""
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


def expand(section: type[BaseModel], key: str, value: Any) -> Any:
    """Expand a short form to the section it stands for: `optimizer: adamw` to `{name: adamw}`. Other values are returned
    unchanged."""
    if key not in section.model_fields:
        return value
    for item in reversed(section.model_fields[key].metadata):
        if isinstance(item, BeforeValidator):
            if isinstance(value, dict):
                break
            value = item.func(value)  # type: ignore[call-arg]
    return value

"""Lists of all recipe sections and keys for the schema tests, built without `tinylm.recipe.sections`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """Return every section class in a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_in(part)]


def sections_in_field(field: FieldInfo) -> list[type[BaseModel]]:
    """Return every section class that a key can contain, including classes that were registered for an open union."""
    added = [section for item in field.metadata for section in getattr(item, "sections", {}).values()]
    return added or sections_in(field.annotation)


def sections_of(section: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """Yield `section` and every section nested in it."""
    yield section
    for field in section.model_fields.values():
        for inner in sections_in_field(field):
            yield from sections_of(inner)


def leaves(section: type[BaseModel]) -> Iterator[str]:
    """Yield every key with a plain value, in the form `SectionClass.key`."""
    for nested in sections_of(section):
        for key, field in nested.model_fields.items():
            if not sections_in_field(field):
                yield f"{nested.__name__}.{key}"

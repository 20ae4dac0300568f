"""Every key that a section of a recipe has, whichever of its forms it takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_in(part)]


def leaves(section: type[BaseModel]) -> Iterator[str]:
    for key, field in section.model_fields.items():
        inner = sections_in(field.annotation)
        for other in inner:
            yield from leaves(other)
        if not inner:
            yield f"{section.__name__}.{key}"

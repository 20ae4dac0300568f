"""Generate docs/reference/recipe.md, which documents every recipe key, from the schema in tinylm/recipe.

The page lists the sections and their variants. For each key, it shows the docstring, the default, and the allowed values in the
words of the error message.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import PydanticUndefined

from tinylm.recipe import EmbeddingRecipe, ModelVariant, Recipe
from tinylm.recipe.schema import Section, to_plain
from tinylm.recipe.sections import Variants, variants_of

INTRODUCTION = """\
# All recipe keys

`python docs/scripts/make_reference.py` generates this page from the schema. `--set SECTION.KEY=VALUE` sets a key on the
command line. A key that is not listed here is an error.
"""


def joined(path: str, key: str) -> str:
    """Return the dotted path of `key` in the section at `path`, which is "" for the top level."""
    return f"{path}.{key}" if path else key


def sections(section: type[BaseModel], path: str = "") -> Iterator[tuple[str, Variants]]:
    """Yield the dotted path and the variants of every section inside `section`."""
    for key in section.model_fields:
        variants = variants_of(section, key)
        if variants is not None:
            yield joined(path, key), variants
            for variant in variants.by_tag.values():
                yield from sections(variant, joined(path, key))


def about(section: type[BaseModel]) -> str:
    """Return the docstring of a section, without inherited docstrings."""
    return inspect.cleandoc(section.__dict__.get("__doc__") or "")


def meanings(section: type[BaseModel]) -> dict[str, str]:
    """Return the docstring below each key of a section, including inherited keys."""
    docstrings: dict[str, str] = {}
    for kind in reversed(section.__mro__):
        if not issubclass(kind, Section):
            continue
        (body,) = ast.parse(inspect.getsource(kind)).body
        assert isinstance(body, ast.ClassDef)
        for key, below in zip(body.body, body.body[1:], strict=False):
            if not isinstance(key, ast.AnnAssign) or not isinstance(below, ast.Expr):
                continue
            if isinstance(key.target, ast.Name) and isinstance(below.value, ast.Constant):
                docstrings[key.target.id] = str(below.value.value)
    return docstrings


def allowed(annotation: Any) -> str:
    """Return the values that a key accepts, in the words of its error message."""
    if get_origin(annotation) is Literal:
        return ", ".join(map(str, get_args(annotation)))
    try:
        TypeAdapter(annotation).validate_python(object())
    except ValidationError as error:
        expected = re.search(r"must be (.*), not <object", error.errors()[0]["msg"])
        return expected[1] if expected else "text" if annotation is str else ""
    raise AssertionError(annotation)


def default(section: type[BaseModel], key: str) -> str:
    """Return the default of a key in recipe notation. If the presets have different defaults, list all of them."""
    presets = section.presets if issubclass(section, ModelVariant) else {}
    if any(key in parts for parts in presets.values()):
        values = {preset: dumped(parts[key]) for preset, parts in presets.items()}
        distinct = set(values.values())
        return distinct.pop() if len(distinct) == 1 else ", ".join(f"{preset}: {value}" for preset, value in values.items())
    field = section.model_fields[key]
    return "required" if field.is_required() else "" if field.default is PydanticUndefined else dumped(field.default)


def dumped(value: Any) -> str:
    """Format a default in recipe notation. Use the short form of a section if it has one."""
    if isinstance(value, Section):
        short_form = next((str(getattr(value, key)) for key in ("name", "kind") if key in type(value).model_fields), "")
        return f"`{short_form}`" if short_form else ""
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{value}`" if isinstance(value, str) and value else f"`{json.dumps(to_plain(value))}`"


def table(path: str, section: type[BaseModel], anchors: dict[str, str], discriminator: str | None = None) -> list[str]:
    """Return a table with a row for each key of the section at `path`, except the `discriminator` of its variants.

    `anchors` maps the path of every section to its anchor.
    """
    meaning, rows = meanings(section), []
    for key, field in section.model_fields.items():
        annotation = field.rebuild_annotation()
        if key == discriminator:
            continue
        anchor = anchors.get(joined(path, key))
        values = f"[a section](#{anchor})" if anchor else allowed(annotation)
        variants = variants_of(section, key)
        text = meaning.get(key) or (about(variants.default) if variants is not None else "")
        rows.append(f"| `{key}` | {in_a_cell(text)} | {default(section, key)} | {values} |")
    return ["| key | meaning | default | allowed values |", "|---|---|---|---|", *rows, ""] if rows else []


def in_a_cell(text: str) -> str:
    """Return the first paragraph of `text` on one line, for a table cell."""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")


def chapter(recipe: type[BaseModel], prefix: str = "") -> list[str]:
    """Return the Markdown lines for a recipe's sections. `prefix` makes the anchors unique among recipe kinds."""
    all_sections = list(sections(recipe))
    anchors = {path: prefix + path.replace(".", "-") for path, _ in all_sections}
    lines = [about(recipe), "", *table("", recipe, anchors, discriminator="kind")]
    for path, variants in all_sections:
        lines += [f"### {path} {{#{anchors[path]}}}", ""]
        if variants.discriminator is not None:
            lines += [f"The key `{variants.discriminator}` selects one of: {', '.join(f'`{tag}`' for tag in variants.by_tag)}.", ""]
        for tag, section in variants.by_tag.items():
            rows = table(path, section, anchors, variants.discriminator)
            lines += [f"**{tag}**: {about(section)}" if tag else about(section), "", *rows]
    return lines


def page() -> str:
    """Return the Markdown of docs/reference/recipe.md."""
    lines = [
        INTRODUCTION,
        "## Language models",
        "",
        *chapter(Recipe),
        "## Embeddings (`kind: embeddings`)",
        "",
        *chapter(EmbeddingRecipe, "embeddings-"),
    ]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


if __name__ == "__main__":
    print(page(), end="")

"""Make the page docs/reference/recipe.md from the schema in tinylm/recipe: every key of a recipe.

The page shows the sections and their variants. For each key it has the docstring, the default, and the allowed values in the words
of the error message.
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

from tinylm.recipe import EmbeddingRecipe, Recipe
from tinylm.recipe.presets import PRESETS
from tinylm.recipe.schema import ModelSection, Section, to_plain
from tinylm.recipe.sections import Variants, variants_of

INTRODUCTION = """\
# All recipe keys

`python docs/scripts/make_reference.py` generates this page from the schema. `--set SECTION.KEY=VALUE` sets a key on the
command line. A key that is not listed here is an error.
"""


def joined(path: str, key: str) -> str:
    """The dotted path of `key` in the section at `path`, which is "" for the top of a recipe."""
    return f"{path}.{key}" if path else key


def sections(section: type[BaseModel], path: str = "") -> Iterator[tuple[str, Variants]]:
    """The dotted path of every section inside `section`, with its variants."""
    for key in section.model_fields:
        variants = variants_of(section, key)
        if variants is not None:
            yield joined(path, key), variants
            for variant in variants.by_tag.values():
                yield from sections(variant, joined(path, key))


def about(section: type[BaseModel]) -> str:
    """The docstring of a section, without those of its base classes."""
    return inspect.cleandoc(section.__dict__.get("__doc__") or "")


def meanings(section: type[BaseModel]) -> dict[str, str]:
    """The docstring under each key of a section, including the keys of its base classes."""
    found: dict[str, str] = {}
    for kind in reversed(section.__mro__):
        if not issubclass(kind, Section):
            continue
        (body,) = ast.parse(inspect.getsource(kind)).body
        assert isinstance(body, ast.ClassDef)
        for key, below in zip(body.body, body.body[1:], strict=False):
            if not isinstance(key, ast.AnnAssign) or not isinstance(below, ast.Expr):
                continue
            if isinstance(key.target, ast.Name) and isinstance(below.value, ast.Constant):
                found[key.target.id] = str(below.value.value)
    return found


def allowed(annotation: Any) -> str:
    """The values that a key accepts, in the words of its error message."""
    if get_origin(annotation) is Literal:
        return ", ".join(map(str, get_args(annotation)))
    try:
        TypeAdapter(annotation).validate_python(object())
    except ValidationError as error:
        expected = re.search(r"must be (.*), not <object", error.errors()[0]["msg"])
        return expected[1] if expected else "text" if annotation is str else ""
    raise AssertionError(annotation)


def default(section: type[BaseModel], key: str) -> str:
    """The default of a key in the notation of a recipe. If presets have different defaults, those of all presets."""
    if section is ModelSection and key in PRESETS["modern"]:
        values = {preset: dumped(parts[key]) for preset, parts in PRESETS.items()}
        same = len(set(values.values())) == 1
        return values["modern"] if same else ", ".join(f"{preset}: {value}" for preset, value in values.items())
    field = section.model_fields[key]
    return "required" if field.is_required() else "" if field.default is PydanticUndefined else dumped(field.default)


def dumped(value: Any) -> str:
    """A default in the notation of a recipe. A section is shown by its short form if it has one."""
    if isinstance(value, Section):
        short_form = next((str(getattr(value, key)) for key in ("name", "kind") if key in type(value).model_fields), "")
        return f"`{short_form}`" if short_form else ""
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{value}`" if isinstance(value, str) and value else f"`{json.dumps(to_plain(value))}`"


def table(path: str, section: type[BaseModel], anchors: dict[str, str]) -> list[str]:
    """A table with a row for each key of the section at `path`. `anchors`: the anchor of every section, by its path."""
    meaning, rows = meanings(section), []
    for key, field in section.model_fields.items():
        annotation = field.rebuild_annotation()
        if get_origin(annotation) is Literal and len(get_args(annotation)) == 1:
            continue  # the discriminator
        anchor = anchors.get(joined(path, key))
        values = f"[a section](#{anchor})" if anchor else allowed(annotation)
        variants = variants_of(section, key)
        text = meaning.get(key) or (about(variants.default) if variants is not None else "")
        rows.append(f"| `{key}` | {in_a_cell(text)} | {default(section, key)} | {values} |")
    return ["| key | meaning | default | allowed values |", "|---|---|---|---|", *rows, ""] if rows else []


def in_a_cell(text: str) -> str:
    """The first paragraph of `text` in one line, as the cell of a table."""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")


def chapter(recipe: type[BaseModel], prefix: str = "") -> list[str]:
    """The sections of a recipe. Their anchors begin with `prefix`, because two kinds of recipe have sections of the same name."""
    found = list(sections(recipe))
    anchors = {path: prefix + path.replace(".", "-") for path, _ in found}
    lines = [about(recipe), "", *table("", recipe, anchors)]
    for path, variants in found:
        lines += [f"### {path} {{#{anchors[path]}}}", ""]
        for tag, section in variants.by_tag.items():
            lines += [f"**{tag}**: {about(section)}" if tag else about(section), "", *table(path, section, anchors)]
    return lines


def page() -> str:
    """The Markdown of docs/reference/recipe.md."""
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

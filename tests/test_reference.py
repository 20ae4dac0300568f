"""docs/recipe.md lists every key of a recipe as the schema has it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from tinylm.recipe.schema import Recipe, flattened

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_reference", DOCS / "make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_schema_says(reference: ModuleType) -> None:
    assert (DOCS / "recipe.md").read_text(encoding="utf-8") == reference.page(), "run: python docs/make_reference.py"


def test_every_key_of_a_recipe_is_there_with_a_meaning(reference: ModuleType) -> None:
    rows = [line.split(" | ") for line in reference.page().splitlines() if line.startswith("| `")]
    sections = {"data", "tokenizer", "model", "training", "evaluation", "checkpoint", "sampling", "vocabulary", "method", "watch"}
    keys = [key.strip("|` ") for key, *_ in rows]
    assert [key for key, (*_, meaning) in zip(keys, rows, strict=True) if not meaning.strip(" |") and key not in sections] == []
    recipe = Recipe.model_validate({"data": {"train": "a.txt"}, "training": {"steps": 1}}).as_dict()
    assert {key.rsplit(".", 1)[-1] for key in flattened(recipe)} - {"kind", "name"} <= set(keys)

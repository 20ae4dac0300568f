"""The generated pages in docs/reference are up to date and document every recipe key."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tinylm.recipe.schema import Recipe, flattened

SCRIPTS = Path(__file__).resolve().parent.parent / "docs" / "scripts"


@pytest.fixture(scope="module")
def reference() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("make_reference")
    sys.path.remove(str(SCRIPTS))


@pytest.mark.parametrize("name", ["cli.md", "recipe.md"])
def test_the_page_is_up_to_date(reference: ModuleType, name: str) -> None:
    written = (reference.REFERENCE / name).read_text(encoding="utf-8")
    assert written == reference.PAGES[name](), "run: python docs/scripts/make_reference.py"


def test_every_key_is_documented(reference: ModuleType) -> None:
    page = reference.PAGES["recipe.md"]()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    meanings = [(key.strip("|` "), meaning) for key, meaning, *_ in rows]
    assert [key for key, meaning in meanings if not meaning.strip()] == []
    recipe = Recipe.model_validate({"data": {"train": "a.txt"}, "training": {"steps": 1}}).as_dict()
    discriminators = set(re.findall("The key `(.*?)` selects one of: ", page))
    assert {key.rsplit(".", 1)[-1] for key in flattened(recipe)} <= {key for key, _ in meanings} | discriminators

"""Generate the pages in docs/reference. Run it with `python docs/scripts/make_reference.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cli_reference
import recipe_reference

REFERENCE = Path(__file__).resolve().parent.parent / "reference"
PAGES: dict[str, Callable[[], str]] = {"cli.md": cli_reference.page, "recipe.md": recipe_reference.page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (REFERENCE / name).write_text(page(), encoding="utf-8")

"""The recipes that ship with tinylm."""

from __future__ import annotations

import os
import shlex
from importlib import resources
from pathlib import Path


def shipped_recipes() -> dict[str, Path]:
    """Return the files of all recipes that ship with tinylm, by name."""
    folder = Path(str(resources.files("tinylm_recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def hint_to_train(run: str) -> str | None:
    """Return a hint for a missing run if it has the name of a recipe that ships with tinylm."""
    folder, name = os.path.split(os.path.normpath(run))
    if name not in shipped_recipes():
        return None
    out = "" if folder == "runs" else f" --out {shlex.quote(run)}"
    return f"train it first with `tinylm train {name}{out}`"

"""Find the file for a RECIPE argument: a path, a run folder, or the name of a recipe that ships with tinylm."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from tinylm.errors import InputError, did_you_mean
from tinylm.recipe.shipped import shipped_recipes
from tinylm.text.files import COMPRESSIONS, TEXT_SUFFIXES


def _new_hint(source: str) -> str:
    return (
        f"`tinylm new {shlex.quote(source)} --out my.yaml` writes a recipe for this text, and `tinylm train my.yaml` trains a model"
    )


def find_recipe(recipe: str) -> Path:
    """Return the path of a recipe file. Raises `InputError` for an unknown recipe or a run folder in another checkpoint format."""
    path = Path(os.path.expanduser(recipe))
    if (path / "recipe.yaml").exists():
        from tinylm.run import check_run_format

        check_run_format(path)
        return path / "recipe.yaml"
    if path.exists() and not path.is_dir():
        if path.suffix.lower() in (*TEXT_SUFFIXES, *COMPRESSIONS):
            raise InputError("is a text, not a recipe", where=recipe, hint=_new_hint(recipe))
        return path
    known = shipped_recipes()
    if recipe.removesuffix(".yaml") in known:
        return known[recipe.removesuffix(".yaml")]
    if path.is_dir():
        raise InputError("not a run folder: it has no recipe.yaml", where=recipe, hint=_new_hint(recipe))
    if "*" in recipe or re.match(r"[a-z0-9]+:", recipe):
        raise InputError("is a text, not a recipe", where=recipe, hint=_new_hint(recipe))
    hint = did_you_mean(recipe, known) or "`tinylm recipes` lists the recipes that ship with tinylm"
    is_path = recipe.lower().endswith((".yaml", ".yml")) or os.sep in recipe
    raise InputError("no such file" if is_path else "no such recipe", where=recipe, hint=hint)

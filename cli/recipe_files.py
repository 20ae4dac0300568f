"""Which file a RECIPE argument means: a path, a run folder, or the name of a recipe that ships."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from tinylm.errors import InputError, did_you_mean


def shipped() -> dict[str, Path]:
    """Name -> file of every recipe in the package, in order."""
    folder = Path(str(resources.files("tinylm_recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find(recipe: str) -> Path:
    """The file of a recipe. Raises `InputError` when there is none, naming the nearest that ships."""
    path = Path(recipe).expanduser()
    if (path / "recipe.yaml").exists():
        return path / "recipe.yaml"
    if path.exists() and not path.is_dir():
        return path
    known = shipped()
    if recipe.removesuffix(".yaml") in known:
        return known[recipe.removesuffix(".yaml")]
    if path.is_dir():
        raise InputError("a folder without recipe.yaml, so not a run", where=recipe)
    hint = did_you_mean(recipe, known) or "`tinylm recipes` lists those that ship"
    raise InputError("no such recipe file, and none of that name ships", where=recipe, hint=hint)

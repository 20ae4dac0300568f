"""Find the file of a RECIPE argument: a path, a run folder, or the name of a recipe that ships with tinylm."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from tinylm.errors import InputError, did_you_mean


def shipped_recipes() -> dict[str, Path]:
    """Return the files of all recipes that ship with tinylm, by name."""
    folder = Path(str(resources.files("tinylm_recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(recipe: str) -> Path:
    """Return the file of a recipe. Raises `InputError` if it does not exist, or for a run folder in another checkpoint format."""
    path = Path(recipe).expanduser()
    if (path / "recipe.yaml").exists():
        from tinylm.run import check_run_format

        check_run_format(path)
        return path / "recipe.yaml"
    if path.exists() and not path.is_dir():
        return path
    known = shipped_recipes()
    if recipe.removesuffix(".yaml") in known:
        return known[recipe.removesuffix(".yaml")]
    if path.is_dir():
        raise InputError("not a run folder: it has no recipe.yaml", where=recipe)
    hint = did_you_mean(recipe, known) or "`tinylm recipes` lists the recipes that ship with tinylm"
    raise InputError("no such recipe", where=recipe, hint=hint)

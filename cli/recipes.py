"""`tinylm recipes`: list the recipes that ship with tinylm, or print one."""

from __future__ import annotations

import typer
import yaml
from rich.table import Table

from tinylm.errors import InputError, did_you_mean
from tinylm.recipe.shipped import shipped_recipes

from .console import JSON, print_columns, print_json, stdout_console, write_stdout

app = typer.Typer(add_completion=False)


@app.command()
def recipes(
    name: str | None = typer.Argument(None, help="Print this recipe. To edit a copy of it: tinylm recipes quickstart > my.yaml"),
    json: bool = JSON,
) -> None:
    """List the recipes that ship with tinylm, or print one."""
    known = shipped_recipes()
    if name is not None:
        if name not in known:
            raise InputError("no such recipe", where=name, hint=did_you_mean(name, known) or "`tinylm recipes` lists them")
        write_stdout(known[name].read_text(encoding="utf-8"), end="")
        return
    rows = [
        {"name": recipe, "about": _about(path.read_text(encoding="utf-8")), "path": str(path)} for recipe, path in known.items()
    ]
    if json:
        print_json(rows)
        return
    console = stdout_console()
    if not console.is_terminal:
        print_columns((row["name"], row["about"]) for row in rows)
        return
    table = Table("name", "description", box=None, pad_edge=False)
    for row in rows:
        table.add_row(row["name"], row["about"])
    console.print(table)


def _about(text: str) -> str:
    """Return the comment at the top of a recipe as one line, without the commands at the end of the comment."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#") or line.startswith("# tinylm "):
            break
        lines.append(line.lstrip("# ").strip())
    return " ".join(lines) or str(yaml.safe_load(text).get("name", ""))

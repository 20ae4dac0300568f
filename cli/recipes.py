"""`tinylm recipes`: list what ships, or print one to start from."""

from __future__ import annotations

import typer
import yaml
from rich.table import Table

from tinylm.errors import InputError, did_you_mean

from .console import JSON, out, print_json, stdout
from .recipe_files import shipped

app = typer.Typer(add_completion=False)


@app.command()
def recipes(
    name: str | None = typer.Argument(None, help="Print this recipe's YAML, to edit a copy: tinylm recipes quickstart > my.yaml"),
    json: bool = JSON,
) -> None:
    """List the recipes that ship, or print one."""
    known = shipped()
    if name is not None:
        if name not in known:
            raise InputError("no recipe of that name ships", where=name, hint=did_you_mean(name, known))
        out(known[name].read_text(encoding="utf-8"), end="")
        return
    rows = [
        {"name": recipe, "about": _about(path.read_text(encoding="utf-8")), "path": str(path)} for recipe, path in known.items()
    ]
    if json:
        print_json(rows)
        return
    table = Table("name", "what it is", box=None, pad_edge=False)
    for row in rows:
        table.add_row(row["name"], row["about"])
    stdout().print(table)


def _about(text: str) -> str:
    """The comment at the top of a recipe, as one line."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").strip())
    return " ".join(lines) or str(yaml.safe_load(text).get("name", ""))

"""`tinylm new`: write a commented recipe for a text, a machine and a time limit."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import typer

from .console import (
    ERRORS,
    FIELD,
    JSON,
    QUIET,
    ConsoleReporter,
    checked_errors,
    format_duration,
    print_json,
    stderr_console,
    write_stdout,
)
from .plan import HARDWARE, check_hardware, list_hardware

app = typer.Typer(add_completion=False)


@app.command()
def new(
    source: list[str] = typer.Argument(..., help="The text: files, folders, globs, URLs or builtin:NAME."),
    out_: str | None = typer.Option(None, "--out", "-o", help="The file to write. Default: stdout."),
    minutes: float = typer.Option(10, "--minutes", help="Length of the training in minutes."),
    hardware: str | None = HARDWARE,
    devices: int | None = typer.Option(None, "--devices", min=1, help="Number of accelerators."),
    name: str | None = typer.Option(None, "--name", help="Name of the recipe. Default: the name of --out or of the text."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing file."),
    field: str = FIELD,
    errors: str = ERRORS,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Write a recipe for a text, a machine and a time limit, with a reason for each choice."""
    from tinylm.errors import InputError
    from tinylm.paths import atomic_write_text
    from tinylm.recipe.schema import DataSection
    from tinylm.suggest import Budget, suggest_recipe

    if hardware == "list":
        list_hardware(json)
        return
    if minutes <= 0 or minutes == float("inf"):
        raise InputError(f"must be above 0, not {minutes:g}", where="--minutes")
    check_hardware(hardware, devices)
    path = None if out_ is None else Path(out_).expanduser()
    if path is not None and path.exists() and not overwrite:
        raise InputError("already exists", where=str(path), hint="--overwrite replaces it")
    console = stderr_console()
    data = DataSection(train=tuple(source), field=field, errors=checked_errors(errors))  # type: ignore[arg-type]
    run_name = name or _run_name(path.stem if path is not None else Path(source[0]).stem)
    budget = Budget(minutes, hardware, devices or 1)
    suggestion = suggest_recipe(data, budget, name=run_name, reporter=ConsoleReporter(console, quiet=quiet))
    if path is not None:
        atomic_write_text(path, suggestion.yaml)
    if json:
        print_json({"path": None if path is None else str(path), "recipe": suggestion.recipe.as_dict(), "plan": suggestion.plan})
    elif path is None:
        write_stdout(suggestion.yaml, end="")
    else:
        write_stdout(str(path))
    if path is not None and not quiet:
        plan = suggestion.plan
        about = f"{plan.steps:,} steps of {plan.tokens_per_step:,} tokens, about {format_duration(60 * minutes)}"
        console.print_line(f"next: tinylm train {shlex.quote(str(path))}   ({about})", "dim")


def _run_name(text: str) -> str:
    """Convert `text` to the name of a run folder. Characters other than letters, digits, `_`, `.` and `-` become dashes."""
    return re.sub(r"[^\w.-]+", "-", text.replace("builtin:", "")).strip("-.") or "mine"

"""`tinylm new`: write a commented recipe for a text, a machine and a time limit."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import typer

from .console import (
    ERRORS,
    FIELD,
    JSON,
    QUIET,
    TEMPLATE,
    ConsoleReporter,
    checked_errors,
    format_duration,
    print_json,
    stderr_console,
    write_stdout,
)
from .plan import HARDWARE, check_hardware, duration_text, list_hardware, steps_text

app = typer.Typer(add_completion=False)


@app.command()
def new(
    source: list[str] = typer.Argument(..., help="The text: files, folders, globs, URLs or builtin:NAME."),
    out_: str | None = typer.Option(None, "--out", "-o", help="The file to write. Default: stdout."),
    minutes_: str = typer.Option("10", "--minutes", metavar="TIME", help="Training time in minutes, or as 90s, 5m or 2h."),
    hardware: str | None = HARDWARE,
    devices: int | None = typer.Option(None, "--devices", min=1, help="Number of accelerators."),
    name: str | None = typer.Option(None, "--name", help="Name of the recipe. Default: the name of --out or of the text."),
    for_: str | None = typer.Option(None, "--for", metavar="gguf", help="Use only parts that this export supports."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing file."),
    field: str = FIELD,
    template: str | None = TEMPLATE,
    errors: str = ERRORS,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Write a recipe for a text, a machine and a time limit, with a reason for each choice."""
    from tinylm.errors import InputError
    from tinylm.hints import duration_minutes
    from tinylm.paths import atomic_write_text
    from tinylm.recipe.schema import DataSection
    from tinylm.suggest import Budget, suggest_recipe

    if hardware == "list":
        list_hardware(json)
        return
    minutes = duration_minutes(minutes_)
    if minutes is None or minutes <= 0:
        raise InputError(f"must be above 0, not {minutes_}", where="--minutes", hint="a number of minutes, or 90s, 5m or 2h")
    if for_ not in (None, "gguf"):
        raise InputError(f"must be gguf, not {for_!r}", where="--for", hint="other exports support every model")
    check_hardware(hardware, devices)
    path = None if out_ is None else Path(os.path.expanduser(out_))
    if path is not None and path.exists() and not overwrite:
        raise InputError("already exists", where=str(path), hint="--overwrite replaces it")
    console = stderr_console()
    data = DataSection(train=tuple(source), field=field, template=template, errors=checked_errors(errors))  # type: ignore[arg-type]
    run_name = name or _run_name(path.stem if path is not None else Path(source[0]).stem)
    budget = Budget(minutes, hardware, devices or 1)
    reporter = ConsoleReporter(console, quiet=quiet)
    suggestion = suggest_recipe(data, budget, name=run_name, for_gguf=for_ == "gguf", reporter=reporter)
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
        by_clock = suggestion.recipe.training.minutes is not None
        duration = format_duration(60 * minutes) if by_clock else duration_text(plan.seconds_range)
        cost = f"{steps_text(plan)} of {plan.tokens_per_step:,} tokens, about {duration}"
        console.print_line(f"next: tinylm train {shlex.quote(str(path))}   ({cost})", "dim")


def _run_name(text: str) -> str:
    """Convert `text` to the name of a run folder. Characters other than letters, digits, `_`, `.` and `-` become dashes."""
    return re.sub(r"[^\w.-]+", "-", text.replace("builtin:", "")).strip("-.") or "mine"
